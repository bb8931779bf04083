"""What versions of mailfleet say to each other over RabbitMQ: neither what is older nor what is newer is misread.

The messages stand here as the first version sends them. Whoever changes what is sent leaves them as they are, and sees
that they are still understood. `tests/fleet/test_an_earlier_version_runs_beside.py` runs an earlier version itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dramatiq
import orjson
import pytest
import support
from support import Fleet, email_row, rows, sending, store, table, work

import actors
import operations
import runtime
from actors.ingest import Delivery
from models import Route
from outbox import connect

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet

PLAIN = {"subject": "Hello"}
LATE = "2999-01-01T00:00:00Z"
ATTACHED = {"attachments": [{"name": "a.txt", "size": 5, "contentBytes": "aGVsbG8="}]}
#: What a later version may add to the arguments of an actor that there is.
LATER: dict[str, Any] = {"tenant": "contoso", "not_before": None}


def message(actor_name: str, queue_name: str, *args: Any, **kwargs: Any) -> dramatiq.Message[Any]:
    """A message as it lies in RabbitMQ."""
    body = {
        "queue_name": queue_name,
        "actor_name": actor_name,
        "args": args,
        "kwargs": kwargs,
        "options": {},
        "message_id": "0199e0a4-0000-7000-8000-000000000001",
        "message_timestamp": 1_760_000_000_000,
    }
    return dramatiq.Message.decode(orjson.dumps(body))


@pytest.mark.parametrize("later", [{}, LATER], ids=["first", "later"])
@pytest.mark.parametrize(("route", "queue"), [(Route.PLAIN, "send_plain"), (Route.ATTACHED, "send_attached")])
def test_a_dispatch_is_understood(fleet: Fleet, route: Route, queue: str, later: dict[str, Any]) -> None:
    # Given
    id = store(**(PLAIN if route is Route.PLAIN else ATTACHED))
    support.dispatch(route)
    dispatch = {"incoming_email_id": id, "publisher_message_id": "order-1", "route": route.value, "attempt": 1}
    # When
    assert work(message(queue, queue, **dispatch, **later)) == "done"
    # Then
    assert (sending(id), email_row(id)["status"]) == ("sent", "processed")


def sent_and_leased(fleet: Fleet, count: int) -> list[str]:
    """Mails that are sent, whose backups have been dispatched."""
    ids = [store(publisher_message_id=f"order-{number}") for number in range(count)]
    fleet.send()
    rows("UPDATE sent_emails SET backup_due_at = now()")
    fleet.schedule()
    fleet.take("backup")
    return ids


@pytest.mark.parametrize("later", [{}, LATER], ids=["first", "later"])
def test_the_dispatch_of_a_backup_is_understood(fleet: Fleet, later: dict[str, Any]) -> None:
    (id,) = sent_and_leased(fleet, 1)
    assert work(message("backup_email", "backup", incoming_email_id=id, attempt=1, **later)) == "done"
    assert [str(row["incoming_email_id"]) for row in table("email_backups")] == [id]


@pytest.mark.parametrize("later", [{}, LATER], ids=["first", "later"])
def test_the_dispatch_of_several_backups_is_understood(fleet: Fleet, later: dict[str, Any]) -> None:
    ids = sent_and_leased(fleet, 2)
    backups = [[id, 1, *later.values()] for id in ids]
    assert work(message("backup_emails", "backup", backups, **later)) == "done"
    assert {str(row["incoming_email_id"]) for row in table("email_backups")} == set(ids)


@pytest.mark.parametrize("later", [{}, LATER], ids=["first", "later"])
def test_receipts_are_understood(fleet: Fleet, later: dict[str, Any]) -> None:
    id = store()
    support.claim(id)
    assert work(message("acknowledge_receipt", "scheduler", [[id, 1, *later.values()]])) == "done"
    assert [row["acknowledged_at"] is not None for row in table("worker_receipts")] == [True]


def test_a_producers_emails_are_understood(fleet: Fleet) -> None:
    email = support.send_email(publisher_message_id="order-1")
    delivery = {"email": email, "correlation_id": "c-1", "reply_to": None, "traceparent": None}
    assert work(message("ingest_emails", "ingest", deliveries=[delivery])) == "done"
    assert [row["publisher_message_id"] for row in table("incoming_emails")] == ["order-1"]


@pytest.mark.parametrize(
    ("actor_name", "queue"),
    [
        ("schedule_emails", "scheduler"),
        ("mirror_dead_letters", "maintenance"),
        ("notify_dead_letters", "maintenance"),
        ("purge_expired", "maintenance"),
        ("delete_stored_attachments", "maintenance"),
        ("tidy_drafts", "maintenance"),
    ],
)
def test_a_wake_up_is_understood(fleet: Fleet, actor_name: str, queue: str) -> None:
    with connect(runtime.rabbitmq) as connection:
        runtime.declare(connection.channel())
    assert work(message(actor_name, queue)) == "done"


def test_every_actor_that_this_version_can_send_to_is_one_of_the_first_or_named_here(fleet: Fleet) -> None:
    """An earlier worker dead-letters what is for an actor that it does not know.

    So a new actor of an old queue is sent to by the version after the one whose workers know it, or the changelog says
    that workers are replaced first.
    """
    assert set(runtime.fleet_broker.actors) == {
        "acknowledge_receipt",
        "backup_email",
        "backup_emails",
        "delete_stored_attachments",
        "ingest_emails",
        "mirror_dead_letters",
        "notify_dead_letters",
        "purge_expired",
        "schedule_emails",
        "send_attached",
        "send_plain",
        "tidy_drafts",
    }


def test_what_a_worker_did_not_know_comes_again_with_its_lease(fleet: Fleet) -> None:
    # Given backups and a mail whose dispatches an earlier worker has dead-lettered
    ids = sent_and_leased(fleet, 2)
    late = store(publisher_message_id="late")
    fleet.schedule()
    fleet.take("send_plain")
    # When their leases have run out
    rows("UPDATE sent_emails SET backup_lease_until = now()")
    support.make_due(late)
    # Then
    assert fleet.backup() == ["done"]
    assert fleet.send() == ["done"]
    assert {str(row["incoming_email_id"]) for row in table("email_backups")} == set(ids)
    assert sending(late) == "sent"


# On a database that a later version has migrated


@pytest.fixture
def later_schema(fleet: Fleet) -> Iterator[None]:
    """Columns, indexes and a table that this version knows nothing of, come to tables that it works with already."""
    names = sorted(row["tablename"] for row in the("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))
    ours = [name for name in names if "yoyo" not in name]
    for name in ours:
        rows(
            f"""
            ALTER TABLE {name} ADD COLUMN later text, ADD COLUMN later_count integer NOT NULL DEFAULT 0;
            CREATE INDEX {name}_later ON {name} (later, later_count)
            """
        )
    rows("CREATE TABLE later (id uuid PRIMARY KEY REFERENCES incoming_emails ON DELETE CASCADE, said text)")
    yield
    rows("DROP TABLE later")
    for name in ours:
        rows(f"ALTER TABLE {name} DROP COLUMN later, DROP COLUMN later_count")


def the(query: str) -> list[dict[str, Any]]:
    return [orjson.loads(row) for (row,) in rows(f"SELECT to_jsonb(t)::text FROM ({query}) t")]


def whole_lives(fleet: Fleet) -> list[str]:
    """Have mail sent by both routes and archived, given up and replayed, cancelled; return how each has ended."""
    refused = {"from": "ben@example.com"}
    emails = {"plain": PLAIN, "attached": ATTACHED, "refused": refused, "cancelled": {"send_at": LATE}}
    fleet.graph.fail(400, code="ErrorInvalidRecipients", mailbox="ben@example.com")
    prefix = f"{len(table('incoming_emails'))}-"
    bodies = [support.send_email(publisher_message_id=prefix + name, **email) for name, email in emails.items()]
    actors.ingest.ingest([Delivery(orjson.dumps(body)) for body in bodies])
    operations.cancel(f"{prefix}cancelled", who="tests")
    fleet.send()
    operations.resolve([operations.open_dead_letter(f"{prefix}refused")], replay=True, who="tests")
    fleet.send()
    fleet.backup()
    operations.hold(f"{prefix}plain", reason=None, who="tests")
    operations.set_limits(None, {"sends": 60}, who="tests")
    operations.release(f"{prefix}plain", who="tests")
    actors.maintenance.purge_expired()
    ended = [operations.status(prefix + name) for name in emails]
    return [each["status"] for each in ended]


def test_this_version_works_on_a_database_that_a_later_one_has_migrated(
    fleet: Fleet, request: pytest.FixtureRequest
) -> None:
    # Given connections that know the tables as they are
    ends = ["processed", "processed", "processed", "cancelled"]
    assert whole_lives(fleet) == ends
    # When a later version's release has run
    request.getfixturevalue("later_schema")
    # Then
    assert whole_lives(fleet) == ends
    assert len(table("email_backups")) == 6
    assert operations.verify(who="tests").discrepancies == []
    assert {row["later_count"] for row in table("incoming_emails")} == {0}
