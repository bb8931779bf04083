"""What goes over the wire with each call, and what comes back, against answers written down here."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import graph_support
import pytest
from requests_mock import ANY, Mocker

from graph_client import MAX_REQUEST_BYTES, SMALL_ATTACHMENT_BYTES, Call, GraphClient, attach_bytes, errors

GRAPH = "https://graph.example/v1.0"
USER = f"{GRAPH}/users/ann@contoso.example"
MAILBOX = "ann@contoso.example"
TAG_ID = "String {9b5c0f2e-6f0b-4a44-8d6e-0b6f3f1f8a11} Name email-id"
MESSAGE: dict[str, Any] = {"subject": "Grüße", "toRecipients": [{"emailAddress": {"address": "bob@fabrikam.example"}}]}

mocked = graph_support.mocked
pytestmark = pytest.mark.usefixtures("mocked")


class Tokens:
    """Tokens t1, t2, …, the next one whenever one is dropped."""

    def __init__(self) -> None:
        self.dropped: list[str] = []

    def token(self) -> str:
        return f"t{len(self.dropped) + 1}"

    def drop(self, token: str) -> None:
        self.dropped.append(token)


@pytest.fixture
def tokens() -> Tokens:
    return Tokens()


@pytest.fixture
def calls() -> list[Call]:
    return []


@pytest.fixture
def graph(tokens: Tokens, calls: list[Call]) -> GraphClient:
    return GraphClient(GRAPH + "/", tokens, timedelta(seconds=5), TAG_ID, "tests/1", on_call=calls.append)


def test_send_mail_posts_the_message_and_keeps_a_copy(graph: GraphClient, requests_mock: Mocker) -> None:
    requests_mock.post(f"{USER}/sendMail", status_code=202, headers={"request-id": "r1"})

    answer = graph.send_mail(MAILBOX, MESSAGE)

    (sent,) = requests_mock.request_history
    assert sent.json() == {"message": MESSAGE, "saveToSentItems": True}
    assert sent.headers["Content-Type"] == "application/json"
    assert answer.request_id == "r1"
    assert answer.client_request_id == sent.headers["client-request-id"]
    assert datetime.now(UTC) - answer.received_at < timedelta(minutes=1)


def test_an_accepted_send_that_carries_a_retry_after_is_accepted(
    graph: GraphClient, calls: list[Call], requests_mock: Mocker
) -> None:
    headers = {"Retry-After": "Sun, 01 Mar 2026 12:00:05 GMT", "Date": "Sun, 01 Mar 2026 12:00:00 GMT"}
    requests_mock.post(f"{USER}/sendMail", status_code=202, headers=headers)

    graph.send_mail(MAILBOX, MESSAGE)

    assert requests_mock.call_count == 1
    assert calls[0].retry_after == timedelta(seconds=5)


@pytest.mark.parametrize("status", [200, 201, 204])
def test_a_success_other_than_202_does_not_prove_that_a_mail_was_sent(
    graph: GraphClient, requests_mock: Mocker, status: int
) -> None:
    requests_mock.post(f"{USER}/sendMail", status_code=status, text="<html>Please log in</html>")

    with pytest.raises(errors.AnswerUnclear):
        graph.send_mail(MAILBOX, MESSAGE)


def test_every_request_carries_token_ids_and_the_wish_for_immutable_ids(
    graph: GraphClient, requests_mock: Mocker
) -> None:
    requests_mock.register_uri(ANY, ANY, json={"id": "m1", "isDraft": True, "value": []})

    graph.create_draft(MAILBOX, MESSAGE)
    graph.get_message(MAILBOX, "m1")
    graph.attachments(MAILBOX, "m1")
    graph.find_by_tag(MAILBOX, "v")
    graph.attach(MAILBOX, "m1", name="a", content_type="text/plain", content=b"a")
    graph.delete_attachment(MAILBOX, "m1", "a1")
    graph.delete_message(MAILBOX, "m1")
    with graph.fetch_mime(MAILBOX, "m1"):
        pass

    headers = [sent.headers for sent in requests_mock.request_history]
    assert len(headers) == 8
    for each in headers:
        assert each["Authorization"] == "Bearer t1"
        assert each["Prefer"] == 'IdType="ImmutableId"'
        assert each["return-client-request-id"] == "true"
        assert each["User-Agent"] == "tests/1"
    assert len({uuid.UUID(each["client-request-id"]) for each in headers}) == 8


def test_a_refused_token_is_replaced_once_and_the_request_repeated(
    graph: GraphClient, tokens: Tokens, calls: list[Call], requests_mock: Mocker
) -> None:
    requests_mock.post(f"{USER}/sendMail", [{"status_code": 401}, {"status_code": 202}])

    graph.send_mail(MAILBOX, MESSAGE)

    first, second = requests_mock.request_history
    assert (first.headers["Authorization"], second.headers["Authorization"]) == ("Bearer t1", "Bearer t2")
    assert first.body == second.body
    assert first.headers["client-request-id"] != second.headers["client-request-id"]
    assert tokens.dropped == ["t1"]
    assert [call.status for call in calls] == [401, 202]


def test_a_fresh_token_that_is_refused_too_is_a_configuration_error(graph: GraphClient, requests_mock: Mocker) -> None:
    requests_mock.post(f"{USER}/sendMail", status_code=401, json={"error": {"code": "InvalidAuthenticationToken"}})

    with pytest.raises(errors.TokenRefused):
        graph.send_mail(MAILBOX, MESSAGE)

    assert requests_mock.call_count == 2


def test_a_mailbox_and_an_id_are_quoted_in_the_path(graph: GraphClient, requests_mock: Mocker) -> None:
    requests_mock.delete(ANY, status_code=204)

    graph.delete_message("o'hara+x/y?z@contoso.example", "AA/B=?#")

    (sent,) = requests_mock.request_history
    assert sent.url == f"{GRAPH}/users/o%27hara%2Bx%2Fy%3Fz@contoso.example/messages/AA%2FB%3D%3F%23"


def test_an_observer_that_fails_does_not_hide_that_a_mail_was_sent(tokens: Tokens, requests_mock: Mocker) -> None:
    def broken(call: Call) -> None:
        raise RuntimeError("no more metrics")

    requests_mock.post(f"{USER}/sendMail", status_code=202)

    GraphClient(GRAPH, tokens, timedelta(seconds=5), TAG_ID, on_call=broken).send_mail(MAILBOX, MESSAGE)


def test_an_observer_is_told_how_each_request_went(
    graph: GraphClient, calls: list[Call], requests_mock: Mocker
) -> None:
    requests_mock.post(f"{USER}/sendMail", status_code=429, headers={"Retry-After": "9", "request-id": "r7"})

    with pytest.raises(errors.Throttled) as caught:
        graph.send_mail(MAILBOX, MESSAGE)

    (call,) = calls
    assert (call.operation, call.mailbox, call.status) == ("send_mail", MAILBOX, 429)
    assert (call.retry_after, call.request_id) == (timedelta(seconds=9), "r7")
    assert call.client_request_id == caught.value.client_request_id


def test_unknown_codes_are_counted(tokens: Tokens, requests_mock: Mocker) -> None:
    counted: list[tuple[int, str]] = []
    graph = GraphClient(GRAPH, tokens, timedelta(seconds=5), TAG_ID, on_unknown_code=lambda *seen: counted.append(seen))
    requests_mock.post(f"{USER}/sendMail", status_code=418, json={"error": {"code": "ErrorTeapot"}})

    with pytest.raises(errors.InvalidMessage):
        graph.send_mail(MAILBOX, MESSAGE)

    assert counted == [(418, "ErrorTeapot")]


def test_a_request_beyond_graphs_limit_is_refused_before_it_leaves(graph: GraphClient, requests_mock: Mocker) -> None:
    with pytest.raises(errors.MessageTooLarge):
        graph.send_mail(MAILBOX, {"body": {"content": "x" * MAX_REQUEST_BYTES}})

    assert requests_mock.call_count == 0


def test_a_message_that_json_cannot_say_is_invalid(graph: GraphClient) -> None:
    with pytest.raises(errors.InvalidMessage):
        graph.send_mail(MAILBOX, {"subject": "\ud800"})


def test_a_draft_is_returned_with_its_ids(graph: GraphClient, requests_mock: Mocker) -> None:
    created = {
        "id": "m1",
        "internetMessageId": "<1@x>",
        "isDraft": True,
        "createdDateTime": "2026-03-01T12:00:00Z",
        "sentDateTime": "2026-03-01T12:00:00Z",
        "parentFolderId": "drafts",
    }
    requests_mock.post(f"{USER}/messages", status_code=201, json=created)

    draft = graph.create_draft(MAILBOX, MESSAGE)

    assert requests_mock.request_history[0].json() == MESSAGE
    assert (draft.id, draft.internet_message_id, draft.parent_folder_id) == ("m1", "<1@x>", "drafts")
    assert (draft.is_draft, draft.created_at, draft.sent_at) == (True, datetime(2026, 3, 1, 12, tzinfo=UTC), None)


def test_a_sent_message_has_its_sending_date(graph: GraphClient, requests_mock: Mocker) -> None:
    requests_mock.get(
        f"{USER}/messages/m1", json={"id": "m1", "isDraft": False, "sentDateTime": "2026-03-01T12:00:01.1234567Z"}
    )

    assert graph.get_message(MAILBOX, "m1").sent_at == datetime(2026, 3, 1, 12, 0, 1, 123456, tzinfo=UTC)


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b"null", b"{}", b'{"id": "m1"}'])
def test_a_success_that_cannot_be_understood_is_a_transient_error(
    graph: GraphClient, requests_mock: Mocker, answer: bytes
) -> None:
    requests_mock.post(f"{USER}/messages", status_code=201, content=answer)

    with pytest.raises(errors.ServerUnavailable):
        graph.create_draft(MAILBOX, MESSAGE)


def test_tagging_adds_the_property_and_leaves_the_message_alone(graph: GraphClient) -> None:
    other = {"id": "String {0} Name other", "value": "x"}
    message = {**MESSAGE, "singleValueExtendedProperties": [other]}

    tagged = graph.tagged(message, "e1")

    assert tagged == {**MESSAGE, "singleValueExtendedProperties": [other, {"id": TAG_ID, "value": "e1"}]}
    assert message["singleValueExtendedProperties"] == [other]


def test_a_tag_is_looked_for_in_the_whole_mailbox_over_all_pages(graph: GraphClient, requests_mock: Mocker) -> None:
    following = f"{USER}/messages?$skip=1"
    requests_mock.get(
        f"{USER}/messages",
        [
            {
                "json": {"value": [{"id": "m1", "isDraft": True}], "@odata.nextLink": following},
                "headers": {"request-id": "r1"},
            },
            {"json": {"value": [{"id": "m2", "isDraft": False}]}, "headers": {"request-id": "r2"}},
        ],
    )

    found = graph.find_by_tag(MAILBOX, "it's", since=datetime(2026, 3, 1, 12, tzinfo=UTC))

    assert [message.id for message in found.messages] == ["m1", "m2"]
    assert found.request_ids == ["r1", "r2"]
    first, second = requests_mock.request_history
    assert parse_qs(urlsplit(first.url).query)["$filter"] == [
        f"singleValueExtendedProperties/Any(ep: ep/id eq '{TAG_ID}' and ep/value eq 'it''s')"
        " and createdDateTime ge 2026-03-01T12:00:00Z"
    ]
    assert " " not in first.url
    assert second.url == following


def test_a_next_page_on_another_host_does_not_get_the_token(graph: GraphClient, requests_mock: Mocker) -> None:
    requests_mock.get(f"{USER}/messages", json={"value": [], "@odata.nextLink": "https://evil.example/v1.0/users"})

    with pytest.raises(errors.InsecureUrl):
        graph.find_by_tag(MAILBOX, "v")

    assert requests_mock.call_count == 1


def test_a_date_that_graph_refuses_in_a_look_up_is_left_out_from_then_on(
    graph: GraphClient, requests_mock: Mocker
) -> None:
    refused = {"status_code": 400, "json": {"error": {"code": "ErrorInvalidArgument"}}}
    found = {"json": {"value": [{"id": "m1", "isDraft": False}]}}
    requests_mock.get(f"{USER}/messages", [refused, refused, refused, found, found])
    since = datetime(2026, 3, 1, 12, tzinfo=UTC)

    # It was not the date that is refused
    with pytest.raises(errors.InvalidMessage):
        graph.find_by_tag(MAILBOX, "v", since=since)
    for _ in range(2):
        assert [message.id for message in graph.find_by_tag(MAILBOX, "v", since=since).messages] == ["m1"]

    dated = ["createdDateTime" in parse_qs(urlsplit(r.url).query)["$filter"][0] for r in requests_mock.request_history]
    assert dated == [True, False, True, False, False]


def test_an_attachment_is_posted_in_base64(graph: GraphClient, requests_mock: Mocker) -> None:
    requests_mock.post(
        f"{USER}/messages/m1/attachments", status_code=201, json={"id": "a1", "name": "logo.png", "size": 104}
    )

    attachment = graph.attach(
        MAILBOX, "m1", name="logo.png", content_type="image/png", content=b"\x00\xff", is_inline=True, content_id="logo"
    )

    assert requests_mock.request_history[0].json() == {
        "@odata.type": "#microsoft.graph.fileAttachment",
        "name": "logo.png",
        "contentType": "image/png",
        "contentBytes": "AP8=",
        "isInline": True,
        "contentId": "logo",
    }
    assert (attachment.id, attachment.size_bytes) == ("a1", 104)


@pytest.mark.parametrize("size", [0, 1, 2, 3, SMALL_ATTACHMENT_BYTES])
def test_what_an_attachment_sends_is_known_before(graph: GraphClient, requests_mock: Mocker, size: int) -> None:
    answer = {"id": "a1", "name": "a", "size": size}
    requests_mock.post(f"{USER}/messages/m1/attachments", status_code=201, json=answer)

    graph.attach(MAILBOX, "m1", name="文" * 255, content_type="a/b", content=bytes(size), content_id="c" * 255)

    assert 0 < attach_bytes(size) - len(requests_mock.request_history[0].body) < 1000


def test_an_attachment_that_no_request_can_hold_needs_an_upload_session(
    graph: GraphClient, requests_mock: Mocker
) -> None:
    with pytest.raises(errors.AttachmentTooLarge):
        graph.attach(MAILBOX, "m1", name="a", content_type="a/b", content=bytes(MAX_REQUEST_BYTES))

    assert requests_mock.call_count == 0


def test_attachments_are_listed_without_their_contents(graph: GraphClient, requests_mock: Mocker) -> None:
    listed = {"id": "a1", "name": "a", "size": 7, "contentType": "a/b", "isInline": True, "contentId": "c"}
    requests_mock.get(f"{USER}/messages/m1/attachments", json={"value": [listed]})

    (attachment,) = graph.attachments(MAILBOX, "m1")

    assert (attachment.name, attachment.is_inline, attachment.content_id) == ("a", True, "c")
    assert "contentBytes" not in requests_mock.request_history[0].url


def test_a_missing_mime_raises_before_anything_is_read(graph: GraphClient, requests_mock: Mocker) -> None:
    requests_mock.get(f"{USER}/messages/m1/$value", status_code=404, json={"error": {"code": "ErrorItemNotFound"}})

    with pytest.raises(errors.ItemNotFound), graph.fetch_mime(MAILBOX, "m1"):
        raise AssertionError("the block is not entered")
