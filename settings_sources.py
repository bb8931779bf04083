"""Where settings come from besides the environment: files that hold a secret, and a secret store.

With `settings` the only reader of the environment. A secret is taken from the first of its variable, the file that
``NAME_FILE`` names, and the store that ``SECRETS_FROM`` names. The last two may change while a process runs:
`current_secret` reads them again. What a process type does not need is not read at all.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from secret_stores import CREDENTIALS, SecretRefused, SecretStore, StoreFailed, open_store

log = logging.getLogger(__name__)

#: Who is refused asks again and again; a file or a store is read no more often than this.
_REREAD_EVERY = timedelta(seconds=5)

_CONSOLE, _INGEST, _SENDS = {"console"}, {"bridge", "ingest"}, {"send_plain", "send_attached"}
#: Secrets that are not everybody's, and the process types that need them. ``bin/start`` takes them out of the
#: environment of every other. Where no type is named (the command line, tests), everything is read.
NEEDED_BY: dict[str, set[str]] = {
    "RABBITMQ_URL": {"bridge", "ingest", "clock", "scheduler", *_SENDS, "backup", "maintenance", "console"},
    "REDIS_URL": {"bridge", "ingest", "clock", "scheduler", *_SENDS, "backup", "maintenance", "console"},
    "GRAPH_CLIENT_SECRET": {*_SENDS, "backup", "maintenance"},
    "GRAPH_CLIENT_CERTIFICATE": {*_SENDS, "backup", "maintenance"},
    "BACKUP_KEYS": {*_INGEST, *_SENDS, "backup", "maintenance", *_CONSOLE},
    "CONSOLE_TOKENS": _CONSOLE,
    "DEAD_LETTER_WEBHOOK_URL": {"maintenance"},
    "DEAD_LETTER_WEBHOOK_SECRET": {"maintenance"},
    "OTEL_EXPORTER_OTLP_HEADERS": {
        "bridge",
        "ingest",
        "clock",
        "scheduler",
        *_SENDS,
        "backup",
        "maintenance",
        "console",
    },
}


def setting(variable: str, help: str, *, default: Any = ..., unit: str = "") -> Any:
    """Declare a setting by its variable, with what the reference says of it."""
    return Field(default, validation_alias=variable, description=help, json_schema_extra={"unit": unit})


def variable_of(field: FieldInfo) -> str:
    """Return the environment's variable that a setting is read from."""
    return str(field.validation_alias)


def is_secret(field: FieldInfo) -> bool:
    """Say whether the setting is a secret: masked when shown, and readable from a file or a store."""
    return SecretStr in (field.annotation, *get_args(field.annotation))


def is_needed(variable: str) -> bool:
    """Say whether this process's type, which ``bin/start`` names, needs a setting."""
    process_type = os.environ.get("PROCESS_TYPE")
    return not process_type or process_type in NEEDED_BY.get(variable, {process_type})


def withhold() -> None:
    """Take out of the environment what this process's type does not need: neither it nor its children have it."""
    for variable in NEEDED_BY:
        if not is_needed(variable):
            for name in (variable, f"{variable}_FILE"):
                os.environ.pop(name, None)


class StoreSettings(BaseSettings):
    """Who this process is and which store its secrets come from; the store's variables are those of its own tools."""

    process_type: str | None = setting(
        "PROCESS_TYPE", "Process type, which says what secrets are loaded; `bin/start` sets it.", default=None
    )
    secrets_from: str | None = setting(
        "SECRETS_FROM",
        "Store of secrets that nothing else gives: `vault://host:8200/secret/mailfleet` (HashiCorp Vault) or"
        " `azure-key-vault://name.vault.azure.net`.",
        default=None,
    )
    vault_token: SecretStr | None = setting("VAULT_TOKEN", "Token for Vault.", default=None)
    vault_role_id: str | None = setting("VAULT_ROLE_ID", "Role to log in to Vault with by AppRole.", default=None)
    vault_secret_id: SecretStr | None = setting("VAULT_SECRET_ID", "The secret id for AppRole.", default=None)
    vault_kubernetes_role: str | None = setting(
        "VAULT_KUBERNETES_ROLE", "Role to log in to Vault with as a Kubernetes service account.", default=None
    )
    vault_kubernetes_token_path: str | None = setting(
        "VAULT_KUBERNETES_TOKEN_PATH", "The service account's token, if Kubernetes mounts it elsewhere.", default=None
    )
    vault_namespace: str | None = setting("VAULT_NAMESPACE", "Namespace of Vault Enterprise.", default=None)
    azure_tenant_id: str | None = setting("AZURE_TENANT_ID", "Tenant of who reads Azure Key Vault.", default=None)
    azure_client_id: str | None = setting(
        "AZURE_CLIENT_ID", "Client id of who reads Azure Key Vault; alone, that of a managed identity.", default=None
    )
    azure_client_secret: SecretStr | None = setting(
        "AZURE_CLIENT_SECRET", "Secret to read Azure Key Vault with. Without: managed identity.", default=None
    )
    azure_federated_token_file: str | None = setting(
        "AZURE_FEDERATED_TOKEN_FILE", "Token of a workload identity to read Azure Key Vault with.", default=None
    )
    azure_authority_host: str | None = setting(
        "AZURE_AUTHORITY_HOST", "Where tokens for Azure Key Vault come from, in a national cloud.", default=None
    )
    azure_pod_identity_authority_host: str | None = setting(
        "AZURE_POD_IDENTITY_AUTHORITY_HOST", "Where a managed identity's tokens come from instead.", default=None
    )


