"""Where mail must not reach everybody: on both routes, in the status of a mail and in the doctor's findings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import support
from support import SENDER, Fleet, email_row, store, table

import operations
import runtime

shared_database, tables, fleet, configure = support.shared_database, support.tables, support.fleet, support.configure


def attached(fleet: Fleet) -> list[dict[str, object]]:
    return [{"name": "a.bin", "size": 10, "urlOrId": fleet.graph.file_url(10)}]


@pytest.mark.parametrize("route", ["send_plain", "send_attached"])
def test_a_redirected_mail_reaches_one_address_and_says_whom_it_was_for(
    fleet: Fleet, configure: Callable[..., None], route: str
) -> None:
    # Given
    configure(recipient_firewall=("redirect:qa@test.example",))
    files = attached(fleet) if route == "send_attached" else None
    id = store(cc=["carl@example.org"], bcc=["dora@example.org"], headers={"x-campaign": "spring"}, attachments=files)
    # When
    fleet.schedule()
    assert fleet.run(route) == ["done"]
    # Then
    (mail,) = fleet.graph.messages(SENDER)
    reached = {each["emailAddress"]["address"] for name in mail if name.endswith("Recipients") for each in mail[name]}
    assert reached == {"qa@test.example"}
    with runtime.graph.fetch_mime(SENDER, mail["id"]) as chunks:
        mime = b"".join(chunks)
    for header in (b"x-original-to: bob@example.org", b"x-original-bcc: dora@example.org", b"x-campaign: spring"):
        assert header in mime
    assert operations.status(id)["recipient_firewall"] == "all mail goes to one address"


@pytest.mark.parametrize("route", ["send_plain", "send_attached"])
def test_replies_to_a_redirected_mail_go_where_it_went(
    fleet: Fleet, configure: Callable[..., None], route: str
) -> None:
    # Given
    configure(recipient_firewall=("redirect:qa@test.example",))
    files = attached(fleet) if route == "send_attached" else None
    store(reply_to=["sales@customer.example"], attachments=files)
    # When
    fleet.schedule()
    assert fleet.run(route) == ["done"]
    # Then
    (mail,) = fleet.graph.messages(SENDER)
    assert [each["emailAddress"]["address"] for each in mail["replyTo"]] == ["qa@test.example"]
    with runtime.graph.fetch_mime(SENDER, mail["id"]) as chunks:
        assert b"x-original-reply-to: sales@customer.example" in b"".join(chunks)


def test_who_is_not_on_the_list_is_not_replied_to(fleet: Fleet, configure: Callable[..., None]) -> None:
    configure(recipient_firewall=("*@example.org",))
    store(reply_to=["sales@customer.example"])
    fleet.send()
    (mail,) = fleet.graph.messages(SENDER)
    assert mail["replyTo"] == []


def test_who_is_not_on_the_list_gets_nothing(fleet: Fleet, configure: Callable[..., None]) -> None:
    configure(recipient_firewall=("*@example.org",))
    store(to=["bob@example.org", "real@customer.example"])
    fleet.send()
    (mail,) = fleet.graph.messages(SENDER)
    assert [each["emailAddress"]["address"] for each in mail["toRecipients"]] == ["bob@example.org"]


@pytest.mark.parametrize("via", ["sendmail", "draft"])
def test_a_mail_that_may_reach_nobody_is_given_up_with_the_reason(
    fleet: Fleet, configure: Callable[..., None], via: str
) -> None:
    configure(recipient_firewall=("*@test.example",), send_plain_via=via)
    id = store()
    fleet.send()
    assert fleet.graph.messages(SENDER) == []
    assert email_row(id)["status"] == "failed"
    assert "RECIPIENT_FIREWALL" in table("dlq")[0]["last_error"]


def test_the_doctor_says_what_the_firewall_does(tables: str, configure: Callable[..., None]) -> None:
    assert operations.recipient_firewall() == "mail reaches whomever it names"
    configure(recipient_firewall=("*@test.example",))
    found = {finding.subject: finding for finding in operations.doctor()}
    assert found["Recipients"] == ("Recipients", True, "mail reaches listed recipients only")
