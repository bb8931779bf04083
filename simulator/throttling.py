"""Graph's limits per application and mailbox, counted exactly, and what happens to whoever passes them.

The figures are those of https://learn.microsoft.com/graph/throttling-limits (Outlook service limits): 4 requests at a
time, 10,000 requests in 10 minutes, 150 MB uploaded in 5 minutes. Refused requests count as well.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

from . import errors
from .behaviour import MEBIBYTE, Settable


@dataclass
class Limits(Settable):
    """The limits of one application at one mailbox; 0 switches one off."""

    concurrency: int = 4
    requests: int = 10_000
    requests_window_seconds: float = 600.0
    upload_bytes: int = 150 * MEBIBYTE
    upload_window_seconds: float = 300.0
    #: What a client over its concurrency is told to wait.
    concurrency_retry_after: str = "1"
    #: How much longer one is shut out for calling before the time it was told; 0 forgives.
    early_retry_penalty_seconds: float = 0.0


@dataclass(slots=True)
class _Usage:
    """What one application does at one mailbox."""

    in_flight: int = 0
    most_in_flight: int = 0
    requests: deque[float] = field(default_factory=deque)
    uploads: deque[tuple[float, int]] = field(default_factory=deque)
    uploaded_bytes: int = 0
    shut_until: float = 0.0

    def shut(self, retry_after: str | None) -> None:
        seconds = wait_seconds(retry_after)
        if seconds is not None:
            self.shut_until = max(self.shut_until, time.monotonic() + seconds)


class Throttle:
    """Counts every call and raises GraphError 429 when one is too many."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.provoked: Counter[tuple[str, str]] = Counter()
        self.early_retries: Counter[str] = Counter()
        self._usage: dict[tuple[str, str], _Usage] = {}

    @contextmanager
    def slot(self, app: str, mailbox: str) -> Iterator[None]:
        """Hold one of the concurrent slots for the length of the block.

        Raises:
            GraphError: 429, over the concurrency or the number of requests.
        """
        usage = self._usage.setdefault((app, mailbox), _Usage())
        now = time.monotonic()
        self._note_early_retry(usage, mailbox, now)
        self._count_request(usage, mailbox, now)
        if 0 < self.limits.concurrency <= usage.in_flight:
            raise self._refuse(usage, mailbox, "MailboxConcurrency", self.limits.concurrency_retry_after)
        usage.in_flight += 1
        usage.most_in_flight = max(usage.most_in_flight, usage.in_flight)
        try:
            yield
        finally:
            usage.in_flight -= 1

    def count_upload(self, app: str, mailbox: str, size_bytes: int) -> None:
        """Count the bytes of a POST, PATCH or PUT.

        Raises:
            GraphError: 429, over the bytes that a mailbox takes in.
        """
        if not size_bytes or not self.limits.upload_bytes:
            return
        usage = self._usage.setdefault((app, mailbox), _Usage())
        now = time.monotonic()
        window_start = now - self.limits.upload_window_seconds
        while usage.uploads and usage.uploads[0][0] <= window_start:
            usage.uploaded_bytes -= usage.uploads.popleft()[1]
        if usage.uploaded_bytes + size_bytes > self.limits.upload_bytes:
            oldest = usage.uploads[0][0] if usage.uploads else now
            raise self._refuse(usage, mailbox, "IncomingBytes", _seconds_until(oldest - window_start))
        usage.uploads.append((now, size_bytes))
        usage.uploaded_bytes += size_bytes

    def shut(self, app: str, mailbox: str, retry_after: str | None) -> None:
        """Remember that the client was told to stay away for ``retry_after`` seconds."""
        self._usage.setdefault((app, mailbox), _Usage()).shut(retry_after)

    def most_in_flight(self) -> dict[str, int]:
        """The most requests that were open at one time, by mailbox, over all applications."""
        most: dict[str, int] = {}
        for (_, mailbox), usage in self._usage.items():
            most[mailbox] = max(most.get(mailbox, 0), usage.most_in_flight)
        return most

    def _count_request(self, usage: _Usage, mailbox: str, now: float) -> None:
        if not self.limits.requests:
            return
        window_start = now - self.limits.requests_window_seconds
        while usage.requests and usage.requests[0] <= window_start:
            usage.requests.popleft()
        usage.requests.append(now)
        if len(usage.requests) > self.limits.requests:
            wait = usage.requests[-self.limits.requests] - window_start
            raise self._refuse(usage, mailbox, "Requests", _seconds_until(wait))

    def _note_early_retry(self, usage: _Usage, mailbox: str, now: float) -> None:
        if now >= usage.shut_until:
            return
        self.early_retries[mailbox] += 1
        penalty = self.limits.early_retry_penalty_seconds
        if penalty:
            usage.shut_until += penalty
            raise self._refuse(usage, mailbox, "EarlyRetry", _seconds_until(usage.shut_until - now))

    def _refuse(self, usage: _Usage, mailbox: str, limit: str, retry_after: str) -> errors.GraphError:
        self.provoked[mailbox, limit] += 1
        usage.shut(retry_after)
        return errors.throttled(limit, retry_after)


def wait_seconds(retry_after: str | None) -> float | None:
    """Return how long from now a Retry-After asks to be left alone; None if there is none, or it makes no sense.

    Seconds, with or without fractions; of a list the longest; or an HTTP date.
    """
    if retry_after is None:
        return None
    try:
        return max(map(float, retry_after.split(",")))
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return None


def _seconds_until(seconds: float) -> str:
    return str(max(1, math.ceil(seconds)))
