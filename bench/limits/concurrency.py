"""As many calls at a time as Graph allows a mailbox, and never one more.

Every call takes 150 ms, no other limit binds, and each mailbox has more mail waiting than can be sent. The steady state
begins some seconds after every mailbox has been called for the first time, and ends while mail is still waiting for
each: what is measured has neither a start nor a tail.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import timedelta

from bench.limits import backlog
from bench.limits.findings import Findings
from bench.limits.machine import Effort, Meter
from bench.limits.measures import Call, by_mailbox, mean_at_once, most_at_once
from bench.limits.recorder import Recorder
from sandbox.world import World

LEAST_USED_SHARE = 0.9
#: A mail in a worker's hands is not with Graph all the time, so a little more of them than slots are handed out.
_IN_HAND_PER_SLOT = 1.5
#: No machine that this is meant for sends more, so no more need wait.
_MOST_PER_SECOND = 300
_PATIENCE = timedelta(minutes=2)


@dataclass(frozen=True)
class Plan:
    """What to run."""

    mailboxes: int = 3
    #: Of each type that calls Graph.
    processes: int = 1
    #: What Graph allows one mailbox, and what the fleet is told that it does.
    concurrency: int = 4
    latency: timedelta = timedelta(milliseconds=150)
    warm_up: timedelta = timedelta(seconds=5)
    steady: timedelta = timedelta(seconds=30)
    #: For each mailbox; None: enough for so long.
    emails: int | None = None
    #: See `backlog.let_go`.
    at_once: bool = True

    @property
    def backlog(self) -> int:
        """For each mailbox: as many as could be sent in half as much time again as is measured."""
        if self.emails is not None:
            return self.emails
        per_second = min(self.concurrency / self.latency.total_seconds(), _MOST_PER_SECOND / self.mailboxes)
        return math.ceil(1.5 * per_second * (self.warm_up + self.steady).total_seconds())


def settings(plan: Plan) -> dict[str, str | int]:
    """Return the fleet's settings: one limit, and workers enough to reach it."""
    in_hand = math.ceil(plan.mailboxes * plan.concurrency * _IN_HAND_PER_SLOT)
    backups = math.ceil(in_hand / 3)
    return {
        "MAILBOX_CONCURRENCY": plan.concurrency,
        "MAILBOX_REQUESTS_PER_10_MINUTES": 0,
        "MAILBOX_UPLOAD_MB_PER_5_MINUTES": 0,
        "MAILBOX_SENDS_PER_MINUTE": 0,
        "MAILBOX_RECIPIENTS_PER_DAY": 0,
        "TENANT_REQUESTS_PER_10_SECONDS": 0,
        "BACKUP_DELAY_SECONDS": 1,
        "SEND_PLAIN_CONCURRENCY": in_hand,
        "SEND_PLAIN_PROCESSES": plan.processes,
        "SEND_PLAIN_THREADS": math.ceil(in_hand / plan.processes),
        "BACKUP_CONCURRENCY": backups,
        "BACKUP_PROCESSES": plan.processes,
        "BACKUP_THREADS": math.ceil(backups / plan.processes),
    }


def measure(world: World, plan: Plan) -> Findings:
    """Send the backlog for as long as the plan says and judge what Graph saw.

    Raises:
        Overdue: The fleet does not call for every mailbox.
    """
    world.simulator.set_latency(plan.latency.total_seconds())
    world.simulator.set_limits(concurrency=plan.concurrency, requests=0, upload_bytes=0)
    senders = backlog.mailboxes(plan.mailboxes, "busy")
    with Recorder(world.simulator) as recorder:
        backlog.let_go(world, backlog.emails(plan.backlog, senders), at_once=plan.at_once)
        world.wait_until(
            "every mailbox is called", lambda: {call.mailbox for call in recorder.calls} >= {*senders}, _PATIENCE
        )
        time.sleep(plan.warm_up.total_seconds())
        meter = Meter(world)
        begins = time.monotonic()
        time.sleep(plan.steady.total_seconds())
        ends = time.monotonic()
        left = backlog.waiting(world, senders)
        effort = meter.read()
        # What was open at the end is in the journal when it has been answered.
        time.sleep(2 * plan.latency.total_seconds())
    calls = [call for call in recorder.calls if call.mailbox in left]
    return judge(plan, calls, begins, ends, min(left.values()), effort)


def judge(plan: Plan, calls: list[Call], begins: float, ends: float, least_left: int, effort: Effort) -> Findings:
    findings = Findings()
    of_mailboxes = by_mailbox(calls).values()
    steady = [call for call in calls if call.answered > begins and call.arrived < ends]
    used = [mean_at_once(each, begins, ends) / plan.concurrency for each in of_mailboxes]
    findings.tell("seconds of the steady state", ends - begins)
    findings.tell("calls in it", len(steady))
    findings.tell("mean time with Graph, ms", 1000 * _mean_seconds(steady))
    findings.at_least("used share of the allowed concurrency", sum(used) / len(used), LEAST_USED_SHARE)
    findings.tell("of the mailbox that used the least", min(used))
    findings.at_most("most at once for one mailbox", max(map(most_at_once, of_mailboxes)), plan.concurrency)
    findings.at_most("answered 429", sum(call.status == "429" for call in calls), 0)
    findings.at_least("fewest waiting for a mailbox at the end", least_left, 1)
    effort.tell(findings)
    return findings


def _mean_seconds(calls: list[Call]) -> float:
    return sum(call.answered - call.arrived for call in calls) / max(len(calls), 1)
