"""Where mail must not reach everybody: on both routes, in the status of a mail and in the doctor's findings."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import support
from support import SENDER, Fleet, email_row, store, table
from test_graph_auth import key_and_certificate

import operations
import runtime
from graph_client import GraphClient, TokenSource, errors
from simulator.control import Simulator

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


# The application's credential


def with_certificate(path: Path) -> TokenSource:
    configuration = runtime.configuration
    return TokenSource(
        configuration.graph_authority,
        configuration.graph_tenant_id,
        configuration.graph_client_id,
        certificate_pem_path=path,
    )


def certificate_of(path: Path) -> str:
    return path.read_text().partition("-----END PRIVATE KEY-----\n")[2]


def test_a_certificate_sends_mail_and_is_replaced_while_the_process_runs(graph: Simulator, tmp_path: Path) -> None:
    # Given
    path, _ = key_and_certificate(tmp_path)
    graph.register_app("mailfleet-demo", certificate=certificate_of(path))
    tokens = with_certificate(path)
    client = GraphClient(
        runtime.configuration.graph_base_url, tokens, timeout=timedelta(seconds=30), tag_id=runtime.TAG
    )
    message = {
        "subject": "Hello",
        "body": {"contentType": "text", "content": "."},
        "toRecipients": [{"emailAddress": {"address": "bob@example.org"}}],
    }
    client.send_mail(SENDER, message)
    # When another one is registered, and the old one's tokens end
    old = path.read_bytes()
    key_and_certificate(tmp_path)
    new = path.read_bytes()
    path.write_bytes(old)
    graph.register_app("mailfleet-demo", certificate=new.decode().partition("-----END PRIVATE KEY-----\n")[2])
    graph.expire_all_tokens()
    with pytest.raises(errors.AuthenticationFailed):
        client.send_mail(SENDER, message)
    # Then it is taken from the file as soon as it is there
    path.write_bytes(new)
    client.send_mail(SENDER, message)
    assert len(graph.deliveries(SENDER)) == 2


@pytest.mark.parametrize(("days", "fine"), [(30, True), (13, False), (-1, False)])
def test_the_doctor_tells_in_time_that_the_credential_ends(
    tables: str, graph: Simulator, configure: Callable[..., None], days: int, fine: bool
) -> None:
    # Given
    ends_on = (datetime.now(UTC) + timedelta(days=days)).date()
    configure(graph_client_secret_expires_on=ends_on)
    # When
    found = {finding.subject: finding for finding in operations.doctor()}["Graph"]
    # Then
    assert found.fine == fine
    assert ends_on.isoformat() in found.detail
