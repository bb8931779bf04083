"""The archive's rows: one per Graph message, kept as long as they must be."""

from __future__ import annotations

from datetime import timedelta

import pytest
import support
from support import LEASE, NOW, WITHIN, claim, email_row, everything, rows, seconds_until, store, table

from models import ClaimedBackup, Copy, Sealed, backups, retention, scheduling
from models.retention import Kind

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

YEAR = timedelta(days=365)
SEALED = Sealed(b"sealed", "gzip", 100, 6, "ab" * 32, "k1")


def leased(publisher_id: str = "order-1") -> ClaimedBackup:
    """A sent email whose backup is in a worker's hands."""
    id = store(publisher_message_id=publisher_id)
    claim(id).record_sent(backup_delay=NOW, publish_within=WITHIN, graph_message_id="draft-id")
    return claim_again(id)


def claim_again(id: str) -> ClaimedBackup:
    rows("UPDATE sent_emails SET backup_lease_until = now() WHERE backup_lease_until IS NOT NULL")
    rows("UPDATE sent_emails SET backup_due_at = now() WHERE backup_due_at IS NOT NULL")
    (backup,) = ClaimedBackup.claim([(id, dispatched_attempt(id))], lease=LEASE)
    return backup


def dispatched_attempt(id: str) -> int:
    """Dispatch every due backup, and return which attempt that is of this one."""
    with scheduling.sweep():
        scheduling.expire_backup_leases()
        _, busy = scheduling.in_flight()
        due, _ = scheduling.claim_backups(concurrency=100, share=100, busy=busy, lease=LEASE)
    (attempt,) = [backup.attempt for backup in due if backup.incoming_email_id == id]
    return attempt


def fail(backup: ClaimedBackup) -> bool:
    return backup.fail(
        reason="backup_failed", error="404", message_id="m-1", queue_name="backup", actor_name="backup_email"
    )


def keep(
    backup: ClaimedBackup, graph_message_id: str, sealed: Sealed = SEALED, retention: timedelta = YEAR
) -> set[str]:
    return backups.store([Copy(backup, graph_message_id, sealed)], retention=retention)


def test_copies_that_are_stored_together_each_keep_their_own() -> None:
    # Given two backups, of which the second is stored already
    first, second = leased("order-1"), leased("order-2")
    keep(second, "graph-2")
    third = leased("order-3")
    sealed = {n: SEALED._replace(blob=f"sealed {n}".encode(), size=n, checksum=f"{n}" * 64) for n in (1, 2, 3)}
    # When
    copies = [Copy(first, "graph-1", sealed[1]), Copy(second, "graph-9", sealed[2]), Copy(third, "graph-3", sealed[3])]
    stored = backups.store(copies, retention=YEAR)
    # Then
    assert stored == {first.incoming_email_id, third.incoming_email_id}
    kept = {row["graph_message_id"]: row for row in table("email_backups")}
    assert {id: (row["incoming_email_id"], row["size"]) for id, row in kept.items()} == {
        "graph-1": (first.incoming_email_id, 1),
        "graph-2": (second.incoming_email_id, 100),
        "graph-3": (third.incoming_email_id, 3),
    }
    assert backups.sealed_blob(kept["graph-3"]["id"]) == (b"sealed 3", "k1", "gzip")


def test_what_a_mailbox_sends_within_half_of_the_delay_is_due_together_and_none_before_it() -> None:
    delay = timedelta(hours=2)
    for n in range(4):
        claim(store(publisher_message_id=f"order-{n}")).record_sent(backup_delay=delay, publish_within=WITHIN)
    claim(store(publisher_message_id="ben", **{"from": "ben@example.com"})).record_sent(
        backup_delay=delay, publish_within=WITHIN
    )
    waits = rows("SELECT backup_due_at, backup_due_at - sent_at FROM sent_emails ORDER BY sent_at")
    assert all(delay <= wait <= 1.5 * delay for _, wait in waits)
    # An hour may end between two sends, but not between three.
    ann = [due_at for due_at, _ in waits[:4]]
    assert len({*ann}) <= 2
    assert waits[4][0] not in ann


