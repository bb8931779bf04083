"""The only way in which a worker that holds an email calls Graph: with a slot, and having looked at its lease.

The lease outlasts what the call usually takes, connecting and answering each within ``GRAPH_TIMEOUT_SECONDS``. A call
may take longer, since only silences are bounded; what it does after the lease has run out is what the grace is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import runtime
from models import ClaimedEmail
from settings import LEASE_MARGIN


@contextmanager
def graph_call(email: ClaimedEmail, *, sends: bool = False, upload_bytes: int = 0) -> Iterator[None]:
    """Hold one of the mailbox's slots for one call, and make sure that the email is still this worker's.

    A worker that was suspended for longer than its lease learns so here, before it does anything that another worker
    may be doing.

    Raises:
        Refused: The limiter says not now; nothing was charged.
        LeaseLost: Another worker has the email.
    """
    charges = {"sends": 1, "recipients": email.recipient_count} if sends else {}
    with runtime.limiter.slot(email.mailbox, upload_bytes=upload_bytes, **charges):
        # To fetch one takes as long as a call; only then is the lease looked at.
        runtime.tokens.token()
        configuration = runtime.configuration
        email.ensure_held(at_least=configuration.graph_timeout + LEASE_MARGIN / 2, lease=configuration.lease)
        yield
