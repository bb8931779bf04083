"""Tokens as msal gets them: when the token endpoint is asked, and what each of its refusals means."""

from __future__ import annotations

import base64
import json
import threading
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from requests_mock import Mocker

from graph_client import TokenSource, errors, roles_in

AUTHORITY = "https://login.example"
DISCOVERY = f"{AUTHORITY}/contoso/v2.0/.well-known/openid-configuration"
TOKEN = f"{AUTHORITY}/contoso/oauth2/v2.0/token"
SECRET = "s3cret-of-the-app"


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def entra(requests_mock: Mocker) -> Iterator[Mocker]:
    configuration = {
        "issuer": f"{AUTHORITY}/contoso/v2.0",
        "authorization_endpoint": f"{AUTHORITY}/contoso/oauth2/v2.0/authorize",
        "token_endpoint": TOKEN,
    }
    requests_mock.get(DISCOVERY, json=configuration)
    return requests_mock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def source(clock: Clock) -> TokenSource:
    return TokenSource(AUTHORITY, "contoso", "app-id", secret=SECRET, clock=clock)


def grants(*names: str, lifetime_seconds: int = 3599) -> list[dict[str, Any]]:
    return [{"json": {"token_type": "Bearer", "expires_in": lifetime_seconds, "access_token": name}} for name in names]


def refusal(status: int, error: str, number: int, **headers: str) -> dict[str, Any]:
    body = {"error": error, "error_description": f"AADSTS{number}: no.", "error_codes": [number], "trace_id": "t1"}
    return {"status_code": status, "json": body, "headers": headers}


def asked(entra: Mocker) -> list[dict[str, list[str]]]:
    """Return the forms that were posted to the token endpoint."""
    return [parse_qs(sent.text) for sent in entra.request_history if sent.method == "POST"]


def test_a_token_is_asked_for_once_and_serves_until_shortly_before_its_end(
    entra: Mocker, source: TokenSource, clock: Clock
) -> None:
    entra.post(TOKEN, grants("a", "b", lifetime_seconds=200))

    assert [source.token() for _ in range(3)] == ["a", "a", "a"]
    clock.seconds += 151
    assert [source.token() for _ in range(3)] == ["b", "b", "b"]

    first, _ = asked(entra)
    assert first["client_id"] == ["app-id"]
    assert first["client_secret"] == [SECRET]
    assert first["scope"] == ["https://graph.microsoft.com/.default"]
    assert first["grant_type"] == ["client_credentials"]
    assert "claims" not in first


def test_each_try_to_get_a_token_is_told_also_when_the_one_in_hand_still_serves(entra: Mocker, clock: Clock) -> None:
    told: list[bool] = []
    source = TokenSource(AUTHORITY, "contoso", "app-id", secret=SECRET, clock=clock, on_renewal=told.append)
    entra.post(TOKEN, [*grants("a", lifetime_seconds=200), refusal(401, "invalid_client", 7000215)])

    assert [source.token() for _ in range(3)] == ["a", "a", "a"]
    assert told == [True]
    clock.seconds += 151
    assert [source.token() for _ in range(3)] == ["a", "a", "a"]
    assert told == [True, False]
    clock.seconds += 100
    for _ in range(2):
        with pytest.raises(errors.AuthenticationFailed):
            source.token()
    assert told == [True, False, False, False]


def test_nothing_is_asked_before_the_first_token_is_wanted(entra: Mocker, source: TokenSource) -> None:
    assert source.expires_at is None
    assert entra.call_count == 0


def test_the_token_in_hand_says_when_it_ends(entra: Mocker, source: TokenSource) -> None:
    entra.post(TOKEN, grants("a", lifetime_seconds=4000))
    source.token()

    assert source.expires_at is not None
    assert abs(source.expires_at - datetime.now(UTC) - timedelta(seconds=4000)) < timedelta(seconds=10)


def test_threads_that_need_the_first_token_share_one_request(entra: Mocker, source: TokenSource) -> None:
    entra.post(TOKEN, grants("a", "b"))
    received = in_threads(8, source.token)

    assert received == ["a"] * 8
    assert len(asked(entra)) == 1


def test_a_token_dropped_by_many_threads_is_dropped_once(entra: Mocker, source: TokenSource) -> None:
    entra.post(TOKEN, grants("a", "b", "c"))
    refused = source.token()

    def drop_and_renew() -> str:
        source.drop(refused)
        return source.token()

    assert in_threads(8, drop_and_renew) == ["b"] * 8
    assert len(asked(entra)) == 2


def in_threads(count: int, action: Any) -> list[Any]:
    results: list[Any] = []
    together = threading.Barrier(count)

    def run() -> None:
        together.wait()
        results.append(action())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_token_still_valid_serves_on_while_it_cannot_be_renewed(
    entra: Mocker, source: TokenSource, clock: Clock
) -> None:
    # Given a token in its last quarter, and a token endpoint that is down
    entra.post(TOKEN, [*grants("a", lifetime_seconds=200), {"status_code": 503}])
    source.token()
    clock.seconds += 151
    # Then the token serves, and the endpoint is asked once in a while only
    assert [source.token() for _ in range(3)] == ["a", "a", "a"]
    assert len(asked(entra)) == 2
    # When it has ended
    clock.seconds += 50
    with pytest.raises(errors.ServerUnavailable):
        source.token()


