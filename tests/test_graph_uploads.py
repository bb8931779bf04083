"""Upload sessions: ranges in order, without a token, and every way in which a session says where it is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import graph_support
import pytest
from requests_mock import Mocker

from graph_client import MAX_ATTACHMENT_BYTES, UPLOAD_RANGE_BYTES, Call, GraphClient, UploadSession, errors

GRAPH = "https://graph.example/v1.0"
MAILBOX = "ann@contoso.example"
CREATE = f"{GRAPH}/users/{MAILBOX}/messages/m1/attachments/createUploadSession"
UPLOAD_URL = "https://outlook.example/api/upload?authtoken=s3cret"
SESSION = UploadSession(MAILBOX, UPLOAD_URL, None)

mocked = graph_support.mocked
pytestmark = pytest.mark.usefixtures("mocked")


class FixedToken:
    def token(self) -> str:
        return "t1"

    def drop(self, token: str) -> None:
        raise AssertionError("an upload's refusal says nothing about the token")


@pytest.fixture
def calls() -> list[Call]:
    return []


@pytest.fixture
def graph(calls: list[Call]) -> GraphClient:
    return GraphClient(GRAPH, FixedToken(), timedelta(seconds=5), "String {0} Name t", on_call=calls.append)


def create(graph: GraphClient, size_bytes: int = 5_000_000) -> UploadSession:
    return graph.create_upload_session(
        MAILBOX, "m1", name="a.pdf", size_bytes=size_bytes, content_type="application/pdf", content_id="c1"
    )


def test_a_session_is_created_and_keeps_its_url_to_itself(graph: GraphClient, requests_mock: Mocker) -> None:
    created = {
        "uploadUrl": UPLOAD_URL,
        "expirationDateTime": "2026-03-02T12:00:00Z",
        "nextExpectedRanges": ["0-"],
    }
    requests_mock.post(CREATE, status_code=201, json=created)

    session = create(graph)

    assert requests_mock.request_history[0].json() == {
        "AttachmentItem": {
            "attachmentType": "file",
            "name": "a.pdf",
            "size": 5_000_000,
            "contentType": "application/pdf",
            "isInline": False,
            "contentId": "c1",
        }
    }
    assert (session.url, session.next_offset) == (UPLOAD_URL, 0)
    assert session.expires_at == datetime(2026, 3, 2, 12, tzinfo=UTC)
    assert "s3cret" not in f"{session} {session!r}"


def test_a_file_too_small_for_a_session_says_so(graph: GraphClient, requests_mock: Mocker) -> None:
    code = "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize"
    requests_mock.post(CREATE, status_code=400, json={"error": {"code": code}})

    with pytest.raises(errors.AttachmentTooSmall):
        create(graph, size_bytes=10)


def test_a_file_that_no_session_takes_is_refused_before_anything_is_sent(
    graph: GraphClient, requests_mock: Mocker
) -> None:
    with pytest.raises(errors.AttachmentTooLarge):
        create(graph, size_bytes=MAX_ATTACHMENT_BYTES + 1)

    assert requests_mock.call_count == 0


@pytest.mark.parametrize("url", ["http://outlook.example/u", "ftp://outlook.example/u", "u", "https://[::bad/u"])
def test_an_upload_url_in_the_clear_is_refused(graph: GraphClient, requests_mock: Mocker, url: str) -> None:
    requests_mock.post(CREATE, status_code=201, json={"uploadUrl": url})

    with pytest.raises(errors.InsecureUrl):
        create(graph)
    with pytest.raises(errors.InsecureUrl):
        graph.upload_range(UploadSession(MAILBOX, url, None), 0, b"x", 1)


def test_a_range_is_put_without_the_token(graph: GraphClient, calls: list[Call], requests_mock: Mocker) -> None:
    requests_mock.put(UPLOAD_URL, json={"nextExpectedRanges": ["14"]})

    graph.upload_range(SESSION, 10, b"abcd", 20)

    (sent,) = requests_mock.request_history
    assert sent.body == b"abcd"
    assert sent.headers["Content-Range"] == "bytes 10-13/20"
    assert sent.headers["Content-Length"] == "4"
    assert sent.headers["Content-Type"] == "application/octet-stream"
    assert "Authorization" not in sent.headers
    assert (calls[0].operation, calls[0].mailbox) == ("upload_range", MAILBOX)


@pytest.mark.parametrize("ranges", [["2097152"], ["2097152-"], ["2097152-4194303"], ["2097152-4194303", "9-"]])
@pytest.mark.parametrize("name", ["nextExpectedRanges", "NextExpectedRanges"])
def test_the_next_offset_is_understood_in_every_form(
    graph: GraphClient, requests_mock: Mocker, name: str, ranges: list[str]
) -> None:
    requests_mock.put(UPLOAD_URL, json={name: ranges, "ExpirationDateTime": "2026-03-02T12:00:00Z"})

    assert graph.upload_range(SESSION, 0, b"x", 2) == 2_097_152


@pytest.mark.parametrize("body", [b"", b"{}", b'{"nextExpectedRanges": []}', b'{"nextExpectedRanges": ["x"]}', b"[1]"])
def test_an_answer_that_names_no_range_is_a_transient_error(
    graph: GraphClient, requests_mock: Mocker, body: bytes
) -> None:
    requests_mock.put(UPLOAD_URL, content=body)

    with pytest.raises(errors.ServerUnavailable):
        graph.upload_range(SESSION, 0, b"x", 2)


def test_the_last_range_completes_the_file(graph: GraphClient, requests_mock: Mocker) -> None:
    requests_mock.put(UPLOAD_URL, status_code=201, headers={"Location": "https://outlook.example/Attachments('a1')"})

    assert graph.upload_range(SESSION, 0, b"x", 1) is None


def test_an_expired_session_is_lost_and_the_token_kept(graph: GraphClient, requests_mock: Mocker) -> None:
    requests_mock.put(UPLOAD_URL, status_code=401)

    with pytest.raises(errors.UploadSessionLost):
        graph.upload_range(SESSION, 0, b"x", 2)

    assert requests_mock.call_count == 1


@pytest.mark.parametrize("status", [204, 404, 410])
def test_a_session_is_given_up_whether_or_not_it_is_still_there(
    graph: GraphClient, requests_mock: Mocker, status: int
) -> None:
    requests_mock.delete(UPLOAD_URL, status_code=status)

    graph.cancel_upload(SESSION)

    assert "Authorization" not in requests_mock.request_history[0].headers


def test_a_range_stays_below_every_reading_of_four_megabytes() -> None:
    assert UPLOAD_RANGE_BYTES % (320 * 1024) == 0
    assert UPLOAD_RANGE_BYTES < 4_000_000
