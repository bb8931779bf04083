"""``backup_email``: one sealed copy of every sent mail, found late or not."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest
import support
from support import SENDER, Fleet, email_row, rows, sending, store, table, work

import models
import runtime
from graph_client import GraphClient
from graph_client.errors import Throttled
from models import backups, dead_letters
from vault import bind_to

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure, limit = support.configure, support.limit


def sent(fleet: Fleet, **changes: object) -> str:
    id = store(**changes)
    fleet.send()
    assert sending(id) == "sent"
    return id


def opened(row: dict[str, object]) -> bytes:
    sealed = backups.sealed_blob(str(row["id"]))
    assert sealed is not None
    bound = bind_to(str(row["incoming_email_id"]), str(row["graph_message_id"]))
    return b"".join(runtime.vault.open(sealed.blob, key_id=sealed.key_id, associated_data=bound))


@pytest.mark.parametrize("attachments", [False, True])
def test_a_sent_mail_is_archived_compressed_and_sealed(fleet: Fleet, attachments: bool) -> None:
    # Given
    file = {"name": "a.pdf", "size": 5000, "urlOrId": fleet.graph.file_url(5000)}
    id = sent(fleet, subject="Find me in the archive", attachments=[file] if attachments else None)
    # When
    assert fleet.backup() == ["done"]
    # Then
    (row,) = table("email_backups")
    mime = opened(row)
    assert b"Subject: Find me in the archive" in mime
    assert (row["incoming_email_id"], row["compression"], row["size"]) == (id, "gzip", len(mime))
    assert row["checksum"] == hashlib.sha256(mime).hexdigest()
    assert b"Find me" not in bytes.fromhex(row["compressed_blob"][2:])
    assert table("sent_emails")[0]["graph_message_id"] == row["graph_message_id"]
    assert fleet.backup() == []


def asked_of(fleet: Fleet) -> list[str]:
    return [request["operation"] for request in fleet.graph.requests() if request["operation"] != "token"]


def test_both_ways_of_sending_a_plain_mail_take_three_requests_up_to_the_archive(
    fleet: Fleet, configure: Callable[..., None]
) -> None:
    # Given a Graph on which the id of a draft survives its sending
    fleet.graph.set_behaviour(immutable_ids="stable")
    sent(fleet)
    fleet.backup()
    assert asked_of(fleet) == ["send_mail", "find", "mime"]
    # When a draft is made of the mail
    configure(send_plain_via="draft")
    id = sent(fleet, publisher_message_id="order-2")
    fleet.backup()
    # Then nothing has to be searched for
    assert asked_of(fleet)[3:] == ["create_draft", "send_draft", "mime"]
    assert [row["incoming_email_id"] for row in table("email_backups")].count(id) == 1


def test_a_draft_whose_id_did_not_survive_its_sending_is_found_by_its_tag(
    fleet: Fleet, configure: Callable[..., None]
) -> None:
    fleet.graph.set_behaviour(immutable_ids="change")
    configure(send_plain_via="draft")
    sent(fleet, subject="Found by its tag")
    assert fleet.backup() == ["done"]
    (row,) = table("email_backups")
    assert b"Subject: Found by its tag" in opened(row)
    assert asked_of(fleet) == ["create_draft", "send_draft", "mime", "find", "mime"]
    assert table("sent_emails")[0]["graph_message_id"] == row["graph_message_id"]


def test_a_backup_that_is_repeated_makes_no_second_copy(fleet: Fleet) -> None:
    sent(fleet)
    rows("UPDATE sent_emails SET backup_due_at = now()")
    fleet.schedule()
    (message,) = fleet.take("backup")
    assert [work(message), work(message)] == ["done", "done"]
    before = table("email_backups")
    # Given a worker that died after storing, before anything was recorded
    rows("UPDATE sent_emails SET backup_due_at = now()")
    assert fleet.backup() == ["done"]
    assert table("email_backups") == before


def test_a_mail_that_shows_late_is_looked_for_again(fleet: Fleet) -> None:
    fleet.graph.set_sent_items_delay(0.7)
    sent(fleet)
    assert fleet.backup() == ["done"]
    (row,) = table("sent_emails")
    assert (table("email_backups"), row["backup_attempt_count"]) == ([], 1)
    assert "not in the mailbox" in row["backup_error"]
    support.wait_until("it shows", lambda: fleet.graph.messages(SENDER))
    assert fleet.backup() == ["done"]
    assert len(table("email_backups")) == 1
    assert table("sent_emails")[0]["backup_error"] is None


@pytest.mark.parametrize("fault", ["truncated", "throttle", "unavailable", "lose_next_answer"])
def test_a_fetch_that_fails_is_repeated_and_no_half_mail_is_archived(fleet: Fleet, fault: str) -> None:
    # Given
    id = sent(fleet, body={"contentType": "text", "content": "long " * 50_000})
    if fault == "truncated":
        fleet.graph.break_mime(how="truncated")
    else:
        getattr(fleet.graph, fault)(operation="mime")
    # When
    assert fleet.backup() == ["done"]
    # Then
    assert table("email_backups") == []
    assert table("sent_emails")[0]["backup_attempt_count"] == (0 if fault == "throttle" else 1)
    rows("UPDATE mailboxes SET paused_until = NULL")
    runtime.redis.flushdb()
    assert fleet.backup() == ["done"]
    assert len(opened(table("email_backups")[0])) > 250_000
    assert email_row(id)["status"] == "processed"


def test_a_mime_that_graph_cannot_make_is_given_up_and_made_after_a_replay(
    fleet: Fleet, configure: Callable[..., None]
) -> None:
    # Given
    configure(max_attempts=2)
    id = sent(fleet)
    fleet.graph.break_mime(times=None)
    # When
    results = fleet.backup() + fleet.backup()
    # Then
    assert results[-1] == "dead-lettered"
    (letter,) = table("dlq")
    assert (letter["reason"], letter["queue_name"], letter["incoming_email_id"]) == ("backup_failed", "backup", id)
    assert (email_row(id)["status"], sending(id)) == ("processed", "sent")
    assert fleet.backup() == []
    assert fleet.events() == ["SendEmailSent"]
    # When Graph can make it again and an operator replays it
    fleet.graph.clear_faults()
    dead_letters.resolve(letter["id"], replayed=True, who="olga")
    assert fleet.backup() == ["done"]
    # Then
    assert len(table("email_backups")) == 1
    assert fleet.mails(id) == 1


def test_a_graph_that_cannot_be_reached_is_no_backups_fault(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    sent(fleet)
    away = GraphClient("https://127.0.0.1:1/v1.0", runtime.tokens, timedelta(seconds=1), runtime.TAG)
    monkeypatch.setattr(runtime, "graph", away)
    assert fleet.backup() == ["done"]
    assert table("sent_emails")[0]["backup_attempt_count"] == 0


def test_a_worker_that_was_frozen_adds_no_second_copy_under_another_id(fleet: Fleet) -> None:
    # Given a worker that has read the mail under one id, and another that has stored it under another meanwhile
    id = sent(fleet)
    rows("UPDATE sent_emails SET backup_due_at = now()")
    fleet.schedule()
    fleet.take("backup")
    (frozen,) = models.ClaimedBackup.claim([(id, 1)], lease=support.LEASE)
    rows("UPDATE sent_emails SET backup_lease_until = NULL")
    assert fleet.backup() == ["done"]
    before = (table("email_backups"), table("sent_emails"))
    # When it wakes
    sealed = models.Sealed(b"x", "gzip", 1, 1, "0", "k")
    assert not backups.store([models.Copy(frozen, "another-id", sealed)], retention=timedelta(days=1))
    # Then
    assert (table("email_backups"), table("sent_emails")) == before


def test_the_limiter_holds_a_backup_back_without_an_attempt(fleet: Fleet, limit: Callable[..., None]) -> None:
    sent(fleet)
    limit(mailbox_concurrency=1)
    with runtime.limiter.slot(SENDER):
        assert fleet.backup() == ["done"]
    assert (table("email_backups"), table("sent_emails")[0]["backup_attempt_count"]) == ([], 0)
    assert fleet.backup() == ["done"]
    assert len(table("email_backups")) == 1


class DrippingGraph:
    """A Graph whose MIME takes longer than a third of the slot's lease to arrive."""

    def __init__(self, lasts: timedelta) -> None:
        self._lasts = lasts
        #: When the slot would lapse, as each chunk is asked for.
        self.lapses_at: list[float] = []

    def find_by_tag(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(messages=[SimpleNamespace(id="message", is_draft=False)])

    @contextmanager
    def fetch_mime(self, *_: object) -> Iterator[Iterator[bytes]]:
        yield self._chunks()

    def _chunks(self) -> Iterator[bytes]:
        for wait in (timedelta(), self._lasts, timedelta()):
            (slots,) = runtime.redis.scan_iter("mailfleet:*:slots")
            self.lapses_at += [lapses_at for _, lapses_at in runtime.redis.zrange(slots, 0, -1, withscores=True)]
            threading.Event().wait(wait.total_seconds())
            yield b"chunk"


def test_the_slot_of_a_long_fetch_is_renewed_while_bytes_come(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a message that takes so long that its slot would come back before it is there
    sent(fleet)
    lease = timedelta(seconds=3)
    graph = DrippingGraph(lease / 2)
    redis_url = runtime.configuration.redis_url.get_secret_value()
    monkeypatch.setattr(runtime, "limiter", runtime.limits.Limiter(redis_url, runtime.limits.Budgets(), lease))
    monkeypatch.setattr(runtime, "graph", graph)
    # When
    assert fleet.backup() == ["done"]
    # Then its one slot was renewed once, and returned
    first, second, third = graph.lapses_at
    assert first == second < third
    assert len(table("email_backups")) == 1
    assert runtime.limiter.usage(SENDER)[0].used == 0


class ThrottlingGraph:
    """A Graph that asks the whole tenant to wait, which the simulator's never does."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._meanwhile = meanwhile

    def find_by_tag(self, *_: object, **__: object) -> None:
        self._meanwhile()
        throttled = Throttled("429", status=429, retry_after=timedelta(seconds=90))
        throttled.scope = "tenant"
        raise throttled


def pause_of_sender() -> float:
    """For how many seconds the scheduler passes the sender over."""
    return support.seconds_until("mailboxes", "paused_until", "mailbox", SENDER)


def test_a_backup_that_graph_throttles_pauses_the_mailbox_for_the_scheduler_too(fleet: Fleet) -> None:
    sent(fleet)
    fleet.graph.throttle(operation="mime", retry_after="90")
    assert fleet.backup() == ["done"]
    assert 85 < pause_of_sender() <= 90


def test_a_wait_that_graph_asks_for_with_another_error_binds_everyone_too(fleet: Fleet) -> None:
    sent(fleet)
    fleet.graph.fail(500, operation="mime", retry_after="90")
    assert fleet.backup() == ["done"]
    assert 85 < pause_of_sender() <= 90
    assert runtime.limiter.paused_until(SENDER) is not None
    (row,) = table("sent_emails")
    assert row["backup_attempt_count"] == 1
    assert rows("SELECT backup_due_at - updated_at FROM sent_emails") == [(timedelta(seconds=90),)]


def test_a_backup_that_meets_the_tenants_limit_pauses_everyone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    sent(fleet)
    monkeypatch.setattr(runtime, "graph", ThrottlingGraph())
    assert fleet.backup() == ["done"]
    assert runtime.limiter.tenant_paused_until() is not None
    assert table("sent_emails")[0]["backup_attempt_count"] == 0


def test_a_pause_that_redis_cannot_be_told_is_recorded_all_the_same(
    fleet: Fleet, limit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent(fleet)
    monkeypatch.setattr(runtime, "graph", ThrottlingGraph(lambda: limit(url="redis://127.0.0.1:1/0")))
    assert fleet.backup() == ["done"]
    (row,) = table("sent_emails")
    assert (row["backup_attempt_count"], row["backup_lease_until"]) == (0, None)
    assert 85 < pause_of_sender() <= 90


def test_a_mailbox_that_refuses_for_days_costs_its_copies_no_attempts(fleet: Fleet) -> None:
    id = sent(fleet)
    fleet.graph.deny(SENDER)
    for _ in range(3):
        assert fleet.backup() == ["done"]
        rows("UPDATE mailboxes SET paused_until = now()")
    assert table("sent_emails")[0]["backup_attempt_count"] == 0
    # When it still does after a week
    rows("UPDATE incoming_emails SET created_at = now() - interval '8 days' WHERE id = %(id)s", {"id": id})
    assert fleet.backup() == ["done"]
    assert table("sent_emails")[0]["backup_attempt_count"] == 1


def test_a_token_that_stays_refused_pauses_everything_and_is_no_backups_fault(fleet: Fleet) -> None:
    sent(fleet)
    fleet.graph.fail(401, code="InvalidAuthenticationToken", times=None)
    assert fleet.backup() == ["done"]
    assert runtime.limiter.tenant_paused_until() is not None
    assert table("sent_emails")[0]["backup_attempt_count"] == 0


def test_a_backup_whose_worker_dies_each_time_is_given_up(fleet: Fleet, configure: Callable[..., None]) -> None:
    # Given
    configure(max_attempts=2)
    id = sent(fleet)
    for attempt in (1, 2):
        rows("UPDATE sent_emails SET backup_due_at = now(), backup_lease_until = NULL")
        fleet.schedule()
        assert [message.kwargs["attempt"] for message in fleet.take("backup")] == [attempt]
        assert models.ClaimedBackup.claim([(id, attempt)], lease=support.LEASE)
    # When
    rows("UPDATE sent_emails SET backup_lease_until = NULL")
    asked = len(fleet.graph.requests())
    assert fleet.backup() == ["dead-lettered"]
    # Then
    (letter,) = table("dlq")
    assert (letter["reason"], letter["incoming_email_id"]) == ("backup_failed", id)
    assert len(fleet.graph.requests()) == asked
    assert fleet.backup() == []


def test_without_a_limiter_nothing_is_fetched(fleet: Fleet, limit: Callable[..., None]) -> None:
    sent(fleet)
    asked = len(fleet.graph.requests())
    rows("UPDATE sent_emails SET backup_due_at = now()")
    fleet.schedule()
    limit(url="redis://127.0.0.1:1/0")
    assert fleet.run("backup") == ["done"]
    assert len(fleet.graph.requests()) == asked


def test_while_postgresql_is_away_a_backup_is_dropped_and_its_row_brings_it_back(fleet: Fleet, tables: str) -> None:
    sent(fleet)
    rows("UPDATE sent_emails SET backup_due_at = now()")
    fleet.schedule()
    (message,) = fleet.take("backup")
    models.disconnect()
    models.connect("postgresql://nobody@127.0.0.1:1/none", "tests")
    assert work(message) == "done"
    models.connect(tables, "tests")
    rows("UPDATE sent_emails SET backup_lease_until = now()")
    assert fleet.backup() == ["done"]
    assert len(table("email_backups")) == 1


# Several together


def sent_together(fleet: Fleet, count: int = 3) -> list[str]:
    """Mails of one mailbox whose backups are due together."""
    ids = [store(publisher_message_id=f"order-{n}", subject=f"Mail {n}") for n in range(count)]
    fleet.send()
    assert [sending(id) for id in ids] == ["sent"] * count
    return ids


def archived() -> dict[str, bytes]:
    return {str(row["incoming_email_id"]): opened(row) for row in table("email_backups")}


@pytest.mark.parametrize("alternatives", [True, False])
def test_backups_of_a_mailbox_are_found_by_one_look_if_graph_takes_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, alternatives: bool
) -> None:
    # Given a client that has not learned yet what Graph takes
    url = runtime.configuration.graph_base_url
    monkeypatch.setattr(runtime, "graph", GraphClient(url, runtime.tokens, timedelta(seconds=30), runtime.TAG))
    fleet.graph.set_behaviour(filters_take_alternatives=alternatives)
    ids = sent_together(fleet)
    asked = len(asked_of(fleet))
    # When
    assert fleet.backup() == ["done"]
    # Then
    copies = archived()
    assert [f"Subject: Mail {n}".encode() in copies[id] for n, id in enumerate(ids)] == [True] * 3
    looks = ["find"] if alternatives else ["find"] * 4  # the one that was refused, then one for each
    assert asked_of(fleet)[asked:] == [*looks, "mime", "mime", "mime"]
    assert {(row["backup_attempt_count"], row["backup_lease_until"]) for row in table("sent_emails")} == {(1, None)}
    assert fleet.backup() == []


def test_one_that_does_not_show_yet_holds_back_no_other_and_is_looked_for_alone(fleet: Fleet) -> None:
    first = sent(fleet)
    support.wait_until("it shows", lambda: fleet.graph.messages(SENDER))
    fleet.graph.set_sent_items_delay(3600)
    late = sent(fleet, publisher_message_id="late")
    assert fleet.backup() == ["done"]
    assert [*archived()] == [first]
    fleet.graph.set_sent_items_delay(0)
    rows("UPDATE sent_emails SET backup_due_at = now() WHERE backup_due_at IS NOT NULL")
    fleet.schedule()
    (message,) = fleet.take("backup")
    assert (message.actor_name, message.kwargs) == ("backup_email", {"incoming_email_id": late, "attempt": 2})


def test_trouble_of_the_mailbox_puts_those_behind_back_without_an_attempt(fleet: Fleet) -> None:
    # Given a Graph that throttles the first of three
    sent_together(fleet)
    asked = len(asked_of(fleet))
    fleet.graph.throttle(operation="mime")
    # When
    assert fleet.backup() == ["done"]
    # Then nobody asks for the others, and none has cost an attempt
    assert asked_of(fleet)[asked:] == ["find", "mime"]
    assert [row["backup_attempt_count"] for row in table("sent_emails")] == [0] * 3
    rows("UPDATE mailboxes SET paused_until = NULL")
    runtime.redis.flushdb()
    assert fleet.backup() == ["done"]
    assert len(archived()) == 3


def test_one_that_can_never_be_made_is_given_up_alone(fleet: Fleet) -> None:
    sent_together(fleet, 2)
    fleet.graph.break_mime(times=None)
    assert fleet.backup() == ["done"]
    assert table("dlq") == []
    rows("UPDATE sent_emails SET backup_attempt_count = 7")
    assert fleet.backup() == ["dead-lettered", "dead-lettered"]
    assert {row["reason"] for row in table("dlq")} == {"backup_failed"}


def test_what_a_worker_with_fewer_attempts_than_the_scheduler_cannot_make_together_is_given_up_alone(
    fleet: Fleet, configure: Callable[..., None]
) -> None:
    # Given several that were dispatched together to a worker whose first attempt is its last
    ids = sent_together(fleet)
    fleet.graph.break_mime(times=None)
    rows("UPDATE sent_emails SET backup_due_at = now()")
    fleet.schedule()
    configure(max_attempts=1)
    # When
    assert fleet.run("backup") == ["done"]
    assert table("dlq") == []
    while fleet.backup() not in ([], ["dead-lettered"] * 3):
        pass
    # Then each has a dead letter with a message of its own
    assert {str(row["incoming_email_id"]) for row in table("dlq")} == set(ids)
    assert {(row["actor_name"], row["reason"]) for row in table("dlq")} == {("backup_email", "backup_failed")}


def test_a_worker_that_dies_with_several_in_hand_leaves_them_to_the_next(fleet: Fleet) -> None:
    ids = sent_together(fleet)
    rows("UPDATE sent_emails SET backup_due_at = now()")
    fleet.schedule()
    (message,) = fleet.take("backup")
    assert len(models.ClaimedBackup.claim([(id, 1) for id in ids], lease=support.LEASE)) == 3
    assert work(message) == "done"  # delivered again: they are another's
    assert archived() == {}
    rows("UPDATE sent_emails SET backup_lease_until = now()")
    assert fleet.backup() == ["done", "done", "done"]
    assert len(archived()) == 3
