"""Vault's key-value engine and Azure Key Vault as they answer over HTTP, strict in what a client must send.

Made after https://developer.hashicorp.com/vault/api-docs (kv-v2, approle, kubernetes) and
https://learn.microsoft.com/rest/api/keyvault (get secret) with the token endpoints of Entra and of managed identities.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit


class Reply(NamedTuple):
    status: int
    body: Any
    headers: Mapping[str, str] = MappingProxyType({})


class Fake:
    """A store on loopback. ``secrets`` may be changed while it runs; ``asked`` has every path in order.

    Of a proxy it has only that it is asked: ``connects`` has where to.
    """

    def __init__(self) -> None:
        self.secrets: dict[str, str] = {}
        self.asked: list[str] = []
        self.connects: list[str] = []
        self.tokens: set[str] = set()
        self.logins = 0
        self.instead: Reply | None = None
        self.port = 0

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Reply:
        raise NotImplementedError

    def grant(self) -> str:
        self.logins += 1
        self.tokens.add(f"token-{self.logins}")
        return f"token-{self.logins}"

    @contextmanager
    def running(self) -> Iterator[Fake]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(b"")

            def do_POST(self) -> None:
                self._reply(self.rfile.read(int(self.headers["Content-Length"])))

            def do_CONNECT(self) -> None:
                fake.connects.append(self.path)
                self.send_error(403)

            def log_message(self, *_: object) -> None:
                pass

            def _reply(self, body: bytes) -> None:
                fake.asked.append(urlsplit(self.path).path)
                reply = fake.instead or fake.answer(self.command, self.path, self.headers, body)
                content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.port = server.server_port
            thread = threading.Thread(target=server.serve_forever, args=[0.02])
            thread.start()
            yield self
            server.shutdown()
            thread.join()


class FakeVault(Fake):
    """The engine ``kv`` with secrets below ``mail/fleet``.

    The policy of its tokens leaves out what is ``forbidden``; of what is ``deleted`` it has the metadata alone, as of a
    version that was deleted or destroyed.
    """

    namespace: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: set[str] = set()
        self.deleted: set[str] = set()

    @property
    def address(self) -> str:
        return f"vault+http://127.0.0.1:{self.port}/kv/mail/fleet"

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Reply:
        if headers["X-Vault-Request"] != "true" or headers["X-Vault-Namespace"] != self.namespace:
            return Reply(400, {"errors": ["missing header"]})
        if (method, path) == ("POST", "/v1/auth/approle/login"):
            return self._login(json.loads(body) == {"role_id": "fleet", "secret_id": "s-1"})
        if (method, path) == ("POST", "/v1/auth/kubernetes/login"):
            return self._login(json.loads(body) == {"role": "fleet", "jwt": "pod"})
        if headers["X-Vault-Token"] not in self.tokens:
            return Reply(403, {"errors": ["permission denied"]})
        name = path.removeprefix("/v1/kv/data/mail/fleet/")
        if name in self.forbidden:
            return Reply(403, {"errors": ["1 error occurred:\n\t* permission denied\n\n"]})
        if name in self.deleted:
            deleted = {"version": 2, "destroyed": False, "deletion_time": "2026-01-02T00:00:00Z"}
            return Reply(404, {"lease_duration": 0, "data": {"data": None, "metadata": deleted}})
        if method != "GET" or name not in self.secrets:
            return Reply(404, {"errors": []})
        metadata = {"version": 1, "destroyed": False, "created_time": "2026-01-01T00:00:00Z"}
        return Reply(200, {"lease_duration": 0, "data": {"data": {"value": self.secrets[name]}, "metadata": metadata}})

    def _login(self, right: bool) -> Reply:
        if not right:
            return Reply(400, {"errors": ["invalid role or secret ID"]})
        return Reply(200, {"auth": {"client_token": self.grant(), "lease_duration": 3600, "renewable": True}})


#: What Vault answers to everything while it can do nothing for us, by its state.
VAULT_STATES = {
    "sealed": Reply(503, {"errors": ["Vault is sealed"]}),
    "standby": Reply(429, {"errors": []}),
    "performance standby": Reply(473, {"errors": []}),
    "in maintenance": Reply(503, {"errors": []}),
}


class FakeAzure(Fake):
    """The vault, the tenant's token endpoint and the managed identity's, all on one port."""

    @property
    def address(self) -> str:
        return f"azure-key-vault+http://127.0.0.1:{self.port}"

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Reply:
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if (method, parts.path) == ("POST", "/contoso/oauth2/v2.0/token"):
            return self._posted({name: values[0] for name, values in parse_qs(body.decode()).items()})
        if parts.path == "/metadata/identity/oauth2/token":
            resource = query.get("resource") == "https://vault.azure.net" and query.get("api-version") == "2018-02-01"
            return self._granted(resource and headers["Metadata"] == "true", expires_in="3600")
        if headers["Authorization"] not in {f"Bearer {token}" for token in self.tokens}:
            return Reply(401, {"error": {"code": "Unauthorized"}}, {"WWW-Authenticate": "Bearer"})
        name = parts.path.removeprefix("/secrets/")
        if query.get("api-version") != "7.4" or name not in self.secrets:
            return Reply(404, {"error": {"code": "SecretNotFound"}})
        return Reply(200, {"value": self.secrets[name], "id": f"{self.origin}/secrets/{name}/1", "attributes": {}})

    def _posted(self, form: dict[str, str]) -> Reply:
        asked = form.pop("grant_type"), form.pop("scope"), form.pop("client_id")
        secret = {"client_secret": "s-1"}
        kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
        workload = {"client_assertion_type": kind, "client_assertion": "pod"}
        right = asked == ("client_credentials", "https://vault.azure.net/.default", "app")
        return self._granted(right and form in (secret, workload), expires_in=3600)

    def _granted(self, right: bool, *, expires_in: Any) -> Reply:
        if not right:
            return Reply(401, {"error": "invalid_client"})
        return Reply(200, {"access_token": self.grant(), "expires_in": expires_in, "token_type": "Bearer"})
