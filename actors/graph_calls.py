"""The only way in which a worker that holds an email calls Graph: with a slot, and having looked at its lease.

The lease is looked at when the token is there and the connection stands, and outlasts the wait for the answer, which
takes ``GRAPH_TIMEOUT_SECONDS`` at most. A call may take longer, since only silences are bounded; what it does after the
lease has run out is what the grace is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import runtime
from graph_client import looking_first
from models import ClaimedEmail
from settings import LEASE_MARGIN


@contextmanager
def graph_call(email: ClaimedEmail, *, sends: bool = False, upload_bytes: int = 0) -> Iterator[None]:
    """Hold one of the mailbox's slots for one call, and make sure as it leaves that the email is still this worker's.

    A worker that was suspended for longer than its lease learns so here, before it does anything that another worker
    may be doing.

    Raises:
        Refused: The limiter says not now; nothing was charged.
        LeaseLost: Another worker has the email.
    """
    charges = {"sends": 1, "recipients": email.recipient_count} if sends else {}
    with runtime.limiter.slot(email.mailbox, upload_bytes=upload_bytes, **charges):
        configuration = runtime.configuration
        outlasting = configuration.graph_timeout + LEASE_MARGIN / 2
        with looking_first(partial(email.ensure_held, at_least=outlasting, lease=configuration.lease)):
            yield
