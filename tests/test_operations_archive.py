"""Key changes and verification: the archive can be opened at every moment, and says what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import support
from operator_support import MIME, archive, audited, mailfleet, tamper
from support import email_row, rows, send_email, store, table

import operations
import runtime
from actors.ingest import Delivery, ingest
from models import backups, counting, payload_keys, rewrapping
from operations import Fault, health, rotation
from payloads import Payloads
from vault import HEADER_BYTES, Keyring, Vault

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

ROOT = Path(__file__).resolve().parent.parent
WHO = "cli:ann"
WRAPPED = ("payload_keys", "stored_attachments", "email_backups")
OLD, NEW = bytes(range(32)), bytes(range(32, 64))
Ring = Callable[..., None]


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Ring:
    """Give the process other keys, newest first, as a restart does."""

    def change(**keys: bytes) -> None:
        keyring = Keyring(keys)
        monkeypatch.setattr(runtime, "vault", Vault(keyring))
        kept = Payloads(keyring, keep=lambda key: payload_keys.keep(*key), find=runtime._find_data_key)
        monkeypatch.setattr(runtime, "payloads", kept)

    change(old=OLD)
    return change


def mime_of(id: str) -> bytes:
    return b"".join(operations.export_backup(id, who=WHO)[1])


def key_ids() -> set[str]:
    return {row["key_id"] for name in ("email_backups", "payload_keys") for row in table(name)}


def arrive_under_its_own_key(ring: Ring, publisher_message_id: str) -> str:
    """Have another process ingest one email: each draws data keys of its own."""
    ring(old=OLD)
    return arrive(publisher_message_id)


def attach(content: bytes) -> str:
    """Store an attachment and return its id."""
    return operations.attach([content], name="a.txt", content_type="text/plain", who=WHO).id


def content_of(id: str) -> bytes:
    with runtime.source.open(id, declared_size=1) as stream:
        return b"".join(stream.chunks(10))


def arrive(publisher_message_id: str) -> str:
    """Have the bridge ingest one email, and return its id."""
    ingest([Delivery(orjson.dumps(send_email(publisher_message_id=publisher_message_id)))])
    return str([row["id"] for row in table("incoming_emails")][-1])


# Key changes


def test_after_a_key_change_everything_opens_with_the_new_key_alone(ring: Ring) -> None:
    # Given
    ids = [archive(f"order-{n}") for n in range(3)]
    waiting = arrive("waits")
    ring(new=NEW, old=OLD)
    # When
    done = operations.rotate_keys(who=WHO)
    # Then
    assert (done.newest_key_id, done.backups, done.payload_keys, done.stuck) == ("new", 3, 1, [])
    assert (key_ids(), operations.older_keys()) == ({"new"}, {})
    ring(new=NEW)
    assert [mime_of(id) for id in ids] == [MIME] * 3
    assert runtime.payloads.open(waiting, email_row(waiting)["payload"])["publisher_message_id"] == "waits"
    assert operations.verify(who=WHO).discrepancies == []


def test_nothing_is_unreadable_at_any_moment_of_a_key_change_and_one_that_was_stopped_goes_on(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given five of each, every payload under a data key of its own
    archived = [archive(f"order-{n}") for n in range(5)]
    waiting = [arrive_under_its_own_key(ring, f"waits-{n}") for n in range(5)]
    attached = [attach(f"{n}".encode()) for n in range(5)]
    monkeypatch.setattr(rotation, "BATCH", 2)
    ring(new=NEW, old=OLD)

    class Stopped(Exception):
        pass

    seen: list[dict[str, int]] = []

    def look(rows_seen: int) -> None:
        assert rows_seen <= 2
        ring(new=NEW, old=OLD)  # so that no data key is remembered
        assert [mime_of(id) for id in archived] == [MIME] * 5
        assert [runtime.payloads.open(id, email_row(id)["payload"])["publisher_message_id"] for id in waiting] == [
            f"waits-{n}" for n in range(5)
        ]
        assert [content_of(id) for id in attached] == [f"{n}".encode() for n in range(5)]
        seen.append({name: sum(row["key_id"] == "new" for row in table(name)) for name in WRAPPED})
        if len(seen) in {2, 5, 8}:
            raise Stopped

    # When it is stopped in the middle of each kind, and started again
    for _ in range(3):
        with pytest.raises(Stopped):
            operations.rotate_keys(who=WHO, on_batch=look)
    done = operations.rotate_keys(who=WHO, on_batch=look)
    # Then each was looked at while a part of it was under the new key
    for name in WRAPPED:
        assert {2, 4} < {counts[name] for counts in seen}, seen
    assert (done.stuck, operations.older_keys()) == ([], {})


def test_a_key_change_exchanges_the_headers_alone(ring: Ring) -> None:
    # Given
    archive()
    ((before,),) = rows("SELECT compressed_blob FROM email_backups")
    # When
    ring(new=NEW, old=OLD)
    operations.rotate_keys(who=WHO)
    # Then
    ((after,),) = rows("SELECT compressed_blob FROM email_backups")
    assert after[HEADER_BYTES:] == before[HEADER_BYTES:]
    assert after[:HEADER_BYTES] != before[:HEADER_BYTES]


def test_a_batch_of_a_key_change_is_bounded_by_bytes_and_the_largest_backup_goes(ring: Ring) -> None:
    for number in range(3):
        archive(f"order-{number}")
    rows("UPDATE email_backups SET compressed_size = %(size)s", {"size": rewrapping.BATCH_BYTES})
    ring(new=NEW, old=OLD)
    seen: list[int] = []
    operations.rotate_keys(who=WHO, on_batch=seen.append)
    assert (seen, key_ids()) == ([1, 1, 1], {"new"})


def test_what_cannot_be_rewrapped_is_named_and_holds_up_nothing(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given one damaged header, and one key that is lost
    monkeypatch.setattr(rotation, "BATCH", 1)
    damaged, lost, fine = archive("damaged"), archive("lost"), archive("fine")
    rows(
        "UPDATE email_backups SET compressed_blob = overlay(compressed_blob PLACING '\\x00' FROM 50)"
        " WHERE incoming_email_id = %(id)s",
        {"id": damaged},
    )
    rows("UPDATE email_backups SET key_id = 'gone' WHERE incoming_email_id = %(id)s", {"id": lost})
    ring(new=NEW, old=OLD)
    # When
    done = operations.rotate_keys(who=WHO)
    # Then
    assert {(stuck.table, stuck.key_id) for stuck in done.stuck} == {
        ("email_backups", "old"),
        ("email_backups", "gone"),
    }
    assert (done.backups, operations.older_keys(), mime_of(fine)) == (1, {"old": 1, "gone": 1}, MIME)


def test_a_key_change_is_audited_with_what_was_and_what_is_left(ring: Ring) -> None:
    archive()
    ring(new=NEW, old=OLD)
    operations.rotate_keys(who=WHO)
    assert audited() == [(WHO, "backups.rotate-keys", "new"), (WHO, "backups.rotated", "new")]
    (begun, ended) = [detail for (detail,) in rows("SELECT detail FROM audit_log ORDER BY id")]
    assert begun == {"older": {"old": 1}}
    assert ended == {"backups": 1, "payload_keys": 0, "attachments": 0, "stuck": 0, "left": {}}


@pytest.mark.parametrize(
    "store", [rewrapping.BACKUPS, rewrapping.ATTACHMENTS, rewrapping.PAYLOAD_KEYS], ids=lambda store: store.table
)
def test_a_batch_of_a_key_change_is_read_from_an_index_in_its_order(store: rewrapping.Store) -> None:
    wanted = {"key_id": "old", "after": "00000000-0000-0000-0000-000000000000", "batch": 200}
    plan = "\n".join(line for (line,) in rows("EXPLAIN " + store._statements.take, wanted))
    assert ("Sort" in plan, f"{store.table}_wrapping_key" in plan) == (False, True)


def test_no_statement_sorts_all_rows_by_the_text_of_their_ids() -> None:
    for path in (ROOT / "models").glob("*.py"):
        for statement in re.findall(r"SELECT id::text[^()]*?ORDER BY \w+", path.read_text()):
            assert not statement.endswith(" id"), (path.name, statement)


@pytest.mark.parametrize("there", [0, 3, 4, 5])
def test_however_many_there_are_they_are_counted_a_page_at_a_time(
    ring: Ring, monkeypatch: pytest.MonkeyPatch, there: int
) -> None:
    monkeypatch.setattr(counting, "PAGE", 2)
    for number in range(there):
        archive(f"order-{number}")
    ring(new=NEW, old=OLD)
    assert (operations.count_to_verify(), operations.older_keys().get("old", 0)) == (there, there)


def test_the_doctor_counts_no_further_than_is_worth_knowing(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MOST_COUNTED", 2)
    for number in range(5):
        archive(f"order-{number}")
    ring(new=NEW, old=OLD)
    assert operations.older_keys(at_most=2) == {"old": 2}
    (finding,) = [found for found in operations.doctor() if found.subject == "Archive"]
    assert (finding.fine, "; at least 2 under older keys" in finding.detail) == (True, True)


# Verification


def faults() -> dict[str, tuple[str, str]]:
    """What is found wrong, by the publisher's id."""
    found = operations.verify(who=WHO).discrepancies
    return {each.publisher_message_id: (each.fault.value, each.detail) for each in found}


