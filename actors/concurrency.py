"""How much may be in flight in the whole fleet: as an operator has set it, else as the settings say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import runtime
from models import Route
from models import limits as set_by_operators


class Concurrency(NamedTuple):
    """The emails of each route, and the backups, that may be leased at a time. Named as the settings are."""

    send_plain_concurrency: int
    send_attached_concurrency: int
    backup_concurrency: int

    def of(self, route: Route) -> int:
        return self.send_plain_concurrency if route is Route.PLAIN else self.send_attached_concurrency


def configured() -> Concurrency:
    """Return what the settings say."""
    return Concurrency(*(getattr(runtime.configuration, name) for name in Concurrency._fields))


def effective(own: Mapping[str, int] | None = None) -> Concurrency:
    """Return what binds now. What a later version may have set besides is passed over.

    Args:
        own: What operators have set; None: it is asked for.
    """
    if own is None:
        own = set_by_operators.of_fleet()
    return configured()._replace(**{name: value for name, value in own.items() if name in Concurrency._fields})
