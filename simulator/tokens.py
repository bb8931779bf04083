"""The authority: registered applications, the tokens that they are given, and whether a token opens a door.

It speaks the client credentials flow of https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow
with a secret or a certificate, and answers in AADSTS codes where that flow goes wrong.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import random
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_plus

import jwt
import orjson
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from . import errors
from .behaviour import Behaviour

GRAPH = "https://graph.microsoft.com"
ALL_ROLES = ("Mail.ReadWrite", "Mail.Send")
_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


@dataclass(slots=True)
class App:
    """An application registration."""

    client_id: str
    secret: str
    certificate: x509.Certificate | None = None
    roles: tuple[str, ...] = ALL_ROLES


@dataclass(slots=True)
class Grant:
    """What a token stands for."""

    app: str
    audience: str
    roles: frozenset[str]
    expires_at: float


class TokenRefused(Exception):
    """Raised when the authority issues no token; carries what its JSON error says."""

    def __init__(self, status: int, error: str, number: int, description: str) -> None:
        super().__init__(f"AADSTS{number}")
        self.status = status
        self.error = error
        self.number = number
        self.description = description

    def as_json(self) -> dict[str, Any]:
        trace_id, correlation_id = str(uuid.uuid4()), str(uuid.uuid4())
        timestamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        return {
            "error": self.error,
            "error_description": f"AADSTS{self.number}: {self.description} Trace ID: {trace_id} "
            f"Correlation ID: {correlation_id} Timestamp: {timestamp}",
            "error_codes": [self.number],
            "timestamp": timestamp,
            "trace_id": trace_id,
            "correlation_id": correlation_id,
        }


class Authority:
    def __init__(self, behaviour: Behaviour, client_id: str, secret: str) -> None:
        self._behaviour = behaviour
        self._key = secrets.token_bytes(32)
        self._grants: dict[str, Grant] = {}
        self._lifetimes = random.Random(client_id)
        self.apps: dict[str, App] = {client_id: App(client_id, secret)}

    def issue(self, tenant: str, token_url: str, form: Mapping[str, str], authorization: str) -> dict[str, Any]:
        """Answer a token request.

        Raises:
            TokenRefused: The request is malformed, or nobody's.
        """
        if form.get("grant_type") != "client_credentials":
            raise TokenRefused(400, "unsupported_grant_type", 70003, "The grant type is not supported.")
        form = {**form, **_basic_credentials(authorization)}
        app = self.apps.get(form.get("client_id", ""))
        if app is None:
            raise TokenRefused(400, "unauthorized_client", 700016, "Application was not found in the directory.")
        self._authenticate_app(app, form, token_url)
        audience = _audience(form.get("scope", ""))
        lifetime = self._behaviour.token_lifetime_seconds or self._lifetimes.randint(3600, 5399)
        token = self._mint(app, tenant, audience, lifetime)
        return {
            "token_type": "Bearer",
            "expires_in": int(lifetime),
            "ext_expires_in": int(lifetime),
            "access_token": token,
        }

    def authorize(self, authorization: str | None) -> Grant:
        """Return what the Authorization header grants.

        Raises:
            GraphError: 401: no token, or one that is unknown, expired, for another audience or without any role.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise errors.invalid_token("Access token is empty.")
        grant = self._grants.get(token)
        if grant is None:
            raise errors.invalid_token("CompactToken parsing failed with error code: 80049217")
        if grant.expires_at <= time.time():
            raise errors.expired_token()
        if grant.audience != GRAPH:
            raise errors.invalid_token("Access token validation failure. Invalid audience.")
        if not grant.roles:
            raise errors.no_permissions()
        return grant

    def expire(self, authorization: str | None) -> None:
        """Let the token of this header be expired from now on."""
        grant = self._grants.get((authorization or "").partition(" ")[2])
        if grant is not None:
            grant.expires_at = 0.0

    def expire_all(self) -> None:
        for grant in self._grants.values():
            grant.expires_at = 0.0

    def _mint(self, app: App, tenant: str, audience: str, lifetime: float) -> str:
        now = int(time.time())
        claims = {
            "aud": audience,
            "iss": f"https://sts.windows.net/{tenant}/",
            "iat": now,
            "nbf": now,
            "exp": now + int(lifetime),
            "appid": app.client_id,
            "roles": list(app.roles),
            "tid": tenant,
            "uti": secrets.token_urlsafe(16),
        }
        token = jwt.encode(claims, self._key, algorithm="HS256")
        self._grants[token] = Grant(app.client_id, audience, frozenset(app.roles), time.time() + lifetime)
        return token

    def _authenticate_app(self, app: App, form: Mapping[str, str], token_url: str) -> None:
        if form.get("client_assertion_type") == _ASSERTION_TYPE:
            _check_assertion(app, form.get("client_assertion", ""), token_url)
        elif not form.get("client_secret"):
            raise TokenRefused(
                401, "invalid_client", 7000216, "'client_assertion', 'client_secret' or 'request' is required."
            )
        elif not secrets.compare_digest(form["client_secret"].encode(), app.secret.encode()):
            raise TokenRefused(401, "invalid_client", 7000215, "Invalid client secret provided.")


