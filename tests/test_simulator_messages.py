"""A message's life in a simulated mailbox: created, changed, sent, found again, exported."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

import pytest
from simulator_support import ANN, TAG, GraphClient, code, message, recipient, tag_filter, tagged, wait_until

from simulator.control import Simulator

IMMUTABLE = {"Prefer": 'IdType="ImmutableId"'}
FOREVER = 3600.0


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.start(tmp_path_factory.mktemp("simulator")) as started:
        yield started


@pytest.fixture
def graph(simulator: Simulator) -> GraphClient:
    simulator.reset()
    simulator.set_sent_items_delay(0)
    return GraphClient(simulator)


def mime_of(graph: GraphClient, message_id: str) -> EmailMessage:
    exported = graph.call("GET", f"/messages/{message_id}/$value")
    assert exported.status_code == 200, exported.text
    return message_from_bytes(exported.content, policy=policy.default)


def file_attachment(name: str, content: bytes, **changes: Any) -> dict[str, Any]:
    return {
        "@odata.type": "#microsoft.graph.fileAttachment",
        "name": name,
        "contentType": "application/pdf",
        "contentBytes": base64.b64encode(content).decode(),
    } | changes


def test_a_sent_mail_is_accepted_without_an_id_and_found_by_its_tag(graph: GraphClient) -> None:
    accepted = graph.send(tagged("ab12"))

    assert (accepted.status_code, accepted.content) == (202, b"")
    (found,) = graph.found("ab12", "/mailFolders/SentItems")
    assert found["isDraft"] is False
    assert graph.found("ab12", "/mailFolders/Drafts") == []
    assert [each["tags"] for each in graph.simulator.deliveries(ANN, tag="ab12")] == [["ab12"]]


def test_a_sent_mail_is_not_found_before_its_delay_is_over(graph: GraphClient) -> None:
    graph.simulator.set_sent_items_delay(FOREVER, ANN)

    graph.send(tagged("late"))
    graph.send(tagged("soon"), mailbox="carl@example.com")

    assert graph.found("late") == []
    assert len(graph.found("soon", mailbox="carl@example.com")) == 1
    assert len(graph.simulator.deliveries()) == 2


def test_a_filter_may_lag_behind_the_mailbox(graph: GraphClient) -> None:
    graph.simulator.set_behaviour(filter_lag_seconds=FOREVER)

    draft_id = graph.draft(tagged("ab12"))

    assert graph.found("ab12") == []
    assert graph.call("GET", f"/messages/{draft_id}").status_code == 200


def test_a_filter_lags_behind_the_arrival_of_a_mail_not_behind_the_first_look_at_it(graph: GraphClient) -> None:
    graph.simulator.set_sent_items_delay(0.2)
    graph.simulator.set_behaviour(filter_lag_seconds=0.3)
    graph.send(tagged("ab12"))
    found_from = time.monotonic() + 0.6
    wait_until(lambda: time.monotonic() > found_from)

    assert len(graph.found("ab12")) == 1


def test_a_mail_that_is_not_to_be_saved_leaves_nothing(graph: GraphClient) -> None:
    graph.call("POST", "/sendMail", json={"message": tagged("gone"), "saveToSentItems": False})

    assert graph.found("gone") == []
    assert graph.simulator.delivery_counts_by_tag() == {"gone": 1}


@pytest.mark.parametrize(
    ("value", "name", "matches"),
    [
        ("AB12", TAG, True),
        ("ab13", TAG, False),
        ("ab12", TAG.replace("Tag", "tag"), False),
        ("ab12", TAG.replace("{", "").replace("}", "").upper().replace("TAG", "Tag").replace("NAME", "Name"), False),
        ("ab12", TAG.replace("6ac6e", "6AC6E"), True),
    ],
)
def test_a_tag_compares_its_value_in_any_case_and_its_name_exactly(
    graph: GraphClient, value: str, name: str, matches: bool
) -> None:
    graph.send(tagged("ab12"))

    answer = graph.call("GET", "/messages", params={"$filter": tag_filter(value, name)})

    assert bool(answer.ok and answer.json()["value"]) is matches


def test_a_filter_may_join_a_tag_with_a_time(graph: GraphClient) -> None:
    graph.send(tagged("o'clock and tea"))
    tag = tag_filter("o''clock and tea")

    for property_name in ("sentDateTime", "createdDateTime"):
        for shift, count in ((timedelta(minutes=-1), 1), (timedelta(minutes=1), 0)):
            since = (datetime.now(UTC) + shift).strftime("%Y-%m-%dT%H:%M:%SZ")
            answer = graph.call("GET", "/messages", params={"$filter": f"{property_name} ge {since} and {tag}"})
            assert len(answer.json()["value"]) == count


def test_a_message_is_found_by_its_internet_message_id(graph: GraphClient) -> None:
    graph.send(message(internetMessageId="<one@example.com>", subject="one"))
    graph.send(message(subject="two"))

    answer = graph.call("GET", "/messages", params={"$filter": "internetMessageId eq '<one@example.com>'"})

    assert [each["subject"] for each in answer.json()["value"]] == ["one"]


def test_a_listing_is_paged_newest_first(graph: GraphClient) -> None:
    for number in range(25):
        graph.send(message(subject=str(number)))

    subjects: list[str] = []
    answer = graph.call("GET", "/mailFolders/sentitems/messages", params={"$select": "subject", "$top": "10"})
    subjects += [each["subject"] for each in answer.json()["value"]]
    while "@odata.nextLink" in answer.json():
        answer = graph.session.get(answer.json()["@odata.nextLink"])
        subjects += [each["subject"] for each in answer.json()["value"]]

    assert subjects == [str(number) for number in reversed(range(25))]


def test_select_and_expand_decide_what_is_shown(graph: GraphClient) -> None:
    draft_id = graph.draft(tagged("ab12") | {"internetMessageHeaders": [{"name": "x-kind", "value": "1"}]})

    plain = graph.call("GET", f"/messages/{draft_id}").json()
    chosen = graph.call(
        "GET",
        f"/messages/{draft_id}",
        params={
            "$select": "subject,internetMessageHeaders",
            "$expand": f"singleValueExtendedProperties($filter=id eq '{TAG}')",
        },
    ).json()

    assert "internetMessageHeaders" not in plain
    assert "singleValueExtendedProperties" not in plain
    assert {name for name in chosen if not name.startswith("@")} == {
        "id",
        "subject",
        "internetMessageHeaders",
        "singleValueExtendedProperties",
    }
    assert chosen["singleValueExtendedProperties"] == [{"id": TAG, "value": "ab12"}]


def test_a_draft_is_shown_as_exchange_has_rewritten_it(graph: GraphClient) -> None:
    created = graph.call(
        "POST", "/messages", json=message(body={"contentType": "html", "content": "<p>Hi</p>"}), headers=IMMUTABLE
    )

    assert created.headers["Preference-Applied"] == 'IdType="ImmutableId"'
    draft = created.json()
    assert draft["isDraft"] is True
    assert draft["body"]["contentType"] == "html"
    assert draft["body"]["content"].startswith("<html>")
    assert re.fullmatch(r"<[^@]+@[^@]+>", draft["internetMessageId"])
    drafts = graph.call("GET", "/mailFolders/Drafts").json()
    assert (drafts["id"], drafts["totalItemCount"]) == (draft["parentFolderId"], 1)


def test_a_draft_can_be_changed_until_it_is_sent(graph: GraphClient) -> None:
    draft_id = graph.draft(tagged("old"))

    changed = graph.call(
        "PATCH", f"/messages/{draft_id}", json=tagged("new") | {"internetMessageId": "<set@example.com>"}
    )

    assert changed.status_code == 200
    assert changed.json()["internetMessageId"] == "<set@example.com>"
    assert graph.found("old") == []
    assert len(graph.found("new")) == 1
    graph.send_draft(draft_id)
    (sent,) = graph.found("new")
    refused = graph.call("PATCH", f"/messages/{sent['id']}", json={"subject": "Changed"})
    assert (refused.status_code, code(refused)) == (400, "ErrorInvalidPropertySet")


def test_sending_a_draft_moves_it_to_sent_items_under_another_id(graph: GraphClient) -> None:
    draft_id = graph.draft(tagged("ab12"))

    accepted = graph.send_draft(draft_id)

    assert (accepted.status_code, accepted.content) == (202, b"")
    (sent,) = graph.found("ab12", "/mailFolders/SentItems")
    assert (sent["isDraft"], sent["id"] == draft_id) == (False, False)
    assert graph.call("GET", f"/messages/{draft_id}").status_code == 404


@pytest.mark.parametrize(("mode", "status"), [("stable", 200), ("change", 404)])
def test_an_immutable_id_survives_sending_only_where_it_is_said_to(graph: GraphClient, mode: str, status: int) -> None:
    graph.simulator.set_behaviour(immutable_ids=mode)
    draft_id = graph.draft(headers=IMMUTABLE)

    graph.send_draft(draft_id)

    assert graph.call("GET", f"/messages/{draft_id}", headers=IMMUTABLE).status_code == status


def test_neither_id_resolves_while_a_draft_is_submitted(graph: GraphClient) -> None:
    graph.simulator.set_behaviour(immutable_ids="stable", sent_items_delay_seconds=FOREVER)
    draft_id = graph.draft(tagged("ab12"), headers=IMMUTABLE)

    graph.send_draft(draft_id)

    assert graph.call("GET", f"/messages/{draft_id}").status_code == 404
    assert graph.found("ab12") == []


def test_a_draft_may_still_show_in_drafts_while_it_is_submitted(graph: GraphClient) -> None:
    graph.simulator.set_behaviour(while_submitting="draft", second_send="accepted", sent_items_delay_seconds=FOREVER)
    draft_id = graph.draft(tagged("ab12"))

    graph.send_draft(draft_id)

    assert [each["isDraft"] for each in graph.found("ab12")] == [True]
    assert graph.send_draft(draft_id).status_code == 202
    assert graph.simulator.delivery_counts_by_tag() == {"ab12": 1}


@pytest.mark.parametrize(
    ("mode", "status", "expected"),
    [
        ("not_found", 404, "ErrorItemNotFound"),
        ("invalid", 400, "ErrorInvalidItemForOperationSendItem"),
        ("accepted", 202, None),
    ],
)
def test_a_second_send_never_delivers_a_second_mail(
    graph: GraphClient, mode: str, status: int, expected: str | None
) -> None:
    graph.simulator.set_behaviour(second_send=mode)
    draft_id = graph.draft()
    graph.send_draft(draft_id)

    again = graph.send_draft(draft_id)

    assert again.status_code == status
    assert expected is None or code(again) == expected
    assert len(graph.simulator.deliveries()) == 1


def test_sending_a_sent_item_is_refused(graph: GraphClient) -> None:
    graph.send(tagged("ab12"))
    (sent,) = graph.found("ab12")

    again = graph.send_draft(sent["id"])

    assert (again.status_code, code(again)) == (400, "ErrorInvalidItemForOperationSendItem")


def test_sending_a_draft_without_a_content_length_is_refused(graph: GraphClient) -> None:
    draft_id = graph.draft()

    answer = graph.call("POST", f"/messages/{draft_id}/send", data=iter([b""]))

    assert answer.status_code == 411
    assert graph.simulator.deliveries() == []


def test_a_deleted_draft_lies_in_deleted_items_under_another_id(graph: GraphClient) -> None:
    draft_id = graph.draft(tagged("ab12"))

    assert graph.call("DELETE", f"/messages/{draft_id}").status_code == 204

    assert graph.call("GET", f"/messages/{draft_id}").status_code == 404
    assert len(graph.found("ab12", "/mailFolders/DeletedItems")) == 1


def test_an_address_is_judged_when_a_draft_is_sent_not_when_it_is_stored(graph: GraphClient) -> None:
    draft_id = graph.draft(message(toRecipients=[recipient("nobody")]))

    answer = graph.send_draft(draft_id)

    assert (answer.status_code, code(answer)) == (400, "ErrorInvalidRecipients")


def test_attachments_are_listed_read_and_deleted(graph: GraphClient) -> None:
    content = b"%PDF " * 1000
    draft_id = graph.draft()
    path = f"/messages/{draft_id}/attachments"

    created = graph.call("POST", path, json=file_attachment("a.pdf", content))

    assert created.status_code == 201
    attachment_id = created.json()["id"]
    assert created.json()["size"] > len(content)
    listed = graph.call("GET", path, params={"$select": "id,name,size"}).json()["value"]
    assert [(each["id"], each["name"], "contentBytes" in each) for each in listed] == [(attachment_id, "a.pdf", False)]
    assert graph.call("GET", f"{path}/{attachment_id}/$value").content == content
    assert base64.b64decode(graph.call("GET", f"{path}/{attachment_id}").json()["contentBytes"]) == content
    assert graph.call("GET", f"/messages/{draft_id}").json()["hasAttachments"] is True
    assert graph.call("DELETE", f"{path}/{attachment_id}").status_code == 204
    assert graph.call("GET", path).json()["value"] == []


def test_the_mime_of_a_sent_message_holds_everything_that_was_sent(graph: GraphClient) -> None:
    # Given a mail with awkward names, a picture in its text and a file beside it
    picture, document = b"\x89PNG" * 700, b"%PDF" * 100_000
    graph.send(
        tagged("ab12")
        | {
            "subject": "Grüße\r\nX-Injected: yes",
            "body": {"contentType": "html", "content": '<p>Grüße <img src="cid:logo"></p>'},
            "toRecipients": [{"emailAddress": {"name": "Müller, Jörg", "address": "jm@example.org"}}],
            "ccRecipients": [recipient("carl@example.org")],
            "internetMessageHeaders": [{"name": "x-kind", "value": "invoice"}],
            "attachments": [
                file_attachment("Rechnung März.pdf", document),
                file_attachment("logo.png", picture, isInline=True, contentId="logo", contentType="image/png"),
            ],
        }
    )
    (sent,) = graph.found("ab12")

    # When its MIME is read
    exported = graph.call("GET", f"/messages/{sent['id']}/$value")
    parsed = mime_of(graph, sent["id"])

    # Then all of it is there, and only that
    assert exported.headers["Content-Type"].startswith("text/plain")
    assert "Content-Length" not in exported.headers
    assert b"\n" not in exported.content.replace(b"\r\n", b"")
    assert parsed["From"] == f'"{ANN}" <{ANN}>'
    assert parsed["To"].addresses[0].display_name == "Müller, Jörg"
    assert parsed["Subject"] == "Grüße X-Injected: yes"
    assert (parsed["X-Injected"], parsed["x-kind"]) == (None, "invoice")
    assert parsed["Message-ID"] == sent["internetMessageId"]
    body = parsed.get_body(("html",))
    assert body is not None
    assert "Grüße <img" in body.get_content()
    by_name = {part.get_filename(): part for part in parsed.walk() if part.get_filename()}
    assert by_name["Rechnung März.pdf"].get_content() == document
    assert by_name["logo.png"].get_content() == picture
    assert by_name["logo.png"]["Content-ID"] == "<logo>"
    assert by_name["logo.png"].get_content_disposition() == "inline"


def test_an_address_beyond_ascii_can_be_written(graph: GraphClient) -> None:
    draft_id = graph.draft(message(toRecipients=[recipient("jörg@example.org")]))

    exported = graph.call("GET", f"/messages/{draft_id}/$value").content
    assert "To: jörg@example.org\r\n".encode() in exported


def mime_message() -> bytes:
    composed = EmailMessage(policy=policy.SMTP)
    composed["From"], composed["To"], composed["Subject"] = ANN, "Bob <bob@example.org>", "From MIME"
    composed["Message-ID"], composed["X-Kind"] = "<mime@example.com>", "invoice"
    composed.set_content("Good morning")
    composed.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="a.pdf")
    return base64.b64encode(composed.as_bytes())


def test_a_mail_can_be_sent_as_mime(graph: GraphClient) -> None:
    answer = graph.call("POST", "/sendMail", data=mime_message(), headers={"Content-Type": "text/plain"})

    assert answer.status_code == 202, answer.text
    (delivery,) = graph.simulator.deliveries()
    assert delivery["recipients"] == ["bob@example.org"]
    assert delivery["internetMessageId"] == "<mime@example.com>"
    assert delivery["headers"] == {"X-Kind": "invoice"}
    assert delivery["attachments"] == [{"name": "a.pdf", "bytes": 4, "sha256": hashlib.sha256(b"%PDF").hexdigest()}]


def test_a_draft_can_be_created_from_mime_but_not_below_a_folder(graph: GraphClient) -> None:
    options: dict[str, Any] = {"data": mime_message(), "headers": {"Content-Type": "text/plain"}}

    assert graph.call("POST", "/messages", **options).json()["subject"] == "From MIME"
    refused = graph.call("POST", "/mailFolders/Drafts/messages", **options)
    assert (refused.status_code, code(refused)) == (400, "UnableToDeserializePostBody")


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"not base64!", "ErrorMimeContentInvalidBase64String"), (base64.b64encode(b"\n"), "ErrorMimeContentInvalid")],
)
def test_mime_that_is_none_is_refused(graph: GraphClient, body: bytes, expected: str) -> None:
    answer = graph.call("POST", "/sendMail", data=body, headers={"Content-Type": "text/plain"})

    assert (answer.status_code, code(answer)) == (400, expected)