def test_others_use_the_old_token_while_one_thread_renews_it(entra: Mocker, source: TokenSource, clock: Clock) -> None:
    entra.post(TOKEN, grants("a", lifetime_seconds=200))
    source.token()
    clock.seconds += 151
    asking, answered = threading.Event(), threading.Event()

    def slowly(request: object, context: object) -> str:
        asking.set()
        answered.wait(10)
        return json.dumps(grants("b")[0]["json"])

    entra.post(TOKEN, text=slowly)
    renewing = threading.Thread(target=source.token)
    renewing.start()
    asking.wait(10)

    meanwhile = source.token()
    answered.set()
    renewing.join()

    assert (meanwhile, source.token()) == ("a", "b")


def test_a_refused_application_is_named_by_its_aadsts_number_and_not_asked_again_at_once(
    entra: Mocker, source: TokenSource
) -> None:
    entra.post(TOKEN, [refusal(400, "invalid_client", 7000215)])

    for _ in range(2):
        with pytest.raises(errors.AuthenticationFailed) as caught:
            source.token()

    error = caught.value
    assert (error.status, error.code, error.aadsts, error.request_id) == (400, "invalid_client", 7000215, "t1")
    assert "AADSTS7000215" in str(error)
    assert len(asked(entra)) == 1


def test_a_401_of_the_token_endpoint_is_a_refusal_too(entra: Mocker, source: TokenSource) -> None:
    entra.post(TOKEN, [refusal(401, "invalid_client", 7000215)])

    with pytest.raises(errors.AuthenticationFailed):
        source.token()


def test_a_throttling_token_endpoint_binds_the_tenant_and_is_left_alone(entra: Mocker, source: TokenSource) -> None:
    entra.post(TOKEN, [{"status_code": 429, "text": "busy", "headers": {"Retry-After": "30"}}])

    for _ in range(2):
        with pytest.raises(errors.Throttled) as caught:
            source.token()

    assert caught.value.scope == "tenant"
    assert caught.value.retry_after is not None
    assert timedelta(seconds=20) < caught.value.retry_after <= timedelta(seconds=30)
    assert len(asked(entra)) == 1


@pytest.mark.parametrize("answer", [{"status_code": 503}, {"status_code": 500, "text": "<html>"}])
def test_a_failing_token_endpoint_is_transient(entra: Mocker, source: TokenSource, answer: dict[str, Any]) -> None:
    entra.post(TOKEN, [answer])

    with pytest.raises(errors.ServerUnavailable):
        source.token()


def test_a_transient_error_in_a_400_is_transient(entra: Mocker, source: TokenSource) -> None:
    entra.post(TOKEN, [refusal(400, "temporarily_unavailable", 90033)])

    with pytest.raises(errors.ServerUnavailable):
        source.token()


@pytest.mark.parametrize("answer", [{"status_code": 200, "text": "<html>"}, {"status_code": 302}, {"text": "{}"}])
def test_an_answer_that_is_no_token_endpoints_is_a_failed_authentication(
    entra: Mocker, source: TokenSource, answer: dict[str, Any]
) -> None:
    entra.post(TOKEN, [answer])

    with pytest.raises(errors.AuthenticationFailed):
        source.token()


def test_an_unknown_tenant_is_a_failed_authentication(entra: Mocker, source: TokenSource) -> None:
    entra.get(DISCOVERY, status_code=400, json={"error": "invalid_tenant"})

    with pytest.raises(errors.AuthenticationFailed):
        source.token()


def test_an_unreachable_authority_is_a_failed_connection(entra: Mocker, source: TokenSource) -> None:
    entra.get(DISCOVERY, exc=requests.ConnectTimeout)

    with pytest.raises(errors.ConnectionFailed):
        source.token()


def test_a_failing_discovery_is_transient_and_tried_again(entra: Mocker, source: TokenSource) -> None:
    with Mocker() as down:
        down.get(DISCOVERY, status_code=503)
        with pytest.raises(errors.ServerUnavailable):
            source.token()
    entra.post(TOKEN, grants("a"))

    assert source.token() == "a"


def test_no_refusal_shows_the_secret(entra: Mocker, source: TokenSource) -> None:
    entra.post(TOKEN, [refusal(400, "invalid_client", 7000215)])

    with pytest.raises(errors.AuthenticationFailed) as caught:
        source.token()

    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in repr(source)


def test_a_certificate_signs_with_ps256_and_is_named_by_sha256(entra: Mocker, tmp_path: Path) -> None:
    pem, certificate = key_and_certificate(tmp_path)
    entra.post(TOKEN, grants("a"))

    TokenSource(AUTHORITY, "contoso", "app-id", certificate_pem_path=pem).token()

    (form,) = asked(entra)
    header, claims = (decoded(part) for part in form["client_assertion"][0].split(".")[:2])
    assert header["alg"] == "PS256"
    assert base64.urlsafe_b64decode(header["x5t#S256"] + "==") == certificate.fingerprint(hashes.SHA256())
    assert (claims["iss"], claims["sub"], claims["aud"]) == ("app-id", "app-id", TOKEN)


