"""The experiments of `bench.limits`, each for some seconds: what must never be exceeded is not, whatever the machine.

How much of the limits is used, and how fast mail is, takes longer to measure and a machine of one's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import redis
from worlds import Worlds

from bench.limits import concurrency, flood, rate, waits
from sandbox.world import World

CONCURRENCY = 4
SENDS_PER_MINUTE = 40
#: Shorter than every wait that is demanded of a mailbox, longer than a machine that does other things stands still.
ON_ITS_WAY = timedelta(seconds=0.6)


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> Iterator[World]:
    """A fleet with two of each type that calls Graph; what is killed comes back."""
    world = worlds.get(
        {"MAILBOX_CONCURRENCY": CONCURRENCY, "MAILBOX_SENDS_PER_MINUTE": SENDS_PER_MINUTE},
        scale={"send_plain": 2, "send_attached": 2, "backup": 2},
        supervise=True,
    )
    yield world
    # Mail that its experiment left would be sent beside other tests'.
    worlds.close()


def test_no_mailbox_is_called_more_often_at_a_time_than_graph_allows(world: World) -> None:
    plan = concurrency.Plan(
        concurrency=CONCURRENCY,
        emails=SENDS_PER_MINUTE,
        warm_up=timedelta(0),
        steady=timedelta(seconds=5),
        at_once=False,
    )
    findings = concurrency.measure(world, plan)
    assert (findings["most at once for one mailbox"], findings["answered 429"]) == (CONCURRENCY, 0)


def test_nobody_calls_a_mailbox_that_graph_wants_left_alone(world: World) -> None:
    plan = waits.Plan(
        mailboxes=12, emails=8, throttled_share=0.3, lasts=timedelta(seconds=15), on_its_way=ON_ITS_WAY, at_once=False
    )
    findings = waits.measure(world, plan)
    assert sum(findings[f"429 with Retry-After: {form}"] for form in waits.FORMS) > len(waits.FORMS)
    assert findings["early, could be known"] == 0, findings["those were"]


def test_one_mailboxs_backlog_is_overtaken_by_every_other_mail(world: World) -> None:
    plan = flood.Plan(
        waiting=600, probes=6, every=timedelta(seconds=0.5), every_when_idle=timedelta(seconds=0.2), at_once=False
    )
    findings = flood.measure(world, plan)
    assert findings["mails measured beside the backlog"] == 6
    # All but what the mailbox may send in the minutes that a very slow machine might take.
    assert findings["waiting at their end"] > 600 - 4 * SENDS_PER_MINUTE


def test_no_budget_is_used_twice_when_a_worker_dies_and_redis_loses_everything(world: World) -> None:
    def lose_redis() -> None:
        with redis.Redis.from_url(world.environment["REDIS_URL"]) as client:
            client.flushall()

    plan = rate.Plan(
        mailboxes=2,
        per_minute=SENDS_PER_MINUTE,
        lasts=timedelta(0),
        worker_dies_after=timedelta(0),
        redis_dies_after=timedelta(0),
        afterwards=timedelta(seconds=8),
        at_once=False,
    )
    findings = rate.measure(world, plan, lose_redis)
    assert findings["most sends of a mailbox in any 60 seconds"] <= SENDS_PER_MINUTE
    assert findings["mails that left twice"] == 0
