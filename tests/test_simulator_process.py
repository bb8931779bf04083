"""The simulator as a process: how it starts, what it serves besides Graph, and how it ends."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from simulator_support import ANN, GraphClient, message

from simulator import files
from simulator.control import Simulator
from simulator.process import StartFailed


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.start(tmp_path_factory.mktemp("simulator")) as started:
        yield started


@pytest.fixture
def graph(simulator: Simulator) -> GraphClient:
    simulator.reset()
    return GraphClient(simulator)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_announces_itself_and_ends_at_once_when_asked_to(tmp_path: Path, number: signal.Signals) -> None:
    # Given a simulator started from a shell
    process = subprocess.Popen(
        [sys.executable, "-m", "simulator", "--dir", str(tmp_path), "--client-id", "me"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    announced = json.loads((tmp_path / "simulator.json").read_text())
    assert announced["base_url"] in line
    assert announced["client_id"] == "me"

    # When a connection is open and the process is told to end
    with requests.Session() as session:
        session.trust_env = False
        assert session.get(f"{announced['base_url']}/health", verify=announced["ca"]).json() == {"status": "ok"}
        process.send_signal(number)

        # Then it does not wait for the connection to be closed
        assert process.wait(timeout=5) == 0
    process.stdout.close()


def test_a_second_start_in_a_folder_keeps_its_authority(tmp_path: Path) -> None:
    with Simulator.start(tmp_path):
        first = (tmp_path / "ca.pem").read_bytes()
    with Simulator.start(tmp_path) as again:
        assert (tmp_path / "ca.pem").read_bytes() == first
        assert GraphClient(again).send().status_code == 202


def test_other_machines_reach_it_by_the_name_that_it_is_given(tmp_path: Path) -> None:
    # Given a folder with certificates for this machine alone
    with Simulator.start(tmp_path):
        pass
    # When it is started for another name
    with Simulator.start(tmp_path, hostname="graph.example"):
        announced = json.loads((tmp_path / "simulator.json").read_text())
        # Then it announces that name and has a certificate for it
        assert announced["base_url"] == f"https://graph.example:{announced['port']}"
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        with (
            socket.create_connection(("127.0.0.1", announced["port"]), timeout=5) as connection,
            context.wrap_socket(connection, server_hostname="graph.example") as checked,
        ):
            assert checked.version()


def test_a_failed_start_says_why(simulator: Simulator, tmp_path: Path) -> None:
    taken = simulator.base_url.rpartition(":")[2]

    with pytest.raises(StartFailed, match="address already in use"):
        Simulator.start(tmp_path, port=taken)


def test_the_certificate_holds_for_every_name_of_this_machine(simulator: Simulator) -> None:
    url = f"{simulator.base_url.replace('localhost', '127.0.0.1')}/health"

    assert requests.get(url, verify=simulator.ca_bundle, timeout=5).status_code == 200
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(url, timeout=5)


def test_a_reset_forgets_everything(graph: GraphClient) -> None:
    graph.send()
    graph.draft()
    graph.simulator.fail(500)
    graph.simulator.set_limits(concurrency=1)

    graph.simulator.reset()

    assert graph.simulator.deliveries() == graph.simulator.messages(ANN) == graph.simulator.faults() == []
    assert graph.simulator.set_limits()["concurrency"] == 4
    assert graph.simulator.request_counts()["requests"] == []


def test_the_page_shows_what_was_sent_and_what_will_go_wrong_without_trusting_it(graph: GraphClient) -> None:
    graph.send(message(subject="<script>alert(1)</script>"))
    graph.simulator.throttle(ANN, retry_after="77")
    graph.simulator.deny("carl@example.com")

    page = graph.session.get(graph.simulator.base_url).text

    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>" not in page
    assert "retry_after 77" in page
    assert "[RAOP]" in page


@pytest.mark.parametrize("start", [0, 1, 65_536, 100_000])
def test_a_file_is_what_anyone_can_compute_from_its_seed(graph: GraphClient, start: int) -> None:
    url = graph.simulator.file_url(200_000, seed="abc", type="application/pdf")

    whole = requests.get(url, verify=graph.simulator.ca_bundle, timeout=10)
    rest = requests.get(url, headers={"Range": f"bytes={start}-"}, verify=graph.simulator.ca_bundle, timeout=10)

    assert whole.content == files.content("abc", 200_000)
    assert hashlib.sha256(whole.content).hexdigest() == files.sha256("abc", 200_000)
    assert (whole.headers["Content-Length"], whole.headers["Content-Type"]) == ("200000", "application/pdf")
    assert (rest.status_code, rest.content) == (206, whole.content[start:])
    assert rest.headers["Content-Range"] == f"bytes {start}-199999/200000"


def test_the_head_of_a_file_tells_its_size(graph: GraphClient) -> None:
    answer = graph.session.head(graph.simulator.file_url(150_000_000))

    assert (answer.status_code, answer.headers["Content-Length"], answer.content) == (200, "150000000", b"")


def test_a_files_source_fails_as_it_is_asked_to(graph: GraphClient) -> None:
    def get(url: str) -> requests.Response:
        return graph.session.get(url, timeout=10, allow_redirects=False)

    sometimes = graph.simulator.file_url(10, fail=503, times=2)
    assert [get(sometimes).status_code for _ in range(3)] == [503, 503, 200]
    assert [get(graph.simulator.file_url(10, fail=500)).status_code for _ in range(2)] == [500, 500]
    assert get(f"{graph.simulator.base_url}/files/missing.pdf").status_code == 404
    assert get(f"{graph.simulator.base_url}/files/redirect?to=/x").headers["Location"] == "/x"
    assert get(graph.simulator.file_url(2000, slow=20_000)).content == files.content(0, 2000)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        get(graph.simulator.file_url(100_000, truncate=50_000))