def test_a_secret_that_was_replaced_serves_without_a_restart(entra: Mocker, clock: Clock) -> None:
    # Given a source that has used the old secret
    stored = ["old"]
    source = TokenSource(AUTHORITY, "contoso", "app-id", "old", clock=clock, reread_secret=lambda: stored[0])
    entra.post(TOKEN, grants("a", lifetime_seconds=200))
    source.token()
    # When it is refused from now on, and nothing else is known yet
    entra.post(TOKEN, [refusal(400, "invalid_client", 7000222)])
    clock.seconds += 201
    with pytest.raises(errors.AuthenticationFailed):
        source.token()
    # And then a new one is
    stored[0] = "new"
    entra.post(TOKEN, grants("b"))
    assert source.token() == "b"
    assert [form["client_secret"] for form in asked(entra)] == [["old"], ["old"], ["new"]]


def test_a_secret_is_replaced_within_one_call_when_the_old_one_is_refused(entra: Mocker) -> None:
    source = TokenSource(AUTHORITY, "contoso", "app-id", "old", reread_secret=lambda: "new")
    entra.post(TOKEN, [refusal(401, "invalid_client", 7000222), *grants("a")])

    assert source.token() == "a"
    assert [form["client_secret"] for form in asked(entra)] == [["old"], ["new"]]


def test_a_certificate_that_was_replaced_serves_without_a_restart(entra: Mocker, tmp_path: Path) -> None:
    # Given
    noted: list[datetime | None] = []
    pem, first = key_and_certificate(tmp_path)
    source = TokenSource(AUTHORITY, "contoso", "app-id", certificate_pem_path=pem, on_credential=noted.append)
    entra.post(TOKEN, grants("a"))
    source.drop(source.token())
    # When
    _, second = key_and_certificate(tmp_path)
    entra.post(TOKEN, [refusal(401, "invalid_client", 700027), *grants("b")])
    # Then
    assert source.token() == "b"
    *_, refused, accepted = (decoded(form["client_assertion"][0].split(".")[0])["x5t#S256"] for form in asked(entra))
    assert base64.urlsafe_b64decode(refused + "==") == first.fingerprint(hashes.SHA256())
    assert base64.urlsafe_b64decode(accepted + "==") == second.fingerprint(hashes.SHA256())
    assert noted == [datetime(2036, 1, 1, tzinfo=UTC)] * 2


def test_the_end_of_a_certificate_can_be_told(tmp_path: Path) -> None:
    pem, _ = key_and_certificate(tmp_path)
    source = TokenSource(AUTHORITY, "contoso", "app-id", certificate_pem_path=pem)
    assert source.certificate_expires_at == datetime(2036, 1, 1, tzinfo=UTC)
    pem.write_text("no certificate")
    assert source.certificate_expires_at is None


def decoded(part: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=="))
    return content


def key_and_certificate(folder: Path) -> tuple[Path, x509.Certificate]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "app")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2036, 1, 1, tzinfo=UTC))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "app.pem"
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path, certificate


@pytest.mark.parametrize("content", [None, b"", b"not a certificate", b"\xff\xfe"])
def test_an_unusable_certificate_is_a_failed_authentication(
    entra: Mocker, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "app.pem"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(errors.AuthenticationFailed):
        TokenSource(AUTHORITY, "contoso", "app-id", certificate_pem_path=path).token()


@pytest.mark.parametrize("credentials", [{}, {"secret": "s", "certificate_pem_path": "/app.pem"}])
def test_exactly_one_credential_is_needed(credentials: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="either a secret or a certificate"):
        TokenSource(AUTHORITY, "contoso", "app-id", **credentials)


def test_without_a_credential_nobody_is_asked(entra: Mocker) -> None:
    with pytest.raises(errors.AuthenticationFailed):
        TokenSource(AUTHORITY, "contoso", "app-id", secret="").token()
    assert entra.call_count == 0


def test_an_authority_in_the_clear_is_refused() -> None:
    with pytest.raises(errors.InsecureUrl):
        TokenSource("http://login.example", "contoso", "app-id", secret=SECRET)


def jwt(claims: object) -> str:
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"e30.{payload}.c2ln"


@pytest.mark.parametrize(
    ("token", "roles"),
    [
        (jwt({"roles": ["Mail.Send", "Mail.ReadWrite"]}), {"Mail.Send", "Mail.ReadWrite"}),
        (jwt({}), set()),
        ("opaque", None),
        ("a.b.c", None),
        (jwt(["roles"]), None),
        (jwt({"roles": 7}), None),
        ("", None),
    ],
)
def test_a_tokens_roles_can_be_read_unless_it_is_opaque(token: str, roles: set[str] | None) -> None:
    assert roles_in(token) == roles
