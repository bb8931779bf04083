"""Application tokens from Microsoft Entra through msal, shared by all threads of a process.

msal does the protocol (secret or certificate, PS256 assertion). What is added here: a token in hand costs no look-up in
msal's cache, one thread at a time asks for a new one while the others go on with the old, a token that Graph refused is
forgotten once, and every failure becomes one of our errors.

The capability ``cp1`` is not declared, so Graph sends no claims challenge and tokens live for 60 to 90 minutes
(https://learn.microsoft.com/entra/identity-platform/claims-challenge).
"""

from __future__ import annotations

import base64
import binascii
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msal
import orjson
import requests
from cryptography import x509

from graph_client import errors
from graph_client.retry_after import retry_after_in
from graph_client.transport import new_session, origin_of, require_secure, surroundings, translating

DEFAULT_SCOPE = "https://graph.microsoft.com/.default"

#: A token is renewed this long before it ends, or in the last quarter of a shorter life. It is less than msal's five
#: minutes, within which msal's own cache no longer gives the old token.
RENEWAL_MARGIN = timedelta(minutes=4)

#: After a failed renewal the token in hand serves on, and the next try waits this long.
RENEWAL_PAUSE = timedelta(seconds=30)

_TRANSIENT_OAUTH_ERRORS = frozenset({"temporarily_unavailable", "server_error"})


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    expires_at: datetime
    fresh_until: float  # of the source's clock
    valid_until: float


