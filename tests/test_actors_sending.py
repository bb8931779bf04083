"""``send_plain``: what becomes of a mail whatever Graph, limiter and worker do; a test per line of policy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import support
from support import SENDER, Fleet, email_row, everything, lapse, make_due, seconds_until, sending, store, table, work

import actors
import models
import operations
import runtime
from actors import graph_calls
from graph_client import GraphClient
from models import mailboxes, rows

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure, limit = support.configure, support.limit

Configure = Callable[..., None]


def paused_for() -> float:
    return seconds_until("mailboxes", "paused_until", "mailbox", SENDER)


def waits_for(id: str) -> float:
    return seconds_until("incoming_emails", "next_attempt_at", "id", id)


def wait_passes(id: str) -> None:
    """Let the email's waiting time and every pause be over."""
    make_due(id)
    rows("UPDATE mailboxes SET paused_until = NULL")
    runtime.redis.flushdb()


# Sent


def test_a_mail_is_sent_once_told_and_made_due_for_its_backup(fleet: Fleet) -> None:
    # Given
    id = store(cc=["carl@example.org"], bcc=["dora@example.org"], reply_to="answers@example.com", importance="high")
    # When
    assert fleet.send() == ["done"]
    # Then
    (delivery,) = fleet.graph.deliveries(tag=id)
    assert delivery["mailbox"] == SENDER
    assert (email_row(id)["status"], sending(id)) == ("processed", "sent")
    assert table("sent_emails")[0]["backup_due_at"] is not None
    assert fleet.events() == ["SendEmailSent"]
    assert fleet.send() == []


def test_a_send_is_asked_for_under_the_id_that_the_evidence_names(fleet: Fleet) -> None:
    id = store()
    fleet.send()
    (request,) = fleet.graph.requests(operation="send_mail")
    (seen,) = table("sent_emails")[0]["response_metadata"]["evidence"]
    assert (seen["asked"], seen["seen"], seen["client_request_id"]) == ("sendMail", "202", request["client_request_id"])
    assert seen["request_id"]
    assert fleet.mails(id) == 1


def test_what_the_publisher_asked_for_reaches_graph(fleet: Fleet) -> None:
    id = store(
        cc=["carl@example.org"],
        bcc=["dora@example.org"],
        reply_to=["answers@example.com"],
        importance="high",
        headers={"x-campaign": "spring"},
        body={"contentType": "text", "content": "Schöne Grüße"},
    )
    fleet.send()
    (mail,) = fleet.graph.messages(SENDER)
    addresses = {
        name: [r["emailAddress"]["address"] for r in mail[name]] for name in mail if name.endswith("ecipients")
    }
    assert addresses == {
        "toRecipients": ["bob@example.org"],
        "ccRecipients": ["carl@example.org"],
        "bccRecipients": ["dora@example.org"],
    }
    assert (mail["importance"], mail["body"]["content"]) == ("high", "Schöne Grüße")
    assert mail["replyTo"][0]["emailAddress"]["address"] == "answers@example.com"
    with runtime.graph.fetch_mime(SENDER, mail["id"]) as chunks:
        assert b"x-campaign: spring" in b"".join(chunks)
    assert fleet.mails(id) == 1


def test_a_dispatch_that_arrives_twice_sends_once(fleet: Fleet) -> None:
    id = store()
    fleet.schedule()
    (message,) = fleet.take("send_plain")
    assert [work(message), work(message), work(message)] == ["done"] * 3
    assert fleet.mails(id) == 1


def test_a_dispatch_of_an_email_that_is_not_there_is_harmless(fleet: Fleet) -> None:
    before = everything()
    work(actors.send_plain.message(incoming_email_id="01900000-0000-7000-8000-000000000000", attempt=1))
    assert everything() == before
    assert fleet.graph.requests() == []


def test_a_receipt_reaches_the_scheduler(fleet: Fleet) -> None:
    id = store()
    fleet.send()
    actors.scheduling.receipts.close()
    assert "done" in fleet.run("scheduler")
    (receipt,) = table("worker_receipts")
    assert (receipt["incoming_email_id"], receipt["acknowledged_at"] is None) == (id, False)


