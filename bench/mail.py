"""The mail that is sent under attack, and the application that publishes it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pika.exceptions

from sandbox.world import World
from simulator import files
from simulator.control import Simulator

Email = dict[str, Any]

_ATTACHED_SHARE = 0.1
_SIZES_BYTES = (1_000, 200_000, 4_500_000)
_REPEATED_SHARE = 0.05
_BATCH = 20


def mailboxes(count: int) -> list[str]:
    return [f"sender{number}@contoso.example" for number in range(count)]


def emails(count: int, senders: list[str], simulator: Simulator, chance: random.Random) -> Iterator[Email]:
    """Yield emails, no two alike, some with attachments small and large."""
    for number in range(count):
        email: Email = {
            "publisher_message_id": f"chaos-{number}",
            "from": senders[number % len(senders)],
            "to": [f"reader{number}@example.com"],
            "subject": f"Number {number}",
            "body": {"contentType": "text", "content": f"This is number {number}."},
        }
        if chance.random() < _ATTACHED_SHARE:
            sizes = [chance.choice(_SIZES_BYTES) for _ in range(chance.randint(1, 2))]
            email["attachments"] = [
                {
                    "name": f"{number}-{place}.bin",
                    "size": size,
                    "urlOrId": simulator.file_url(size, seed=f"{number}-{place}"),
                }
                for place, size in enumerate(sizes)
            ]
        yield email


def attachments(email: Email) -> list[tuple[str, str]]:
    """Return what the email should arrive with: names and SHA-256 in hex, in order of the names."""
    return sorted((each["name"], _sha256(each)) for each in email.get("attachments", ()))


def _sha256(attachment: dict[str, Any]) -> str:
    (seed,) = parse_qs(urlsplit(attachment["urlOrId"]).query)["seed"]
    return files.sha256(seed, attachment["size"])


class Publisher(threading.Thread):
    """Publishes as an application would: again and again until RabbitMQ has confirmed, and some mail twice."""

    def __init__(self, world: World, mail: list[Email], over_seconds: float, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self._world = world
        self._mail = mail
        self._pause = over_seconds / max(len(mail) / _BATCH, 1)
        self._chance = chance
        self.repeats = 0

    def run(self) -> None:
        for start in range(0, len(self._mail), _BATCH):
            batch = self._mail[start : start + _BATCH]
            again = [email for email in batch if self._chance.random() < _REPEATED_SHARE]
            self.repeats += len(again)
            self._publish(batch + again)
            time.sleep(self._pause)

    def _publish(self, batch: list[Email]) -> None:
        while True:
            try:
                return self._world.publish(*batch)
            except (pika.exceptions.AMQPError, OSError):
                time.sleep(0.5)
