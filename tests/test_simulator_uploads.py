"""Upload sessions: strictly in order, without a token, within their sizes, and gone when they are lost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from simulator_support import ANN, GraphClient, code, tagged

from simulator import files
from simulator.control import Simulator

MEBIBYTE = 1024 * 1024
SIZE = 5 * MEBIBYTE
RANGE = 2 * MEBIBYTE
CONTENT = files.content("upload", SIZE)


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.start(tmp_path_factory.mktemp("simulator")) as started:
        yield started


@pytest.fixture
def graph(simulator: Simulator) -> GraphClient:
    simulator.reset()
    simulator.set_sent_items_delay(0)
    return GraphClient(simulator)


def open_session(graph: GraphClient, draft_id: str, **changes: Any) -> requests.Response:
    item = {"attachmentType": "file", "name": "large.bin", "size": SIZE} | changes
    return graph.call("POST", f"/messages/{draft_id}/attachments/createUploadSession", json={"AttachmentItem": item})


def put(graph: GraphClient, url: str, first: int, end: int, **headers: str) -> requests.Response:
    given = {"Content-Range": f"bytes {first}-{end - 1}/{SIZE}", "Content-Type": "application/octet-stream"} | headers
    return requests.put(
        url, data=CONTENT[first:end], headers=given, verify=graph.simulator.ca_bundle, auth=_no_auth, timeout=10
    )


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def put_all(graph: GraphClient, url: str) -> requests.Response:
    for first in range(0, SIZE, RANGE):
        answer = put(graph, url, first, min(first + RANGE, SIZE))
    return answer


@pytest.fixture
def draft_id(graph: GraphClient) -> str:
    return graph.draft(tagged("large"))


@pytest.fixture
def url(graph: GraphClient, draft_id: str) -> str:
    return str(open_session(graph, draft_id).json()["uploadUrl"])


def test_a_file_arrives_range_by_range_and_leaves_with_the_mail(graph: GraphClient, draft_id: str) -> None:
    opened = open_session(graph, draft_id)
    assert opened.status_code == 201
    assert opened.json()["nextExpectedRanges"] == ["0-"]
    url = opened.json()["uploadUrl"]

    first = put(graph, url, 0, RANGE)
    assert first.status_code == 200
    assert first.json()["nextExpectedRanges"] == [str(RANGE)]
    assert "ExpirationDateTime" in first.json()
    assert "uploadUrl" not in first.json()
    assert put(graph, url, RANGE, 2 * RANGE).status_code == 200
    last = put(graph, url, 2 * RANGE, SIZE)
    assert (last.status_code, last.content) == (201, b"")

    attachment_id = last.headers["Location"].split("Attachments('")[1].removesuffix("')")
    path = f"/messages/{draft_id}/attachments/{attachment_id}"
    assert graph.call("GET", f"{path}/$value").content == CONTENT
    graph.send_draft(draft_id)
    (delivery,) = graph.simulator.deliveries()
    assert delivery["attachments"] == [
        {"name": "large.bin", "bytes": SIZE, "sha256": hashlib.sha256(CONTENT).hexdigest()}
    ]


def test_a_session_takes_files_of_three_to_150_megabytes_only(graph: GraphClient, draft_id: str) -> None:
    too_small = open_session(graph, draft_id, size=2_999_999)
    too_large = open_session(graph, draft_id, size=150 * MEBIBYTE + 1)

    assert code(too_small) == "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize"
    assert (too_small.status_code, too_large.status_code) == (400, 400)
    assert open_session(graph, draft_id, size=3_000_000).status_code == 201
    assert open_session(graph, draft_id, size=150 * MEBIBYTE).status_code == 201


@pytest.mark.parametrize(
    "changes",
    [{"attachmentType": "item"}, {"attachmentType": "folder"}, {"name": None}, {"size": "5"}, {"colour": "red"}],
)
def test_a_malformed_session_is_not_opened(graph: GraphClient, draft_id: str, changes: dict[str, Any]) -> None:
    assert open_session(graph, draft_id, **changes).status_code == 400


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [(RANGE + 1, RANGE + 10, "fragmentOutOfOrder"), (0, RANGE, "fragmentOverlap"), (10, 20, "fragmentOverlap")],
)
def test_a_range_out_of_order_is_refused_and_changes_nothing(
    graph: GraphClient, url: str, first: int, end: int, expected: str
) -> None:
    put(graph, url, 0, RANGE)

    answer = put(graph, url, first, end)

    assert (answer.status_code, code(answer)) == (416, expected)
    assert put(graph, url, RANGE, 2 * RANGE).status_code == 200


@pytest.mark.parametrize(
    ("content_range", "status"),
    [
        ("", 400),
        ("bytes 0-9", 400),
        (f"bytes 0-10/{SIZE}", 416),
        (f"bytes 0-9/{SIZE + 1}", 416),
    ],
)
def test_a_range_that_does_not_fit_is_refused(graph: GraphClient, url: str, content_range: str, status: int) -> None:
    assert put(graph, url, 0, 10, **{"Content-Range": content_range}).status_code == status


def test_a_range_above_four_mebibytes_is_refused(graph: GraphClient, url: str) -> None:
    assert put(graph, url, 0, 4 * MEBIBYTE + 1).status_code == 413


def test_the_upload_url_refuses_graphs_token_and_needs_its_own(graph: GraphClient, url: str) -> None:
    with_token = put(graph, url, 0, RANGE, Authorization=str(graph.session.headers["Authorization"]))
    without_key = put(graph, url.split("?")[0], 0, RANGE)

    assert (with_token.status_code, without_key.status_code) == (401, 401)
    assert put(graph, url, 0, RANGE).status_code == 200


def test_the_upload_url_cannot_be_asked_for_its_progress(graph: GraphClient, url: str) -> None:
    assert requests.get(url, verify=graph.simulator.ca_bundle, timeout=10).status_code == 405


def test_a_cancelled_session_is_gone(graph: GraphClient, url: str) -> None:
    cancelled = requests.delete(url, verify=graph.simulator.ca_bundle, timeout=10)

    assert (cancelled.status_code, cancelled.content) == (204, b"")
    answer = put(graph, url, 0, RANGE)
    assert (answer.status_code, code(answer)) == (404, "uploadSessionNotFound")


def test_a_session_dies_at_its_expiry(graph: GraphClient, draft_id: str) -> None:
    graph.simulator.set_behaviour(session_lifetime_seconds=0.0)
    url = open_session(graph, draft_id).json()["uploadUrl"]

    assert put(graph, url, 0, RANGE).status_code == 404


def test_a_finished_session_takes_nothing_more(graph: GraphClient, url: str) -> None:
    assert put_all(graph, url).status_code == 201

    assert put(graph, url, 2 * RANGE, SIZE).status_code == 404


def test_a_lost_session_leaves_the_draft_and_its_other_attachments(graph: GraphClient, draft_id: str, url: str) -> None:
    # Given a finished file and another one that is half there
    put_all(graph, url)
    second = open_session(graph, draft_id, name="second.bin").json()["uploadUrl"]
    put(graph, second, 0, RANGE)

    # When the session is lost
    graph.simulator.lose_upload_session(ANN)
    lost = put(graph, second, RANGE, 2 * RANGE)

    # Then only that file is gone, and a new session for it works
    assert (lost.status_code, code(lost)) == (404, "uploadSessionNotFound")
    assert put(graph, second, RANGE, 2 * RANGE).status_code == 404
    third = open_session(graph, draft_id, name="second.bin").json()["uploadUrl"]
    assert put_all(graph, third).status_code == 201
    listed = graph.call("GET", f"/messages/{draft_id}/attachments", params={"$select": "name"}).json()["value"]
    assert [each["name"] for each in listed] == ["large.bin", "second.bin"]


def test_a_message_that_outgrows_the_mailbox_is_refused_in_the_middle(graph: GraphClient, url: str) -> None:
    graph.simulator.set_behaviour(max_message_bytes=3 * MEBIBYTE)

    assert put(graph, url, 0, RANGE).status_code == 200
    answer = put(graph, url, RANGE, 2 * RANGE)

    assert (answer.status_code, code(answer)) == (400, "ErrorMessageSizeExceeded")


def test_a_session_needs_a_draft_that_is_still_there(graph: GraphClient, draft_id: str, url: str) -> None:
    graph.send_draft(draft_id)

    assert put(graph, url, 0, RANGE).status_code == 404
    assert open_session(graph, draft_id).status_code == 404


def test_a_lost_answer_to_the_last_range_has_stored_the_file(graph: GraphClient, draft_id: str, url: str) -> None:
    put(graph, url, 0, RANGE)
    put(graph, url, RANGE, 2 * RANGE)
    graph.simulator.lose_next_answer(operation="upload_range")

    with pytest.raises(requests.ConnectionError):
        put(graph, url, 2 * RANGE, SIZE)

    listed = graph.call("GET", f"/messages/{draft_id}/attachments", params={"$select": "name"}).json()["value"]
    assert [each["name"] for each in listed] == ["large.bin"]
