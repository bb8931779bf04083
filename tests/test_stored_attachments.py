"""Attachments that are stored first and sent later: whole, sealed, by whoever names their id, and gone in time."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import threading
import tracemalloc
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import support
from operator_support import audited, mailfleet
from prometheus_client import REGISTRY
from support import Fleet, email_row, lapse, rows, store, table, wait_until

import actors
import models
import operations
import runtime
from actors import drafts
from actors.composition import graph_message
from attachments import Damaged, NotStored, Store, StoreUnavailable, TooLarge
from graph_client import UPLOAD_RANGE_BYTES
from models import holds, stored_attachments, uploads
from models.ids import new_id
from operations import Attached, NotAttachable
from vault import SEGMENT_BYTES, Keyring, Vault

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure = support.configure

pytestmark = pytest.mark.usefixtures("tables")
SMALL = b"a small report"
LARGE = hashlib.shake_256(b"a large report").digest(UPLOAD_RANGE_BYTES + SEGMENT_BYTES)


def attach(content: bytes = SMALL, **changes: Any) -> Attached:
    given = {"name": "report.pdf", "content_type": "application/pdf", "who": "ann"} | changes
    return operations.attach([content[:10], content[10:]], **given)


def named(stored: Attached, **changes: Any) -> dict[str, Any]:
    """The attachment as a ``SendEmail`` names it."""
    return {"name": stored.name, "size": stored.size, "contentType": "application/pdf", "urlOrId": stored.id} | changes


def read(id: str, size: int, offset: int = 0) -> bytes:
    with runtime.source.open(id, declared_size=size, offset=offset) as stream:
        return b"".join(stream.chunks(300_000))


def file(id: str) -> Path:
    return Path(urlsplit(runtime.configuration.attachment_store_url).path) / id


def delivered(fleet: Fleet, id: str) -> dict[str, str]:
    (delivery,) = fleet.graph.deliveries(tag=id)
    return {each["name"]: each["sha256"] for each in delivery["attachments"]}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Sent


def test_a_stored_attachment_reaches_the_recipient_byte_for_byte(fleet: Fleet) -> None:
    # Given
    small, large = attach(SMALL, name="small"), attach(LARGE, name="large")
    id = store(attachments=[named(small), named(large)])
    # When
    assert fleet.send() == ["done"]
    # Then
    assert delivered(fleet, id) == {"small": sha256(SMALL), "large": sha256(LARGE)}
    assert (large.size, large.sha256) == (len(LARGE), sha256(LARGE))


def test_a_killed_upload_of_a_stored_attachment_goes_on_where_it_was(fleet: Fleet) -> None:
    # Given
    given = named(attach(LARGE, name="large"))
    id = store(attachments=[given])
    email = support.claim(id, intent=False)
    draft_id = runtime.graph.create_draft(email.mailbox, graph_message(id, email.payload)).id
    email.record_draft(draft_id)
    (upload,) = uploads.plan(email, [given])
    session = drafts._session(email, draft_id, upload, given)
    upload.uploaded_bytes = runtime.graph.upload_range(session, 0, LARGE[:UPLOAD_RANGE_BYTES], len(LARGE)) or 0
    upload.source_version = sha256(LARGE)
    uploads.record_progress(email, upload, lease=support.LEASE)
    lapse(id)
    # When
    fleet.settle(id)
    # Then
    assert delivered(fleet, id) == {"large": sha256(LARGE)}
    ranges = [request for request in fleet.graph.requests() if request["operation"] == "upload_range"]
    assert len(ranges) == 2


def test_files_within_the_mail_reach_the_recipient(fleet: Fleet) -> None:
    given = {"name": "note.txt", "size": 5, "contentBytes": base64.b64encode(b"hello").decode()}
    empty = {"name": "empty.txt", "size": 0, "contentBytes": ""}
    id = store(attachments=[given, empty])
    assert fleet.send() == ["done"]
    assert delivered(fleet, id) == {"note.txt": sha256(b"hello"), "empty.txt": sha256(b"")}


@pytest.mark.parametrize("id", ["never-stored", new_id()])
def test_an_id_that_is_not_stored_fails_the_mail_with_a_sentence(fleet: Fleet, id: str) -> None:
    email = store(attachments=[{"name": "a", "size": 5, "urlOrId": id}])
    assert fleet.send() == ["dead-lettered"]
    (letter,) = table("dlq")
    assert letter["reason"] == "not_stored"
    assert "no attachment is stored under the id" in letter["last_error"]
    assert (email_row(email)["status"], fleet.mails(email)) == ("failed", 0)


def test_an_attachment_of_another_size_than_declared_fails_the_mail(fleet: Fleet) -> None:
    store(attachments=[named(attach(), size=3)])
    assert fleet.send() == ["dead-lettered"]
    assert table("dlq")[0]["reason"] == "size_mismatch"


# Stored


def test_what_is_stored_is_sealed_and_its_row_says_what_it_is() -> None:
    stored = attach(LARGE)
    (row,) = table("stored_attachments")
    assert (row["name"], row["content_type"], row["size"], row["sha256"], row["created_by"]) == (
        "report.pdf",
        "application/pdf",
        len(LARGE),
        sha256(LARGE),
        "ann",
    )
    sealed = file(stored.id).read_bytes()
    assert len(sealed) == len(LARGE) + 16 * -(-len(LARGE) // SEGMENT_BYTES)
    assert LARGE[:64] not in sealed
    assert audited() == [("ann", "attachments.store", stored.id)]


def test_a_stored_attachment_is_read_from_any_offset() -> None:
    stored = attach(LARGE)
    for offset in (0, 1, SEGMENT_BYTES, len(LARGE) - 1):
        assert read(stored.id, len(LARGE), offset) == LARGE[offset:]


def test_neither_storing_nor_reading_holds_more_than_a_few_segments() -> None:
    piece, count = LARGE[:1_000_000], 24
    tracemalloc.start()
    try:
        stored = operations.attach((piece for _ in range(count)), name="a", content_type="a/b", who="ann")
        with runtime.source.open(stored.id, declared_size=stored.size) as stream:
            while stream.receive(65_536):
                pass
        assert tracemalloc.get_traced_memory()[1] < 8 * SEGMENT_BYTES
    finally:
        tracemalloc.stop()


def test_what_is_altered_in_the_store_is_never_handed_out_whole() -> None:
    stored = attach(LARGE)
    content = bytearray(file(stored.id).read_bytes())
    content[-1] ^= 1
    file(stored.id).write_bytes(content)
    with pytest.raises(Damaged):
        read(stored.id, len(LARGE))


def test_a_checksum_that_is_not_that_of_the_row_is_found_before_the_last_bytes() -> None:
    stored = attach()
    rows("UPDATE stored_attachments SET sha256 = 'other'")
    with runtime.source.open(stored.id) as stream, pytest.raises(Damaged, match="checksum"):
        stream.receive(1)


def test_a_file_of_another_attachment_does_not_pass_for_one() -> None:
    one, other = attach(), attach()
    file(other.id).replace(file(one.id))
    with pytest.raises(Damaged):
        read(one.id, len(SMALL))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\r\nb"}, "name"),
        ({"name": "a" * 256}, "name"),
        ({"content_type": "pdf"}, "content type"),
        ({"content_type": "a/b\r\nX: y"}, "content type"),
        ({"expires_in": timedelta(days=31)}, "30 days"),
        ({"expires_in": timedelta(0)}, "30 days"),
        ({"declared_bytes": 3}, "3 bytes were declared"),
        ({"declared_bytes": 300}, "300 bytes were declared"),
    ],
)
def test_what_cannot_be_stored_as_asked_is_refused_and_not_kept(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(NotAttachable, match=said):
        attach(**changes)
    assert read_files() == set()


def read_files() -> set[str]:
    """The files whose rows are not being deleted already, which nobody could read."""
    kept = {id for (id,) in rows("SELECT id::text FROM stored_attachments")}
    return {path.name for path in file("x").parent.glob("*")} & kept if file("x").parent.exists() else set()


def test_only_types_that_the_operator_allows_are_stored(configure: Any) -> None:
    configure(attachment_types=("application/pdf", "image/*"))
    attach(content_type="image/PNG; q=1")
    with pytest.raises(NotAttachable, match="ATTACHMENT_TYPES"):
        attach(content_type="text/html")


@pytest.mark.parametrize("declared_bytes", [None, 1024 * 1024 + 1])
def test_more_than_the_limit_is_refused_however_it_comes(configure: Any, declared_bytes: int | None) -> None:
    configure(attachment_max_mb=1)
    taken = []

    def endless() -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield bytes(100_000)

    with pytest.raises(TooLarge):
        operations.attach(endless(), name="a", content_type="a/b", who="ann", declared_bytes=declared_bytes)
    assert len(taken) <= (0 if declared_bytes else 11)
    assert read_files() == set()


def test_what_breaks_off_leaves_no_file_and_its_row_is_deleted() -> None:
    def breaking() -> Iterator[bytes]:
        yield LARGE
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        operations.attach(breaking(), name="a", content_type="a/b", who="ann")
    assert read_files() == set()
    actors.delete_stored_attachments()
    assert table("stored_attachments") == []


def test_what_a_killed_process_left_unfinished_cannot_be_sent_and_is_deleted_with_its_file() -> None:
    # Given
    id = new_id()
    stored_attachments.begin(id, name="a", content_type="a/b", key_id="k", header=b"", created_by="ann")
    runtime.store.write(id, [b"part of a file"])
    # Then
    with pytest.raises(NotStored), runtime.source.open(id):
        pass
    actors.delete_stored_attachments()
    assert file(id).exists()  # somebody may be writing it
    rows("UPDATE stored_attachments SET expires_at = now()")
    actors.delete_stored_attachments()
    assert (table("stored_attachments"), file(id).exists()) == ([], False)
    assert stored_attachments.finish(id, size=1, sha256="", keep=timedelta(1)) is None


def test_what_arrives_after_its_row_was_deleted_leaves_no_file() -> None:
    written: list[str] = []

    def late() -> Iterator[bytes]:
        yield SMALL
        written.extend(row["id"] for row in table("stored_attachments"))
        rows("DELETE FROM stored_attachments")
        yield SMALL

    with pytest.raises(NotAttachable, match="given up"):
        operations.attach(late(), name="a", content_type="a/b", who="ann")
    (id,) = written
    assert not file(id).exists()
    assert audited() == []


def test_a_store_that_cannot_be_written_is_told_without_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "store", Store("file:///proc/nowhere"))
    with pytest.raises(StoreUnavailable) as away:
        attach()
    assert "nowhere" not in str(away.value)


def test_a_file_and_its_name_and_that_of_a_new_folder_are_flushed_before_it_counts_as_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    Store(f"file://{tmp_path}/new/folder").write("a", [b"sealed"])
    folder = tmp_path / "new" / "folder"
    assert flushed == [tmp_path, tmp_path / "new", folder / "a", folder]


def test_a_shared_folder_that_does_not_flush_names_is_a_store_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == tmp_path:
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    Store(f"file://{tmp_path}").write("a", [b"sealed"])
    assert (tmp_path / "a").read_bytes() == b"sealed"


# Deleted


def expire(stored: Attached) -> None:
    rows("UPDATE stored_attachments SET expires_at = now() WHERE id = %(id)s", {"id": stored.id})


def is_kept(stored: Attached) -> bool:
    actors.delete_stored_attachments()
    kept = file(stored.id).exists()
    assert kept == (stored.id in {row["id"] for row in table("stored_attachments")})
    return kept


def set_status(id: str, status: str, ago: timedelta = timedelta(hours=2)) -> None:
    rows(
        "UPDATE incoming_emails SET status = %(status)s, updated_at = now() - %(ago)s WHERE id = %(id)s",
        {"id": id, "status": status, "ago": ago},
    )


def test_an_attachment_that_nobody_used_is_kept_until_it_expires() -> None:
    stored = attach()
    assert is_kept(stored)
    expire(stored)
    assert not is_kept(stored)


@pytest.mark.parametrize("status", ["received", "dispatched", "processing"])
def test_an_expired_attachment_is_kept_and_sent_while_a_mail_that_uses_it_is_unsettled(
    fleet: Fleet, status: str
) -> None:
    stored = attach()
    id = store(attachments=[named(stored)])
    set_status(id, status)
    expire(stored)
    assert is_kept(stored)
    set_status(id, "received")
    fleet.send()
    assert delivered(fleet, id) == {"report.pdf": sha256(SMALL)}
    assert not is_kept(stored)


def test_an_attachment_goes_once_all_mails_that_use_it_have_been_done_for_a_while() -> None:
    stored = attach()
    first, second = (store(publisher_message_id=name, attachments=[named(stored)]) for name in ("1", "2"))
    set_status(first, "processed")
    assert is_kept(stored)
    set_status(second, "cancelled", timedelta(minutes=59))
    assert is_kept(stored)
    set_status(second, "cancelled")
    assert not is_kept(stored)


def test_an_attachment_of_a_failed_mail_is_kept_for_its_replay_until_it_expires() -> None:
    stored = attach()
    set_status(store(attachments=[named(stored)]), "failed")
    assert is_kept(stored)
    expire(stored)
    assert not is_kept(stored)


def test_an_expired_attachment_is_not_sent_with_a_mail_that_came_later_however_late_it_is_deleted(fleet: Fleet) -> None:
    # Given
    stored = attach()
    expire(stored)
    # When nobody has deleted it yet
    id = store(attachments=[named(stored)])
    assert fleet.send() == ["dead-lettered"]
    # Then
    (letter,) = table("dlq")
    assert (email_row(id)["status"], letter["reason"]) == ("failed", "not_stored")
    assert file(stored.id).exists()


def test_an_expired_attachment_is_not_kept_for_a_mail_that_came_later() -> None:
    stored = attach()
    expire(stored)
    store(attachments=[named(stored)])
    assert not is_kept(stored)


def test_a_delivery_that_comes_again_changes_nothing_about_its_attachments() -> None:
    stored = attach()
    for _ in range(2):
        store(attachments=[named(stored), named(stored, name="again")])
    assert len(table("stored_attachment_uses")) == 1


def test_a_mail_that_comes_while_an_attachment_is_taken_for_deletion_finds_it_gone() -> None:
    # Given
    stored = attach()
    arrived = threading.Event()

    def arrive() -> None:
        store(attachments=[named(stored)])
        arrived.set()
        models.disconnect()

    with models.transaction():
        rows("UPDATE stored_attachments SET deleting_at = now()")
        thread = threading.Thread(target=arrive)
        thread.start()
        wait_until(
            "the mail waits for the row",
            lambda: rows("SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"),
        )
        assert not arrived.is_set()
    thread.join()
    # Then
    assert table("stored_attachment_uses") == []
    assert not is_kept(stored)


def test_a_mail_that_is_being_stored_keeps_the_attachment_from_being_taken() -> None:
    # Given
    stored = attach()
    set_status(store(publisher_message_id="before", attachments=[named(stored)]), "processed")  # so that it may go
    id = store(publisher_message_id="now")
    noted, go_on = threading.Event(), threading.Event()

    def note() -> None:
        with models.transaction():
            stored_attachments.note_uses([stored_attachments.Use(stored.id, id)])
            noted.set()
            go_on.wait(10)
        models.disconnect()

    thread = threading.Thread(target=note)
    thread.start()
    noted.wait(10)
    # When
    taken = stored_attachments.take_deletable(10, keep_used=timedelta(0))
    go_on.set()
    thread.join()
    # Then
    assert taken == []
    expire(stored)
    assert is_kept(stored)


def test_what_was_taken_by_a_process_that_died_is_deleted_at_the_next_turn() -> None:
    stored = attach()
    expire(stored)
    assert stored_attachments.take_deletable(10, keep_used=timedelta(0)) == [stored.id]
    with pytest.raises(NotStored):
        read(stored.id, len(SMALL))
    file(stored.id).unlink()
    assert not is_kept(stored)


def test_what_is_to_be_deleted_is_taken_in_batches() -> None:
    for _ in range(5):
        expire(attach())
    for left in (5, 3, 1):
        assert len(table("stored_attachments")) == left
        taken = stored_attachments.take_deletable(2, keep_used=timedelta(0))
        assert len(taken) == min(2, left)
        stored_attachments.forget(taken, who="tests")
    assert table("stored_attachments") == []


def cannot_be_deleted(stored: Attached) -> None:
    """Have a folder in the place of its file: that is not deleted as a file."""
    expire(stored)
    file(stored.id).unlink()
    file(stored.id).mkdir()


def left_alone_long_enough() -> None:
    rows("UPDATE stored_attachments SET deleting_at = now() WHERE deleting_at IS NOT NULL")


def test_while_its_file_cannot_be_deleted_a_row_waits_for_it() -> None:
    # Given
    stored = attach()
    cannot_be_deleted(stored)
    # When
    actors.delete_stored_attachments()
    # Then nobody can send it, and its row is kept
    assert [row["id"] for row in table("stored_attachments")] == [stored.id]
    with pytest.raises(NotStored):
        read(stored.id, len(SMALL))
    # And when it can be deleted it is
    file(stored.id).rmdir()
    left_alone_long_enough()
    assert not is_kept(stored)


def test_what_is_deleted_is_audited_and_counted_with_all_else_that_is_purged() -> None:
    # Given two that have expired, one whose file cannot be deleted, and one that is kept
    for stored in (attach(), attach()):
        expire(stored)
    cannot_be_deleted(attach())
    attach()
    before, written = purged("attachments"), len(audited())
    # When
    actors.delete_stored_attachments()
    actors.delete_stored_attachments()
    # Then
    assert audited()[written:] == [("maintenance", "purge", "attachments")]
    assert table("audit_log")[-1]["detail"] == {"count": 2}
    assert purged("attachments") == before + 2


def purged(kind: str) -> float:
    return REGISTRY.get_sample_value("mailfleet_purged_total", {"kind": kind}) or 0


def test_files_that_cannot_be_deleted_do_not_stop_the_others() -> None:
    # Given some that have been in the way for longest
    bad, good = [attach() for _ in range(4)], [attach() for _ in range(3)]
    for stored in bad:
        cannot_be_deleted(stored)
    stored_attachments.take_deletable(100, keep_used=timedelta(0))
    for stored in good:
        expire(stored)
    # When
    actors.delete_stored_attachments()
    # Then
    assert {row["id"] for row in table("stored_attachments")} == {stored.id for stored in bad}
    assert not any(file(stored.id).exists() for stored in good)


def test_files_that_cannot_be_deleted_do_not_fill_the_batch_of_the_next_turn() -> None:
    # Given
    for stored in (attach() for _ in range(4)):
        cannot_be_deleted(stored)
    actors.delete_stored_attachments()
    good = attach()
    expire(good)
    # Then
    assert stored_attachments.take_deletable(4, keep_used=timedelta(0)) == [good.id]
    # And they are tried again when their time has come, behind those that were taken before
    left_alone_long_enough()
    assert len(stored_attachments.take_deletable(10, keep_used=timedelta(0))) == 5


def test_a_store_that_is_away_is_asked_for_a_few_files_and_not_for_all() -> None:
    asked: list[str] = []

    class Away(Store):
        def delete(self, name: str) -> None:
            asked.append(name)
            raise StoreUnavailable("the store of attachments is not there")

    for _ in range(8):
        expire(attach())
    whole, runtime.store = runtime.store, Away(runtime.configuration.attachment_store_url)
    try:
        actors.delete_stored_attachments()
        assert len(asked) == 5
        # The next turn begins with those that were not tried
        actors.delete_stored_attachments()
    finally:
        runtime.store = whole
    assert len({*asked}) == len(asked) == 8
    left_alone_long_enough()
    actors.delete_stored_attachments()
    assert table("stored_attachments") == []


# Deleted, and held meanwhile


def done_with() -> tuple[str, Attached]:
    """A mail that was sent, with its attachment, which may go."""
    stored = attach()
    id = store(publisher_message_id=f"with-{stored.id}", attachments=[named(stored)])
    set_status(id, "processed")
    expire(stored)
    return id, stored


def held(id: str) -> None:
    operations.hold(id, reason=None, who="cli:ann")


def test_a_hold_takes_an_attachment_back_into_use_that_was_taken_and_not_deleted() -> None:
    # Given
    id, stored = done_with()
    assert stored_attachments.take_deletable(10, keep_used=timedelta(0)) == [stored.id]
    # When
    held(id)
    # Then
    assert read(stored.id, len(SMALL)) == SMALL
    assert is_kept(stored)
    operations.release(id, who="cli:ann")
    assert not is_kept(stored)


def test_a_hold_that_comes_while_a_turn_is_under_way_keeps_what_its_turn_has_not_come_to() -> None:
    # Given a store in which deleting the first file takes until somebody has placed holds
    pairs = [done_with() for _ in range(3)]
    deleted: list[str] = []

    class Slow(Store):
        def delete(self, name: str) -> None:
            deleted.append(name)
            for id, stored in pairs:
                if stored.id != name:
                    held(id)
            super().delete(name)

    whole, runtime.store = runtime.store, Slow(runtime.configuration.attachment_store_url)
    try:
        actors.delete_stored_attachments()
    finally:
        runtime.store = whole
    # Then
    (gone,) = deleted
    for _, stored in pairs:
        assert is_kept(stored) == (stored.id != gone)


def test_a_hold_that_comes_while_the_store_is_away_keeps_what_could_not_be_deleted() -> None:
    # Given
    id, stored = done_with()

    class Away(Store):
        def delete(self, name: str) -> None:
            held(id)
            raise StoreUnavailable("the store of attachments is not there")

    whole, runtime.store = runtime.store, Away(runtime.configuration.attachment_store_url)
    try:
        actors.delete_stored_attachments()
    finally:
        runtime.store = whole
    # When the store is back
    assert is_kept(stored)
    # Then
    assert read(stored.id, len(SMALL)) == SMALL


def test_a_deletion_waits_for_a_hold_that_is_being_placed_and_lets_the_file_be() -> None:
    # Given a hold that is not committed
    id, stored = done_with()
    stored_attachments.take_deletable(10, keep_used=timedelta(0))
    begun: list[bool] = []

    def delete() -> None:
        begun.append(stored_attachments.begin_deleting(stored.id))
        models.disconnect()

    thread = threading.Thread(target=delete)
    with models.transaction():
        holds.place(id, reason=None, who="cli:ann")
        # When
        thread.start()
        wait_until("the deletion waits", lambda: rows("SELECT 1 FROM pg_locks WHERE NOT granted"))
    thread.join()
    # Then
    assert begun == [False]
    assert is_kept(stored)


def test_an_attachment_whose_deletion_has_begun_is_not_taken_back_by_a_hold() -> None:
    id, stored = done_with()
    (taken,) = stored_attachments.take_deletable(10, keep_used=timedelta(0))
    assert stored_attachments.begin_deleting(taken)
    held(id)
    with pytest.raises(NotStored):
        read(stored.id, len(SMALL))
    # And of one whose deletion was broken off, what may still be there is left alone until the release
    assert is_kept(stored)
    operations.release(id, who="cli:ann")
    assert not is_kept(stored)


# Keys


def test_stored_attachments_change_their_key_without_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, unreadable = attach(LARGE), attach()
    rows("UPDATE stored_attachments SET key_id = 'lost' WHERE id = %(id)s", {"id": unreadable.id})
    before = file(stored.id).read_bytes()
    old = runtime.configuration.backup_keys.get_secret_value()
    new = f"newer:{base64.b64encode(bytes(32)).decode()}"
    monkeypatch.setattr(runtime, "vault", Vault(Keyring.parse(f"{new},{old}")))
    assert [operations.rotate_keys(who="cli:ann").attachments for _ in range(2)] == [1, 0]
    monkeypatch.setattr(runtime, "vault", Vault(Keyring.parse(new)))
    assert read(stored.id, len(LARGE)) == LARGE
    assert file(stored.id).read_bytes() == before


# The command line


def test_the_command_line_stores_a_file_and_prints_its_id(tmp_path: Path) -> None:
    (tmp_path / "figures.pdf").write_bytes(LARGE)
    ended = mailfleet("attach", tmp_path / "figures.pdf", "--expires-in", "2h")
    assert ended.status == 0, ended.complaint
    (row,) = table("stored_attachments")
    assert (ended.output.strip(), row["name"], row["content_type"]) == (row["id"], "figures.pdf", "application/pdf")
    assert 7100 < support.seconds_until("stored_attachments", "expires_at", "id", row["id"]) <= 7200
    assert read(row["id"], len(LARGE)) == LARGE


def test_the_command_line_takes_standard_input_and_answers_in_json() -> None:
    ended = mailfleet("attach", "-", "--name", "a.txt", "--content-type", "text/csv", "--json", stdin=SMALL)
    assert ended.status == 0, ended.complaint
    assert f'"sha256": "{sha256(SMALL)}"' in ended.output
    assert read(table("stored_attachments")[0]["id"], len(SMALL)) == SMALL


def test_standard_input_needs_a_name() -> None:
    ended = mailfleet("attach", "-", stdin=SMALL)
    assert (ended.status, "--name" in ended.complaint) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--expires-in", "31d"], 1), (["--content-type", "x"], 1), (["--expires-in", "soon"], 2), (["--name", "\n"], 1)],
)
def test_the_command_line_says_why_a_file_is_not_stored(tmp_path: Path, arguments: list[str], status: int) -> None:
    (tmp_path / "a").write_bytes(SMALL)
    ended = mailfleet("attach", tmp_path / "a", *arguments)
    assert ended.status == status
    assert table("stored_attachments") == []
