"""What the in-process tests of models and actors share: emails, rows, and a worker's way with a message.

A test module that wants a fixture of these takes it over by name: ``fleet = support.fleet``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import orjson
import pika
import pytest
from dramatiq import Message
from dramatiq.broker import MessageProxy

import actors
import models
import runtime
from actors import scheduling as scheduler
from actors.budgets import keep_counts
from broker import MIRROR_QUEUE
from contracts import accept
from migrations.__main__ import migrate
from models import Arrival, ClaimedEmail, Route, rows, scheduling, turns
from models.ingest import Stored
from models.scheduling import Dispatch, Pick
from models.turns import Busy
from sandbox.world import new_database
from simulator.control import Simulator

LEASE = timedelta(minutes=2)
WITHIN = timedelta(seconds=30)
NOW = timedelta(0)
SENDER = "ann@example.com"
TABLES = ("incoming_emails", "worker_receipts", "file_uploads", "sent_emails", "email_backups", "outbox_events", "dlq")
QUEUES = ("ingest", "scheduler", "send_plain", "send_attached", "backup", "maintenance")


def send_email(**changes: Any) -> dict[str, Any]:
    """A ``SendEmail`` that is accepted, with members replaced or, by None, left out."""
    email = {
        "publisher_message_id": "order-1",
        "from": SENDER,
        "to": ["bob@example.org"],
        "subject": "Your order",
        "body": {"contentType": "text", "content": "Thank you."},
    } | changes
    return {name: value for name, value in email.items() if value is not None}


def arrival(**changes: Any) -> Arrival:
    return Arrival(accept(orjson.dumps(send_email(**changes))))


def store(**changes: Any) -> str:
    """Store one email and return its id."""
    (stored,) = models.store([arrival(**changes)], publish_within=WITHIN)
    return stored.incoming_email_id


def store_many(count: int, **changes: Any) -> list[Stored]:
    batch = [arrival(**{"publisher_message_id": f"order-{n}", **changes}) for n in range(count)]
    return models.store(batch, publish_within=WITHIN)


def dispatch(
    route: Route = Route.PLAIN,
    *,
    capacity: int = 100,
    share: int = 100,
    busy: Busy | None = None,
    after: str = "",
    lease: timedelta = LEASE,
) -> list[Dispatch]:
    """Claim what is ready as the scheduler does, with no budget reserved."""
    busy = busy or Busy({}, {})
    found = turns.look_ups(route, capacity=capacity, share=share, busy=busy)
    chosen = turns.choose(turns.candidates(route, capacity=capacity, share=share, busy=busy, after=after), capacity)
    picks = [Pick(candidate.id, candidate.mailbox, None) for candidate in [*found, *chosen]]
    with scheduling.sweep():
        return scheduling.claim(route, picks, capacity=capacity, lease=lease)


def claim(id: str, *, intent: bool = True, attempt: int | None = None, lease: timedelta = LEASE) -> ClaimedEmail:
    """Dispatch everything that is ready and claim one email of it."""
    for route in Route:
        dispatch(route)
    row = email_row(id)
    route = Route(row["route"])
    claimed = ClaimedEmail.claim(id, attempt or row["attempt_count"], route=route, lease=lease, intent=intent)
    assert claimed is not None
    return claimed


def table(name: str) -> list[dict[str, Any]]:
    """Every row of a table, in order of its key."""
    return [orjson.loads(row) for (row,) in rows(f"SELECT to_jsonb(t)::text FROM {name} t ORDER BY 1")]


def everything() -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, to see that something changed nothing."""
    return {name: table(name) for name in TABLES}


def email_row(id: str) -> dict[str, Any]:
    (found,) = [row for row in table("incoming_emails") if row["id"] == id]
    return found


def sending(id: str) -> str | None:
    """The status of the email's sending; None if there is no intent."""
    found = rows("SELECT status FROM sent_emails WHERE incoming_email_id = %(id)s", {"id": id})
    return found[0][0] if found else None


def seconds_until(table_name: str, column: str, key: str, id: str) -> float:
    """How far in the future an instant is, by the database's clock."""
    ((seconds,),) = rows(
        f"SELECT extract(epoch FROM {column} - now())::float FROM {table_name} WHERE {key} = %(id)s", {"id": id}
    )
    return float(seconds)


def make_due(id: str) -> None:
    """Let the email's waiting time have passed, its lease included."""
    rows(
        """
        UPDATE incoming_emails SET next_attempt_at = CASE WHEN next_attempt_at IS NOT NULL THEN now() END,
                                   lease_until = CASE WHEN lease_until IS NOT NULL THEN now() END WHERE id = %(id)s
        """,
        {"id": id},
    )


def lapse(id: str) -> None:
    """Let the lease of whoever holds the email run out, and be taken back."""
    make_due(id)
    with scheduling.sweep():
        scheduling.expire_leases()


