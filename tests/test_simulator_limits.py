"""Graph's limits per application and mailbox, as the simulator counts them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime

import pytest
from simulator_support import ANN, GraphClient, code, message, wait_until

from simulator.control import Simulator

CARL = "carl@example.com"


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.start(tmp_path_factory.mktemp("simulator")) as started:
        yield started


@pytest.fixture
def graph(simulator: Simulator) -> GraphClient:
    simulator.reset()
    return GraphClient(simulator)


def provoked(graph: GraphClient) -> dict[tuple[str, str], int]:
    return {
        (each["mailbox"], each["limit"]): each["count"] for each in graph.simulator.request_counts()["provoked_429"]
    }


def test_a_fifth_request_at_a_time_is_refused_for_that_mailbox_alone(graph: GraphClient) -> None:
    # Given four requests that are being served
    graph.simulator.hang(ANN, times=4, executed="late")
    with ThreadPoolExecutor(4) as pool:
        held = [pool.submit(graph.send) for _ in range(4)]
        wait_until(lambda: graph.simulator.request_counts()["most_in_flight"].get(ANN) == 4)

        # When one more comes, and one for another mailbox
        fifth = graph.send()
        elsewhere = graph.send(mailbox=CARL)
        graph.simulator.release()

    # Then it alone is refused, and counted as provoked
    assert (fifth.status_code, code(fifth), fifth.headers["Retry-After"]) == (429, "ApplicationThrottled", "1")
    assert fifth.json()["error"]["message"] == "Application is over its MailboxConcurrency limit."
    assert elsewhere.status_code == 202
    assert [each.result().status_code for each in held] == [202] * 4
    assert provoked(graph) == {(ANN, "MailboxConcurrency"): 1}
    assert len(graph.simulator.deliveries()) == 5


def test_latency_makes_concurrency_visible(graph: GraphClient) -> None:
    graph.simulator.set_latency(1.0, "send_mail")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: graph.send(), range(3)))

    assert graph.simulator.request_counts()["most_in_flight"] == {ANN: 3}


def test_requests_beyond_the_window_are_refused_until_it_has_moved_on(graph: GraphClient) -> None:
    graph.simulator.set_limits(requests=3, requests_window_seconds=600)

    answers = [graph.send() for _ in range(4)]

    assert [each.status_code for each in answers] == [202, 202, 202, 429]
    assert 590 < int(answers[3].headers["Retry-After"]) <= 600
    assert graph.send(mailbox=CARL).status_code == 202
    graph.simulator.set_limits(requests_window_seconds=0.001)
    assert graph.send().status_code == 202


def test_uploaded_bytes_beyond_the_window_are_refused(graph: GraphClient) -> None:
    graph.simulator.set_limits(upload_bytes=5000)
    large = message(body={"contentType": "text", "content": "x" * 3000})

    assert graph.send(large).status_code == 202
    answer = graph.send(large)

    assert (answer.status_code, code(answer)) == (429, "ApplicationThrottled")
    assert answer.json()["error"]["message"] == "Application is over its IncomingBytes limit."
    assert graph.call("GET", "/messages").status_code == 200
    assert provoked(graph) == {(ANN, "IncomingBytes"): 1}


def test_zero_switches_a_limit_off(graph: GraphClient) -> None:
    graph.simulator.set_limits(requests=0, upload_bytes=0, concurrency=0)

    assert {graph.send().status_code for _ in range(10)} == {202}


def test_a_retry_before_its_time_is_counted_and_punished_if_so_set(graph: GraphClient) -> None:
    graph.simulator.throttle(ANN, retry_after="100")

    assert graph.send().headers["Retry-After"] == "100"
    assert graph.send().status_code == 202
    graph.simulator.set_limits(early_retry_penalty_seconds=50)
    punished = graph.send()

    assert punished.status_code == 429
    assert 140 < int(punished.headers["Retry-After"]) <= 150
    assert graph.simulator.request_counts()["early_retries"] == {ANN: 2}


def test_an_unknown_limit_or_choice_is_a_mistake_of_the_test(graph: GraphClient) -> None:
    with pytest.raises(ValueError, match="colour"):
        graph.simulator.set_limits(colour=1)
    with pytest.raises(ValueError, match="not_found, invalid, accepted"):
        graph.simulator.set_behaviour(second_send="perhaps")


@pytest.mark.parametrize("retry_after", ["100", "99.5", "0,100"])
def test_a_retry_before_its_time_is_counted_however_the_time_was_told(graph: GraphClient, retry_after: str) -> None:
    graph.simulator.throttle(ANN, retry_after=retry_after)

    assert graph.send().headers["Retry-After"] == retry_after
    graph.send()

    assert graph.simulator.request_counts()["early_retries"] == {ANN: 1}


def test_a_date_to_retry_after_is_so_far_ahead_of_each_answer(graph: GraphClient) -> None:
    graph.simulator.throttle(ANN, retry_after=None, retry_after_date_seconds=100, times=2)

    answers = [graph.send(), graph.send()]

    for answer, noted in zip(answers, graph.simulator.requests(ANN), strict=True):
        date = parsedate_to_datetime(answer.headers["Retry-After"])
        ahead = date - datetime.fromisoformat(noted["at"])
        assert timedelta(seconds=99.5) < ahead <= timedelta(seconds=101)
        assert abs(noted["wait_seconds"] - ahead.total_seconds()) < 0.5
    assert graph.simulator.request_counts()["early_retries"] == {ANN: 1}


def test_the_journal_tells_when_each_request_came_and_how_long_it_was_kept(graph: GraphClient) -> None:
    # Given an operation that takes half a second, and one answer that asks to wait
    graph.simulator.set_latency(0.5, "send_mail")
    graph.simulator.throttle(ANN, retry_after="0.2")
    # When it is called between two looks at the clock that all processes share
    before = time.monotonic()
    graph.send()
    graph.send()
    after = time.monotonic()
    # Then both times lie between them
    refused, sent = graph.simulator.requests(ANN)
    assert before < refused["arrived_monotonic"] <= refused["answered_monotonic"] - 0.5
    assert refused["answered_monotonic"] < sent["arrived_monotonic"] <= sent["answered_monotonic"] - 0.5 < after - 0.5
    # And what was asked for is kept as it was said, and as it was meant
    assert (refused["retry_after"], refused["wait_seconds"]) == ("0.2", 0.2)
    assert (sent["retry_after"], sent["wait_seconds"]) == (None, None)


def test_the_journal_is_read_on_from_the_request_seen_last(graph: GraphClient) -> None:
    for _ in range(3):
        graph.send()

    first_two = graph.simulator.requests(operation="send_mail", limit=2)
    rest = graph.simulator.requests(operation="send_mail", after=first_two[-1]["number"])

    assert len(rest) == 1
    assert rest[0]["number"] == first_two[-1]["number"] + 1
    assert graph.simulator.requests(after=rest[0]["number"]) == []
