"""The truth: tables, states, and every change that may be made to them.

PostgreSQL alone knows what is to be sent and what was. RabbitMQ carries ids and may lose, repeat or reorder them; Redis
holds rates and may be emptied; neither changes what is in here. So every change is keyed and may be tried twice, and
every change that a worker makes names the lease under which it works.

What is taken a batch at a time is selected in a ``MATERIALIZED`` part of its statement: as a subquery of the change it
may be run more than once, as the planner likes, and its ``LIMIT`` does not hold then.

Nothing in this package talks to RabbitMQ, Redis or Graph.
"""

from models.backups import ClaimedBackup, Copy, Sealed
from models.claims import ClaimedEmail, LeaseLost
from models.database import DatabaseAway, NotStorable, connect, database, disconnect, now, rows, transaction
from models.events import claim_unpublished, mark_published
from models.ingest import Arrival, Reception, store
from models.payload_keys import DataKeyLost
from models.states import Route, Sending, Status

__all__ = [
    "Arrival",
    "ClaimedBackup",
    "ClaimedEmail",
    "Copy",
    "DataKeyLost",
    "DatabaseAway",
    "LeaseLost",
    "NotStorable",
    "Reception",
    "Route",
    "Sealed",
    "Sending",
    "Status",
    "claim_unpublished",
    "connect",
    "database",
    "disconnect",
    "mark_published",
    "now",
    "rows",
    "store",
    "transaction",
]