def wait_until(what: str, holds: Callable[[], Any], seconds: float = 15) -> Any:
    """Wait for what other threads or processes bring about."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        pause.wait(0.02)
    return found


def work(message: Message[Any]) -> str:
    """Do with a message what a worker does, and return ``done`` or, if its actor gave it up, ``dead-lettered``."""
    broker, proxy = runtime.fleet_broker, MessageProxy(message)
    broker.emit_before("process_message", proxy)
    error: BaseException | None = None
    try:
        broker.get_actor(message.actor_name)(*message.args, **message.kwargs)
    except Exception as raised:
        error = raised
    broker.emit_after("process_message", proxy, result=None, exception=error)
    return "dead-lettered" if proxy.failed else "done"


class Fleet:
    """The actors of this process with their servers, run one message at a time."""

    def __init__(self, graph: Simulator, connection: pika.BlockingConnection) -> None:
        self.graph = graph
        self.channel = connection.channel()

    def schedule(self) -> None:
        """Let the scheduler look once."""
        actors.schedule_emails()

    def take(self, queue: str) -> list[Message[Any]]:
        """Take every message that waits in a queue of actors."""
        return [Message.decode(body) for _, body in self.take_raw(queue)]

    def take_raw(self, queue: str) -> list[tuple[Any, bytes]]:
        taken = []
        while (delivery := self.channel.basic_get(queue, auto_ack=True))[0] is not None:
            taken.append((delivery[1], delivery[2]))
        return taken

    def run(self, queue: str) -> list[str]:
        """Do the work that waits in a queue; return how each message ended."""
        return [work(message) for message in self.take(queue)]

    def send(self) -> list[str]:
        """Schedule, and let the workers of both routes send once."""
        self.schedule()
        return self.run("send_plain") + self.run("send_attached")

    def settle(self, id: str) -> list[str]:
        """Let the email's waiting time pass, then send again."""
        make_due(id)
        rows("UPDATE mailboxes SET paused_until = NULL")
        runtime.redis.flushdb()
        return self.send()

    def backup(self) -> list[str]:
        """Let every backup be due, and make them."""
        rows("UPDATE sent_emails SET backup_due_at = now() WHERE backup_due_at IS NOT NULL")
        self.schedule()
        return self.run("backup")

    def events(self) -> list[str]:
        """The types of the events published so far, each once taken."""
        runtime.events.close()
        return sorted(properties.type for properties, _ in self.take_raw("test.events"))

    def mails(self, id: str) -> int:
        """How many mails really left for this email."""
        return len(self.graph.deliveries(tag=id))


@pytest.fixture(scope="session")
def shared_database(servers: dict[str, str]) -> Iterator[str]:
    """The URL of a migrated database for all tests that do not mind its history: making one takes a while."""
    with ExitStack() as stack:
        url = new_database(servers["DATABASE_URL"], stack)
        migrate(url)
        yield url


@pytest.fixture
def tables(shared_database: str) -> str:
    """Empty tables, to which `models` is connected, and the URL of their database."""
    models.disconnect()
    models.connect(shared_database, "tests")
    for name in (
        "routes",
        "fleet_limits",
        "holds",
        "email_backups",
        "stored_attachments",
        "incoming_emails",
        "payload_keys",
        "dlq",
        "dead_letter_notices",
        "mailboxes",
        "audit_log",
    ):
        rows(f"DELETE FROM {name}")
    runtime.payloads.forget()  # the data key of an earlier test is not kept any more
    return shared_database


@pytest.fixture
def fleet(tables: str, graph: Simulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Actors with empty tables, empty queues, a new Graph whose mails show at once, and no limits left over."""
    graph.set_behaviour(sent_items_delay_seconds=0)
    # A source trusts whom it trusted when it was made, and the simulator's certificates are made only now.
    monkeypatch.setattr(runtime, "source", runtime.attachment_source())
    runtime.tokens.drop(runtime.tokens.token())  # the new Graph knows no earlier one
    runtime.redis.flushdb()
    keep_counts()
    with pika.BlockingConnection(runtime.rabbitmq) as connection:
        _empty(connection.channel())
        yield Fleet(graph, connection)
        scheduler._alarm.ring_in(None)
        scheduler.receipts.close()
        runtime.close()


def _empty(channel: Any) -> None:
    runtime.declare(channel)
    channel.queue_declare("test.events", durable=True)
    channel.queue_bind("test.events", "mail.events", "#")
    own = [name + suffix for name in QUEUES for suffix in ("", ".XQ")]
    for queue in (*own, MIRROR_QUEUE, runtime.SEND_QUEUE, runtime.REJECTED_QUEUE, "test.events"):
        channel.queue_purge(queue)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the fleet other budgets for the length of a test, or a Redis at another address."""

    def change(url: str | None = None, **budgets: int) -> None:
        address = url or runtime.configuration.redis_url.get_secret_value()
        limiter = runtime.limits.Limiter(address, runtime.limits.Budgets(**budgets), timedelta(minutes=1))
        monkeypatch.setattr(runtime, "limiter", limiter)

    return change


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the actors other settings for the length of a test."""

    def change(**settings: Any) -> None:
        monkeypatch.setattr(runtime, "configuration", runtime.configuration.model_copy(update=settings))

    return change
