"""What the fleet's servers last answered: many may ask whether they are there, few may open connections to find out.

Whoever waits for that has no thread: strangers may ask, and must not keep an operator's request from being answered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import anyio
import anyio.to_thread

from operations import Finding

_LASTS = timedelta(seconds=2)


class Readiness:
    """Remembers for a moment what a check has found. While it is made, in a thread of its own, all wait for its answer.

    Args:
        check: What finds out.
        clock: Seconds that only go forward.
    """

    def __init__(self, check: Callable[[], list[Finding]], clock: Callable[[], float] = time.monotonic) -> None:
        self._check = check
        self._clock = clock
        self._lock = anyio.Lock()
        self._found: list[Finding] = []
        self._known_until = float("-inf")

    async def findings(self) -> list[Finding]:
        """Return what was found, at most two seconds ago."""
        async with self._lock:
            if self._clock() >= self._known_until:
                self._found = await anyio.to_thread.run_sync(self._check, limiter=anyio.CapacityLimiter(1))
                self._known_until = self._clock() + _LASTS.total_seconds()
            return self._found
