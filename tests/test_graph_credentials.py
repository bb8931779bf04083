"""The application's credential at Graph: a certificate sends and is replaced, and the doctor tells when it ends."""

from __future__ import annotations

import re
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


# Least privilege

#: All that docs/connect-microsoft-365.md has an administrator grant.
GRANTED = ("Mail.ReadWrite", "Mail.Send")


def test_the_two_permissions_that_are_asked_for_are_enough_from_the_send_to_the_archive(fleet: Fleet) -> None:
    # Given
    fleet.graph.register_app("mailfleet-demo", roles=GRANTED)
    runtime.tokens.drop(runtime.tokens.token())
    assert runtime.graph.ping() == set(GRANTED)
    files = [{"name": f"{size}.bin", "size": size, "urlOrId": fleet.graph.file_url(size)} for size in (10, 4_000_000)]
    ids = [store(), store(publisher_message_id="attached", attachments=files)]
    # When
    assert fleet.send() == ["done", "done"]
    fleet.backup()
    # Then
    assert [email_row(id)["status"] for id in ids] == ["processed", "processed"]
    assert len(table("email_backups")) == 2


@pytest.mark.parametrize(("missing", "given"), [GRANTED, GRANTED[::-1]])
def test_the_doctor_names_the_permission_that_is_missing(
    tables: str, graph: Simulator, missing: str, given: str
) -> None:
    # Given
    graph.register_app("mailfleet-demo", roles=[given])
    runtime.tokens.drop(runtime.tokens.token())
    # When
    found = {finding.subject: finding for finding in operations.doctor()}["Graph"]
    # Then
    assert not found.fine
    assert found.detail.startswith(f"gives a token without {missing}")


def test_the_page_asks_for_no_other_permission() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "connect-microsoft-365.md").read_text()
    assert set(re.findall(r"\b(?:Mail|User|Directory|Files|MailboxSettings)\.[A-Z]\w+(?:\.\w+)*", page)) == set(GRANTED)
