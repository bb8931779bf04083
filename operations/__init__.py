"""What an operator may do, whichever way it is asked for: by the command line or by the console.

Every verb that changes something writes who did it into ``audit_log``, in the transaction of the change. None of them
sends anything: they change what the tables say, and the fleet acts on that.
"""

import actors  # noqa: F401  declares the actors that are woken and the queues that are looked at
from models.cancelling import NotCancellable
from operations.archive import backup, export_backup, find_backups, list_backups
from operations.attaching import Attached, attach, rotate_attachment_keys
from operations.budgets import (
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
from operations.dead_letters import dead_letter, dead_letter_groups, find_dead_letters, open_dead_letter, resolve
from operations.emails import cancel, find_emails, publish, status, timeline
from operations.errors import NotALimit, NotAttachable, NotFound, NotOpen, NotReplayable, ServerAway
from operations.forecasting import forecast
from operations.health import Finding, backlog, doctor, queue_depths, ready, recipient_firewall
from operations.pausing import EVERY, Resumed, pause, pauses, resume

__all__ = [
    "EVERY",
    "MAILBOX_LIMITS",
    "TENANT_LIMITS",
    "Attached",
    "Finding",
    "Limit",
    "LimitsChange",
    "NotALimit",
    "NotAttachable",
    "NotCancellable",
    "NotFound",
    "NotOpen",
    "NotReplayable",
    "Resumed",
    "ServerAway",
    "attach",
    "backlog",
    "backup",
    "cancel",
    "dead_letter",
    "dead_letter_groups",
    "doctor",
    "export_backup",
    "find_backups",
    "find_dead_letters",
    "find_emails",
    "forecast",
    "held",
    "limits",
    "limits_set",
    "list_backups",
    "open_dead_letter",
    "pause",
    "pauses",
    "publish",
    "queue_depths",
    "ready",
    "recipient_firewall",
    "resolve",
    "resume",
    "rotate_attachment_keys",
    "set_limits",
    "status",
    "timeline",
    "unset_limits",
]