# Limiter says no


def test_a_mailbox_at_its_limit_waits_without_an_attempt_and_is_passed_over(
    fleet: Fleet, limit: Callable[..., None]
) -> None:
    # Given
    limit(mailbox_sends_per_minute=1)
    first, second = store(publisher_message_id="1"), store(publisher_message_id="2")
    # When
    fleet.send()
    # Then
    assert sorted([email_row(first)["status"], email_row(second)["status"]]) == ["processed", "received"]
    (waiting,) = [row for row in table("incoming_emails") if row["status"] == "received"]
    assert (waiting["attempt_count"], sending(waiting["id"])) == (0, None)
    assert [row["incoming_email_id"] for row in table("worker_receipts")] != [waiting["id"]]
    ((reason, full_for),) = rows("SELECT full_reason, full_until - now() FROM mailboxes")
    assert (reason, full_for > timedelta()) == ("limit: sends", True)
    assert fleet.send() == []
    assert len(fleet.graph.deliveries()) == 1


def test_a_mailbox_whose_slots_are_taken_is_asked_again_soon_and_not_paused(
    fleet: Fleet, limit: Callable[..., None]
) -> None:
    limit(mailbox_concurrency=1)
    id = store()
    with runtime.limiter.slot(SENDER):
        fleet.send()
    assert (email_row(id)["status"], email_row(id)["attempt_count"]) == ("received", 0)
    assert waits_for(id) < 2
    assert mailboxes.pauses() == []
    fleet.settle(id)
    assert fleet.mails(id) == 1


def test_nothing_is_sent_while_the_limiter_cannot_answer(fleet: Fleet, limit: Callable[..., None]) -> None:
    # Given mail that was handed out before
    id = store()
    fleet.schedule()
    limit(url="redis://127.0.0.1:1/0")
    # Then
    assert fleet.run("send_plain") == ["done"]
    assert fleet.graph.requests() == []
    assert (email_row(id)["status"], email_row(id)["attempt_count"], sending(id)) == ("received", 0, None)


def test_a_mail_that_can_never_fit_its_budget_is_given_up(fleet: Fleet, limit: Callable[..., None]) -> None:
    limit(mailbox_recipients_per_day=2)
    id = store(to=["a@example.org", "b@example.org", "c@example.org"])
    assert fleet.send() == ["dead-lettered"]
    assert (email_row(id)["status"], table("dlq")[0]["reason"]) == ("failed", "never_fits")


# Paused


@pytest.mark.parametrize("subject", [SENDER, mailboxes.EVERY, "no-attachment"])
def test_mail_that_waits_for_a_worker_is_not_begun_after_a_pause(fleet: Fleet, subject: str) -> None:
    # Given a mail that is dispatched when an operator pauses it
    id = store()
    fleet.schedule()
    operations.pause(subject, why="wrong newsletter", who="olga")
    # When a worker takes it up
    assert fleet.run("send_plain") == ["done"]
    # Then it waits as if it had never been dispatched
    assert fleet.graph.requests(operation="send_mail") == []
    row = email_row(id)
    assert (row["status"], row["attempt_count"], row["last_error"]) == ("received", 0, "paused")
    assert (sending(id), runtime.limiter.usage(SENDER)[3].used) == (None, 0)
    assert fleet.send() == []
    # And goes out when it is resumed
    operations.resume(subject, who="olga")
    fleet.send()
    assert fleet.mails(id) == 1


def test_mail_of_others_goes_out_during_a_pause(fleet: Fleet) -> None:
    id = store()
    fleet.schedule()
    operations.pause("ben@example.com", why="holiday", who="olga")
    operations.pause("attachment", why="store is down", who="olga")
    fleet.run("send_plain")
    assert fleet.mails(id) == 1


def test_a_look_up_that_waits_for_a_worker_is_put_off_by_a_pause_and_the_mail_stays_in_doubt(fleet: Fleet) -> None:
    fleet.graph.lose_next_answer(mailbox=SENDER)
    id = store()
    fleet.send()
    make_due(id)
    fleet.schedule()
    operations.pause(SENDER, why="holiday", who="olga")
    before = len(fleet.graph.requests())
    assert fleet.run("send_plain") == ["done"]
    assert (sending(id), len(fleet.graph.requests())) == ("in_doubt", before)
    operations.resume(SENDER, who="olga")
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


