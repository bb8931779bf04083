"""As many sends a minute as a mailbox may have, and never one more, whoever dies meanwhile.

A worker is killed while it has mail in hand, in the second minute. In the third Redis is killed and comes back empty,
when one mailbox has used a part of its budget and is then given more mail than the rest allows: a budget that was
forgotten shows there, and one that is charged twice in what the others have used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from bench.limits import backlog
from bench.limits.findings import Findings
from bench.limits.measures import SENDS, Call, by_mailbox, longest_gap, most_within, used_share
from bench.limits.recorder import Recorder
from sandbox.world import World

LEAST_USED_SHARE = 0.95
MINUTE_SECONDS = 60.0
_PATIENCE = timedelta(minutes=2)
#: Of a budget that is used before Redis loses it: neither nothing nor all, so that forgetting it would be seen at once.
_PART = 0.6


@dataclass(frozen=True)
class Plan:
    """What to run; the instants count from the first send."""

    mailboxes: int = 5
    per_minute: int = 40
    lasts: timedelta = timedelta(minutes=5)
    #: None: not at all.
    worker_dies_after: timedelta | None = timedelta(seconds=65)
    redis_dies_after: timedelta | None = timedelta(seconds=130)
    #: Looked on for so long after that, at least.
    afterwards: timedelta = timedelta(seconds=15)
    latency: timedelta = timedelta(milliseconds=150)
    #: See `backlog.let_go`.
    at_once: bool = True

    @property
    def backlog(self) -> int:
        """For each mailbox: what two minutes more would take."""
        return math.ceil(self.per_minute * (self.lasts.total_seconds() / MINUTE_SECONDS + 2))


#: The replicas, any of which may be killed alone. The fleet has to be supervised.
SCALE = {"send_plain": 2}


def settings(plan: Plan) -> dict[str, str | int]:
    """Return the fleet's settings: one limit, and a lease short enough for the mail of a killed worker to be found."""
    return {
        "MAILBOX_SENDS_PER_MINUTE": plan.per_minute,
        "MAILBOX_RECIPIENTS_PER_DAY": 0,
        "MAILBOX_REQUESTS_PER_10_MINUTES": 0,
        "MAILBOX_UPLOAD_MB_PER_5_MINUTES": 0,
        "TENANT_REQUESTS_PER_10_SECONDS": 0,
        "BACKUP_DELAY_SECONDS": 1,
        "GRAPH_TIMEOUT_SECONDS": 2,
        "IN_DOUBT_GRACE_SECONDS": 15,
        "IN_DOUBT_SETTLE_SECONDS": 2,
        "LEASE_SECONDS": 20,
    }


def measure(world: World, plan: Plan, lose_redis: Callable[[], None]) -> Findings:
    """Send the backlog for as long as the plan says, strike, and judge what Graph saw.

    Args:
        lose_redis: Ends Redis and starts it without anything that it had.

    Raises:
        Overdue: The fleet does not use up its budgets.
    """
    world.simulator.set_latency(plan.latency.total_seconds())
    senders = backlog.mailboxes(plan.mailboxes, "paced")
    with Recorder(world.simulator) as recorder:
        backlog.let_go(world, backlog.emails(plan.backlog, senders), at_once=plan.at_once)

        world.wait_until("the first is sent", lambda: arrivals(recorder.calls), _PATIENCE)
        began = time.monotonic()
        if plan.worker_dies_after is not None:
            _sleep_until(began, plan.worker_dies_after)
            world.wait_until("a worker has mail in hand", lambda: backlog.one_is_in_hand(world), _PATIENCE)
            world.fleet.kill("send_plain.1")
        if plan.redis_dies_after is not None:
            _sleep_until(began, plan.redis_dies_after)
            _lose_redis_between(world, recorder, plan, lose_redis)
        _sleep_until(began, plan.lasts)
        left = backlog.waiting(world, senders)
    return judge(world, plan, recorder.calls, left)


def arrivals(calls: list[Call]) -> dict[str, list[float]]:
    """Return when the sends of each mailbox came to Graph."""
    return {
        mailbox: [call.arrived for call in of_mailbox]
        for mailbox, of_mailbox in by_mailbox(call for call in calls if call.operation in SENDS).items()
    }


def judge(world: World, plan: Plan, calls: list[Call], left: dict[str, int]) -> Findings:
    """Judge the calls of all mailboxes; ``left`` tells what still waits for those that never had too little mail."""
    findings = Findings()
    sends = arrivals(calls)
    busy = [sends[mailbox] for mailbox in left]
    shares = [used_share(each, plan.per_minute, MINUTE_SECONDS) or 0.0 for each in busy]
    findings.tell("sends that Graph saw", sum(map(len, sends.values())))
    findings.at_least("used share of the budgets", sum(shares) / len(shares), LEAST_USED_SHARE)
    findings.tell("of the mailbox that used the least", min(shares))
    findings.tell("longest silence of a mailbox, s", max(map(longest_gap, busy)))
    most = max(most_within(each, MINUTE_SECONDS) for each in sends.values())
    findings.at_most("most sends of a mailbox in any 60 seconds", most, plan.per_minute)
    findings.at_most("answered 429", sum(call.status == "429" for call in calls), 0)
    sent_twice = sum(count > 1 for count in world.simulator.delivery_counts_by_tag().values())
    findings.at_most("mails that left twice", sent_twice, 0)
    findings.at_least("fewest waiting for a mailbox at the end", min(left.values()), 1)
    return findings


def _lose_redis_between(world: World, recorder: Recorder, plan: Plan, lose_redis: Callable[[], None]) -> None:
    """Have one more mailbox use a part of its budget, lose Redis, and give it more mail than the rest allows."""
    (partly,) = backlog.mailboxes(1, "partly-used")
    part = math.ceil(_PART * plan.per_minute)
    backlog.publish(world, backlog.emails(part, [partly]))
    world.wait_until("a part is used", lambda: len(arrivals(recorder.calls).get(partly, ())) >= part, _PATIENCE)
    lose_redis()
    backlog.publish(world, backlog.emails(plan.per_minute, [partly]))
    time.sleep(plan.afterwards.total_seconds())


def _sleep_until(began: float, after: timedelta) -> None:
    time.sleep(max(0.0, began + after.total_seconds() - time.monotonic()))
