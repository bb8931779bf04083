"""RabbitMQ, PostgreSQL and Redis killed under load and started again: the fleet comes back by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from conftest import SETTINGS, Worlds
from fleet_support import a_mailbox, an_attachment, an_email, assert_each_left_once, deliveries, emails, fates, settled

from sandbox.servers import Servers
from sandbox.world import World

SERVERS = ("rabbitmq", "postgresql", "redis")


@pytest.fixture(scope="module")
def own(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Servers, World]]:
    """Servers that nobody else uses, and a world on them."""
    worlds.close()
    directory = tmp_path_factory.mktemp("servers")
    for each in (directory, *directory.parents[:2]):
        each.chmod(0o711)  # PostgreSQL's user has to get through
    with Servers(directory, durable=False, environment={}) as servers:
        with World(servers.environment, worlds.directory / "killed-servers", SETTINGS) as world:
            world.wait_until_ready()
            yield servers, world


def _publish_until_confirmed(world: World, batch: list[dict[str, Any]]) -> None:
    """Publish as an application does that repeats what was not confirmed."""
    world.publish(*batch)


@pytest.mark.parametrize("name", SERVERS)
def test_every_email_leaves_once_although_this_was_killed(own: tuple[Servers, World], name: str) -> None:
    # Given a fleet in the middle of its work
    servers, world = own
    server = getattr(servers, name)
    world.simulator.set_latency(0.15)
    mailboxes = [a_mailbox(name) for _ in range(8)]
    given = [email for mailbox in mailboxes for email in emails(8, mailbox)]
    given += [an_email(each, attachments=[an_attachment(world.simulator, 3_500_000)]) for each in mailboxes[:4]]
    _publish_until_confirmed(world, given)
    world.wait_until("some have left", lambda: len(world.simulator.deliveries(mailboxes[0])) > 2)

    # When the server is killed and comes back
    server.kill()
    server.start()
    world.simulator.set_latency(0)

    # Then everything is sent and archived once, and no process had to be started again
    known = settled(world, given, 90)
    assert Counter(fate.status for fate in known.values()) == {"processed": len(given)}
    assert_each_left_once(world, known.values())
    assert all(fate.archived for fate in known.values())
    assert world.fleet.dead == []
    _assert_told(world, {fate.id for fate in known.values()})


def _assert_told(world: World, ids: set[str]) -> None:
    for type in ("SendEmailReceived", "SendEmailSent"):
        world.wait_until(
            f"every {type} has come",
            lambda type=type: {event.body["incoming_email_id"] for event in world.events(type)} >= ids,
            timedelta(seconds=60),
        )
        assert len({e.message_id for e in world.events(type) if e.body["incoming_email_id"] in ids}) == len(ids)


def test_nothing_is_sent_while_the_limits_cannot_be_counted(own: tuple[Servers, World]) -> None:
    # Given a fleet without Redis
    servers, world = own
    servers.redis.kill()

    # When emails arrive
    given = emails(5, a_mailbox("unlimited"))
    world.publish(*given)
    world.wait_until("one was held back", lambda: any(fate.last_error for fate in fates(world, given).values()))

    # Then none leaves before Redis is back, and none has spent an attempt
    assert set(deliveries(world, fates(world, given).values()).values()) == {0}
    servers.redis.start()
    known = settled(world, given, 90).values()
    assert_each_left_once(world, known)
    assert {fate.attempt_count for fate in known} == {1}
