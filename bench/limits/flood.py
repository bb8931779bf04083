"""One mailbox's backlog delays nobody else's mail.

The time from the publish of a mail to its arrival at Graph is measured twice in one run: while nothing else is to be
done, and while another mailbox has any number of mails waiting. Each mail is another mailbox's. The backlog is
ingested by the bridge like all mail, while no scheduler runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import orjson
import pika

from bench.limits import backlog
from bench.limits.findings import Findings
from bench.limits.machine import Meter
from bench.limits.measures import SENDS, latencies, percentile
from bench.limits.recorder import Recorder
from sandbox.world import World

MOST_OVER_IDLE_SECONDS = 0.5
#: Sent before anything is measured: tokens, connections and plans are there then.
_WARM_UP = 5
_PATIENCE = timedelta(minutes=2)


@dataclass(frozen=True)
class Plan:
    """What to run."""

    waiting: int = 50_000
    probes: int = 60
    every: timedelta = timedelta(seconds=3)
    every_when_idle: timedelta = timedelta(seconds=1)
    latency: timedelta = timedelta(milliseconds=150)
    #: See `backlog.let_go`.
    at_once: bool = True


def settings(_: Plan) -> dict[str, str | int]:
    """Return the fleet's settings: no limit on sends, so that the backlog's mailbox is never at rest."""
    return {"MAILBOX_SENDS_PER_MINUTE": 0, "MAILBOX_RECIPIENTS_PER_DAY": 0, "BACKUP_DELAY_SECONDS": 1}


def measure(world: World, plan: Plan) -> Findings:
    """Publish one mail after the other, at rest and beside the backlog, and judge when each came to Graph.

    Raises:
        Overdue: One of them does not.
    """
    world.simulator.set_latency(plan.latency.total_seconds())
    (flooded,) = backlog.mailboxes(1, "flooded")
    with Recorder(world.simulator) as recorder:
        idle = _idle(world, recorder, plan)
        backlog.let_go(world, backlog.emails(plan.waiting, [flooded]), at_once=plan.at_once)
        world.wait_until("the backlog is being sent", lambda: _sent(recorder, flooded), _PATIENCE)
        meter, waiting_before = Meter(world), backlog.waiting(world, [flooded])[flooded]
        flood = _published(world, plan.probes, plan.every)
        world.wait_until("all have come to Graph", lambda: _sent_all(recorder, flood), _PATIENCE)
        effort, waiting_after = meter.read(), backlog.waiting(world, [flooded])[flooded]
    at_rest, beside = latencies(idle, recorder.calls), latencies(flood, recorder.calls)
    findings = Findings()
    findings.tell("mails measured at rest", len(at_rest))
    findings.tell("mails measured beside the backlog", len(beside))
    findings.at_least("waiting at their begin", waiting_before, 0.95 * plan.waiting)
    findings.at_least("waiting at their end", waiting_after, 1)
    for name, found in (("at rest", at_rest), ("beside it", beside)):
        findings.tell(f"publish to Graph, {name}, p50, ms", 1000 * percentile(found, 50))
        findings.tell(f"publish to Graph, {name}, p95, ms", 1000 * percentile(found, 95))
        findings.tell(f"publish to Graph, {name}, longest, ms", 1000 * max(found))
    over_idle = percentile(beside, 95) - percentile(at_rest, 95)
    findings.at_most("over rest at p95, ms", 1000 * over_idle, 1000 * MOST_OVER_IDLE_SECONDS)
    effort.tell(findings)
    return findings


def _idle(world: World, recorder: Recorder, plan: Plan) -> dict[str, float]:
    warm_up = _published(world, _WARM_UP, plan.every_when_idle)
    world.wait_until("the first have come to Graph", lambda: _sent_all(recorder, warm_up), _PATIENCE)
    idle = _published(world, plan.probes, plan.every_when_idle)
    world.wait_until("all have come to Graph", lambda: _sent_all(recorder, idle), _PATIENCE)
    return idle


def _published(world: World, count: int, every: timedelta) -> dict[str, float]:
    """Publish a mail for each of so many mailboxes, one after the other; return when, by mailbox."""
    published = {}
    with pika.BlockingConnection(pika.URLParameters(world.environment["RABBITMQ_URL"])) as connection:
        channel = connection.channel()
        for mailbox in backlog.mailboxes(count, "other"):
            body = orjson.dumps(backlog.email(mailbox))
            published[mailbox] = time.monotonic()
            channel.basic_publish("", "send_email", body, pika.BasicProperties(delivery_mode=2), mandatory=True)
            connection.sleep(every.total_seconds())
    return published


def _sent_all(recorder: Recorder, published: dict[str, float]) -> bool:
    return published.keys() <= {call.mailbox for call in recorder.calls if call.operation in SENDS}


def _sent(recorder: Recorder, mailbox: str) -> bool:
    return any(call.mailbox == mailbox and call.operation in SENDS for call in recorder.calls)
