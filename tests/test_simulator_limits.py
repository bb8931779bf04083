"""Graph's limits per application and mailbox, as the simulator counts them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
