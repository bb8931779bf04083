"""What an operator may do: every change is written down with who made it, and none of them sends anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import orjson
import pika
import pytest
import support
from operator_support import MIME, archive, audited, foreign, give_up, letter_of, tamper, workers
from support import Fleet, email_row, rows, sending

import models
import operations
import runtime
from broker import MIRROR_QUEUE
from contracts import Unacceptable
from graph_client import GraphClient, TokenSource
from models import dead_letters, inspection
from models.dead_letters import Filter, Letter
from operations import NotCancellable, NotFound
from sandbox.world import new_database
from simulator.control import Simulator
from vault import Tampered, UnknownKey

shared_database, tables, fleet, configure = support.shared_database, support.tables, support.fleet, support.configure
pytestmark = pytest.mark.usefixtures("tables")

WHO = "tests:ann"
NOBODYS_IDS = ["", "x" * 10_000, "a' OR 1=1; --", "\x1b[31m\r\n", "späß🙈", "{" + "0" * 32 + "}", "%s %(id)s"]
TASK = {
    "queue_name": "maintenance",
    "actor_name": "purge_expired",
    "args": [],
    "kwargs": {},
    "options": {"told": 1},
    "message_id": "the first",
    "message_timestamp": 1_700_000_000_000,
}


def letters(**narrowed: Any) -> list[Letter]:
    return operations.find_dead_letters(Filter(**narrowed), None)


def replay(*which: Letter, **options: Any) -> list[str]:
    outcomes: list[str] = []
    operations.resolve(which, replay=True, who=WHO, on_each=lambda _, outcome: outcomes.append(outcome), **options)
    return outcomes


@pytest.fixture
def channel() -> Iterator[Any]:
    with pika.BlockingConnection(runtime.rabbitmq) as connection:
        channel = connection.channel()
        runtime.declare(channel)
        for queue in (*support.QUEUES, runtime.SEND_QUEUE):
            channel.queue_purge(queue)
        yield channel
    runtime.close()


# Publishing and looking


def test_a_published_email_is_put_on_the_queue_as_it_is_and_lastingly(channel: Any) -> None:
    body = orjson.dumps(support.send_email(), option=orjson.OPT_INDENT_2)
    assert operations.publish(body, who=WHO) == "order-1"
    _, properties, published = channel.basic_get(runtime.SEND_QUEUE, auto_ack=True)
    assert (published, properties.delivery_mode) == (body, 2)
    assert audited() == [(WHO, "publish", "order-1")]


def test_what_would_be_rejected_is_not_published(channel: Any) -> None:
    with pytest.raises(Unacceptable):
        operations.publish(b'{"from": "ann"}', who=WHO)
    assert audited() == []
    assert channel.basic_get(runtime.SEND_QUEUE)[0] is None


def test_an_email_is_known_by_our_id_and_by_the_publishers() -> None:
    id = give_up("order-7")
    assert operations.status(id) == operations.status("order-7")
    known = operations.status(id)
    assert (known["status"], known["sending"], len(known["receipts"]), len(known["dead_letters"])) == (
        "failed",
        None,
        1,
        1,
    )
    assert "Thank you" not in str(known)


@pytest.mark.parametrize("id", NOBODYS_IDS, ids=lambda id: ascii(id[:12]))
def test_an_id_that_nobody_has_is_not_found_whatever_it_looks_like(id: str) -> None:
    give_up()
    with pytest.raises(NotFound):
        operations.status(id)
    with pytest.raises(NotFound):
        operations.cancel(id, who=WHO)
    with pytest.raises(NotFound):
        operations.dead_letter(id)
    with pytest.raises(NotFound):
        operations.read_message(id, who=WHO)
    with pytest.raises(NotFound):
        operations.export_backup(id, who=WHO)
    assert not letters(reason=id or "none")


# Cancelling


def test_a_cancelled_email_is_not_sent_although_its_dispatch_is_on_the_way_and_its_publisher_is_told(
    fleet: Fleet,
) -> None:
    # Given
    id = support.store()
    fleet.schedule()
    # When
    assert operations.cancel("order-1", who=WHO)
    assert not operations.cancel(id, who=WHO)
    # Then
    assert fleet.run("send_plain") == ["done"]
    assert fleet.send() == []
    assert (email_row(id)["status"], fleet.mails(id), fleet.events()) == ("cancelled", 0, ["SendEmailCancelled"])
    assert audited() == [(WHO, "cancel", id)]
    assert [event["type"] for event in operations.status(id)["events"]] == ["SendEmailReceived", "SendEmailCancelled"]


def test_what_cannot_be_cancelled_says_why_and_is_not_written_down() -> None:
    id = give_up()
    with pytest.raises(NotCancellable, match="dead letter"):
        operations.cancel(id, who=WHO)
    assert audited() == []


# Dead letters


def test_a_replay_puts_the_email_back_wakes_the_scheduler_and_says_who_asked(channel: Any) -> None:
    # Given
    id = give_up()
    runtime.redis.flushdb()
    # When
    assert replay(*letters()) == ["replayed"]
    runtime.close()
    # Then
    assert (email_row(id)["status"], email_row(id)["attempt_count"]) == ("received", 0)
    assert audited() == [(WHO, "dlq.replayed", letter_of(id))]
    assert b"schedule_emails" in channel.basic_get("scheduler", auto_ack=True)[2]


def test_a_letter_that_was_resolved_meanwhile_is_left_alone() -> None:
    give_up()
    seen = letters()
    assert replay(*seen) == ["replayed"]
    assert replay(*seen) == ["resolved before"]
    assert len(audited()) == 1


def test_a_discarded_email_stays_failed() -> None:
    id = give_up()
    assert operations.resolve(letters(), replay=False, who=WHO) == 1
    assert email_row(id)["status"] == "failed"
    assert audited() == [(WHO, "dlq.discarded", letter_of(id))]
    assert letters() == []


def test_the_replay_of_an_email_in_doubt_looks_for_it_and_does_not_send_it_again(
    fleet: Fleet, graph: Simulator, configure: Callable[..., None]
) -> None:
    # Given a mail that was sent, whose answer was lost, and that did not show up before patience ended
    configure(in_doubt_policy="hold", in_doubt_grace=support.NOW, in_doubt_settle=support.NOW)
    id = support.store()
    graph.set_sent_items_delay(3)
    graph.lose_next_answer()
    fleet.send()
    fleet.settle(id)
    assert (email_row(id)["status"], dead_letters.find(id).reason) == ("failed", "in_doubt_held")  # type: ignore[union-attr]
    # When
    support.wait_until("the mail shows", lambda: graph.messages(support.SENDER))
    replay(*letters())
    assert sending(id) in ("in_doubt", "sending")
    fleet.settle(id)
    # Then
    assert (email_row(id)["status"], fleet.mails(id)) == ("processed", 1)


def test_a_foreign_message_is_put_on_its_queue_again_under_a_new_id(channel: Any) -> None:
    # Given
    foreign(orjson.dumps(TASK))
    # When
    assert replay(*letters()) == ["replayed"]
    # Then
    again = orjson.loads(channel.basic_get("maintenance", auto_ack=True)[2])
    assert again | {"message_id": ""} == TASK | {"message_id": ""}
    # And if it fails again, that is another letter: the first one's id would hide it
    assert again["message_id"] != TASK["message_id"]


def test_a_foreign_message_that_was_replayed_meanwhile_is_not_published_again(channel: Any) -> None:
    foreign(orjson.dumps(TASK))
    seen = letters()
    assert replay(*seen) + replay(*seen) == ["replayed", "resolved before"]
    assert channel.basic_get("maintenance", auto_ack=True)[0] is not None
    assert channel.basic_get("maintenance", auto_ack=True)[0] is None


def test_a_foreign_message_whose_replay_died_halfway_is_open_and_can_be_replayed_again(channel: Any) -> None:
    # Given an operator whose machine went down before RabbitMQ had the message
    id = foreign(orjson.dumps(TASK))
    assert dead_letters.reserve(id, "olga", timedelta(minutes=1))
    # When another tries at once, and later
    assert replay(*letters()) == ["resolved before"]
    rows("UPDATE dlq SET resolved_at = resolved_at - interval '1 hour'")
    # Then
    assert replay(*letters()) == ["replayed"]
    assert letters() == []
    assert channel.basic_get("maintenance", auto_ack=True)[0] is not None


def test_the_queues_depths_tell_of_dead_letters_and_their_copies(channel: Any) -> None:
    before = operations.queues()
    for queue in ("maintenance.XQ", MIRROR_QUEUE):
        channel.basic_publish("", queue, b"{}")
        support.wait_until(
            "it is there", lambda queue=queue: operations.queues()[queue].ready == before[queue].ready + 1
        )
        channel.queue_purge(queue)


@pytest.mark.parametrize("body", [b"\xff\x00 hello", b"", b'{"kwargs": {}}', b"[1]", orjson.dumps(TASK)[:-9]])
def test_a_foreign_message_that_no_actor_can_read_stays_open_until_it_is_discarded(body: bytes, channel: Any) -> None:
    foreign(body)
    assert replay(*letters()) == ["no actor can read it: discard it"]
    assert len(letters()) == 1
    assert channel.basic_get("maintenance")[0] is None
    assert operations.resolve(letters(), replay=False, who=WHO) == 1


def test_a_letter_that_cannot_be_put_back_does_not_stop_the_others(channel: Any) -> None:
    # Given
    foreign(orjson.dumps(TASK), queue_name="gone")
    give_up()
    # When
    first, second = replay(*letters())
    # Then
    assert "no queue named gone" in first
    assert second == "replayed"
    assert [(letter.queue_name, letter.resolved_by) for letter in letters()] == [("gone", None)]
    assert [action for _, action, _ in audited()] == ["dlq.replayed"]


def test_a_rate_spreads_a_replay_and_costs_the_first_letter_nothing() -> None:
    for number in range(3):
        give_up(f"order-{number}")
    began = time.monotonic()
    replay(letters()[0], per_second=0.1)
    assert time.monotonic() - began < 5
    began = time.monotonic()
    replay(*letters(), per_second=5)
    assert 0.2 <= time.monotonic() - began < 5


# The archive


def test_an_exported_backup_is_the_exact_mime_by_any_of_its_ids() -> None:
    id = archive("order-1")
    for known_as in (id, "order-1", "graph-order-1"):
        backup, chunks = operations.export_backup(known_as, who=WHO)
        assert b"".join(chunks) == MIME
    assert audited() == [(WHO, "backups.export", backup.id)] * 3


def test_no_publisher_stands_in_for_another_mail_by_calling_its_own_by_the_others_id() -> None:
    # Given mails of which two have ended and one waits, and others that call theirs by the ids of these
    archived, failed, waiting = (
        archive("order-1", mime=b"mine"),
        give_up("order-2"),
        support.store(publisher_message_id="order-3"),
    )
    imitations = [archive(archived, mime=b"theirs"), give_up(failed), support.store(publisher_message_id=waiting)]
    rows("UPDATE incoming_emails SET updated_at = now() WHERE id = ANY(%(ids)s::uuid[])", {"ids": [archived, waiting]})
    # Then an id of ours is that of the mail that has it
    assert [inspection.find_email(id) for id in (archived, failed, waiting, *imitations)] == [
        *(archived, failed, waiting),
        *imitations,
    ]
    assert b"".join(operations.export_backup(archived, who=WHO)[1]) == b"mine"
    found = dead_letters.find(failed)
    assert found is not None
    assert found.incoming_email_id == failed


def test_a_backup_that_was_changed_is_not_taken_for_the_mail() -> None:
    tamper(archive())
    with pytest.raises(Tampered):
        b"".join(operations.export_backup("order-1", who=WHO)[1])


def test_a_backup_under_a_key_that_is_gone_says_so() -> None:
    archive()
    rows("UPDATE email_backups SET key_id = 'lost'")
    with pytest.raises(UnknownKey, match="lost"):
        b"".join(operations.export_backup("order-1", who=WHO)[1])


def test_backups_are_listed_by_mailbox_in_any_case() -> None:
    archive("order-1")
    archive("order-2", **{"from": "carl@example.com"})
    listed = operations.list_backups(mailbox="Carl@Example.com", limit=10)
    assert [backup.publisher_message_id for backup in listed] == ["order-2"]


# Health


def problems() -> dict[str, str]:
    return {finding.subject: finding.detail for finding in operations.doctor() if not finding.fine}


def test_the_doctor_finds_nothing_where_all_is_well(graph: Simulator) -> None:
    support.store()
    with workers():
        findings = operations.doctor()
    assert {finding.subject: finding.fine for finding in findings} == dict.fromkeys(
        ["PostgreSQL", "RabbitMQ", "Redis", "Graph", "Archive", "Recipients", "Backlog"], True
    )
    assert findings[-1].detail == "1 received"


def test_the_doctor_tries_a_mailbox_and_leaves_no_draft(fleet: Fleet) -> None:
    # Given
    fleet.graph.deny("ceo@example.com")
    # When
    found = {finding.subject: finding for finding in operations.doctor(["ann@example.com", "ceo@example.com"])}
    # Then
    assert found["ann@example.com"].fine
    assert not found["ceo@example.com"].fine
    assert "403" in found["ceo@example.com"].detail
    assert fleet.graph.messages("ann@example.com", "drafts") == []


@pytest.mark.parametrize(
    ("roles", "fine"), [({"Mail.Send", "Mail.ReadWrite"}, True), ({"User.Read.All"}, True), ({"Mail.Send"}, False)]
)
def test_permissions_that_exchange_grants_show_in_no_token_and_are_no_problem(
    graph: Simulator, monkeypatch: pytest.MonkeyPatch, roles: set[str], fine: bool
) -> None:
    graph.register_app("other", secret="secret", roles=roles)
    tokens = TokenSource(
        runtime.configuration.graph_authority, runtime.configuration.graph_tenant_id, "other", secret="secret"
    )
    other = GraphClient(runtime.configuration.graph_base_url, tokens, timeout=support.WITHIN, tag_id=runtime.TAG)
    monkeypatch.setattr(runtime, "graph", other)
    (finding,) = [found for found in operations.doctor() if found.subject == "Graph"]
    assert finding.fine is fine
    assert ("--mailbox" in finding.detail) == ("Mail.Send" not in roles)


def test_the_doctor_names_the_queues_that_nobody_works_on(graph: Simulator) -> None:
    assert problems() == {
        "RabbitMQ": "answers, but nobody works on send_email, backup, maintenance, scheduler, send_attached, send_plain"
    }


def test_the_doctor_names_what_else_is_wrong(graph: Simulator) -> None:
    # Given
    give_up()
    archive("order-2")
    rows("UPDATE email_backups SET key_id = 'lost'")
    runtime.redis.config_set("maxmemory-policy", "allkeys-lru")
    # When
    try:
        with workers():
            found = problems()
    finally:
        runtime.redis.config_set("maxmemory-policy", "noeviction")
    # Then
    assert found.keys() == {"Redis", "Archive", "Backlog"}
    assert "allkeys-lru" in found["Redis"]
    assert "lost" in found["Archive"]
    assert "open dead letters: 1" in found["Backlog"]


def test_the_doctor_says_which_migration_is_missing(graph: Simulator, servers: dict[str, str]) -> None:
    with ExitStack() as stack:
        models.disconnect()
        models.connect(new_database(servers["DATABASE_URL"], stack), "tests")
        assert "lacks 0001.schema" in problems()["PostgreSQL"]
        assert not {finding.subject: finding.fine for finding in operations.ready()}["PostgreSQL"]
        models.disconnect()


def test_the_backlog_is_counted_without_reading_what_is_settled() -> None:
    # Given many emails that are settled, few that wait, and statistics that say so
    rows(
        """
        INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, status, route, mailbox,
                                     recipient_count)
        SELECT gen_random_uuid(), 'done-' || n, '{}', '', 'processed', 'no-attachment', 'a@b.example', 1
        FROM generate_series(1, 20000) n
        """
    )
    support.store()
    rows("ANALYZE incoming_emails")
    # When
    bound = {"counted": inspection.COUNTED}
    plan = str([rows(f"EXPLAIN {query}", bound) for query in (inspection._WAITING, inspection._OLDEST)])
    # Then
    assert "Seq Scan" not in plan
    assert inspection.backlog().by_status == {"received": 1}


def test_an_email_is_found_by_either_id_from_the_index_of_that() -> None:
    plan = str(rows(f"EXPLAIN {inspection._FIND}", {"id": "order-1", "uuid": support.store()}))
    for index in ("incoming_emails_pkey", "incoming_emails_publisher_message_id_key"):
        assert index in plan
    assert "Filter" not in plan


def test_what_is_unfinished_is_counted_from_its_indexes() -> None:
    id = support.store()
    support.claim(id).record_sent(backup_delay=support.NOW, publish_within=support.WITHIN)
    assert operations.backlog().backups_due == 1
    with models.transaction():
        rows("SET LOCAL enable_seqscan = off")
        plan = str(rows(f"EXPLAIN {inspection._UNFINISHED}", {"counted": inspection.COUNTED}))
    for index in ("sent_emails_backup_due", "mailboxes_refusing", "mailboxes_full"):
        assert index in plan
    assert "Seq Scan" not in plan
