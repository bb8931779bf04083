"""The authority of the simulator: who gets a token, what it opens, and that MSAL is content with it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msal
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from simulator_support import GRAPH_SCOPE, GraphClient, code

from simulator.control import Simulator


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.start(tmp_path_factory.mktemp("simulator")) as started:
        yield started


@pytest.fixture
def graph(simulator: Simulator) -> GraphClient:
    simulator.reset()
    return GraphClient(simulator)


@pytest.fixture(scope="module")
def client_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def certificate_for(key: rsa.RSAPrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mailfleet")])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )


def msal_app(simulator: Simulator, credential: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", simulator.ca_bundle)
    return msal.ConfidentialClientApplication(
        "mailfleet-demo",
        authority=f"{simulator.authority}/contoso",
        client_credential=credential,
        instance_discovery=False,
    )


def pem(key: rsa.RSAPrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def test_msal_obtains_a_token_with_a_secret_and_graph_accepts_it(
    graph: GraphClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = msal_app(graph.simulator, "demo-secret", monkeypatch).acquire_token_for_client([GRAPH_SCOPE])

    assert 3600 <= token["expires_in"] < 5400
    assert graph.send(headers={"Authorization": f"Bearer {token['access_token']}"}).status_code == 202


@pytest.mark.parametrize("digest", [hashes.SHA256(), hashes.SHA1()], ids=["PS256", "RS256"])
def test_msal_obtains_a_token_with_a_registered_certificate(
    graph: GraphClient, client_key: rsa.RSAPrivateKey, digest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given an application that has registered a certificate
    certificate = certificate_for(client_key)
    public = certificate.public_bytes(Encoding.PEM).decode()
    graph.simulator.register_app("mailfleet-demo", certificate=public)

    # When MSAL signs with its key: PS256 when it knows the certificate, RS256 when only the old thumbprint
    credential = {"private_key": pem(client_key)} | (
        {"public_certificate": public}
        if isinstance(digest, hashes.SHA256)
        else {"thumbprint": certificate.fingerprint(digest).hex()}
    )
    token = msal_app(graph.simulator, credential, monkeypatch).acquire_token_for_client([GRAPH_SCOPE])

    # Then the token is good for Graph
    assert graph.send(headers={"Authorization": f"Bearer {token['access_token']}"}).status_code == 202


def test_an_assertion_that_names_another_certificate_is_refused(
    graph: GraphClient, client_key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = certificate_for(client_key).public_bytes(Encoding.PEM).decode()
    graph.simulator.register_app("mailfleet-demo", certificate=public)
    credential = {"private_key": pem(client_key), "thumbprint": "00" * 20}

    token = msal_app(graph.simulator, credential, monkeypatch).acquire_token_for_client([GRAPH_SCOPE])

    assert token["error_codes"] == [700027]


def test_an_assertion_signed_with_another_key_is_refused(
    graph: GraphClient, client_key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = certificate_for(client_key)
    public = certificate.public_bytes(Encoding.PEM).decode()
    graph.simulator.register_app("mailfleet-demo", certificate=public)
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    credential = {"private_key": pem(other), "public_certificate": public}

    token = msal_app(graph.simulator, credential, monkeypatch).acquire_token_for_client([GRAPH_SCOPE])

    assert token["error"] == "invalid_client"
    assert token["error_codes"] == [700027]


@pytest.mark.parametrize(
    ("changes", "status", "error", "number"),
    [
        ({"client_secret": "wrong"}, 401, "invalid_client", 7000215),
        ({"client_secret": ""}, 401, "invalid_client", 7000216),
        ({"client_id": "nobody"}, 400, "unauthorized_client", 700016),
        ({"grant_type": "password"}, 400, "unsupported_grant_type", 70003),
        ({"scope": "Mail.Send"}, 400, "invalid_scope", 1002012),
        ({"scope": f"{GRAPH_SCOPE} https://other.example/.default"}, 400, "invalid_scope", 1002012),
    ],
)
def test_a_wrong_token_request_is_refused_with_its_aadsts_number(
    graph: GraphClient, changes: dict[str, str], status: int, error: str, number: int
) -> None:
    answer = graph.token(**changes)

    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert answer.json()["error_codes"] == [number]
    assert answer.json()["error_description"].startswith(f"AADSTS{number}:")


def test_id_and_secret_may_come_as_basic_credentials(graph: GraphClient) -> None:
    credentials = base64.b64encode(b"mailfleet-demo:demo-secret").decode()

    answer = graph.session.post(
        f"{graph.simulator.authority}/contoso/oauth2/v2.0/token",
        data={"grant_type": "client_credentials", "scope": GRAPH_SCOPE},
        headers={"Authorization": f"Basic {credentials}"},
    )

    assert answer.status_code == 200


def test_a_call_without_a_token_or_with_a_foreign_one_is_unauthorised(graph: GraphClient) -> None:
    for authorization in (None, "Bearer ", "Bearer eyJhbGciOiJub25lIn0.e30.", "Basic eDp5"):
        answer = graph.send(headers={"Authorization": authorization})
        assert (answer.status_code, code(answer)) == (401, "InvalidAuthenticationToken")
    assert graph.simulator.deliveries() == []


def test_a_token_for_another_audience_is_unauthorised(graph: GraphClient) -> None:
    token = graph.token(scope="https://outlook.office.com/.default").json()["access_token"]

    answer = graph.send(headers={"Authorization": f"Bearer {token}"})

    assert answer.status_code == 401
    assert "audience" in answer.json()["error"]["message"]


def test_a_token_dies_with_its_lifetime_and_a_new_one_works(graph: GraphClient) -> None:
    # Given a token whose life is over at once
    graph.simulator.set_token_lifetime(1e-6)
    graph.sign_in()

    # When it is used
    answer = graph.send()

    # Then Graph says why, and a token of the usual lifetime helps
    assert (answer.status_code, code(answer)) == (401, "InvalidAuthenticationToken")
    assert answer.json()["error"]["message"] == "Lifetime validation failed, the token is expired."
    graph.simulator.set_token_lifetime(None)
    graph.sign_in()
    assert graph.send().status_code == 202


def test_expiring_all_tokens_leaves_none_that_works(graph: GraphClient) -> None:
    graph.simulator.expire_all_tokens()

    assert graph.send().status_code == 401


@pytest.mark.parametrize(
    ("roles", "path", "status"),
    [
        (["Mail.Send"], "/sendMail", 202),
        (["Mail.Send"], "/messages", 403),
        (["Mail.ReadWrite"], "/sendMail", 403),
        (["Mail.ReadWrite"], "/messages", 201),
        (["User.Read.All"], "/messages", 403),
        ([], "/sendMail", 401),
    ],
)
def test_a_call_needs_the_role_that_belongs_to_it(graph: GraphClient, roles: list[str], path: str, status: int) -> None:
    graph.simulator.register_app("mailfleet-demo", roles=roles)
    graph.sign_in()
    given = {"subject": "Hello", "toRecipients": [{"emailAddress": {"address": "bob@example.org"}}]}

    answer = graph.call("POST", path, json={"message": given} if path == "/sendMail" else given)

    assert answer.status_code == status
    if status == 403:
        assert code(answer) == "ErrorAccessDenied"
    if status == 401:
        assert code(answer) == "NoPermissionsInAccessToken"


def test_the_authority_fails_when_it_is_asked_to(graph: GraphClient) -> None:
    graph.simulator.fail(503, operation="token", body="empty", retry_after="7")

    answer = graph.token()

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
    assert graph.token().status_code == 200