class SecretFiles(PydanticBaseSettingsSource):
    """Reads a secret from the file that ``NAME_FILE`` names, for platforms that mount secrets."""

    def get_field_value(self, field: FieldInfo, _field_name: str) -> tuple[Any, str, bool]:
        return secret_in_file(field), variable_of(field), False

    def __call__(self) -> dict[str, Any]:
        values = {variable_of(field): secret_in_file(field) for field in self.settings_cls.model_fields.values()}
        return {variable: value for variable, value in values.items() if value}


class StoredSecrets(PydanticBaseSettingsSource):
    """Reads what neither a variable nor a file gives from the secret store, if there is one."""

    def get_field_value(self, field: FieldInfo, _field_name: str) -> tuple[Any, str, bool]:
        return stored_secrets(self.settings_cls).get(variable_of(field)), variable_of(field), False

    def __call__(self) -> dict[str, Any]:
        return dict(stored_secrets(self.settings_cls))


class WithheldSecrets(PydanticBaseSettingsSource):
    """Says that a secret which this process type does not need is empty, so that it is not asked for."""

    def get_field_value(self, field: FieldInfo, _field_name: str) -> tuple[Any, str, bool]:
        return None, variable_of(field), False

    def __call__(self) -> dict[str, Any]:
        required = {variable_of(field) for field in self.settings_cls.model_fields.values() if field.is_required()}
        return {variable: "" for variable in required & NEEDED_BY.keys() if not is_needed(variable)}


def secret_in_file(field: FieldInfo) -> str | None:
    """Return the secret, "" if its file is of no use, None if no file is named."""
    return _in_file(variable_of(field)) if is_secret(field) else None


def _in_file(variable: str) -> str | None:
    path = os.environ.get(f"{variable}_FILE")
    try:
        return Path(path).read_text(encoding="utf-8").strip() if path else None
    except (OSError, UnicodeDecodeError):
        return ""


@cache
def _store() -> SecretStore | None:
    """Return the store that ``SECRETS_FROM`` names.

    Raises:
        ValueError: Its address or credentials are not usable.
    """
    address = os.environ.get("SECRETS_FROM")
    return open_store(address, _Credentials()) if address else None


class _Credentials(Mapping[str, str]):
    """What logs in to the store, as it is now: whoever keeps it in a file, as an agent of Vault, may renew it."""

    def __getitem__(self, name: str) -> str:
        return os.environ.get(name) or _in_file(name) or ""

    def __iter__(self) -> Iterator[str]:
        return iter(CREDENTIALS)

    def __len__(self) -> int:
        return len(CREDENTIALS)


def stored_secrets(settings: type[BaseSettings]) -> dict[str, str]:
    """Return the secrets that the store has and nothing else gives; read once, until `forget_stored`."""
    return _read_store(settings)[0]


@cache
def _read_store(settings: type[BaseSettings]) -> tuple[dict[str, str], str | None]:
    """Return the secrets that the store gives, and what is in the way of the others that are asked of it."""
    found: dict[str, str] = {}
    required = {variable_of(field) for field in settings.model_fields.values() if field.is_required()}
    try:
        store = _store()
        for variable in _to_be_stored(settings) if store else ():
            try:
                if store and (value := (store.read(variable) or "").strip()):
                    found[variable] = value
            except SecretRefused:  # a policy may leave out what this process can do without
                if variable in required:
                    raise
    except (StoreFailed, ValueError) as problem:
        return {}, f"SECRETS_FROM: {problem}"
    return found, None


def _to_be_stored(settings: type[BaseSettings]) -> Iterator[str]:
    for field in settings.model_fields.values():
        variable = variable_of(field)
        given = os.environ.get(variable) or os.environ.get(f"{variable}_FILE")
        if variable == "GRAPH_CLIENT_SECRET":
            given = given or os.environ.get("GRAPH_CLIENT_CERTIFICATE")  # one credential is enough
        if is_secret(field) and is_needed(variable) and not given and variable not in CREDENTIALS:
            yield variable


def forget_stored() -> None:
    """Have the store named and read anew."""
    _store.cache_clear()
    _read_store.cache_clear()


def store_problem(settings: type[BaseSettings]) -> str | None:
    """Say why the secret store is of no use, None if it is well or there is none."""
    return _read_store(settings)[1]


class Rereading:
    """Reads one secret again when it is asked for, at most once in `_REREAD_EVERY`. Threads may share it."""

    def __init__(self, variable: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._variable = variable
        self._clock = clock
        self._read_at = clock()

    def __call__(self) -> str | None:
        """Return the secret as it is now; None if it is not known to be another."""
        if self._clock() - self._read_at < _REREAD_EVERY.total_seconds():
            return None
        self._read_at = self._clock()
        return current_secret(self._variable)


def current_secret(variable: str) -> str | None:
    """Read a secret again where it may have changed: in its file or in the store.

    Returns None where it is given by the environment, which cannot change, or cannot be read now.
    """
    if os.environ.get(variable):
        return None
    try:
        if os.environ.get(f"{variable}_FILE"):
            return _in_file(variable) or None
        store = _store()
        return (store.read(variable) or "").strip() or None if store else None
    except (StoreFailed, ValueError) as failure:
        log.warning("a secret cannot be read again: %s", failure)
        return None
