"""The states of an email and of its sending, and every transition that is allowed.

An email::

    received ─► dispatched ─► processing ─► processed
       │ ▲         │ │            │  └────► failed ──► received   (replay)
       │ └─────────┼─┴────────────┘ snooze, retry, lease expired, found absent
       │           └──► cancelled    (no worker has claimed it)
       └─► cancelled | expired

``processing`` without a lease is an email in doubt: its send was started and nothing proves how it ended. It is
dispatched again to be looked up, not to be sent.

Its sending (``sent_emails``)::

    sending ─► sent
       └─► in_doubt ─► sent | not_sent ─► sending

A row ``sending`` is the committed intent: from then on only evidence decides what became of the mail.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """``incoming_emails.status``."""

    RECEIVED = "received"
    DISPATCHED = "dispatched"
    PROCESSING = "processing"
    PROCESSED = "processed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Sending(StrEnum):
    """``sent_emails.status``."""

    SENDING = "sending"
    IN_DOUBT = "in_doubt"
    SENT = "sent"
    NOT_SENT = "not_sent"


class Route(StrEnum):
    """Which send actor an email goes to."""

    PLAIN = "no-attachment"
    ATTACHED = "attachment"


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.RECEIVED: frozenset({Status.DISPATCHED, Status.CANCELLED, Status.EXPIRED}),
    Status.DISPATCHED: frozenset({Status.PROCESSING, Status.RECEIVED, Status.CANCELLED}),
    Status.PROCESSING: frozenset(
        {Status.PROCESSED, Status.FAILED, Status.RECEIVED, Status.PROCESSING, Status.DISPATCHED, Status.EXPIRED}
    ),
    Status.FAILED: frozenset({Status.RECEIVED, Status.PROCESSING}),
    Status.PROCESSED: frozenset(),
    Status.CANCELLED: frozenset(),
    Status.EXPIRED: frozenset(),
}

FINAL = frozenset(status for status, targets in TRANSITIONS.items() if not targets)
#: Nothing more happens to these unless an operator asks for it.
SETTLED = FINAL | {Status.FAILED}


class IllegalTransition(Exception):
    """Raised when code asks for a transition that the table above does not have."""


def check(source: Status, target: Status) -> None:
    """Raise `IllegalTransition` unless an email may go from ``source`` to ``target``."""
    if target not in TRANSITIONS[source]:
        raise IllegalTransition(f"an email cannot go from {source} to {target}")
