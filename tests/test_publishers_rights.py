"""What a publisher's login to RabbitMQ may do, with the rights that docs/security.md gives it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pika
import pika.exceptions
import pytest

import actors  # noqa: F401  declares the queues that a publisher may not write to
import runtime
from sandbox.servers import Servers

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "security.md"
QUEUES = ("send_email", "ingest", "send_plain")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A RabbitMQ of its own with our queues, an exchange for publishers, and a login for one of them, as it is said."""
    directory = tmp_path_factory.mktemp("servers")
    for each in (directory, *directory.parents[:2]):
        each.chmod(0o711)  # PostgreSQL's user has to get through
    with Servers(directory, durable=False, environment={}) as servers:
        with pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url)) as connection:
            channel = connection.channel()
            runtime.declare(channel)
            channel.exchange_declare("mail.submit", "fanout", durable=True)
            channel.queue_bind("send_email", "mail.submit")
        for command in re.findall(r"^rabbitmqctl (.+)$", DOCUMENT.read_text(), re.MULTILINE):
            password = ["password"] if command.startswith("add_user") else []
            servers.rabbitmq.rabbitmqctl(*shlex.split(command), *password)
        yield servers.rabbitmq


@contextmanager
def logged_in(broker: Any, user: str = "crm") -> Iterator[Any]:
    parts = urlsplit(broker.url)
    url = parts._replace(netloc=f"{user}:password@{parts.hostname}:{parts.port}").geturl()
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


def depths(broker: Any) -> dict[str, int]:
    with pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
        channel = connection.channel()
        found = {queue: channel.queue_declare(queue, passive=True).method.message_count for queue in QUEUES}
        for queue in QUEUES:
            channel.queue_purge(queue)
        return found


def test_a_publisher_reaches_the_queue_for_mail_and_hears_of_its_mail(broker: Any) -> None:
    with logged_in(broker) as channel:
        for key in QUEUES:
            channel.basic_publish("mail.submit", key, b"{}", pika.BasicProperties(user_id="crm"), mandatory=True)
        channel.queue_declare("crm.answers")
        channel.queue_bind("crm.answers", "mail.events", "email.*")
    assert depths(broker) == {"send_email": 3, "ingest": 0, "send_plain": 0}


ATTEMPTS: dict[str, Callable[[Any], Any]] = {
    "write to the actors' queues": lambda channel: channel.basic_publish("", "send_plain", b"{}"),
    "write to ingest, past the bridge": lambda channel: channel.basic_publish("", "ingest", b"{}"),
    "read others' mail": lambda channel: channel.basic_get("send_email"),
    "read what was rejected": lambda channel: channel.basic_get("send_email.rejected"),
    "empty the queue": lambda channel: channel.queue_purge("send_email"),
    "delete the queue": lambda channel: channel.queue_delete("send_email"),
    "tell events of its own": lambda channel: channel.basic_publish("mail.events", "email.sent", b"{}"),
    "have its exchange lead elsewhere": lambda channel: channel.queue_bind("ingest", "mail.submit"),
    "say that it is another": lambda channel: channel.basic_publish(
        "mail.submit", "", b"{}", pika.BasicProperties(user_id="billing")
    ),
}


@pytest.mark.parametrize("what", ATTEMPTS)
def test_a_publisher_can_do_nothing_else(broker: Any, what: str) -> None:
    with (
        pytest.raises(pika.exceptions.ChannelClosedByBroker, match=r"ACCESS_REFUSED|PRECONDITION_FAILED"),
        logged_in(broker) as channel,
    ):
        ATTEMPTS[what](channel)
    assert depths(broker) == dict.fromkeys(QUEUES, 0)


def test_the_default_exchange_would_lead_to_every_queue(broker: Any) -> None:
    broker.rabbitmqctl("add_user", "careless", "password")
    broker.rabbitmqctl("set_permissions", "careless", "^$", r"^amq\.default$", "^$")
    with logged_in(broker, "careless") as channel:
        channel.basic_publish("", "ingest", b"{}", mandatory=True)
    assert depths(broker)["ingest"] == 1
