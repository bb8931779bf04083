"""``docs/settings.md``, made from the settings themselves: ``python -m settings`` prints it."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from settings import Settings
from settings_sources import StoreSettings, is_secret


def reference() -> str:
    """Return the page: one row per setting with its default, unit and help."""
    fields, of_stores = Settings.model_fields, StoreSettings.model_fields
    names = [*(name for name in fields if name not in of_stores), *of_stores]
    return "\n".join([_INTRODUCTION, *(_row(fields[name]) for name in names), ""])


def _row(field: FieldInfo) -> str:
    variable, help = str(field.validation_alias), str(field.description)
    if is_secret(field):
        help += f" Secret: may be given as `{variable}_FILE`."
    extra = field.json_schema_extra
    unit = extra["unit"] if isinstance(extra, dict) else ""
    return f"| `{variable}` | {_default(field)} | {unit} | {help} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default in (None, "") else f"`{field.default}`"


_INTRODUCTION = """\
# Settings

Made from `settings.py` by `python -m settings`. Everything is read from the environment when a process starts;
`mailfleet settings` shows the effective values. `bin/start` reads a few more: workers' processes and threads are
`DRAMATIQ_PROCESSES` (1) and `DRAMATIQ_THREADS` (8; 1 for scheduler, 2 for maintenance), or per type
`SEND_PLAIN_PROCESSES`, `SEND_PLAIN_THREADS`, and so on; each is 1 or more. `REQUESTS_CA_BUNDLE` names the certificate
authorities that are trusted. docs/security.md says how secrets are given, stored and rotated.

| variable | default | unit | meaning |
|---|---|---|---|"""