# Graph throttles


@pytest.mark.parametrize(("retry_after", "seconds"), [("7", 7), (None, 30)])
def test_throttling_pauses_the_mailbox_for_everyone_and_costs_no_attempt(
    fleet: Fleet, retry_after: str | None, seconds: int
) -> None:
    # Given
    fleet.graph.throttle(SENDER, retry_after=retry_after)
    id, other = store(), store(**{"publisher_message_id": "other", "from": "ben@example.com"})
    # When
    fleet.send()
    # Then
    assert (email_row(id)["status"], email_row(id)["attempt_count"], sending(id)) == ("received", 0, None)
    assert seconds - 2 < waits_for(id) <= seconds
    assert seconds - 2 < paused_for() <= seconds
    assert runtime.limiter.paused_until(SENDER) is not None
    assert email_row(other)["status"] == "processed"
    # When more of its mail comes
    store(publisher_message_id="next")
    assert fleet.send() == []
    # Then it all goes out once the time has passed
    wait_passes(id)
    fleet.send()
    assert len(fleet.graph.deliveries(mailbox=SENDER)) == 2


@pytest.mark.parametrize("wait", [{"retry_after": "0"}, {"retry_after": None, "retry_after_date_seconds": -5}])
def test_throttling_that_asks_for_no_wait_is_no_loop_without_a_pause(fleet: Fleet, wait: dict[str, Any]) -> None:
    fleet.graph.throttle(SENDER, **wait)
    id = store()
    fleet.send()
    assert email_row(id)["attempt_count"] == 0
    assert rows("SELECT next_attempt_at - updated_at FROM incoming_emails") == [(timedelta(seconds=1),)]
    ((paused_for,),) = rows("SELECT paused_until - updated_at FROM mailboxes")
    assert paused_for == timedelta(seconds=1)


# Outcome unknown


def break_connection(graph: Any) -> None:
    graph.reset_connection()


UNKNOWN: dict[str, Callable[[Any], None]] = {
    "lost answer": lambda graph: graph.lose_next_answer(),
    "408, sent": lambda graph: graph.fail(408, operation="send_mail", executed=True),
    "500, sent": lambda graph: graph.fail(500, operation="send_mail", executed=True),
    "502, sent": lambda graph: graph.fail(502, operation="send_mail", executed=True),
    "503, sent": lambda graph: graph.fail(503, operation="send_mail", executed=True),
    "504, sent": lambda graph: graph.fail(504, operation="send_mail", executed=True),
}
UNKNOWN_NOT_SENT: dict[str, Callable[[Any], None]] = {
    "reset": lambda graph: graph.reset_connection(),
    "500, not sent": lambda graph: graph.fail(500, operation="send_mail"),
    "503, not sent": lambda graph: graph.unavailable(operation="send_mail"),
    "504, not sent": lambda graph: graph.fail(504, operation="send_mail", body="html"),
}


@pytest.mark.parametrize("fault", sorted(UNKNOWN))
def test_a_lost_answer_to_a_send_that_happened_is_found_and_not_sent_again(fleet: Fleet, fault: str) -> None:
    # Given
    UNKNOWN[fault](fleet.graph)
    id = store()
    # When
    assert fleet.send() == ["done"]
    # Then
    assert (email_row(id)["status"], sending(id)) == ("processing", "in_doubt")
    assert 25 < waits_for(id) <= 30
    assert fleet.events() == []
    fleet.settle(id)
    assert (email_row(id)["status"], sending(id), fleet.mails(id)) == ("processed", "sent", 1)
    assert fleet.events() == ["SendEmailSent"]


