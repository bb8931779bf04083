"""Whole fleets for the tests of this folder; each test keeps to mailboxes of its own, so that they do not meet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from worlds import Worlds

from sandbox.world import World
from simulator.control import Simulator


@pytest.fixture(scope="session")
def worlds(servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    started = Worlds(servers, tmp_path_factory.mktemp("worlds"))
    yield started
    started.close()


@pytest.fixture(scope="session", params=["sendmail", "draft"])
def way(request: pytest.FixtureRequest) -> str:
    """Each way to send a mail without attachments, as `SEND_PLAIN_VIA` names it.

    It is the session's, so that pytest runs what asks for the one way before what asks for the other.
    """
    return str(request.param)


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> World:
    """A whole fleet, one process of each type."""
    return worlds.get()


@pytest.fixture(scope="module")
def simulator(world: World) -> Iterator[Simulator]:
    """The world's Graph, which forgets at the end what these tests asked of it."""
    yield world.simulator
    world.simulator.clear_faults()
    world.simulator.set_behaviour(latency_seconds=0, latency_by_operation={})
