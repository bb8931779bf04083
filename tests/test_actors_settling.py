"""A mail in doubt: what is found in the mailbox decides, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import support
from support import SENDER, Fleet, email_row, lapse, rows, sending, store, table

import models
import runtime
from actors.composition import graph_message
from models import scheduling

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure = support.configure

Configure = Callable[..., None]
OVER = {"in_doubt_grace": timedelta(0)}


def evidence() -> list[str]:
    (sent,) = table("sent_emails")
    return [entry["seen"] for entry in sent["response_metadata"]["evidence"]]


def in_doubt(fleet: Fleet, **changes: object) -> str:
    """An email whose worker died after it had committed the intent, before it called Graph."""
    id = store(**changes)
    support.claim(id, intent=True)
    lapse(id)
    assert sending(id) == "in_doubt"
    return id


def test_found_sent_is_recorded_with_its_time_and_the_evidence(fleet: Fleet) -> None:
    fleet.graph.lose_next_answer()
    id = store()
    fleet.send()
    fleet.settle(id)
    (sent,) = table("sent_emails")
    assert (sent["status"], bool(sent["graph_message_id"]), bool(sent["sent_at"])) == ("sent", True, True)
    assert evidence()[-1] == "1 sent, 0 drafts"
    assert email_row(id)["attempt_count"] == 1


def draft_in_doubt(**changes: object) -> tuple[str, str]:
    """An email, and the draft whose send was intended by a worker that died before it asked for it."""
    id = store(**changes)
    email = support.claim(id, intent=False)
    draft = runtime.graph.create_draft(SENDER, graph_message(id, email.payload))
    email.record_draft(draft.id)
    email.record_intent(support.LEASE, draft.id)
    lapse(id)
    return id, draft.id


def test_the_evidence_names_each_call_as_graph_knows_it(fleet: Fleet) -> None:
    # Given a send without an answer
    fleet.graph.lose_next_answer()
    id = store()
    fleet.send()
    # When it is looked up
    fleet.settle(id)
    # Then our id of the one and Graph's id of the other are kept
    (sent,) = table("sent_emails")
    asked, looked = sent["response_metadata"]["evidence"]
    (request,) = fleet.graph.requests(operation="send_mail")
    assert (asked["asked"], asked["client_request_id"]) == ("send", request["client_request_id"])
    assert looked["asked"] == "messages by tag"
    assert looked["request_id"]


def test_found_as_a_draft_is_sent(fleet: Fleet) -> None:
    id, _ = draft_in_doubt()
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("sent", 1)
    assert evidence()[-2:] == ["0 sent, 1 drafts", "202"]
    assert fleet.events() == ["SendEmailSent"]


def test_a_draft_left_over_from_before_is_not_sent_while_the_send_without_it_may_still_show(
    fleet: Fleet, configure: Configure
) -> None:
    # Given a mail whose draft was made, and that was then sent without it, its answer lost, its copy not yet shown
    configure(send_plain_via="draft")
    fleet.graph.throttle(SENDER, operation="send_draft")
    id = store()
    fleet.send()
    assert email_row(id)["draft_id"]
    configure(send_plain_via="sendmail")
    fleet.graph.set_sent_items_delay(2)
    fleet.graph.lose_next_answer()
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("in_doubt", 1)
    # When it is looked for, and only the draft is there
    fleet.settle(id)
    # Then
    assert evidence()[-1] == "0 sent, 1 drafts"
    assert (sending(id), fleet.mails(id)) == ("in_doubt", 1)


def test_a_draft_of_a_plain_mail_is_sent_once_nothing_has_shown_for_so_long(fleet: Fleet, configure: Configure) -> None:
    id = in_doubt(fleet)
    payload = rows("SELECT payload FROM incoming_emails")[0][0]
    runtime.graph.create_draft(SENDER, graph_message(id, payload))
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("in_doubt", 0)
    configure(**OVER)
    fleet.settle(id)
    assert (sending(id), fleet.mails(id), fleet.graph.requests(operation="send_mail")) == ("sent", 1, [])


def test_an_expired_mail_is_not_sent_though_its_draft_is_found(fleet: Fleet, configure: Configure) -> None:
    # Given
    id, _ = draft_in_doubt(expires_at="2100-01-01T00:00:00Z")
    rows("UPDATE incoming_emails SET payload = jsonb_set(payload::jsonb, '{expires_at}', '\"2020-01-01T00:00:00Z\"')")
    rows("UPDATE incoming_emails SET expires_at = now()")
    # When
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("in_doubt", 0)
    configure(**OVER)
    fleet.settle(id)
    fleet.schedule()
    # Then
    assert (email_row(id)["status"], fleet.mails(id)) == ("expired", 0)


def test_the_look_that_decides_does_not_depend_on_when_the_clock_said_that_the_mail_came(
    fleet: Fleet, configure: Configure
) -> None:
    # Given that PostgreSQL's clock was ahead when the mail was stored
    fleet.graph.lose_next_answer()
    id = store()
    rows("UPDATE incoming_emails SET created_at = now() + interval '1 hour'")
    fleet.send()
    configure(**OVER)
    # When
    fleet.settle(id)
    # Then
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def test_the_replay_of_a_held_mail_that_has_expired_meanwhile_comes_to_its_end(
    fleet: Fleet, configure: Configure
) -> None:
    # Given
    id = store(expires_at="2100-01-01T00:00:00Z")
    support.claim(id, intent=True)
    lapse(id)
    configure(**OVER, in_doubt_policy="hold")
    assert fleet.settle(id) == ["dead-lettered"]
    rows("UPDATE incoming_emails SET expires_at = now()")
    # When
    models.dead_letters.resolve(table("dlq")[0]["id"], replayed=True, who="olga")
    fleet.send()
    fleet.schedule()
    # Then
    assert (email_row(id)["status"], sending(id), fleet.mails(id)) == ("expired", "not_sent", 0)
    due_in = scheduling.next_due_in(datetime.now(UTC))
    assert due_in is None or due_in > timedelta(0)


def test_an_operators_replay_is_given_as_long_as_the_first_doubt_was(fleet: Fleet, configure: Configure) -> None:
    # Given a mail that could not be looked up for days, and was replayed then
    id = in_doubt(fleet)
    rows("UPDATE sent_emails SET intent_at = now() - interval '4 days'")
    fleet.graph.fail(503, operation="find", times=None)
    assert fleet.settle(id) == ["dead-lettered"]
    models.dead_letters.resolve(table("dlq")[0]["id"], replayed=True, who="olga")
    # When it still cannot be
    assert fleet.send() == ["done"]
    # Then it is looked up again, not given up
    assert (email_row(id)["status"], sending(id)) == ("processing", "in_doubt")


def test_an_error_that_nobody_foresaw_does_not_keep_a_mail_in_doubt_for_ever(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = in_doubt(fleet)
    rows("UPDATE sent_emails SET intent_at = now() - interval '4 days'")
    monkeypatch.setattr(runtime, "graph", object())
    assert fleet.settle(id) == ["dead-lettered"]
    assert (email_row(id)["status"], sending(id), table("dlq")[0]["reason"]) == ("failed", "in_doubt", "in_doubt_held")


@pytest.mark.parametrize("second_send", ["not_found", "invalid", "accepted"])
def test_a_draft_that_is_being_sent_already_is_neither_sent_twice_nor_given_up(fleet: Fleet, second_send: str) -> None:
    # Given a mail whose send got no answer, and which Graph still shows as a draft
    fleet.graph.set_behaviour(while_submitting="draft", second_send=second_send, sent_items_delay_seconds=1)
    fleet.graph.lose_next_answer(operation="send_draft")
    file = {"name": "a.txt", "size": 5, "urlOrId": fleet.graph.file_url(5)}
    id = store(attachments=[file])
    fleet.send()
    assert sending(id) == "in_doubt"
    # When
    results = fleet.settle(id)
    # Then
    assert "dead-lettered" not in results
    assert fleet.mails(id) == 1

    def sent() -> bool:
        if sending(id) != "sent":
            fleet.settle(id)
        return sending(id) == "sent"

    support.wait_until("it is found sent", sent)
    assert (email_row(id)["status"], fleet.mails(id), fleet.events()) == ("processed", 1, ["SendEmailSent"])


def test_the_send_of_a_draft_that_was_found_may_be_in_doubt_again(fleet: Fleet) -> None:
    id, _ = draft_in_doubt()
    fleet.graph.lose_next_answer(operation="send_draft")
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("in_doubt", 1)
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def test_absent_within_the_grace_period_is_looked_for_again_and_never_sent(fleet: Fleet) -> None:
    id = in_doubt(fleet)
    for _ in range(3):
        fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("in_doubt", 0)
    assert evidence()[-3:] == ["0 sent, 0 drafts"] * 3
    assert 25 < support.seconds_until("incoming_emails", "next_attempt_at", "id", id) <= 30
    assert fleet.graph.requests(operation="send_mail") == []


def test_a_mail_that_shows_late_is_found_within_the_grace_period(fleet: Fleet) -> None:
    fleet.graph.set_sent_items_delay(0.6)
    fleet.graph.lose_next_answer()
    id = store()
    fleet.send()
    fleet.settle(id)
    assert sending(id) == "in_doubt"

    def found() -> bool:
        fleet.settle(id)
        return sending(id) == "sent"

    support.wait_until("it shows", found)
    assert fleet.mails(id) == 1


def test_absent_after_the_grace_period_is_sent_again(fleet: Fleet, configure: Configure) -> None:
    id = in_doubt(fleet)
    configure(**OVER)
    fleet.settle(id)
    assert (email_row(id)["status"], sending(id)) == ("received", "not_sent")
    fleet.send()
    assert (sending(id), fleet.mails(id)) == ("sent", 1)
    assert evidence()[-2:] == ["0 sent, 0 drafts", "202"]


def test_absent_after_the_grace_period_is_held_where_the_policy_says_so(fleet: Fleet, configure: Configure) -> None:
    # Given
    id = in_doubt(fleet)
    configure(**OVER, in_doubt_policy="hold")
    # When
    assert fleet.settle(id) == ["dead-lettered"]
    # Then
    assert (email_row(id)["status"], sending(id), fleet.mails(id)) == ("failed", "in_doubt", 0)
    assert table("dlq")[0]["reason"] == "in_doubt_held"
    assert fleet.events() == ["SendEmailFailed"]
    # When an operator replays it, it is looked up once more and then sent
    models.dead_letters.resolve(table("dlq")[0]["id"], replayed=True, who="olga")
    fleet.send()
    assert (sending(id), fleet.mails(id)) == ("not_sent", 0)
    fleet.send()
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def test_the_replay_of_a_held_mail_that_was_sent_after_all_does_not_send_it_again(
    fleet: Fleet, configure: Configure
) -> None:
    fleet.graph.set_sent_items_delay(0.5)
    fleet.graph.lose_next_answer()
    configure(**OVER, in_doubt_policy="hold")
    id = store()
    fleet.send()
    assert fleet.settle(id) == ["dead-lettered"]
    support.wait_until("it shows", lambda: fleet.graph.messages(SENDER))
    models.dead_letters.resolve(table("dlq")[0]["id"], replayed=True, who="olga")
    fleet.send()
    assert (email_row(id)["status"], sending(id), fleet.mails(id)) == ("processed", "sent", 1)


@pytest.mark.parametrize("trouble", ["throttled", "unavailable", "lost answer", "denied", "no token"])
def test_a_look_up_that_fails_leaves_the_mail_in_doubt_and_sends_nothing(
    fleet: Fleet, trouble: str, configure: Configure
) -> None:
    # Given
    fleet.graph.lose_next_answer()
    id = store()
    fleet.send()
    configure(**OVER, max_attempts=1)
    {
        "throttled": lambda: fleet.graph.throttle(operation="find"),
        "unavailable": lambda: fleet.graph.unavailable(operation="find"),
        "lost answer": lambda: fleet.graph.lose_next_answer(operation="find"),
        "denied": lambda: fleet.graph.deny(SENDER),
        "no token": lambda: fleet.graph.fail(401, code="InvalidAuthenticationToken", times=2, operation="find"),
    }[trouble]()
    # When
    assert fleet.settle(id) == ["done"]
    # Then
    assert (email_row(id)["status"], sending(id), fleet.mails(id)) == ("processing", "in_doubt", 1)
    # When the trouble is over
    fleet.graph.clear_faults()
    fleet.settle(id)
    # Then
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def test_a_mail_in_doubt_is_looked_up_even_if_its_attempts_are_used_up(fleet: Fleet, configure: Configure) -> None:
    fleet.graph.lose_next_answer()
    id = store()
    fleet.send()
    rows("UPDATE incoming_emails SET attempt_count = 50")
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def test_two_mails_for_one_email_are_recorded_as_sent_and_noted(fleet: Fleet) -> None:
    id = in_doubt(fleet)
    payload = rows("SELECT payload FROM incoming_emails")[0][0]
    for _ in range(2):
        runtime.graph.send_mail(SENDER, graph_message(id, payload))
    fleet.settle(id)
    assert sending(id) == "sent"
    assert evidence()[-1] == "2 sent, 0 drafts"


def test_a_look_up_that_graph_refuses_says_nothing_about_the_mail(fleet: Fleet) -> None:
    # Given
    id = in_doubt(fleet)
    fleet.graph.fail(403, code="ErrorMessageSizeExceeded", operation="find", times=2)
    # When
    results = fleet.settle(id)
    # Then it is looked up again, not given up
    assert "dead-lettered" not in results
    assert (email_row(id)["status"], sending(id), table("dlq")) == ("processing", "in_doubt", [])


def test_a_mail_that_shows_itself_after_it_was_found_absent_is_not_sent_again_as_a_draft(fleet: Fleet) -> None:
    # Given a mail by way of a draft that was found absent and is to be sent anew
    file = {"name": "a.txt", "size": 5, "urlOrId": fleet.graph.file_url(5)}
    id = store(attachments=[file])
    fleet.send()
    assert fleet.mails(id) == 1
    rows("UPDATE sent_emails SET status = 'not_sent'")
    rows("UPDATE incoming_emails SET status = 'received', draft_id = NULL, attempt_count = 1")
    rows("DELETE FROM file_uploads")
    # When its next attempt finds it in Sent Items
    fleet.send()
    # Then
    assert (email_row(id)["status"], sending(id), fleet.mails(id)) == ("processed", "sent", 1)


def test_a_mail_that_came_too_late_is_not_sent(fleet: Fleet) -> None:
    # Given a dispatch that waited in its queue until expires_at had passed
    id = store(expires_at="2999-01-01T00:00:00Z")
    rows('UPDATE incoming_emails SET payload = (payload::jsonb || \'{"expires_at": "2020-01-01T00:00:00Z"}\')::json')
    # When
    fleet.send()
    # Then
    assert (email_row(id)["status"], fleet.mails(id), fleet.events()) == ("expired", 0, ["SendEmailExpired"])