@pytest.mark.parametrize("fault", sorted(UNKNOWN_NOT_SENT))
def test_a_send_that_did_not_happen_is_repeated_only_after_it_stayed_absent(
    fleet: Fleet, fault: str, configure: Configure
) -> None:
    # Given
    UNKNOWN_NOT_SENT[fault](fleet.graph)
    id = store()
    fleet.send()
    assert sending(id) == "in_doubt"
    # When it is looked up within the grace period
    fleet.settle(id)
    # Then
    assert (sending(id), fleet.mails(id)) == ("in_doubt", 0)
    # When it is over
    configure(in_doubt_grace=timedelta(0))
    fleet.settle(id)
    fleet.send()
    # Then
    assert (email_row(id)["status"], sending(id), fleet.mails(id)) == ("processed", "sent", 1)


def test_a_503_with_retry_after_is_in_doubt_and_pauses_the_mailbox_too(fleet: Fleet) -> None:
    fleet.graph.unavailable(operation="send_mail", retry_after="90")
    id = store()
    fleet.send()
    assert sending(id) == "in_doubt"
    assert 85 < paused_for() <= 90


def test_a_timeout_is_in_doubt(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "graph", client(runtime.configuration.graph_base_url, timedelta(milliseconds=300)))
    fleet.graph.hang(executed="late")
    id = store()
    fleet.send()
    assert sending(id) == "in_doubt"
    fleet.graph.release()
    support.wait_until("Graph has sent it after all", lambda: fleet.mails(id) == 1)
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def client(base_url: str, timeout: timedelta) -> GraphClient:
    return GraphClient(base_url, runtime.tokens, timeout=timeout, tag_id=runtime.TAG)


# Mailbox refuses


@pytest.mark.parametrize("refuse", ["deny", "unlicense", "remove_mailbox"])
def test_a_mailbox_that_refuses_is_paused_longer_each_time_and_its_mail_spends_attempts(
    fleet: Fleet, refuse: str
) -> None:
    # Given
    getattr(fleet.graph, refuse)(SENDER)
    first, second = store(publisher_message_id="1"), store(publisher_message_id="2")
    # When
    fleet.schedule()
    results = fleet.run("send_plain")
    # Then
    assert set(results) == {"done"}
    assert email_row(first)["attempt_count"] == 1
    assert email_row(first)["status"] == email_row(second)["status"] == "received"
    assert sending(first) is None
    assert table("mailboxes")[0]["refusal_count"] == 1
    assert 27 < paused_for() <= 30
    # When the pause is over, one mail probes
    wait_passes(first)
    wait_passes(second)
    assert len(fleet.send()) == 1
    # When somebody has mended it, the probe goes through and opens it
    fleet.graph.allow(SENDER)
    wait_passes(first)
    wait_passes(second)
    assert fleet.send() == ["done"]
    wait_passes(first)
    wait_passes(second)
    fleet.send()
    assert {fleet.mails(first), fleet.mails(second)} == {1}
    assert table("mailboxes")[0]["refusal_count"] == 0


def test_the_mails_of_a_mailbox_that_refuses_probe_in_turns(fleet: Fleet) -> None:
    fleet.graph.deny(SENDER)
    first = store(publisher_message_id="1")
    fleet.send()
    assert 58 < seconds_until("incoming_emails", "next_attempt_at", "id", first) <= 60
    # When the pause of half a minute is over
    second = store(publisher_message_id="2")
    rows("UPDATE mailboxes SET paused_until = now()")
    fleet.send()
    # Then
    assert [email_row(id)["attempt_count"] for id in (first, second)] == [1, 1]


# Started too late


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("by_draft", [False, True])
def test_a_send_that_starts_long_after_its_admission_is_admitted_anew(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, configure: Configure, by_draft: bool, room: bool
) -> None:
    # Given a worker whose connection takes longer than a charge counts beyond its window
    configure(send_plain_via="draft" if by_draft else "sendmail")
    monkeypatch.setattr(graph_calls, "_LATEST_SEND", timedelta(microseconds=1))
    id = store()
    fleet.schedule()
    if not room:  # and a minute's budget that was used up meanwhile: what was reserved counts no more
        runtime.limiter.set_limits(SENDER, {"sends": 1})
        monkeypatch.setattr(graph_calls._Admission, "take", _forgetting(graph_calls._Admission.take))
    # When
    assert fleet.run("send_plain") == ["done"]
    # Then it is sent and charged once; or not sent, not in doubt, and no attempt spent
    row = email_row(id)
    if room:
        assert (row["status"], fleet.mails(id)) == ("processed", 1)
        assert {each.budget: each.used for each in runtime.limiter.usage(SENDER)}.items() >= {
            ("concurrency", 0),
            ("sends", 1),
            ("recipients", 1),
        }
    else:
        assert (row["status"], row["attempt_count"], sending(id), fleet.mails(id)) == ("received", 0, None, 0)
        assert [each.used for each in runtime.limiter.usage(SENDER) if each.budget == "concurrency"] == [0]


