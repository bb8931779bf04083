"""What the simulator refuses, so that nothing passes here that Graph would refuse."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from simulator_support import ANN, TAG, GraphClient, code, message, recipient

from simulator.control import Simulator

FILE = {
    "@odata.type": "#microsoft.graph.fileAttachment",
    "name": "a.txt",
    "contentType": "text/plain",
    "contentBytes": base64.b64encode(b"hello").decode(),
}


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.start(tmp_path_factory.mktemp("simulator")) as started:
        yield started


@pytest.fixture
def graph(simulator: Simulator) -> GraphClient:
    simulator.reset()
    return GraphClient(simulator)


def headers(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "value": "1"} for name in names]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"colour": "red"}, "RequestBodyRead"),
        ({"Subject": "Hello"}, "RequestBodyRead"),
        ({"saveToSentItems": False}, "RequestBodyRead"),
        ({"subject": 5}, "RequestBodyRead"),
        ({"body": "text"}, "RequestBodyRead"),
        ({"body": {"contentType": "markdown", "content": "x"}}, "RequestBodyRead"),
        ({"body": {"contentType": "text", "text": "x"}}, "RequestBodyRead"),
        ({"importance": "urgent"}, "RequestBodyRead"),
        ({"isRead": "yes"}, "RequestBodyRead"),
        ({"sentDateTime": "yesterday"}, "RequestBodyRead"),
        ({"categories": "red"}, "RequestBodyRead"),
        ({"categories": [None]}, "RequestBodyRead"),
        ({"toRecipients": recipient("bob@example.org")}, "RequestBodyRead"),
        ({"toRecipients": ["bob@example.org"]}, "RequestBodyRead"),
        ({"toRecipients": [{"address": "bob@example.org"}]}, "RequestBodyRead"),
        ({"ccRecipients": [{"emailAddress": {"address": "a@b.example", "type": "to"}}]}, "RequestBodyRead"),
        ({"@odata.type": "#microsoft.graph.event"}, "RequestBodyRead"),
        ({"attachments": [{**FILE, "size": "5"}]}, "RequestBodyRead"),
        ({"attachments": [{**FILE, "contentBytes": "not base64!"}]}, "RequestBodyRead"),
        ({"attachments": [{**FILE, "contentBytes": "aGk"}]}, "RequestBodyRead"),
        ({"attachments": [{**FILE, "@odata.type": "#microsoft.graph.itemAttachment"}]}, "RequestBodyRead"),
        (
            {"attachments": [{name: value for name, value in FILE.items() if name != "@odata.type"}]},
            "RequestBodyRead",
        ),
        ({"attachments": [{**FILE, "name": None}]}, "ErrorRequiredPropertyMissing"),
        ({"internetMessageHeaders": headers("List-Unsubscribe")}, "InvalidInternetMessageHeader"),
        ({"internetMessageHeaders": []}, "InvalidInternetMessageHeaderCollection"),
        (
            {"internetMessageHeaders": headers(*(f"x-{number}" for number in range(6)))},
            "InvalidInternetMessageHeaderCollection",
        ),
        ({"singleValueExtendedProperties": [{"id": "Tag", "value": "1"}]}, "ErrorInvalidProperty"),
        ({"singleValueExtendedProperties": [{"id": TAG}]}, "ErrorInvalidProperty"),
        ({"toRecipients": []}, "ErrorInvalidRecipients"),
        ({"toRecipients": None}, "ErrorInvalidRecipients"),
        ({"toRecipients": [{"emailAddress": {"name": "Bob"}}]}, "ErrorInvalidRecipients"),
        ({"toRecipients": [recipient("bob")]}, "ErrorInvalidRecipients"),
        ({"toRecipients": [recipient("bob.@example.org")]}, "ErrorInvalidRecipients"),
        ({"toRecipients": [recipient("bob@@example.org")]}, "ErrorInvalidRecipients"),
        ({"toRecipients": [recipient("bob@localhost")]}, "ErrorInvalidRecipients"),
        ({"bccRecipients": [recipient("bob x@example.org")]}, "ErrorInvalidRecipients"),
        ({"replyTo": [recipient("bob")]}, "ErrorInvalidRecipients"),
        ({"ccRecipients": [recipient(f"u{number}@example.org") for number in range(500)]}, "ErrorInvalidRecipients"),
    ],
)
def test_a_message_that_graph_would_not_take_is_refused_and_not_sent(
    graph: GraphClient, changes: dict[str, Any], expected: str
) -> None:
    answer = graph.send(message(**changes))

    assert (answer.status_code, code(answer)) == (400, expected)
    assert graph.simulator.deliveries() == []


def test_an_unknown_member_is_named_with_its_type(graph: GraphClient) -> None:
    answer = graph.send(message(body={"contentType": "text", "content": "x", "colour": "red"}))

    words = answer.json()["error"]["message"]
    assert "The property 'colour' does not exist on type 'microsoft.graph.itemBody'." in words


def test_everything_that_graph_takes_is_taken(graph: GraphClient) -> None:
    answer = graph.send(
        message(
            body={"contentType": "HTML", "content": "<p>Hello</p>"},
            importance="High",
            isDeliveryReceiptRequested=True,
            ccRecipients=[recipient("carl@example.org")],
            bccRecipients=[recipient(f"u{number}@example.org") for number in range(498)],
            replyTo=[recipient("desk@example.org")],
            categories=["red"],
            attachments=[FILE, {**FILE, "isInline": True, "contentId": "logo"}],
            internetMessageHeaders=headers("x-one", "X-Two"),
            singleValueExtendedProperties=[{"id": TAG, "value": "1"}, {"id": "String 0x1045", "value": "<u>"}],
        )
        | {"from": recipient(ANN.upper())}
    )

    assert answer.status_code == 202, answer.text
    (delivery,) = graph.simulator.deliveries()
    assert len(delivery["recipients"]) == 500
    assert delivery["headers"] == {"x-one": "1", "X-Two": "1"}
    assert [each["name"] for each in delivery["attachments"]] == ["a.txt", "a.txt"]


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"", 400, "UnableToDeserializePostBody"),
        (b"{", 400, "UnableToDeserializePostBody"),
        (b"[]", 400, "UnableToDeserializePostBody"),
        (b"{}", 400, "BadRequest"),
        (b'{"message": null}', 400, "BadRequest"),
        (b'{"message": 1}', 400, "RequestBodyRead"),
        (b'{"subject": "no wrapper"}', 400, "BadRequest"),
        (b'{"message": {}, "saveToSentItems": 1}', 400, "RequestBodyRead"),
        (b'{"message": {}, "saveToSentItems": "perhaps"}', 400, "RequestBodyRead"),
        (b'{"message": {}, "colour": "red"}', 400, "BadRequest"),
    ],
)
def test_a_malformed_send_mail_body_is_refused(graph: GraphClient, body: bytes, status: int, expected: str) -> None:
    answer = graph.call("POST", "/sendMail", data=body, headers={"Content-Type": "application/json"})

    assert (answer.status_code, code(answer)) == (status, expected)


def test_a_body_of_another_media_type_is_refused(graph: GraphClient) -> None:
    answer = graph.call("POST", "/messages", data=b"<x/>", headers={"Content-Type": "application/xml"})

    assert answer.status_code == 415


@pytest.mark.parametrize("names", [("message", "saveToSentItems"), ("Message", "SaveToSentItems")])
@pytest.mark.parametrize("flag", [False, "false", "False"])
def test_action_parameters_match_in_any_case_and_the_flag_may_be_a_string(
    graph: GraphClient, names: tuple[str, str], flag: bool | str
) -> None:
    graph.simulator.set_sent_items_delay(0)

    answer = graph.call("POST", "/sendMail", json={names[0]: message(), names[1]: flag})

    assert answer.status_code == 202
    assert len(graph.simulator.deliveries()) == 1
    assert graph.simulator.messages(ANN) == []


@pytest.mark.parametrize(
    ("form", "status", "content_type"),
    [("empty", 413, "text/plain"), ("html", 413, "text/html"), ("bad_request", 400, "application/json")],
)
def test_a_request_above_four_mebibytes_is_refused_in_each_of_the_known_forms(
    graph: GraphClient, form: str, status: int, content_type: str
) -> None:
    graph.simulator.set_behaviour(oversize_answer=form)
    largest = message(body={"contentType": "text", "content": "x" * (4 * 1024 * 1024 - 1000)})
    too_large = message(body={"contentType": "text", "content": "x" * (4 * 1024 * 1024)})

    assert graph.send(largest).status_code == 202
    answer = graph.send(too_large)

    assert answer.status_code == status
    assert answer.headers["Content-Type"].startswith(content_type)
    assert len(graph.simulator.deliveries()) == 1


def test_an_attachment_of_three_mebibytes_does_not_fit_into_a_post(graph: GraphClient) -> None:
    draft_id = graph.draft()
    fits = FILE | {"contentBytes": base64.b64encode(b"x" * 3_000_000).decode()}
    too_large = FILE | {"contentBytes": base64.b64encode(b"x" * 3 * 1024 * 1024).decode()}

    assert graph.call("POST", f"/messages/{draft_id}/attachments", json=fits).status_code == 201
    assert graph.call("POST", f"/messages/{draft_id}/attachments", json=too_large).status_code == 413


def test_sending_as_somebody_else_needs_the_right_to(graph: GraphClient) -> None:
    foreign = message() | {"from": recipient("boss@example.com")}

    answer = graph.send(foreign)
    assert (answer.status_code, code(answer)) == (403, "ErrorSendAsDenied")

    graph.simulator.allow_send_as(ANN, "boss@example.com")
    assert graph.send(foreign).status_code == 202


def test_an_unknown_user_has_no_mailbox(graph: GraphClient) -> None:
    for user in ("someone@unknown.example", "someone"):
        answer = graph.send(mailbox=user)
        assert (answer.status_code, code(answer)) == (404, "ErrorInvalidUser")


@pytest.mark.parametrize(
    ("state", "status", "expected", "words"),
    [
        ("deny", 403, "ErrorAccessDenied", "[RAOP]"),
        ("unlicense", 404, "MailboxNotEnabledForRESTAPI", "inactive"),
        ("remove_mailbox", 404, "ErrorInvalidUser", ANN),
    ],
)
def test_a_mailbox_refuses_everything_until_it_is_allowed_again(
    graph: GraphClient, state: str, status: int, expected: str, words: str
) -> None:
    draft_id = graph.draft()
    getattr(graph.simulator, state)(ANN)

    for answer in (graph.send(), graph.send_draft(draft_id), graph.call("GET", "/messages")):
        assert (answer.status_code, code(answer)) == (status, expected)
        assert words in answer.json()["error"]["message"]
    assert graph.send(mailbox="carl@example.com").status_code == 202

    graph.simulator.allow(ANN)
    assert graph.send_draft(draft_id).status_code == 202


@pytest.mark.parametrize(
    ("method", "path", "status", "expected"),
    [
        ("GET", "/messages/nonsense", 400, "ErrorInvalidIdMalformed"),
        ("GET", "/messages/AAMkunknown=", 404, "ErrorItemNotFound"),
        ("GET", "/mailFolders/Nowhere/messages", 400, "ErrorInvalidIdMalformed"),
        ("GET", "/events", 400, "BadRequest"),
        ("GET", "/sendMail", 405, "Request_BadRequest"),
        ("PUT", "/messages", 405, "Request_BadRequest"),
        ("GET", "/messages?$filter=id eq 'x'", 400, "ErrorInvalidProperty"),
        ("GET", "/messages?$filter=subject eq 'x' and isDraft eq true", 400, "ErrorInvalidProperty"),
        ("GET", "/messages?$filter=isDraft eq true or isDraft eq false", 400, "ErrorInvalidProperty"),
        ("GET", "/messages?$filter=sentDateTime ge 2026-01-01", 400, "BadRequest"),
        ("GET", "/messages?$select=id,colour", 400, "RequestBroker--ParseUri"),
        ("GET", "/messages?$expand=sender", 400, "ErrorInvalidUrlQuery"),
        ("GET", "/messages?$top=0", 400, "ErrorInvalidUrlQuery"),
        ("GET", "/messages?$top=1001", 400, "ErrorInvalidUrlQuery"),
        ("GET", "/messages?$top=many", 400, "BadRequest"),
        ("GET", "/messages?$colour=red", 400, "BadRequest"),
    ],
)
def test_a_request_that_leads_nowhere_is_refused(
    graph: GraphClient, method: str, path: str, status: int, expected: str
) -> None:
    answer = graph.call(method, path)

    assert (answer.status_code, code(answer)) == (status, expected)


def test_me_does_not_exist_for_an_application(graph: GraphClient) -> None:
    answer = graph.session.get(f"{graph.simulator.graph_base_url}/me/messages")

    assert answer.status_code == 400


def test_every_answer_carries_the_ids_for_support(graph: GraphClient) -> None:
    given = "3d5ba6f4-6a0c-4b1e-9f5b-3a4e8ad7b0c1"

    accepted = graph.send(headers={"client-request-id": given})
    refused = graph.send(message(colour="red"), headers={"client-request-id": given})

    for answer in (accepted, refused):
        assert answer.headers["client-request-id"] == given
        assert answer.headers["request-id"]
    inner = refused.json()["error"]["innerError"]
    assert inner["client-request-id"] == given
    assert inner["request-id"] == refused.headers["request-id"]
