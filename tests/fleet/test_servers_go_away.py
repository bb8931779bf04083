"""RabbitMQ, PostgreSQL and Redis go away under load, each in every way: the fleet comes back by itself.

They are killed, restarted, emptied, frozen; PostgreSQL becomes read-only; an operator deletes queues. Each happens to a
batch of emails that is on its way. Some then wait for a lease to run out, so all are looked at together, at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NamedTuple

import pytest
from fleet_support import Fate, assert_each_left_once, now, put
from fleet_support import settled as settle
from outages import Outages
from worlds import SETTINGS, Worlds

from sandbox.servers import Servers
from sandbox.world import World

#: A call that was under way when Redis was killed has ended after this.
LATENCY = timedelta(seconds=0.2)
#: Longer than anybody waits for RabbitMQ to greet or to confirm, longer than a lease, longer than Redis is waited for.
FROZEN = {"rabbitmq": timedelta(seconds=11), "postgresql": timedelta(seconds=21), "redis": timedelta(seconds=3)}
#: What a replica may use of a processor while a server is away, and what it may spend on ending what it had in hand.
IDLE_SHARE, IN_HAND_SECONDS = 0.2, 0.5
#: The same in lines of its log. Whoever tries without pausing logs hundreds each second.
IDLE_LINES_PER_SECOND, IN_HAND_LINES = 50, 100
DELETED_QUEUES = ("send_email", "scheduler", "send_plain", "mail.dead_letters.mirror")


class Survivors(NamedTuple):
    outages: Outages
    world: World
    fates: dict[str, Fate]
    #: How often the clock had started this when RabbitMQ was whole again.
    mirrored_times: int
    #: Between these nobody could count what a mailbox may still send.
    uncounted_from: datetime
    uncounted_until: datetime


@pytest.fixture(scope="module")
def outages(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outages]:
    """A fleet on servers that nobody else uses."""
    worlds.close()
    directory = tmp_path_factory.mktemp("servers")
    for each in (directory, *directory.parents[:2]):
        each.chmod(0o711)  # PostgreSQL's user has to get through
    with (
        Servers(directory, durable=False, environment={}) as servers,
        World(servers.environment, worlds.directory / "servers-go-away", SETTINGS) as world,
    ):
        world.wait_until_ready()
        world.simulator.set_latency(LATENCY.total_seconds())
        yield Outages(servers, world)


@pytest.fixture(scope="module")
def rabbitmq_lost(outages: Outages) -> Outages:
    """The fleet after RabbitMQ was killed, then lost all that it had, then had queues deleted by an operator."""
    rabbitmq = outages.servers.rabbitmq
    outages.some_work("killed")
    with outages.away("rabbitmq is killed"):
        rabbitmq.kill()
        rabbitmq.start()
    outages.wait_until_told()  # else an event that is repeated may come when nobody has bound a queue
    outages.some_stored_work("wiped")
    with outages.away("rabbitmq is wiped"):
        rabbitmq.wipe()
    outages.world.wait_until_ready()
    outages.some_stored_work("deleted")
    with outages.rabbitmq() as operator:
        for queue in DELETED_QUEUES:
            operator.queue_delete(queue)
        operator.exchange_delete("mail.events")
    return outages


@pytest.fixture(scope="module")
def rabbitmq_whole(rabbitmq_lost: Outages) -> Outages:
    """The fleet after it has declared again what was lost, and a subscriber has bound its queue again."""
    world = rabbitmq_lost.world
    world.wait_until_ready()
    world.wait_until("the exchange is there", lambda: rabbitmq_lost.exchange_exists("mail.events"))
    with rabbitmq_lost.rabbitmq() as subscriber:
        subscriber.queue_bind("sandbox.events", "mail.events", "#")
    return rabbitmq_lost


@pytest.fixture(scope="module")
def survivors(rabbitmq_whole: Outages) -> Survivors:
    """What became of emails during whose sending each of the servers went away in each way."""
    outages, world = rabbitmq_whole, rabbitmq_whole.world
    _lose_postgresql(outages)
    mirrored_times = outages.times_done("maintenance.1", "mirror_dead_letters")
    uncounted_from, uncounted_until = _lose_redis(outages)
    for server, duration in FROZEN.items():
        outages.some_work(f"{server}-frozen")
        outages.freeze(server, duration)
    world.simulator.set_latency(0)
    return Survivors(outages, world, settle(world, outages.given, 90), mirrored_times, uncounted_from, uncounted_until)


def _lose_postgresql(outages: Outages) -> None:
    postgresql, world = outages.servers.postgresql, outages.world
    outages.some_work("terminated")
    outages.administer("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    postgresql.stop()
    postgresql.start()
    outages.some_work("killed")
    with outages.away("postgresql is killed"):
        postgresql.kill()
        postgresql.start()
    outages.some_work("failed-over")
    with outages.away("postgresql is read-only"):
        outages.administer("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
        refused_before = _batches_kept(world)
        outages.more_work("read-only")
        world.wait_until("the bridge has tried again", lambda: _batches_kept(world) > refused_before + 2)
        outages.administer("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")


def _batches_kept(world: World) -> int:
    return sum("a batch is kept" in line["event"] for line in world.log_lines("bridge.1"))


def _lose_redis(outages: Outages) -> tuple[datetime, datetime]:
    """Empty Redis and kill it; return between which instants nobody could count."""
    redis, world = outages.servers.redis, outages.world
    outages.some_work("emptied")
    redis.wipe()
    outages.some_work("redis-killed")
    with outages.away("redis is killed"):
        missed_before = _times_missed(world)
        redis.kill()
        killed_at = now()
        world.wait_until("the scheduler has missed it", lambda: _times_missed(world) > missed_before)
        outages.let_pass(10 * LATENCY)
        back_at = now()
        redis.start()
    return killed_at + 2 * LATENCY, back_at


def _times_missed(world: World) -> int:
    return sum(line["event"] == "Redis is away" for line in world.log_lines("scheduler.1"))


def test_what_rabbitmq_lost_is_declared_again_with_the_way_of_dead_letters(rabbitmq_whole: Outages) -> None:
    world = rabbitmq_whole.world
    # When
    put(world, "send_plain", b"no message")
    # Then
    world.wait_until(
        "the dead letter is mirrored",
        lambda: world.rows("SELECT 1 FROM dlq WHERE queue_name = 'send_plain' AND reason = 'unreadable'"),
        timedelta(seconds=90),
    )
    world.wait_until("it is in its own queue", lambda: world.queue_depth("send_plain.XQ") == 1)
    assert world.queue_depth("send_email.rejected") == 0


def test_every_email_leaves_once(survivors: Survivors) -> None:
    assert Counter(fate.status for fate in survivors.fates.values()) == {"processed": len(survivors.outages.given)}
    assert_each_left_once(survivors.world, survivors.fates.values())


def test_every_email_is_archived_once(survivors: Survivors) -> None:
    archived = Counter(id for (id,) in survivors.world.rows("SELECT incoming_email_id::text FROM email_backups"))
    assert archived == Counter(fate.id for fate in survivors.fates.values())


def test_no_email_is_dead_lettered(survivors: Survivors) -> None:
    assert survivors.world.rows("SELECT queue_name, reason FROM dlq WHERE reason <> 'unreadable'") == []


def test_no_process_had_to_be_started_again(survivors: Survivors) -> None:
    assert survivors.world.fleet.dead == []


def test_no_process_tries_without_pausing(survivors: Survivors) -> None:
    restless = [
        effort
        for effort in survivors.outages.efforts
        if effort.processor_seconds > IN_HAND_SECONDS + IDLE_SHARE * effort.lasted_seconds
        or effort.lines > IN_HAND_LINES + IDLE_LINES_PER_SECOND * effort.lasted_seconds
    ]
    assert restless == []


@pytest.mark.parametrize("type", ["SendEmailReceived", "SendEmailSent"])
def test_publishers_are_told_and_can_tell_every_repeat(survivors: Survivors, type: str) -> None:
    # Given those whose subscriber had its queue bound all the time
    world, untold = survivors.world, {email["publisher_message_id"] for email in survivors.outages.untold}
    ids = {fate.id for name, fate in survivors.fates.items() if name not in untold}

    def told() -> list[tuple[str, str]]:
        return [(event.body["incoming_email_id"], event.message_id) for event in world.events(type)]

    # Then
    world.wait_until("every event has come", lambda: {id for id, _ in told()} >= ids)
    assert [id for id, count in Counter(id for id, _ in set(told())).items() if count > 1] == []


def test_every_event_is_published_in_the_end(survivors: Survivors) -> None:
    unpublished = "SELECT count(*) FROM outbox_events WHERE published_at IS NULL"
    survivors.world.wait_until("all are", lambda: not survivors.world.count(unpublished))


def test_the_clock_goes_on(survivors: Survivors) -> None:
    survivors.world.wait_until(
        "it has ticked",
        lambda: survivors.outages.times_done("maintenance.1", "mirror_dead_letters") > survivors.mirrored_times,
        timedelta(seconds=70),
    )


def test_nothing_is_sent_while_the_limits_cannot_be_counted(survivors: Survivors) -> None:
    assert survivors.uncounted_from < survivors.uncounted_until
    left_at = [datetime.fromisoformat(each["at"]) for each in survivors.world.simulator.deliveries()]
    assert [at for at in left_at if survivors.uncounted_from < at < survivors.uncounted_until] == []
