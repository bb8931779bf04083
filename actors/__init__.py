"""What RabbitMQ can start: the actors, where the truth in ``models`` and the world in ``graph_client`` meet.

An actor is policy: it claims, acts, and records one outcome. Importing the package declares every actor, so that each
process may send to any of them; a worker runs only those of the queue that its process type names.
"""

from actors.backups import backup_email, backup_emails
from actors.ingest import ingest_emails
from actors.maintenance import mirror_dead_letters, purge_expired
from actors.notices import notify_dead_letters
from actors.scheduling import acknowledge_receipt, schedule_emails
from actors.sending import send_attached, send_plain
from actors.stored_attachments import delete_stored_attachments
from actors.tidying import tidy_drafts

__all__ = [
    "acknowledge_receipt",
    "backup_email",
    "backup_emails",
    "delete_stored_attachments",
    "ingest_emails",
    "mirror_dead_letters",
    "notify_dead_letters",
    "purge_expired",
    "schedule_emails",
    "send_attached",
    "send_plain",
    "tidy_drafts",
]
