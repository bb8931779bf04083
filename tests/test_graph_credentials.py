"""The application's credential at Graph: a certificate sends and is replaced, and the doctor tells when it ends."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import support
from support import SENDER
from test_graph_auth import key_and_certificate

import operations
import runtime
from graph_client import GraphClient, TokenSource, errors
from simulator.control import Simulator

shared_database, tables, configure = support.shared_database, support.tables, support.configure


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
