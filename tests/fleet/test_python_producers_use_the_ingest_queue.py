"""The queue ``ingest``, for producers that speak Dramatiq: emails in, the same events out."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from fleet_support import a_mailbox, an_email, assert_each_left_once, events_of, put, settled

from sandbox.world import ROOT, World


@pytest.fixture(scope="module")
def ingest(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A worker of the queue, and its log; it ends by itself when it is asked to."""
    log = tmp_path_factory.mktemp("ingest") / "ingest.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bin/start", "ingest"],
            cwd=ROOT,
            env={**world.environment, "METRICS_PORT": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        yield log
        process.terminate()
        assert process.wait(timeout=15) == 0


def _produce(world: World, *deliveries: dict[str, Any]) -> None:
    message: dramatiq.Message[None] = dramatiq.Message(
        queue_name="ingest",
        actor_name="ingest_emails",
        args=(),
        kwargs={"deliveries": list(deliveries)},
        options={},
    )
    put(world, "ingest", message.encode())


def test_what_a_producer_puts_there_is_sent_and_told_once(world: World, ingest: Path) -> None:
    given = [an_email(a_mailbox()) for _ in range(3)]

    deliveries = [{"email": email, "correlation_id": "from Python"} for email in given]
    _produce(world, *deliveries)
    _produce(world, *deliveries)

    known = settled(world, given).values()
    assert_each_left_once(world, known)
    for each in known:
        [received] = world.wait_until("it is told", lambda each=each: events_of(world, each, "SendEmailReceived"))
        assert received.correlation_id == "from Python"


def test_a_bad_email_is_rejected_and_the_others_go_out(world: World, ingest: Path) -> None:
    good = an_email(a_mailbox())

    _produce(world, {"email": an_email("nobody"), "correlation_id": "bad one"}, {"email": 17}, {"email": good})

    assert_each_left_once(world, settled(world, [good]).values())
    world.wait_until(
        "the rejection is told",
        lambda: [e for e in world.events("SendEmailRejected") if e.correlation_id == "bad one"],
    )


def test_what_is_no_delivery_is_dead_lettered_with_its_content(world: World, ingest: Path) -> None:
    _produce(world, {"mail": an_email(a_mailbox(), subject="Misnamed")})

    world.wait_until(
        "it is in the table",
        lambda: world.rows(
            "SELECT 1 FROM dlq WHERE queue_name = 'ingest' AND position('Misnamed' in encode(body, 'escape')) > 0"
        ),
    )
