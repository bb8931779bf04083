"""What the fleet's servers last answered: many may ask whether they are there, few may open connections to find out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from operations import Finding

_LASTS = timedelta(seconds=2)


class Readiness:
    """Remembers for a moment what a check has found. Safe between threads: while one asks, the others wait for it.

    Args:
        check: What finds out.
        clock: Seconds that only go forward.
    """

    def __init__(self, check: Callable[[], list[Finding]], clock: Callable[[], float] = time.monotonic) -> None:
        self._check = check
        self._clock = clock
        self._lock = threading.Lock()
        self._found: list[Finding] = []
        self._known_until = float("-inf")

    def findings(self) -> list[Finding]:
        """Return what was found, at most two seconds ago."""
        with self._lock:
            if self._clock() >= self._known_until:
                self._found = self._check()
                self._known_until = self._clock() + _LASTS.total_seconds()
            return self._found