def _forgetting(take: Callable[..., None]) -> Callable[..., None]:
    def take_as_if_nothing_was_reserved(admission: graph_calls._Admission, *, wait: timedelta) -> None:
        if wait == timedelta():
            admission._email.charged_at_ms = 1
        take(admission, wait=wait)

    return take_as_if_nothing_was_reserved


# Configuration refused


def test_a_token_that_expired_is_replaced_at_once(fleet: Fleet) -> None:
    fleet.graph.expire_token()
    id = store()
    fleet.send()
    assert (email_row(id)["attempt_count"], fleet.mails(id)) == (1, 1)


def test_a_token_that_stays_refused_pauses_everything_and_is_no_mails_fault(fleet: Fleet) -> None:
    fleet.graph.fail(401, code="InvalidAuthenticationToken", times=None)
    id = store()
    assert fleet.send() == ["done"]
    assert (email_row(id)["status"], email_row(id)["attempt_count"], sending(id)) == ("received", 0, None)
    assert 14 < waits_for(id) <= 30
    assert runtime.limiter.tenant_paused_until() is not None
    fleet.graph.clear_faults()
    fleet.settle(id)
    assert fleet.mails(id) == 1


# Transient


def test_a_graph_out_of_reach_costs_no_attempt_and_puts_nothing_in_doubt(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "graph", client("https://127.0.0.1:1/v1.0", timedelta(seconds=2)))
        id = store()
        assert fleet.send() == ["done"]
    row = email_row(id)
    assert (row["status"], row["attempt_count"], sending(id)) == ("received", 0, None)
    assert 14 < waits_for(id) <= 30
    assert "ConnectionFailed" in row["last_error"]
    fleet.settle(id)
    assert (email_row(id)["attempt_count"], fleet.mails(id)) == (1, 1)


def test_the_wait_doubles_with_each_attempt_and_is_spread_over_its_whole_length() -> None:
    from actors.waiting import backoff

    shortest, longest = runtime.configuration.retry_backoff_min, runtime.configuration.retry_backoff_max
    for attempt in (1, 2, 5, 8, 100):
        ceiling = min(shortest * 2 ** min(attempt - 1, 20), longest)
        waits = [backoff(attempt) for _ in range(300)]
        assert max(waits) <= ceiling
        assert max(waits) > 0.9 * ceiling
        assert min(waits) < 0.1 * ceiling


# Permanent


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (400, "ErrorInvalidRecipients", "invalid_recipient"),
        (400, "ErrorInvalidPropertySet", "invalid_message"),
        (413, "", "message_too_large"),
    ],
)
def test_a_permanent_error_is_dead_lettered_at_once_and_told(fleet: Fleet, status: int, code: str, reason: str) -> None:
    # Given
    fleet.graph.fail(status, code, operation="send_mail", times=None, message="bob@example.org is not valid")
    id = store()
    # When
    assert fleet.send() == ["dead-lettered"]
    # Then
    assert (email_row(id)["status"], sending(id)) == ("failed", None)
    (letter,) = table("dlq")
    assert (letter["reason"], letter["queue_name"], letter["actor_name"]) == (reason, "send_plain", "send_plain")
    assert "bob@" not in letter["last_error"]
    assert fleet.events() == ["SendEmailFailed"]
    assert fleet.send() == []
    assert len(fleet.graph.requests(operation="send_mail")) == 1


