"""Secret stores over HTTP: HashiCorp Vault and Azure Key Vault, one secret for each setting.

A store is asked for one secret by one name, so that its own policies can keep from a process what the process does not
need. Every request is bounded in time and size, goes to https (to loopback in plain http too), and follows no redirect:
a redirect would carry the token elsewhere. Errors name the store and what it answered, never what it was given.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

import requests
import urllib3

LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "::1"}
#: A store answers from memory; what takes longer is away. Connecting and each silence count by themselves.
_PATIENCE = timedelta(seconds=5)
#: The largest secret that either store keeps is far smaller.
_MAX_ANSWER_BYTES = 1024 * 1024
#: A token is renewed this long before it ends.
_RENEWAL_MARGIN = timedelta(seconds=30)

#: Where Kubernetes mounts a pod's own token.
_KUBERNETES_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105  a path
#: Azure's instance metadata: link-local, so plain http is all there is.
_AZURE_METADATA = "http://169.254.169.254"
_AZURE_AUTHORITY = "https://login.microsoftonline.com"
_AZURE_RESOURCE = "https://vault.azure.net"
_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

#: What `open_store` reads besides the address, by the variables that the stores' own tools use.
CREDENTIALS = (
    "VAULT_TOKEN",
    "VAULT_ROLE_ID",
    "VAULT_SECRET_ID",
    "VAULT_KUBERNETES_ROLE",
    "VAULT_KUBERNETES_TOKEN_PATH",
    "VAULT_NAMESPACE",
    "AZURE_TENANT_ID",
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_AUTHORITY_HOST",
    "AZURE_POD_IDENTITY_AUTHORITY_HOST",
)


_NO_TOKEN = "the token to log in with cannot be read from its file"  # noqa: S105  a sentence


class StoreFailed(Exception):
    """Raised when a secret store cannot be reached, refuses us, or answers something else than a secret."""


class SecretRefused(StoreFailed):
    """Raised when a secret store answers, and does not let us read this secret."""


class SecretStore(Protocol):
    """Where secrets are kept, by the names of settings."""

    def read(self, name: str) -> str | None:
        """Return a secret, None if the store does not have it.

        Raises:
            StoreFailed: It is not known whether the store has it.
        """


def open_store(address: str, credentials: Mapping[str, str]) -> SecretStore:
    """Return the store at ``vault://host:port/mount/path`` or ``azure-key-vault://name.vault.azure.net``.

    Nothing is contacted yet. A host on loopback is spoken to in plain http if ``+http`` follows the scheme. A
    credential is looked up whenever it is used: it may be another by then.

    Raises:
        ValueError: The address is of no such form, or the credentials are not those of one way to log in.
    """
    parts = urlsplit(address)
    kind, _, transport = parts.scheme.partition("+")
    if kind not in _STORES or transport not in ("", "http") or not parts.hostname or parts.username or parts.query:
        raise ValueError(
            "must look like vault://host:8200/secret/mailfleet or azure-key-vault://name.vault.azure.net, without a"
            " user or a password"
        )
    if transport and parts.hostname not in LOOPBACK_HOSTS:
        raise ValueError("plain http is accepted on loopback only")
    return _STORES[kind](f"{transport or 'https'}://{parts.netloc}", parts.path.strip("/"), credentials)


class _Answer(NamedTuple):
    status: int
    body: Any


def _ask(what: str, method: str, url: str, headers: Mapping[str, str], **given: Any) -> _Answer:
    """Make one request and return its JSON.

    This machine and its metadata are asked directly: a proxy of the environment would get to read tokens that are in
    plain http. Nor does a ``.netrc`` replace what logs us in.

    Raises:
        StoreFailed: No answer came, or it is too large or no JSON. Its text holds nothing that was sent or received.
    """
    try:
        with (
            _session(url) as session,
            session.request(
                method,
                url,
                headers=dict(headers),
                timeout=_PATIENCE.total_seconds(),
                allow_redirects=False,
                stream=True,
                **given,
            ) as response,
        ):
            body = response.raw.read(_MAX_ANSWER_BYTES + 1, decode_content=True)
            if len(body) > _MAX_ANSWER_BYTES:
                raise StoreFailed(f"{what} answers more than a secret can have")
            return _Answer(response.status_code, json.loads(body) if body else None)
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise StoreFailed(f"{what} does not answer as it should ({type(error).__name__})") from None


def _session(url: str) -> requests.Session:
    session = requests.Session()
    surroundings = session.merge_environment_settings(url, {}, None, None, None)
    session.verify = surroundings["verify"]
    if url.startswith("https:") and urlsplit(url).hostname not in LOOPBACK_HOSTS:
        session.proxies = surroundings["proxies"]
    session.trust_env = False
    return session


def _insist(what: str, answer: _Answer, states: Mapping[int, str] = MappingProxyType({})) -> Any:
    if answer.status != 200 or not isinstance(answer.body, dict):
        why = f": {states[answer.status]}" if answer.status in states else ""
        raise StoreFailed(f"{what} answers with status {answer.status}{why}")
    return answer.body


def _secure(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK_HOSTS):
        raise ValueError("where tokens come from must be an https address (http is accepted on loopback only)")
    return url.rstrip("/")


class _Lasting:
    """A token and until when it serves."""

    def __init__(self) -> None:
        self.text: str | None = None
        self._until = 0.0

    def keep(self, text: str, lifetime_seconds: float) -> str:
        """Keep a token; a lifetime of 0 has no end."""
        self.text = text
        margin = min(_RENEWAL_MARGIN.total_seconds(), lifetime_seconds / 4)
        self._until = time.monotonic() + lifetime_seconds - margin if lifetime_seconds else float("inf")
        return text

    @property
    def serves(self) -> bool:
        return self.text is not None and time.monotonic() < self._until

    def drop(self) -> None:
        self.text = None


#: Why Vault can do nothing for us, by the status that it then answers everything with
#: (developer.hashicorp.com/vault/api-docs, HTTP status codes).
_VAULT_STATES = {
    429: "it is a standby, or asked too often",
    472: "it is a secondary for disaster recovery",
    473: "it is a standby, or asked too often",
    503: "it is sealed or in maintenance",
}


def _is_deleted(body: Any) -> bool:
    """Whether a 404 is of a secret whose version was deleted or destroyed: it has its metadata still."""
    data = body.get("data") if isinstance(body, dict) else None
    return isinstance(data, dict) and bool(data.get("metadata"))


class _HashiCorpVault:
    """The key-value engine, version 2: the secret for ``NAME`` is the field ``value`` of ``path/NAME``."""

    def __init__(self, origin: str, path: str, credentials: Mapping[str, str]) -> None:
        self._origin = origin
        mount, _, folder = path.partition("/")
        if not mount:
            raise ValueError("must name the engine and the folder, as in vault://host:8200/secret/mailfleet")
        self._folder = "/".join(quote(part, safe="") for part in (mount, "data", *filter(None, folder.split("/"))))
        self._headers = {"X-Vault-Request": "true"}
        if namespace := credentials.get("VAULT_NAMESPACE"):
            self._headers["X-Vault-Namespace"] = namespace
        self._credentials = credentials
        self._token = _Lasting()
        ways = [name for name in ("VAULT_TOKEN", "VAULT_ROLE_ID", "VAULT_KUBERNETES_ROLE") if credentials.get(name)]
        if len(ways) != 1:
            raise ValueError("needs exactly one of VAULT_TOKEN, VAULT_ROLE_ID and VAULT_KUBERNETES_ROLE")
        if ways == ["VAULT_ROLE_ID"] and not credentials.get("VAULT_SECRET_ID"):
            raise ValueError("VAULT_ROLE_ID needs VAULT_SECRET_ID")
        (self._way,) = ways

    def read(self, name: str) -> str | None:
        token = self._logged_in()
        answer = self._get(name, token)
        if answer.status == 403:
            self._token.drop()  # it may have been revoked, or replaced in its file
            if (another := self._logged_in()) != token:
                answer = self._get(name, another)
        if answer.status == 404:
            if _is_deleted(answer.body):
                raise StoreFailed(
                    f"the newest version of {name} in Vault was deleted: undelete it, or write another, or delete its"
                    " metadata too"
                )
            return None
        if answer.status == 403:
            raise SecretRefused(f"Vault does not let us read {name}")
        try:
            value = _insist("Vault", answer, _VAULT_STATES)["data"]["data"]["value"]
        except (KeyError, TypeError):
            raise StoreFailed(f"Vault has {name} without a field named value") from None
        return str(value)

    def _get(self, name: str, token: str) -> _Answer:
        headers = {**self._headers, "X-Vault-Token": token}
        return _ask("Vault", "GET", f"{self._origin}/v1/{self._folder}/{quote(name, safe='')}", headers)

    def _logged_in(self) -> str:
        if self._way == "VAULT_TOKEN":
            if token := self._credentials.get("VAULT_TOKEN"):
                return token
            raise StoreFailed(_NO_TOKEN)
        if self._token.serves:
            return str(self._token.text)
        if self._way == "VAULT_KUBERNETES_ROLE":
            path = self._credentials.get("VAULT_KUBERNETES_TOKEN_PATH") or _KUBERNETES_TOKEN
            given = {"role": self._credentials["VAULT_KUBERNETES_ROLE"], "jwt": _text_of(path)}
            return self._log_in("kubernetes", given)
        return self._log_in(
            "approle",
            {"role_id": self._credentials["VAULT_ROLE_ID"], "secret_id": self._credentials["VAULT_SECRET_ID"]},
        )

    def _log_in(self, method: str, given: Mapping[str, str]) -> str:
        what = f"Vault's login by {method}"
        answer = _ask(what, "POST", f"{self._origin}/v1/auth/{method}/login", self._headers, json=dict(given))
        try:
            granted = _insist(what, answer, _VAULT_STATES)["auth"]
            return self._token.keep(str(granted["client_token"]), float(granted.get("lease_duration") or 0))
        except (KeyError, TypeError, ValueError):
            raise StoreFailed(f"{what} gives no token") from None


class _AzureKeyVault:
    """Azure Key Vault. Its names have no underscores: the secret for ``DATABASE_URL`` is ``DATABASE-URL``."""

    def __init__(self, origin: str, path: str, credentials: Mapping[str, str]) -> None:
        if path:
            raise ValueError("must be azure-key-vault://name.vault.azure.net, without a path")
        self._origin = origin
        self._credentials = credentials
        self._authority = _secure(credentials.get("AZURE_AUTHORITY_HOST") or _AZURE_AUTHORITY)
        metadata = credentials.get("AZURE_POD_IDENTITY_AUTHORITY_HOST")
        self._metadata = _secure(metadata) if metadata else _AZURE_METADATA
        self._token = _Lasting()
        if self._posts and not (credentials.get("AZURE_TENANT_ID") and credentials.get("AZURE_CLIENT_ID")):
            raise ValueError("AZURE_CLIENT_SECRET and AZURE_FEDERATED_TOKEN_FILE need the tenant's and the client's id")

    @property
    def _posts(self) -> bool:
        """Whether the token comes from Entra; else it is that of the machine's managed identity."""
        return bool(self._credentials.get("AZURE_CLIENT_SECRET") or self._credentials.get("AZURE_FEDERATED_TOKEN_FILE"))

    def read(self, name: str) -> str | None:
        answer = self._get(name)
        if answer.status == 401:
            self._token.drop()
            answer = self._get(name)
        if answer.status == 404:
            return None
        if answer.status == 403:
            raise SecretRefused(f"Azure Key Vault does not let us read {name}, or it is disabled or past its end")
        try:
            return str(_insist("Azure Key Vault", answer)["value"])
        except KeyError:
            raise StoreFailed(f"Azure Key Vault has {name} without a value") from None

    def _get(self, name: str) -> _Answer:
        token = self._token.text if self._token.serves else self._granted()
        return _ask(
            "Azure Key Vault",
            "GET",
            f"{self._origin}/secrets/{quote(name.replace('_', '-'), safe='')}",
            {"Authorization": f"Bearer {token}"},
            params={"api-version": "7.4"},
        )

    def _granted(self) -> str:
        what = "Entra's token endpoint" if self._posts else "the managed identity's endpoint"
        answer = self._ask_entra(what) if self._posts else self._ask_metadata(what)
        try:
            granted = _insist(what, answer)
            return self._token.keep(str(granted["access_token"]), float(granted["expires_in"]))
        except (KeyError, TypeError, ValueError):
            raise StoreFailed(f"{what} gives no token") from None

    def _ask_entra(self, what: str) -> _Answer:
        given, tenant = self._credentials, quote(self._credentials["AZURE_TENANT_ID"], safe="")
        form = {
            "grant_type": "client_credentials",
            "client_id": given["AZURE_CLIENT_ID"],
            "scope": f"{_AZURE_RESOURCE}/.default",
        }
        if secret := given.get("AZURE_CLIENT_SECRET"):
            form["client_secret"] = secret
        else:
            form["client_assertion_type"] = _ASSERTION_TYPE
            form["client_assertion"] = _text_of(given["AZURE_FEDERATED_TOKEN_FILE"])
        return _ask(what, "POST", f"{self._authority}/{tenant}/oauth2/v2.0/token", {}, data=form)

    def _ask_metadata(self, what: str) -> _Answer:
        asked = {"api-version": "2018-02-01", "resource": _AZURE_RESOURCE}
        if client_id := self._credentials.get("AZURE_CLIENT_ID"):
            asked["client_id"] = client_id
        return _ask(what, "GET", f"{self._metadata}/metadata/identity/oauth2/token", {"Metadata": "true"}, params=asked)


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise StoreFailed(_NO_TOKEN) from None


_STORES = {"vault": _HashiCorpVault, "azure-key-vault": _AzureKeyVault}