def _basic_credentials(authorization: str) -> dict[str, str]:
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() != "basic":
        return {}
    try:
        client_id, _, secret = base64.b64decode(credentials).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return {}
    return {"client_id": unquote_plus(client_id), "client_secret": unquote_plus(secret)}


def _audience(scope: str) -> str:
    resources = [each for each in scope.split() if each.endswith("/.default")]
    if len(resources) != 1 or len(scope.split()) != 1:
        raise TokenRefused(400, "invalid_scope", 1002012, "The provided value for scope is not valid.")
    return resources[0].removesuffix("/.default").rstrip("/")


def _check_assertion(app: App, assertion: str, token_url: str) -> None:
    """Accept an assertion signed with the app's certificate, as
    https://learn.microsoft.com/entra/identity-platform/certificate-credentials describes it.
    """
    if app.certificate is None:
        raise TokenRefused(401, "invalid_client", 700027, "The certificate is not registered on the application.")
    try:
        header = jwt.get_unverified_header(assertion)
        jwt.decode(
            assertion,
            app.certificate.public_key(),  # type: ignore[arg-type]
            algorithms=["PS256", "RS256"],
            audience=token_url,
            issuer=app.client_id,
            options={"require": ["exp", "jti", "sub"]},
            leeway=300,
        )
    except jwt.InvalidTokenError as error:
        raise TokenRefused(401, "invalid_client", 700027, "Client assertion failed signature validation.") from error
    named = str(header.get("x5t#S256") or header.get("x5t")).rstrip("=")  # MSAL pads, RFC 7515 does not
    if named not in _thumbprints(app.certificate):
        raise TokenRefused(401, "invalid_client", 700027, "The key was not found by its thumbprint.")


def _thumbprints(certificate: x509.Certificate) -> set[str]:
    der = certificate.public_bytes(Encoding.DER)
    digests = (hashlib.sha256(der).digest(), hashlib.sha1(der, usedforsecurity=False).digest())
    return {base64.urlsafe_b64encode(digest).decode().rstrip("=") for digest in digests}


def discovery(tenant: str, base_url: str) -> bytes:
    """The OpenID configuration from which a client learns the token endpoint."""
    oauth = f"{base_url}/{tenant}/oauth2/v2.0"
    return orjson.dumps(
        {
            "issuer": f"{base_url}/{tenant}/v2.0",
            "authorization_endpoint": f"{oauth}/authorize",
            "token_endpoint": f"{oauth}/token",
            "device_authorization_endpoint": f"{oauth}/devicecode",
            "jwks_uri": f"{base_url}/{tenant}/discovery/v2.0/keys",
            "token_endpoint_auth_methods_supported": ["client_secret_post", "private_key_jwt", "client_secret_basic"],
            "response_types_supported": ["code"],
            "scopes_supported": ["openid"],
        }
    )
