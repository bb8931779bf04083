"""Follows the simulator's journal during a run: it remembers only the latest requests, and a run makes more."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from bench.limits.measures import Call
from simulator.control import Simulator

_POLL_SECONDS = 0.5
#: The simulator serves nobody else while it puts an answer together, so each is small: some milliseconds.
_BATCH = 500


class Missed(Exception):
    """Raised when the simulator has forgotten requests that were not yet read: a record with gaps proves nothing."""


class Recorder:
    """Collects every request for a mailbox that is answered within a ``with`` block.

    Attributes:
        calls: What has been read so far, in the order of the answers. Complete after the block.
    """

    def __init__(self, simulator: Simulator) -> None:
        self.calls: list[Call] = []
        # A connection of its own: those of requests are not for two threads.
        self._simulator = Simulator(simulator.base_url, simulator.ca_bundle)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._seen = 0
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        latest = self._simulator.requests()
        self._seen = latest[-1]["number"] if latest else 0
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self._failure is None:
            self._read_on()
        self._simulator.stop()
        if self._failure is not None and error is None:
            raise self._failure

    def _follow(self) -> None:
        try:
            while not self._over.wait(_POLL_SECONDS):
                self._read_on()
        except Exception as failure:
            self._failure = failure

    def _read_on(self) -> None:
        while batch := self._simulator.requests(after=self._seen, limit=_BATCH):
            if batch[0]["number"] != self._seen + 1:
                raise Missed(f"{batch[0]['number'] - self._seen - 1} requests are missing from the record")
            self._seen = batch[-1]["number"]
            self.calls += [_call(request) for request in batch if request["mailbox"]]


def _call(request: dict[str, Any]) -> Call:
    return Call(
        request["arrived_monotonic"],
        request["answered_monotonic"],
        request["mailbox"],
        request["operation"],
        request["status"],
        request["retry_after"],
        request["wait_seconds"],
    )
