"""Retention: what is past it goes, a batch at a time; what is on hold, or still at work, stays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import orjson
import pytest
import support
from operator_support import archive, audited, give_up
from support import Fleet, email_row, rows, send_email, table

import actors
import models
import operations
import runtime
from actors.ingest import Delivery, ingest
from actors.retention import purge_kind
from models import audit, dead_letters, holds, mailboxes, retention, stored_attachments
from models.retention import Kind
from operations import NotFound
from telemetry import PURGED

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure = support.configure

Configure = Callable[..., None]
LONG = timedelta(days=1000)
WHO = "cli:ann"


def age() -> None:
    """Let three years pass."""
    shift = "interval '1100 days'"
    rows(f"UPDATE email_backups SET expires_at = expires_at - {shift}")
    rows(f"UPDATE outbox_events SET published_at = now() - {shift}, id = ('00' || substr(id::text, 3))::uuid")
    rows(f"UPDATE dlq SET resolved_at = resolved_at - {shift}")
    rows(f"UPDATE mailboxes SET updated_at = updated_at - {shift}")
    rows(f"UPDATE audit_log SET at = at - {shift}")
    rows(f"UPDATE incoming_emails SET updated_at = updated_at - {shift}")


def full_life(publisher_message_id: str = "order-1") -> str:
    """An email that was sent and archived, of which every kind of record is kept; its id is years old."""
    id = archive(publisher_message_id)
    rows(
        """
        INSERT INTO file_uploads (id, incoming_email_id, position, filename, size)
        VALUES (gen_random_uuid(), %(id)s, 0, 'salary.pdf', 10)
        """,
        {"id": id},
    )
    return id


def purge_all() -> dict[str, int]:
    return {kind.value: count for kind in Kind if (count := purge_kind(kind, who="maintenance"))}


@pytest.mark.usefixtures("tables")
def test_what_is_within_its_retention_stays() -> None:
    full_life()
    before = support.everything()
    assert purge_all() == {}
    assert support.everything() == before


@pytest.mark.usefixtures("tables")
def test_of_a_mail_past_every_retention_its_ids_and_how_it_ended_stay() -> None:
    # Given
    id = full_life()
    age()
    # When
    purged = purge_all()
    # Then
    assert purged.items() >= {"backups": 1, "payloads": 1, "events": 2}.items()
    row = email_row(id)
    assert (row["publisher_message_id"], row["status"], row["payload"]) == ("order-1", "processed", {"purged": True})
    assert row["payload_purged_at"] is not None
    assert (table("email_backups"), table("outbox_events"), table("file_uploads")) == ([], [], [])
    assert table("sent_emails")[0]["backup_purged_at"] is not None
    assert operations.verify(who=WHO).discrepancies == []


def test_a_late_redelivery_of_a_purged_mail_is_known_and_sends_nothing(fleet: Fleet) -> None:
    # Given
    ingest([Delivery(orjson.dumps(send_email()))])
    fleet.send()
    age()
    actors.purge_expired()
    (id,) = [row["id"] for row in table("incoming_emails")]
    assert email_row(id)["payload"] == {"purged": True}
    fleet.events()
    # When
    ingest([Delivery(orjson.dumps(send_email())), Delivery(orjson.dumps(send_email(subject="Another")))])
    fleet.send()
    # Then
    assert (len(table("incoming_emails")), fleet.mails(id)) == (1, 1)
    assert fleet.events() == ["SendEmailRejected"]


@pytest.mark.usefixtures("tables")
def test_content_stays_while_a_mail_waits_or_may_be_replayed() -> None:
    # Given
    waiting = support.store(publisher_message_id="waits")
    failed, discarded = give_up("failed"), give_up("discarded")
    operations.resolve([operations.open_dead_letter(discarded)], replay=False, who=WHO)
    age()
    # When
    purge_all()
    # Then
    assert {id for id in (waiting, failed, discarded) if "subject" in email_row(id)["payload"]} == {waiting, failed}
    # And once it is replayed and has failed again for good
    operations.resolve([operations.open_dead_letter(failed)], replay=True, who=WHO)
    age()
    assert purge_kind(Kind.PAYLOADS, who="maintenance") == 0


@pytest.mark.usefixtures("tables")
def test_resolved_dead_letters_go_and_open_ones_stay() -> None:
    resolved, still_open = give_up("resolved"), give_up("open")
    operations.resolve([operations.open_dead_letter(resolved)], replay=False, who=WHO)
    age()
    assert purge_kind(Kind.DEAD_LETTERS, who="maintenance") == 1
    assert [letter["incoming_email_id"] for letter in table("dlq")] == [still_open]
    assert dead_letters.find(resolved) is None


@pytest.mark.usefixtures("tables")
def test_receipts_of_settled_mail_go_with_the_years() -> None:
    # Given emails whose ids say that they are old
    settled, waiting = "00000000-0000-7000-8000-000000000001", "00000000-0000-7000-8000-000000000002"
    for id, status in ((settled, "processed"), (waiting, "received")):
        rows(
            """
            INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, status, route, mailbox,
                                         recipient_count)
            VALUES (%(id)s, %(id)s, '{}', '', %(status)s, 'no-attachment', 'ann@example.com', 1)
            """,
            {"id": id, "status": status},
        )
        rows("INSERT INTO worker_receipts (incoming_email_id, attempt) VALUES (%(id)s, 1), (%(id)s, 2)", {"id": id})
    age()
    # When
    assert purge_kind(Kind.RECEIPTS, who="maintenance") == 2
    # Then
    assert {receipt["incoming_email_id"] for receipt in table("worker_receipts")} == {waiting}


@pytest.mark.usefixtures("tables")
def test_mailboxes_without_anything_to_remember_go_and_others_stay() -> None:
    for mailbox in ("idle@example.com", "paused@example.com", "limited@example.com", "*"):
        rows("INSERT INTO mailboxes (mailbox) VALUES (%(mailbox)s)", {"mailbox": mailbox})
    mailboxes.pause_by_hand("paused@example.com", why="x", who=WHO)
    rows("UPDATE mailboxes SET limits = '{\"sends\": 1}' WHERE mailbox = 'limited@example.com'")
    age()
    rows("INSERT INTO mailboxes (mailbox) VALUES ('new@example.com')")
    assert purge_kind(Kind.MAILBOXES, who="maintenance") == 1
    assert {row["mailbox"] for row in table("mailboxes")} == {
        "paused@example.com",
        "limited@example.com",
        "*",
        "new@example.com",
    }


@pytest.mark.usefixtures("tables")
def test_every_purge_is_audited_and_counted() -> None:
    archive()
    age()
    counted = PURGED.labels("backups")._value.get()
    purge_kind(Kind.BACKUPS, who="maintenance")
    assert audited() == [("maintenance", "purge", "backups")]
    assert rows("SELECT detail FROM audit_log") == [({"count": 1},)]
    assert PURGED.labels("backups")._value.get() == counted + 1


@pytest.mark.usefixtures("tables")
def test_old_audit_rows_go_but_what_was_done_to_a_mail_on_hold() -> None:
    held, other = archive("held"), archive("other")
    operations.hold("held", reason="a suit", who=WHO)
    for id in (held, other):
        list(operations.export_backup(id, who=WHO)[1])
    audit.record(WHO, "pause", "ann@example.com")
    age()
    assert purge_kind(Kind.AUDIT, who="maintenance") == 2
    assert [action for _, action, _ in audited()] == ["hold", "backups.export", "purge"]


@pytest.mark.usefixtures("tables")
def test_a_backlog_is_deleted_in_batches_that_are_bounded_by_rows_and_bytes() -> None:
    # Given
    for number in range(5):
        archive(f"order-{number}")
    age()
    # When
    first = retention.purge(Kind.BACKUPS, retention=LONG, who="maintenance", batch=2)
    # Then
    assert (first, len(table("email_backups"))) == ((2, True), 3)
    # And whatever a backup's size is, it goes
    rows("UPDATE email_backups SET compressed_size = %(size)s", {"size": retention.BATCH_BYTES + 1})
    assert retention.purge(Kind.BACKUPS, retention=LONG, who="maintenance") == (1, True)
    assert purge_kind(Kind.BACKUPS, who="maintenance", most_batches=1) == 1
    assert purge_kind(Kind.BACKUPS, who="maintenance") == 1
    assert purge_kind(Kind.BACKUPS, who="maintenance") == 0


# Holds


@pytest.mark.usefixtures("tables")
def test_no_purge_touches_a_mail_on_hold_until_it_is_released() -> None:
    # Given
    id = full_life()
    standing, placed = operations.hold("order-1", reason="a suit", who=WHO)
    assert (standing.incoming_email_id, standing.has_payload, standing.has_backup, placed) == (id, True, True, True)
    age()
    before = support.everything()
    # When
    purge_all()
    # Then
    assert support.everything() == before
    # And afterwards it goes as any other
    assert operations.release(id, who=WHO)
    assert purge_all().items() >= {"backups": 1, "payloads": 1, "events": 2}.items()


@pytest.mark.usefixtures("tables")
def test_mail_on_hold_does_not_keep_other_mail_from_being_purged() -> None:
    for number in range(4):
        archive(f"order-{number}")
        if number < 3:
            operations.hold(f"order-{number}", reason=None, who=WHO)
    age()
    assert retention.purge(Kind.BACKUPS, retention=LONG, who="maintenance", batch=2).rows == 1


@pytest.mark.usefixtures("tables")
def test_stored_attachments_of_a_mail_on_hold_stay_until_it_is_released() -> None:
    # Given
    id, attachment = archive(), "0190a000-0000-7000-8000-000000000001"
    rows(
        """
        INSERT INTO stored_attachments (id, name, content_type, key_id, header, created_by, expires_at, stored_at)
        VALUES (%(attachment)s, 'a', 'text/plain', 'k', '', 'ann', now() - interval '1 day', now())
        """,
        {"attachment": attachment},
    )
    rows("INSERT INTO stored_attachment_uses VALUES (%(a)s, %(id)s)", {"a": attachment, "id": id})
    operations.hold(id, reason=None, who=WHO)
    # When, then
    assert stored_attachments.take_deletable(10, keep_used=timedelta(0)) == []
    operations.release(id, who=WHO)
    assert stored_attachments.take_deletable(10, keep_used=timedelta(0)) == [attachment]


@pytest.mark.usefixtures("tables")
def test_holding_and_releasing_twice_is_harmless_and_audited_once() -> None:
    id = support.store()
    assert [operations.hold(id, reason=reason, who=WHO)[1] for reason in ("first", "second")] == [True, False]
    (standing,) = operations.list_holds(limit=10)
    assert (standing.reason, standing.placed_by, standing.has_backup) == ("first", WHO, False)
    assert operations.status(id)["hold"]["reason"] == "first"
    assert [operations.release(id, who=WHO) for _ in range(2)] == [True, False]
    assert audited() == [(WHO, "hold", id), (WHO, "release", id)]
    assert operations.status(id)["hold"] is None
    with pytest.raises(NotFound):
        operations.hold("nobody's", reason=None, who=WHO)


@pytest.mark.usefixtures("tables")
def test_the_row_of_a_mail_on_hold_cannot_be_deleted_by_anybody() -> None:
    id = support.store()
    operations.hold(id, reason=None, who=WHO)
    with pytest.raises(Exception, match="holds"):
        rows("DELETE FROM incoming_emails WHERE id = %(id)s", {"id": id})


@pytest.mark.usefixtures("tables")
def test_a_hold_that_comes_during_a_purge_waits_for_it_and_says_what_is_left() -> None:
    # Given a purge that has deleted and not committed
    id = archive()
    age()
    told: list[Any] = []

    def hold() -> None:
        told.append(operations.hold(id, reason=None, who=WHO)[0])
        models.disconnect()

    holder = threading.Thread(target=hold)
    with models.transaction():
        assert retention.purge(Kind.BACKUPS, retention=LONG, who="maintenance").rows == 1
        # When
        holder.start()
        support.wait_until("it waits", waits_for_a_lock)
    holder.join()
    # Then
    assert [standing.has_backup for standing in told] == [False]


def waits_for_a_lock() -> bool:
    return bool(rows("SELECT 1 FROM pg_locks WHERE NOT granted"))


@pytest.mark.usefixtures("tables")
def test_a_purge_passes_over_a_mail_that_is_being_held() -> None:
    # Given a hold that is not committed
    id = archive()
    age()
    purged: list[int] = []

    def purge() -> None:
        purged.append(retention.purge(Kind.BACKUPS, retention=LONG, who="maintenance").rows)
        models.disconnect()

    with models.transaction():
        holds.place(id, reason=None, who=WHO)
        # When
        purger = threading.Thread(target=purge)
        purger.start()
        purger.join()
    # Then
    assert (purged, len(table("email_backups"))) == ([0], 1)


def test_a_turn_of_maintenance_applies_the_settings(fleet: Fleet, configure: Configure) -> None:
    # Given
    id = archive()
    rows("UPDATE incoming_emails SET updated_at = now() - interval '2 days'")
    assert support.work(actors.purge_expired.message()) == "done"
    assert "subject" in email_row(id)["payload"]
    # When
    configure(payload_retention=timedelta(days=1))
    assert support.work(actors.purge_expired.message()) == "done"
    # Then
    assert email_row(id)["payload"] == {"purged": True}
    assert len(table("email_backups")) == 1
    assert runtime.configuration.backup_retention == timedelta(days=365)
