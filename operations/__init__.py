"""What an operator may do, whichever way it is asked for: by the command line or by the console.

Every verb that changes something writes who did it into ``audit_log``, in the transaction of the change. None of them
sends anything: they change what the tables say, and the fleet acts on that.
"""

import actors  # noqa: F401  declares the actors that are woken and the queues that are looked at
from models.cancelling import NotCancellable
from operations.archive import backup, count_expired, export_backup, find_backups, list_backups, purge_backups
from operations.attaching import Attached, attach
from operations.budgets import (
    FLEET_LIMITS,
    MAILBOX_LIMITS,
    TENANT_LIMITS,
    Limit,
    LimitsChange,
    held,
    limits,
    limits_set,
    set_limits,
    unset_limits,
)
from operations.dead_letters import (
    dead_letter,
    dead_letter_groups,
    find_dead_letters,
    open_dead_letter,
    read_message,
    resolve,
)
from operations.emails import cancel, find_emails, publish, status, timeline
from operations.errors import NotALimit, NotAttachable, NotFound, NotOpen, NotReplayable, ServerAway
from operations.forecasting import forecast
from operations.health import Finding, backlog, concurrency_limits, doctor, queues, ready, recipient_firewall
from operations.holding import Hold, hold, list_holds, release
from operations.pausing import EVERY, Resumed, pause, pauses, resume
from operations.rotation import Rotation, older_keys, rotate_keys
from operations.verification import Discrepancy, Fault, Verification, count_to_verify, verify

__all__ = [
    "EVERY",
    "FLEET_LIMITS",
    "MAILBOX_LIMITS",
    "TENANT_LIMITS",
    "Attached",
    "Discrepancy",
    "Fault",
    "Finding",
    "Hold",
    "Limit",
    "LimitsChange",
    "NotALimit",
    "NotAttachable",
    "NotCancellable",
    "NotFound",
    "NotOpen",
    "NotReplayable",
    "Resumed",
    "Rotation",
    "ServerAway",
    "Verification",
    "attach",
    "backlog",
    "backup",
    "cancel",
    "concurrency_limits",
    "count_expired",
    "count_to_verify",
    "dead_letter",
    "dead_letter_groups",
    "doctor",
    "export_backup",
    "find_backups",
    "find_dead_letters",
    "find_emails",
    "forecast",
    "held",
    "hold",
    "limits",
    "limits_set",
    "list_backups",
    "list_holds",
    "older_keys",
    "open_dead_letter",
    "pause",
    "pauses",
    "publish",
    "purge_backups",
    "queues",
    "read_message",
    "ready",
    "recipient_firewall",
    "release",
    "resolve",
    "resume",
    "rotate_keys",
    "set_limits",
    "status",
    "timeline",
    "unset_limits",
    "verify",
]
