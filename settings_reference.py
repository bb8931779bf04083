"""The page of all settings, ``docs/settings.md``, from their declarations: it cannot say anything else than they do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import Field, SecretStr
from pydantic.fields import FieldInfo

_INTRODUCTION = """\
# Settings

Made from `settings.py` by `python -m settings`. Everything is read from the environment when a process starts;
`mailfleet settings` shows the effective values. `bin/start` reads a few more: workers' processes and threads are
`DRAMATIQ_PROCESSES` (1) and `DRAMATIQ_THREADS` (8; 2 for scheduler and maintenance), or per type
`SEND_PLAIN_PROCESSES`, `SEND_PLAIN_THREADS`, and so on. `REQUESTS_CA_BUNDLE` names the certificate authorities that are
trusted. docs/security.md says how secrets are given, stored and rotated.

| variable | default | unit | meaning |
|---|---|---|---|"""


def page(fields: Iterable[FieldInfo]) -> str:
    """Return the page: one row per setting with its default, unit and help."""
    return "\n".join([_INTRODUCTION, *map(_row, fields), ""])


def variable_of(field: FieldInfo) -> str:
    """Return the environment's variable that a setting is read from."""
    return str(field.validation_alias)


def is_secret(field: FieldInfo) -> bool:
    """Say whether the setting is a secret: masked when shown, and readable from ``NAME_FILE``."""
    return SecretStr in (field.annotation, *get_args(field.annotation))


def setting(variable: str, help: str, *, default: Any = ..., unit: str = "") -> Any:
    """Declare a setting by its variable, with what the page says of it."""
    return Field(default, validation_alias=variable, description=help, json_schema_extra={"unit": unit})


def _row(field: FieldInfo) -> str:
    variable, help = variable_of(field), str(field.description)
    if is_secret(field):
        help += f" Secret: may be given as `{variable}_FILE`."
    extra = field.json_schema_extra
    unit = extra["unit"] if isinstance(extra, dict) else ""
    return f"| `{variable}` | {_default(field)} | {unit} | {help} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default in (None, "") else f"`{field.default}`"