def test_a_mail_that_used_up_its_attempts_is_dead_lettered(fleet: Fleet, configure: Configure) -> None:
    configure(max_attempts=2)
    fleet.graph.deny(SENDER)
    id = store()
    assert fleet.send() == ["done"]
    wait_passes(id)
    assert fleet.send() == ["dead-lettered"]
    assert (email_row(id)["status"], email_row(id)["attempt_count"]) == ("failed", 2)
    (letter,) = table("dlq")
    assert (letter["reason"], letter["attempts"]) == ("mailbox_denied", 2)


def test_a_mail_that_ends_every_worker_is_given_up_at_last(fleet: Fleet, configure: Configure) -> None:
    # Given an email whose workers died after their claims, without an intent, as often as it may be tried
    configure(max_attempts=2)
    id = store(attachments=[{"name": "a", "size": 5, "urlOrId": fleet.graph.file_url(5)}])
    for _ in range(2):
        fleet.schedule()
        support.claim(id, intent=False)
        lapse(id)
    # Then
    fleet.take("send_attached")
    assert fleet.send() == ["dead-lettered"]
    assert table("dlq")[0]["reason"] == "attempts_used_up"


def test_a_replay_sends_what_had_failed_once(fleet: Fleet) -> None:
    fleet.graph.fail(400, "ErrorInvalidRecipients", operation="send_mail")
    id = store()
    fleet.send()
    models.dead_letters.resolve(table("dlq")[0]["id"], replayed=True, who="olga")
    assert fleet.send() == ["done"]
    assert fleet.mails(id) == 1
    assert fleet.events() == ["SendEmailFailed", "SendEmailSent"]


# Errors of our own


def test_an_unforeseen_error_after_the_intent_leaves_the_mail_in_doubt(fleet: Fleet) -> None:
    id = store()
    rows("UPDATE incoming_emails SET payload = '{}'")
    assert fleet.send() == ["done"]
    assert sending(id) == "in_doubt"
    assert fleet.graph.requests() == []


# Workers and servers that die


@pytest.mark.parametrize("sent", [True, False])
def test_a_worker_that_died_during_the_send_leaves_the_mail_in_doubt(
    fleet: Fleet, sent: bool, configure: Configure
) -> None:
    # Given
    id = store()
    email = support.claim(id, intent=True)
    if sent:
        runtime.graph.send_mail(email.mailbox, actors.composition.graph_message(id, email.payload))
    # When its lease runs out
    make_due(id)
    fleet.send()
    # Then it is looked up first
    assert (sending(id), fleet.mails(id)) == (("sent", 1) if sent else ("in_doubt", 0))
    if not sent:
        configure(in_doubt_grace=timedelta(0))
        fleet.settle(id)
        fleet.send()
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def test_a_worker_that_died_before_its_claim_costs_no_attempt(fleet: Fleet) -> None:
    id = store()
    fleet.schedule()
    fleet.take("send_plain")
    make_due(id)
    assert fleet.send() == ["done"]
    assert (email_row(id)["attempt_count"], fleet.mails(id)) == (1, 1)


def test_an_outcome_that_comes_after_the_lease_was_lost_is_dropped(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a worker that is so slow that its mail is taken from it while Graph answers
    id = store()
    fleet.schedule()
    (message,) = fleet.take("send_plain")
    acquire = runtime.limiter.acquire

    def acquire_slowly(*args: Any, **charges: Any) -> Any:
        lapse(id)
        return acquire(*args, **charges)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.limiter, "acquire", acquire_slowly)
        assert work(message) == "done"
    # Then its word does not count, and the mail is found sent
    assert sending(id) == "in_doubt"
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def test_while_postgresql_is_away_a_message_is_dropped_and_its_row_brings_it_back(fleet: Fleet, tables: str) -> None:
    id = store()
    fleet.schedule()
    (message,) = fleet.take("send_plain")
    models.disconnect()
    models.connect("postgresql://nobody@127.0.0.1:1/none", "tests")
    assert work(message) == "done"
    models.connect(tables, "tests")
    assert email_row(id)["status"] == "dispatched"
    make_due(id)
    fleet.send()
    assert fleet.mails(id) == 1
