"""The mail that speed is measured with, and a fleet's settings under which no limit but its own speed binds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import orjson
import pika

from outbox import Outgoing, Publisher
from simulator.control import Simulator

#: Types that mail needs; the console only reads.
TYPES = ("bridge", "clock", "scheduler", "send_plain", "send_attached", "backup", "maintenance")
#: High enough not to bind, and not 0: a budget that is switched off would not be asked for.
UNBINDING: dict[str, str | int] = {
    "MAILBOX_REQUESTS_PER_10_MINUTES": 10_000_000,
    "MAILBOX_UPLOAD_MB_PER_5_MINUTES": 1_000_000,
    "MAILBOX_RECIPIENTS_PER_DAY": 10_000_000,
    "TENANT_REQUESTS_PER_10_SECONDS": 10_000_000,
    "MAILBOX_SENDS_PER_MINUTE": 0,
}
LIMIT = timedelta(minutes=30)
_POLL_SECONDS = 0.05
#: Unconfirmed ones would not do: RabbitMQ may lose the last of a channel that closes.
_CONFIRMED_TOGETHER = 1000
_SENTENCE = "The quarterly figures are attached to this message in words. "


def lift_limits(simulator: Simulator) -> None:
    """Have Graph throttle nobody."""
    simulator.set_limits(concurrency=0, requests=0, upload_bytes=0)


def emails(
    count: int, mailboxes: int, body_kb: float, attachments: Sequence[dict[str, Any]] = (), name: str = "bench"
) -> list[bytes]:
    """Return so many ``SendEmail`` bodies, in turns over the mailboxes, each with all of the attachments.

    Args:
        name: Begins their ids: those of two calls differ if this does.
    """
    length = int(body_kb * 1024)
    content = (_SENTENCE * (1 + length // len(_SENTENCE)))[:length]
    files = {"attachments": list(attachments)} if attachments else {}
    return [
        orjson.dumps(
            {
                "publisher_message_id": f"{name}-{number}",
                "from": f"mailbox{number % mailboxes}@contoso.example",
                "to": [f"reader{number}@fabrikam.example"],
                "subject": f"Figures {number}",
                "body": {"contentType": "text", "content": content},
                **files,
            }
        )
        for number in range(count)
    ]


def publish(rabbitmq_url: str, queue: str, bodies: Sequence[bytes]) -> None:
    """Publish persistent messages and have them confirmed, a thousand at a time."""
    persistent = pika.BasicProperties(delivery_mode=2)
    messages = [Outgoing("", queue, body, persistent, mandatory=True) for body in bodies]
    publisher = Publisher(pika.URLParameters(rabbitmq_url), lambda _channel: None)
    for start in range(0, len(messages), _CONFIRMED_TOGETHER):
        publisher.publish(messages[start : start + _CONFIRMED_TOGETHER])
    publisher.close()


def seconds_until(began: float, holds: Callable[[], bool]) -> float:
    """Wait, and return the seconds from an instant of the monotonic clock until it holds."""
    while not holds():
        if time.monotonic() - began > LIMIT.total_seconds():
            raise SystemExit("it does not come to an end")
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - began
