"""One whole fleet at a time on the shared servers.

Starting and ending one costs ten seconds of both cores, so it stays for the tests that follow as long as they want one
with the same settings.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sandbox.world import World

#: Everything that may be waited for is short; nothing else differs from an organisation's fleet.
SETTINGS: dict[str, str | int] = {
    "BACKUP_DELAY_SECONDS": 1,
    "GRAPH_TIMEOUT_SECONDS": 2,
    "IN_DOUBT_GRACE_SECONDS": 3,
    "IN_DOUBT_SETTLE_SECONDS": 1,
    "LEASE_SECONDS": 20,
    # Mail that is made at random may have 500 recipients; what a day's limit does is shown by tests of the limits.
    "MAILBOX_RECIPIENTS_PER_DAY": 0,
    "MAILBOX_SENDS_PER_MINUTE": 0,
    "MAX_ATTEMPTS": 3,
    "RETRY_BACKOFF_MAX_SECONDS": 2,
    "RETRY_BACKOFF_MIN_SECONDS": 1,
    # The one setting that is the caller's: every promise is kept both ways.
    "SEND_PLAIN_VIA": os.environ.get("SEND_PLAIN_VIA", "sendmail"),
}


class Worlds:
    """Starts worlds on the same servers, one at a time: each empties them."""

    def __init__(self, servers: dict[str, str], directory: Path) -> None:
        self.directory = directory
        self._servers = servers
        self._kind: Any = None
        self._current: World | None = None

    def get(
        self, settings: dict[str, str | int] | None = None, *, measured: bool = False, **fleet_options: Any
    ) -> World:
        """Return a world whose fleet is up: the current one if it is of this kind, else a new one.

        Args:
            measured: With the processes that serve the workers' metrics, each a second of a core to start.
        """
        all_settings = SETTINGS | ({} if measured else {"METRICS_PORT": 0}) | (settings or {})
        kind = (all_settings, fleet_options)
        if self._current is None or self._kind != kind:
            self.close()
            directory = self.directory / f"world-{len(list(self.directory.iterdir()))}"
            self._current = World(self._servers, directory, all_settings, **fleet_options).__enter__()
            self._kind = kind
            self._current.wait_until_ready()
        return self._current

    def close(self) -> None:
        """End the current world, if there is one."""
        if self._current:
            self._current.__exit__(None, None, None)
        self._current = None