class _TokenEndpoint:
    """The HTTP client that msal is given: bounded in time, our errors, and a memory of the last answer.

    msal replays refusals from a cache without calling this, hence the memory.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout.total_seconds()
        self._session = new_session()
        self._answered_at = 0.0
        self.status: int | None = None
        self._retry_after: timedelta | None = None

    def get(self, url: str, **kwargs: Any) -> requests.Response:
        return self._request("GET", url, **kwargs)

    def post(self, url: str, **kwargs: Any) -> requests.Response:
        return self._request("POST", url, **kwargs)

    def close(self) -> None:
        self._session.close()

    @property
    def retry_after(self) -> timedelta | None:
        """What is left of the wait that was asked for."""
        if self._retry_after is None:
            return None
        return max(timedelta(0), self._retry_after - timedelta(seconds=time.monotonic() - self._answered_at))

    def _request(self, method: str, url: str, **kwargs: Any) -> requests.Response:
        origin = origin_of(url)
        require_secure(origin)
        proxies, verify = surroundings(origin)
        with translating(True, None):
            response = self._session.request(
                method, url, timeout=self._timeout, proxies=proxies, verify=verify, allow_redirects=False, **kwargs
            )
        self._answered_at = time.monotonic()
        self.status = response.status_code
        self._retry_after = retry_after_in(response.headers)
        return response


class TokenSource:
    """The application's tokens for one tenant. Any number of threads may use it.

    Network is used by ``token`` alone, and only when there is no token or it is about to end.
    """

    def __init__(
        self,
        authority: str,
        tenant_id: str,
        client_id: str,
        secret: str | None = None,
        certificate_pem_path: str | Path | None = None,
        scope: str = DEFAULT_SCOPE,
        timeout: timedelta = timedelta(seconds=30),
        clock: Callable[[], float] = time.monotonic,
        reread_secret: Callable[[], str | None] = lambda: None,
        on_credential: Callable[[datetime | None], None] = lambda _ends_at: None,
        on_renewal: Callable[[bool], None] = lambda _done: None,
    ) -> None:
        """Exactly one of ``secret`` and ``certificate_pem_path`` (key and certificate in one file) is needed.

        An empty secret stands for none: every token is then refused here, and nobody is asked.

        ``clock`` counts seconds, by which the token's age is judged. A credential that is refused may have been
        replaced: the file is read again, and ``reread_secret`` asked for the secret (None: not known to be another).
        ``on_credential`` is told when a credential comes into use, with the end of its certificate; ``on_renewal`` of
        each try to get a token, with whether there is a new one.

        Raises:
            InsecureUrl: The authority is plain http to another machine.
            ValueError: There is no credential, or there are two.
        """
        if (secret is None) == (certificate_pem_path is None):
            raise ValueError("give either a secret or a certificate")
        require_secure(origin_of(authority))
        self._authority = f"{authority.rstrip('/')}/{tenant_id}"
        self._client_id = client_id
        self._secret = secret
        self._reread_secret = reread_secret
        self._on_credential = on_credential
        self._on_renewal = on_renewal
        self._used: str | None = None
        self._certificate_path = None if certificate_pem_path is None else Path(certificate_pem_path)
        self._scope = scope
        self._clock = clock
        self._endpoint = _TokenEndpoint(timeout)
        self._application: Any = None
        self._token: _Token | None = None
        self._renewing = threading.Lock()

    @property
    def expires_at(self) -> datetime | None:
        """When the token in hand ends; None when there is none."""
        token = self._token
        return None if token is None else token.expires_at

    def token(self) -> str:
        """Return a token that is good for a while yet. Blocks only when there is none that could serve.

        Raises:
            AuthenticationFailed: The token endpoint refuses the application, or the credential is unusable.
            Throttled: The token endpoint asks to wait (scope ``tenant``).
            ConnectionFailed, ConnectionLost, ServerUnavailable: It cannot be reached or fails.
        """
        token, now = self._token, self._clock()
        if token is not None and now < token.fresh_until:
            return token.text
        still_valid = token is not None and now < token.valid_until
        if not self._renewing.acquire(blocking=not still_valid):
            assert token is not None  # noqa: S101  (only a valid token makes the acquisition non-blocking)
            return token.text
        try:
            return self._renewed().text
        finally:
            self._renewing.release()

    @property
    def certificate_expires_at(self) -> datetime | None:
        """When the certificate in the file ends; None when a secret is used, or the file has none that can be read."""
        if self._certificate_path is None:
            return None
        try:
            certificate = x509.load_pem_x509_certificate(self._certificate_path.read_bytes())
        except (OSError, ValueError):
            return None
        return certificate.not_valid_after_utc

    def drop(self, token: str) -> None:
        """Forget a token that Graph refused. Of many threads that drop the same one, the first does it."""
        with self._renewing:
            if self._token is not None and self._token.text == token:
                self._token = None
                self._application.remove_tokens_for_client()

    def _renewed(self) -> _Token:
        """Ask for a new token, unless another thread just did. To be called with the lock held."""
        held, now = self._token, self._clock()
        if held is not None and now < held.fresh_until:
            return held
        try:
            token = self._acquire()
        except errors.GraphError:
            self._on_renewal(False)
            if held is None or now >= held.valid_until:
                raise
            pause = now + RENEWAL_PAUSE.total_seconds()
            token = _Token(held.text, held.expires_at, min(pause, held.valid_until), held.valid_until)
        else:
            self._on_renewal(True)
        self._token = token
        return token

    def _acquire(self) -> _Token:
        try:
            return self._acquire_once()
        except errors.AuthenticationFailed:
            if not self._is_replaced():
                raise
            return self._acquire_once()

    def _acquire_once(self) -> _Token:
        try:
            if self._application is None:
                self._application = self._new_application()
            granted = self._application.acquire_token_for_client(scopes=[self._scope])
        except errors.GraphError:
            raise
        except Exception as exc:  # msal raises what its parsing meets: ValueError, KeyError, MsalServiceError, OSError
            raise self._refusal({}) from exc
        if "access_token" not in granted:
            raise self._refusal(granted)
        return _token(granted, self._clock())

    def _is_replaced(self) -> bool:
        """Take over the credential that holds now; say whether it is another than was used."""
        if self._certificate_path is None:
            self._secret = self._reread_secret() or self._secret
            current = self._secret
        else:
            try:
                current = self._certificate_path.read_text()
            except (OSError, UnicodeDecodeError):
                return False
        replaced = current != self._used
        if replaced:
            self._application = None  # msal would replay the refusal
        return replaced

    def _new_application(self) -> Any:
        """Discover the authority's endpoints (a GET). Instance discovery is off: it would ask Microsoft's public cloud
        about the authority, and we trust the one that we are given."""
        self._endpoint.status = None
        self._on_credential(self.certificate_expires_at)
        return msal.ConfidentialClientApplication(
            self._client_id,
            authority=self._authority,
            client_credential=self._credential(),
            instance_discovery=False,
            http_client=self._endpoint,
        )

    def _credential(self) -> str | dict[str, str] | None:
        if self._secret == "":
            raise errors.AuthenticationFailed("this process has no credential")
        if self._certificate_path is None:
            self._used = self._secret
            return self._secret
        self._used = pem = self._certificate_path.read_text()
        # Without a SHA-1 thumbprint msal signs with PS256 and names the certificate by SHA-256.
        return {"private_key": pem, "public_certificate": pem}

    def _refusal(self, answer: Mapping[str, Any]) -> errors.GraphError:
        code, status = answer.get("error"), self._endpoint.status
        facts: dict[str, Any] = {
            "status": status,
            "code": code,
            "request_id": answer.get("trace_id"),
            "client_request_id": answer.get("correlation_id"),
            "retry_after": self._endpoint.retry_after,
        }
        if status == 429:
            throttled = errors.Throttled("the token endpoint is throttling", **facts)
            throttled.scope = "tenant"
            return throttled
        if code in _TRANSIENT_OAUTH_ERRORS or (status or 0) >= 500:
            return errors.ServerUnavailable("the token endpoint fails", **facts)
        failed = errors.AuthenticationFailed("the token endpoint refuses the application", **facts)
        failed.aadsts = next(iter(answer.get("error_codes") or ()), None)
        return failed


def _token(granted: Mapping[str, Any], now: float) -> _Token:
    lifetime = timedelta(seconds=int(granted["expires_in"]))
    margin = min(RENEWAL_MARGIN, lifetime / 4)
    return _Token(
        text=granted["access_token"],
        expires_at=datetime.now(UTC) + lifetime,
        fresh_until=now + (lifetime - margin).total_seconds(),
        valid_until=now + lifetime.total_seconds(),
    )


def roles_in(token: str) -> frozenset[str] | None:
    """Return the application roles that a token names, unverified; None when the token is opaque.

    An empty set is no proof of anything: permissions granted by RBAC for Applications do not show in the token.
    """
    try:
        payload = token.split(".")[1]
        claims = orjson.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return frozenset(claims.get("roles", ()))
    except (IndexError, ValueError, AttributeError, TypeError, binascii.Error):
        return None