def test_a_stored_backup_is_done_and_known_by_every_id() -> None:
    # Given
    backup = leased()
    # When
    keep(backup, "graph-1")
    # Then
    (sent,), (row,) = table("sent_emails"), table("email_backups")
    assert (sent["graph_message_id"], sent["backup_due_at"], sent["backup_lease_until"]) == ("graph-1", None, None)
    assert 364 * 86400 < seconds_until("email_backups", "expires_at", "id", row["id"]) <= 365 * 86400
    for id in (row["id"], backup.incoming_email_id, "order-1", "graph-1"):
        found = backups.find_backup(id)
        assert found is not None
        assert (found.id, found.mailbox, found.size, found.key_id) == (row["id"], "ann@example.com", 100, "k1")
    assert backups.sealed_blob(row["id"]) == (b"sealed", "k1", "gzip")
    assert backups.find_backup("unknown") is None
    assert ClaimedBackup.claim([(backup.incoming_email_id, backup.attempt)], lease=LEASE) == []


def test_a_second_copy_of_the_same_message_is_ignored() -> None:
    backup = leased()
    keep(backup, "graph-1")
    before = table("email_backups")
    keep(backup, "graph-1", SEALED._replace(blob=b"other", checksum="cd" * 32))
    assert table("email_backups") == before


def test_only_the_dispatched_attempt_can_claim_and_only_once() -> None:
    id = store()
    claim(id).record_sent(backup_delay=NOW, publish_within=WITHIN)
    assert ClaimedBackup.claim([(id, 1)], lease=LEASE) == []
    assert dispatched_attempt(id) == 1
    claims = [ClaimedBackup.claim([(id, attempt)], lease=LEASE) for attempt in (0, 2, 1, 1)]
    assert [bool(claimed) for claimed in claims] == [False, False, True, False]


def test_a_backup_that_waits_for_a_worker_spends_no_attempt_and_one_whose_worker_dies_does() -> None:
    # Given a sent email whose backup was dispatched twice and taken up by nobody
    id = store()
    claim(id).record_sent(backup_delay=NOW, publish_within=WITHIN)
    for _ in range(2):
        assert dispatched_attempt(id) == 1
        rows("UPDATE sent_emails SET backup_lease_until = now()")
    # When a worker takes it up and dies
    assert claim_again(id).attempt == 1
    # Then
    assert claim_again(id).attempt == 2


def test_a_backup_that_waits_gives_its_attempt_back_and_one_that_failed_spends_it() -> None:
    backup = leased()
    backup.snooze(timedelta(minutes=1), "busy")
    assert claim_again(backup.incoming_email_id).attempt == 1
    claim_again(backup.incoming_email_id).retry(timedelta(minutes=1), "503")
    (sent,) = table("sent_emails")
    assert (sent["backup_attempt_count"], sent["backup_error"], sent["backup_lease_until"]) == (2, "503", None)


def test_an_outcome_of_an_earlier_attempt_changes_nothing() -> None:
    late = leased()
    current = claim_again(late.incoming_email_id)
    before = everything()
    late.snooze(NOW, "busy")
    late.retry(NOW, "503")
    assert not fail(late)
    assert everything() == before
    keep(current, "graph-1")
    before = everything()
    late.retry(NOW, "503")
    assert not fail(current)
    assert everything() == before


def test_a_backup_that_is_given_up_has_one_dead_letter_and_the_mail_stays_sent() -> None:
    backup = leased()
    assert fail(backup)
    (letter,), (sent,) = table("dlq"), table("sent_emails")
    assert (letter["reason"], letter["queue_name"], letter["mailbox"]) == ("backup_failed", "backup", "ann@example.com")
    assert (sent["status"], sent["backup_due_at"], sent["backup_error"]) == ("sent", None, "404")
    assert email_row(backup.incoming_email_id)["status"] == "processed"


def test_expired_backups_are_purged_in_batches_and_others_are_kept() -> None:
    for n in range(5):
        keep(leased(f"order-{n}"), f"graph-{n}", retention=YEAR if n else timedelta(seconds=-1))
    rows("UPDATE email_backups SET expires_at = now() WHERE graph_message_id IN ('graph-1', 'graph-2')")
    purged = [retention.purge(Kind.BACKUPS, retention=YEAR, who="maintenance", batch=2).rows for _ in range(3)]
    assert purged == [2, 1, 0]
    assert {row["graph_message_id"] for row in table("email_backups")} == {"graph-3", "graph-4"}


def test_backups_are_listed_by_mailbox_the_newest_first() -> None:
    for n in range(3):
        keep(leased(f"order-{n}"), f"graph-{n}")
    assert [backup.publisher_message_id for backup in backups.stored_backups()] == ["order-2", "order-1", "order-0"]
    assert len(backups.stored_backups(mailbox="ann@example.com", limit=2)) == 2
    assert backups.stored_backups(mailbox="ben@example.com") == []
