"""RabbitMQ, PostgreSQL and Redis killed under load and started again: the fleet comes back by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import pytest
from fleet_support import Fate, a_mailbox, an_attachment, an_email, assert_each_left_once, emails, fates, now
from fleet_support import settled as settle
from worlds import SETTINGS, Worlds

from sandbox.servers import Servers
from sandbox.world import World

#: A call that was under way when Redis was killed has ended after this.
LATENCY = timedelta(seconds=0.2)


class Survivors(NamedTuple):
    world: World
    fates: dict[str, Fate]
    #: Between these nobody could count what a mailbox may still send.
    uncounted_from: datetime
    uncounted_until: datetime


@pytest.fixture(scope="module")
def own(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Servers, World]]:
    """Servers that nobody else uses, and a world on them."""
    worlds.close()
    directory = tmp_path_factory.mktemp("servers")
    for each in (directory, *directory.parents[:2]):
        each.chmod(0o711)  # PostgreSQL's user has to get through
    with (
        Servers(directory, durable=False, environment={}) as servers,
        World(servers.environment, worlds.directory / "killed-servers", SETTINGS) as world,
    ):
        world.wait_until_ready()
        yield servers, world


def _some_work(world: World, name: str) -> list[dict[str, Any]]:
    """Publish emails of eight mailboxes and return them as soon as some have left."""
    mailboxes = [a_mailbox(name) for _ in range(8)]
    given = [email for mailbox in mailboxes for email in emails(6, mailbox)]
    given += [an_email(each, attachments=[an_attachment(world.simulator, 3_500_000)]) for each in mailboxes[:2]]
    world.publish(*given)
    world.wait_until("some have left", lambda: len(world.simulator.deliveries(mailboxes[0])) > 2)
    return given


@pytest.fixture(scope="module")
def survivors(own: tuple[Servers, World]) -> Survivors:
    """What became of emails during whose sending each of the servers was killed and came back."""
    servers, world = own
    world.simulator.set_latency(LATENCY.total_seconds())
    given = _some_work(world, "rabbitmq")
    servers.rabbitmq.kill()
    servers.rabbitmq.start()
    given += _some_work(world, "postgresql")
    servers.postgresql.kill()
    servers.postgresql.start()
    given += (last := _some_work(world, "redis"))
    servers.redis.kill()
    killed_at = now()
    world.wait_until(
        "one was held back",
        lambda: any("limit" in (fate.last_error or "") for fate in fates(world, last).values()),
        timedelta(seconds=70),
    )
    back_at = now()
    servers.redis.start()
    world.simulator.set_latency(0)
    return Survivors(world, settle(world, given, 90), killed_at + 2 * LATENCY, back_at)


def test_every_email_leaves_once(survivors: Survivors) -> None:
    assert {fate.status for fate in survivors.fates.values()} == {"processed"}
    assert_each_left_once(survivors.world, survivors.fates.values())


def test_every_email_is_archived_once(survivors: Survivors) -> None:
    archived = Counter(id for (id,) in survivors.world.rows("SELECT incoming_email_id::text FROM email_backups"))
    assert archived == Counter(fate.id for fate in survivors.fates.values())


def test_no_process_had_to_be_started_again(survivors: Survivors) -> None:
    assert survivors.world.fleet.dead == []


@pytest.mark.parametrize("type", ["SendEmailReceived", "SendEmailSent"])
def test_publishers_are_told_and_can_tell_every_repeat(survivors: Survivors, type: str) -> None:
    world, ids = survivors.world, {fate.id for fate in survivors.fates.values()}
    world.wait_until(
        "every event has come",
        lambda: {event.body["incoming_email_id"] for event in world.events(type)} >= ids,
        timedelta(seconds=60),
    )
    assert len({event.message_id for event in world.events(type)}) == len(ids)


def test_nothing_is_sent_while_the_limits_cannot_be_counted(survivors: Survivors) -> None:
    left_at = [datetime.fromisoformat(each["at"]) for each in survivors.world.simulator.deliveries()]
    assert [at for at in left_at if survivors.uncounted_from < at < survivors.uncounted_until] == []
