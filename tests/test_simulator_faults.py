"""Faults that are asked for by name: how they look to the client, and whether the call was executed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes, policy
from typing import Any

import pytest
import requests
from simulator_support import ANN, GraphClient, code, tagged, wait_until

from simulator.control import Simulator

CARL = "carl@example.com"


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.start(tmp_path_factory.mktemp("simulator")) as started:
        yield started


@pytest.fixture
def graph(simulator: Simulator) -> GraphClient:
    simulator.reset()
    simulator.set_sent_items_delay(0)
    return GraphClient(simulator)


@pytest.mark.parametrize("retry_after", ["3", "0.249", "0,120", "Wed, 21 Oct 2026 07:28:00 GMT", None])
def test_throttling_carries_any_literal_retry_after_and_executes_nothing(
    graph: GraphClient, retry_after: str | None
) -> None:
    graph.simulator.throttle(ANN, retry_after=retry_after, times=2)

    for _ in range(2):
        answer = graph.send()
        assert (answer.status_code, code(answer)) == (429, "ApplicationThrottled")
        assert answer.headers.get("Retry-After") == retry_after
    assert graph.send().status_code == 202
    assert len(graph.simulator.deliveries()) == 1
    assert graph.simulator.request_counts()["provoked_429"] == []


@pytest.mark.parametrize("executed", [True, False])
@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_a_server_error_says_nothing_about_whether_the_mail_left(
    graph: GraphClient, status: int, executed: bool
) -> None:
    graph.simulator.fail(status, code="ErrorTimeoutExpired", executed=executed, operation="send_mail")

    answer = graph.send(tagged("ab12"))

    assert (answer.status_code, code(answer)) == (status, "ErrorTimeoutExpired")
    assert len(graph.found("ab12")) == len(graph.simulator.deliveries()) == int(executed)


@pytest.mark.parametrize(
    ("body", "content_type", "beginning"),
    [("json", "application/json", b'{"error"'), ("empty", "text/plain", b""), ("html", "text/html", b"<html>")],
)
def test_an_error_body_has_one_of_three_forms(
    graph: GraphClient, body: Any, content_type: str, beginning: bytes
) -> None:
    graph.simulator.fail(504, body=body)

    answer = graph.send()

    assert answer.headers["Content-Type"].startswith(content_type)
    assert answer.content.startswith(beginning)
    assert bool(answer.content) is (body != "empty")


@pytest.mark.parametrize("retry_after", ["7", None])
def test_unavailability_comes_with_or_without_retry_after(graph: GraphClient, retry_after: str | None) -> None:
    graph.simulator.unavailable(retry_after=retry_after)

    answer = graph.send()

    assert (answer.status_code, answer.headers.get("Retry-After")) == (503, retry_after)


def test_a_lost_answer_closes_the_connection_after_the_mail_has_left(graph: GraphClient) -> None:
    graph.simulator.lose_next_answer()

    with pytest.raises(requests.ConnectionError):
        graph.send(tagged("ab12"))

    assert graph.simulator.delivery_counts_by_tag() == {"ab12": 1}
    assert [each["status"] for each in graph.simulator.requests(ANN, "send_mail")] == ["none"]
    assert graph.send().status_code == 202


def test_a_lost_answer_to_a_draft_leaves_it_there_or_sent(graph: GraphClient) -> None:
    graph.simulator.lose_next_answer(operation="create_draft")
    with pytest.raises(requests.ConnectionError):
        graph.draft(tagged("ab12"))
    (orphan,) = graph.found("ab12")
    assert orphan["isDraft"] is True

    graph.simulator.lose_next_answer(operation="send_draft")
    with pytest.raises(requests.ConnectionError):
        graph.send_draft(orphan["id"])
    (sent,) = graph.found("ab12")
    assert sent["isDraft"] is False


def test_a_reset_connection_has_executed_nothing(graph: GraphClient) -> None:
    graph.simulator.reset_connection()

    with pytest.raises(requests.ConnectionError):
        graph.send(tagged("ab12"))

    assert graph.simulator.deliveries() == graph.found("ab12") == []
    assert [each["status"] for each in graph.simulator.requests(ANN, "send_mail")] == ["none"]


@pytest.mark.parametrize(("executed", "left"), [(True, 1), (False, 0), ("late", 1)])
def test_a_hanging_call_outlasts_its_client(graph: GraphClient, executed: Any, left: int) -> None:
    graph.simulator.hang(executed=executed)

    with pytest.raises(requests.ReadTimeout):
        graph.send(timeout=(10, 0.5))

    wait_until(lambda: graph.simulator.requests(ANN, "send_mail") != [])
    assert len(graph.simulator.deliveries()) == left


def test_a_late_call_takes_effect_at_its_time_however_early_its_client_gives_up(graph: GraphClient) -> None:
    graph.simulator.hang(executed="late", seconds=1)
    begun = time.monotonic()

    with pytest.raises(requests.ReadTimeout):
        graph.send(timeout=(10, 0.2))

    wait_until(lambda: graph.simulator.deliveries() != [])
    assert time.monotonic() - begun >= 1


def test_a_hanging_call_goes_on_when_it_is_released(graph: GraphClient) -> None:
    graph.simulator.hang(executed="late")
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(graph.send)
        wait_until(lambda: graph.simulator.request_counts()["most_in_flight"].get(ANN) == 1)
        assert graph.simulator.deliveries() == []

        graph.simulator.release()

        assert held.result().status_code == 202
    assert len(graph.simulator.deliveries()) == 1


def test_a_hang_of_some_seconds_ends_by_itself(graph: GraphClient) -> None:
    graph.simulator.hang(seconds=0.1, executed=True)

    assert graph.send().status_code == 202


def test_an_accepted_mail_may_carry_a_retry_after(graph: GraphClient) -> None:
    graph.simulator.accept_with_retry_after(retry_after="9")

    answer = graph.send()

    assert (answer.status_code, answer.headers["Retry-After"]) == (202, "9")
    assert len(graph.simulator.deliveries()) == 1


def test_an_accepted_mail_may_leave_twice(graph: GraphClient) -> None:
    graph.simulator.deliver_twice()
    assert graph.found("ab12") == []

    assert graph.send(tagged("ab12")).status_code == 202
    assert graph.simulator.delivery_counts_by_tag() == {"ab12": 2}
    assert len(graph.found("ab12")) == 1


def send_in_either_way(graph: GraphClient, way: str) -> None:
    answer = graph.send(tagged("ab12")) if way == "send_mail" else graph.send_draft(graph.draft(tagged("ab12")))
    assert answer.status_code == 202


@pytest.mark.parametrize("way", ["send_mail", "send_draft"])
def test_an_accepted_mail_may_be_lost(graph: GraphClient, way: str) -> None:
    graph.simulator.lose_mail(operation=way)

    send_in_either_way(graph, way)

    assert graph.found("ab12") == graph.simulator.deliveries() == []


@pytest.mark.parametrize("way", ["send_mail", "send_draft"])
def test_an_accepted_mail_may_stay_in_drafts(graph: GraphClient, way: str) -> None:
    graph.simulator.keep_in_drafts(operation=way)

    send_in_either_way(graph, way)

    (stuck,) = graph.found("ab12")
    assert (stuck["isDraft"], graph.simulator.deliveries()) == (True, [])
    assert graph.send_draft(stuck["id"]).status_code == 202
    assert len(graph.simulator.deliveries()) == 1


def test_an_accepted_mail_may_bounce_into_the_inbox(graph: GraphClient) -> None:
    graph.simulator.bounce(operation="send_mail")

    send_in_either_way(graph, "send_mail")

    (sent,) = graph.found("ab12")
    (report,) = graph.simulator.messages(ANN, "Inbox")
    assert report["subject"] == "Undeliverable: Hello"
    assert sent["internetMessageId"] in report["body"]["content"]
    assert graph.simulator.deliveries() == []


def test_a_draft_may_be_invisible_just_after_its_creation(graph: GraphClient) -> None:
    graph.simulator.hide_next_draft(3600)
    hidden, visible = graph.draft(tagged("ab12")), graph.draft()

    for answer in (graph.call("GET", f"/messages/{hidden}"), graph.send_draft(hidden)):
        assert (answer.status_code, code(answer)) == (404, "ErrorItemNotFound")
    assert graph.found("ab12") == []
    assert graph.call("GET", f"/messages/{visible}").status_code == 200


def test_a_hidden_draft_appears_in_time(graph: GraphClient) -> None:
    graph.simulator.hide_next_draft(0.1)
    hidden = graph.draft()

    wait_until(lambda: graph.call("GET", f"/messages/{hidden}").status_code == 200)


def test_an_expired_token_stays_expired_until_a_new_one_is_taken(graph: GraphClient) -> None:
    graph.simulator.expire_token(ANN)

    for _ in range(2):
        answer = graph.send()
        assert (answer.status_code, code(answer)) == (401, "InvalidAuthenticationToken")
    graph.sign_in()
    assert graph.send().status_code == 202


def test_mime_may_be_impossible_or_break_off(graph: GraphClient) -> None:
    draft_id = graph.draft()
    path = f"/messages/{draft_id}/$value"
    graph.simulator.break_mime(ANN)
    graph.simulator.break_mime(ANN, how="truncated")

    refused = graph.call("GET", path)
    assert (refused.status_code, code(refused)) == (500, "ErrorMimeContentConversionFailed")
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        graph.call("GET", path)
    statuses = [each["status"] for each in graph.simulator.requests(ANN, "mime")]
    assert statuses == ["500", "none"]
    assert message_from_bytes(graph.call("GET", path).content, policy=policy.default)["Subject"] == "Hello"


def test_a_fault_strikes_only_the_mailbox_and_operation_it_is_meant_for(graph: GraphClient) -> None:
    graph.simulator.fail(500, mailbox=ANN.upper(), operation="send_mail")

    assert graph.send(mailbox=CARL).status_code == 202
    assert graph.call("GET", "/messages").status_code == 200
    assert graph.send().status_code == 500
    assert graph.simulator.faults() == []


def test_a_call_that_graph_refuses_itself_does_not_use_a_fault_up(graph: GraphClient) -> None:
    graph.simulator.lose_next_answer()

    assert graph.send({"toRecipients": []}).status_code == 400
    with pytest.raises(requests.ConnectionError):
        graph.send()
    assert graph.send().status_code == 202


def test_an_endless_fault_ends_when_faults_are_cleared(graph: GraphClient) -> None:
    graph.simulator.fail(500, times=None)
    graph.simulator.deny(CARL)

    assert [graph.send().status_code for _ in range(5)] == [500] * 5
    graph.simulator.clear_faults()
    assert [graph.send().status_code, graph.send(mailbox=CARL).status_code] == [202, 202]


def test_a_probable_fault_strikes_the_same_calls_after_every_reset(graph: GraphClient) -> None:
    def outcomes() -> list[int]:
        graph.simulator.reset()
        graph.sign_in()
        graph.simulator.fail(500, probability=0.5, times=None)
        return [graph.send().status_code for _ in range(20)]

    first = outcomes()

    assert set(first) == {202, 500}
    assert outcomes() == first


def test_an_unknown_operation_is_a_mistake_of_the_test(graph: GraphClient) -> None:
    with pytest.raises(ValueError, match="send_mail"):
        graph.simulator.fail(500, operation="sendmail")