def test_an_archive_that_is_well_has_nothing_to_tell() -> None:
    archive("order-1"), archive("order-2"), store(publisher_message_id="waits")
    found = operations.verify(who=WHO)
    assert (found.backups, found.emails, found.discrepancies) == (2, 2, [])
    assert audited() == [(WHO, "backups.verify", "archive")]


def test_a_flipped_byte_is_found_wherever_it_is() -> None:
    # Given
    archive("fine")
    sizes = {}
    for name in ("magic", "salt", "segment"):
        id = archive(name)
        ((sizes[name],),) = rows(
            "SELECT length(compressed_blob) FROM email_backups WHERE incoming_email_id = %(id)s", {"id": id}
        )
        flip(id, {"magic": 1, "salt": 30, "segment": sizes[name] // 2}[name])
    tamper(archive("tag"))
    # Then
    found = faults()
    assert found.keys() == {"magic", "salt", "segment", "tag"}
    assert {fault for fault, _ in found.values()} == {Fault.DAMAGED.value}


def flip(id: str, position: int) -> None:
    rows(
        """
        UPDATE email_backups
        SET compressed_blob = set_byte(compressed_blob, %(at)s, get_byte(compressed_blob, %(at)s) # 1)
        WHERE incoming_email_id = %(id)s
        """,
        {"id": id, "at": position},
    )


def test_swapped_rows_are_named_with_whose_they_are() -> None:
    # Given
    first, second = archive("first"), archive("second")
    archive("fine")
    rows(
        """
        UPDATE email_backups b SET compressed_blob = o.compressed_blob, checksum = o.checksum, size = o.size
        FROM email_backups o
        WHERE (b.incoming_email_id, o.incoming_email_id) IN ((%(first)s, %(second)s), (%(second)s, %(first)s))
        """,
        {"first": first, "second": second},
    )
    # Then
    assert faults() == {
        "first": ("swapped", f"it holds the backup of the email {second}"),
        "second": ("swapped", f"it holds the backup of the email {first}"),
    }


def test_a_recorded_size_or_checksum_that_is_another_is_found() -> None:
    names = ("size", "checksum", "compressed", "compression")
    for name in (*names, "fine"):
        archive(name)
    rows("UPDATE email_backups SET size = size + 1 WHERE graph_message_id = 'graph-size'")
    rows("UPDATE email_backups SET checksum = repeat('0', 64) WHERE graph_message_id = 'graph-checksum'")
    rows("UPDATE email_backups SET compressed_size = compressed_size + 1 WHERE graph_message_id = 'graph-compressed'")
    rows("UPDATE email_backups SET compression = 'none' WHERE graph_message_id = 'graph-compression'")
    found = faults()
    assert {name: fault for name, (fault, _) in found.items()} == dict.fromkeys(names, "damaged")
    assert found["compression"][1] == "it has gzip for its compression, and none is recorded"


def test_a_backup_under_a_key_that_is_not_there_is_named(ring: Ring) -> None:
    archive()
    ring(new=NEW)
    assert {name: fault for name, (fault, _) in faults().items()} == {"order-1": "unknown key"}


def test_a_sent_and_archived_mail_without_its_backup_is_missing() -> None:
    # Given one of each: archived and lost, not archived yet, given up
    lost = archive("lost")
    archive("fine")
    rows("DELETE FROM email_backups WHERE incoming_email_id = %(id)s", {"id": lost})
    support.claim(store(publisher_message_id="due")).record_sent(
        backup_delay=support.NOW, publish_within=support.WITHIN
    )
    support.claim(store(publisher_message_id="given up")).record_sent(
        backup_delay=support.NOW, publish_within=support.WITHIN
    )
    rows(
        """
        UPDATE sent_emails SET backup_due_at = NULL, backup_error = 'not found'
        WHERE incoming_email_id = (SELECT id FROM incoming_emails WHERE publisher_message_id = 'given up')
        """
    )
    # Then
    assert faults() == {"lost": ("missing", "it was archived, and there is no backup of it")}


def test_backups_are_looked_through_in_batches_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operations.verification._BATCH", 2)
    ids = [archive(f"order-{n}") for n in range(5)]
    rows("DELETE FROM email_backups WHERE incoming_email_id = %(id)s", {"id": ids[4]})
    seen: list[None] = []
    found = operations.verify(who=WHO, on_each=lambda: seen.append(None))
    assert (found.backups, found.emails, len(seen)) == (4, 5, 4)
    assert [each.incoming_email_id for each in found.discrepancies] == [ids[4]]


def test_a_backup_that_is_deleted_while_it_is_verified_is_no_discrepancy(monkeypatch: pytest.MonkeyPatch) -> None:
    archive("first"), archive("second")

    def purge() -> None:
        rows("UPDATE email_backups SET expires_at = now()")
        operations.purge_backups(who=WHO)

    assert operations.verify(who=WHO, on_each=purge).discrepancies == []
    assert backups.count() == 0


# As commands


def answer(*arguments: str, status: int = 0) -> dict[str, object]:
    ended = mailfleet(*arguments, "--json")
    assert ended.status == status, ended
    told: dict[str, object] = orjson.loads(ended.output)
    return told


def test_verify_exits_with_1_and_a_table_if_something_is_wrong() -> None:
    archive("order-1")
    assert mailfleet("backups", "verify").output == "1 backups opened, 1 mails looked up: 0 wrong\n"
    tamper(archive("order-2"))
    ended = mailfleet("backups", "verify")
    assert (ended.status, "damaged" in ended.output, "order-2" in ended.output) == (1, True, True)
    told = answer("backups", "verify", status=1)
    assert (told["backups"], told["emails"], len(told["discrepancies"])) == (2, 2, 1)  # type: ignore[arg-type]


def test_rotate_keys_says_what_is_under_the_newest_key_and_what_keeps_an_older_one(ring: Ring) -> None:
    archive("order-1")
    ring(new=NEW, old=OLD)
    assert mailfleet("backups", "rotate-keys").output == "1 backups, 0 attachments, 0 payload keys are now under new\n"
    rows("UPDATE email_backups SET key_id = 'gone'")
    ended = mailfleet("backups", "rotate-keys")
    assert (ended.status, "stays under gone" in ended.output, "1 are under gone: keep" in ended.output) == (
        1,
        True,
        True,
    )
    assert answer("backups", "rotate-keys", status=1)["left"] == {"gone": 1}


def test_purge_deletes_what_has_expired_and_only_counts_it_on_a_dry_run() -> None:
    archive("order-1"), archive("order-2")
    rows("UPDATE email_backups SET expires_at = now() WHERE graph_message_id = 'graph-order-1'")
    assert mailfleet("backups", "purge", "--dry-run").output == "1 backups would be deleted\n"
    assert backups.count() == 2
    assert answer("backups", "purge") == {"backups": 1, "dry_run": False}
    assert (backups.count(), [action for _, action, _ in audited()]) == (1, ["purge"])


def test_hold_and_release_by_either_id() -> None:
    id = archive("order-1")
    told = answer("hold", "order-1", "--why", "a suit")
    assert (told["incoming_email_id"], told["reason"], told["outcome"]) == (id, "a suit", "held")
    assert mailfleet("hold", id).output == f"{id}  held before\n"
    assert "a suit" in mailfleet("holds").output
    assert "on hold since" in mailfleet("status", id).output
    assert mailfleet("release", id).output == f"{id}  released\n"
    assert answer("release", id) == {"id": id, "outcome": "not on hold"}
    assert mailfleet("hold", "nobody's").status == 1
    assert mailfleet("hold", id, "--why", "x" * 1001).status == 2


def test_doctor_says_what_is_under_older_keys_and_whose_key_is_missing(ring: Ring) -> None:
    archive()
    ring(new=NEW, old=OLD)
    (finding,) = [found for found in operations.doctor() if found.subject == "Archive"]
    assert (finding.fine, finding.detail) == (
        True,
        "seals under new; 1 under older keys, see mailfleet backups rotate-keys",
    )
    ring(new=NEW)
    (finding,) = [found for found in operations.doctor() if found.subject == "Archive"]
    assert (finding.fine, "sealed under old" in finding.detail) == (False, True)
