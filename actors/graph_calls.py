"""The only way in which a worker calls Graph: with a slot, with its charges, and having looked before the first byte.

A worker that holds an email looks at its lease when the token is there and the connection stands. The lease outlasts
the wait for the answer, which takes ``GRAPH_TIMEOUT_SECONDS`` at most. A call may take longer, since only silences are
bounded; what it does after the lease has run out is what the grace is for. Whoever has waited for token or connection
looks at the pauses again as well: they bind requests that are about to start.

What is charged is what a call regularly takes. Not charged, for they are rare, are the repeat after a token that was
revoked, and further pages: one takes a hundred attachments or messages with the same tag.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial

import limiter as limits
import runtime
from actors.budgets import give_back
from graph_client import looking_first
from limiter import Exhausted, Reservation, Slot, Wanted
from models import ClaimedEmail
from settings import LEASE_MARGIN
from telemetry import LIMITER_ADMITTED, series

#: How long a call may wait for one of the mailbox's slots: a few calls of others. The worker waits with it.
SLOT_WAIT = timedelta(seconds=1)
#: A request that starts sooner after it was admitted does not ask again for pauses.
_FRESH = timedelta(milliseconds=50)
#: A send that starts later after it was admitted is admitted anew: what it was charged might leave the window of a
#: minute before it arrives.
_LATEST_SEND = limits.SLACK * timedelta(milliseconds=limits.WINDOWS["sends"]) / limits.SUBWINDOWS

Renewing = Callable[[Iterable[bytes]], Iterator[bytes]]


@contextmanager
def graph_call(email: ClaimedEmail, *, sends: bool = False, upload_bytes: int = 0) -> Iterator[None]:
    """Hold one of the mailbox's slots for one call, and make sure as it leaves that the email is still this worker's.

    A worker that was suspended for longer than its lease learns so here, before it does anything that another worker
    may be doing.

    Raises:
        Refused: The limiter says not now; nothing was charged.
        LeaseLost: Another worker has the email.
    """
    admission = _Admission(email, sends=sends, upload_bytes=upload_bytes)
    admission.take(wait=SLOT_WAIT)
    try:
        with looking_first(admission.look):
            yield
    finally:
        runtime.limiter.release(admission.slot)


class _Admission:
    """A call's slot and charges, taken anew if the call does not start soon: connections and tokens take their time."""

    def __init__(self, email: ClaimedEmail, *, sends: bool, upload_bytes: int) -> None:
        self._email = email
        self._sends = sends
        self._upload_bytes = upload_bytes
        self._admitted_at = 0.0
        self.slot: Slot

    def take(self, *, wait: timedelta) -> None:
        email = self._email
        reserved = self._sends and email.charged_at_ms is not None
        self.slot = runtime.limiter.acquire(
            email.mailbox,
            send=send_of(email) if self._sends else None,
            reservation=Reservation(email.charged_at_ms or 0) if reserved else None,
            upload_bytes=self._upload_bytes,
            wait=wait,
        )
        self._admitted_at = time.monotonic()
        series(LIMITER_ADMITTED, "call").inc()
        if self._sends:
            email.charged_at_ms = self.slot.at_ms

    def look(self) -> None:
        """See to it, as the first byte is about to leave, that the call may still be made, and by this worker."""
        waited = time.monotonic() - self._admitted_at
        if self._sends and waited > _LATEST_SEND.total_seconds():
            runtime.limiter.release(self.slot)
            self.take(wait=timedelta())
        elif waited > _FRESH.total_seconds():
            _look_at_pauses(self._email.mailbox)
        configuration = runtime.configuration
        self._email.ensure_held(at_least=configuration.graph_timeout + LEASE_MARGIN / 2, lease=configuration.lease)


@contextmanager
def backup_call(mailbox: str, *, requests: int = 1) -> Iterator[Renewing]:
    """Hold one of the mailbox's slots for so many requests, one after the other.

    Yields what passes on the chunks of a long answer, and renews the slot for as long as they come.

    Raises:
        Refused: The limiter says not now; nothing was charged.
    """
    with runtime.limiter.slot(mailbox, requests=requests, wait=SLOT_WAIT) as slot:
        looked_at = admitted_at = time.monotonic()
        series(LIMITER_ADMITTED, "call").inc()

        def look() -> None:
            nonlocal looked_at
            if (now := time.monotonic()) - looked_at > _FRESH.total_seconds():
                _look_at_pauses(mailbox)
                looked_at = now

        with looking_first(look):
            yield partial(_renewing, slot, admitted_at)


def _renewing(slot: Slot, renewed_at: float, chunks: Iterable[bytes]) -> Iterator[bytes]:
    renew_after = runtime.limiter.slot_lease.total_seconds() / 3
    for chunk in chunks:
        if time.monotonic() - renewed_at > renew_after:
            runtime.limiter.renew(slot)
            renewed_at = time.monotonic()
        yield chunk


def send_of(email: ClaimedEmail) -> Wanted:
    """Return what the send of the email costs."""
    return Wanted(email.recipient_count, email.external_recipient_count)


def refund(email: ClaimedEmail) -> None:
    """Give back the send budget of an email that is proven not to be sent now."""
    if email.charged_at_ms is not None:
        give_back(email.mailbox, Reservation(email.charged_at_ms), send_of(email))


def _look_at_pauses(mailbox: str) -> None:
    if until := runtime.limiter.paused_until(mailbox):
        raise Exhausted("pause", max(until - datetime.now(UTC), timedelta()), mailbox_wide=True)
