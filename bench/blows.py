"""What befalls the processes and the servers: a seeded schedule of kills and freezes, and the hand that deals them.

A kill counts when it struck something that was alive. One that finds its target down waits until that is up again, so
that as many are dealt as were asked for.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from operator import attrgetter
from typing import Any, Literal

from sandbox.programs import ServerFailed
from sandbox.servers import Servers
from sandbox.world import World

SERVERS = ("postgresql", "rabbitmq", "redis")
#: Of all kills; a server takes many processes' work with it.
_SERVER_SHARE = 0.1
#: Every so many freezes is a long one, of a process that holds leases.
_LONG_FREEZE_EVERY = 3
_SHORT_FREEZE_SECONDS = 3.0
_LEASEHOLDERS = ("send_plain", "send_attached", "backup")
_BACK_WITHIN = timedelta(minutes=1)
_START_ATTEMPTS = 10


@dataclass(frozen=True)
class Blow:
    """One entry of the schedule: what happens to whom, so many seconds after the start."""

    at_seconds: float
    kind: Literal["kill", "freeze"]
    target: str
    #: Of a freeze.
    lasts_seconds: float = 0.0


def schedule(
    kills: int,
    freezes: int,
    long_freeze_seconds: float,
    over_seconds: float,
    replicas: Sequence[str],
    chance: random.Random,
) -> list[Blow]:
    """Return a schedule of so many kills and freezes: the same for the same seed."""
    blows = [*_kills(kills, over_seconds, replicas, chance)]
    blows += _freezes(freezes, long_freeze_seconds, over_seconds, replicas, chance)
    return sorted(blows, key=attrgetter("at_seconds"))


def _kills(count: int, over_seconds: float, replicas: Sequence[str], chance: random.Random) -> Iterator[Blow]:
    for _ in range(count):
        targets = SERVERS if chance.random() < _SERVER_SHARE else replicas
        yield Blow(chance.uniform(0, over_seconds), "kill", chance.choice(targets))


def _freezes(
    count: int, long_seconds: float, over_seconds: float, replicas: Sequence[str], chance: random.Random
) -> Iterator[Blow]:
    leaseholders = [name for name in replicas if _type(name) in _LEASEHOLDERS]
    for number in range(count):
        long = number % _LONG_FREEZE_EVERY == 0
        target = chance.choice(leaseholders if long else replicas)
        yield Blow(chance.uniform(0, over_seconds), "freeze", target, long_seconds if long else _SHORT_FREEZE_SECONDS)


class Hand:
    """Deals the blows. What was killed comes back as on a platform that restarts it.

    Attributes:
        kills: How many SIGKILLs struck what was alive, by process type or server.
        freezes: How many freezes did, by their length in seconds.
    """

    def __init__(self, world: World, servers: Servers) -> None:
        self.kills: Counter[str] = Counter()
        self.freezes: Counter[float] = Counter()
        self._world = world
        self._servers = servers
        self._frozen_until: dict[str, float] = {}
        self._thaws: list[threading.Timer] = []

    def deal(self, blows: Sequence[Blow], began: float) -> None:
        """Deal each in its time after ``began``, by the monotonic clock."""
        for blow in blows:
            time.sleep(max(0.0, began + blow.at_seconds - time.monotonic()))
            if blow.target in SERVERS:
                self._kill_server(blow.target)
            elif blow.kind == "freeze":
                self._freeze(blow.target, blow.lasts_seconds)
            else:
                self._kill(blow.target)

    def wait_until_all_are_awake(self) -> None:
        for thaw in self._thaws:
            thaw.join()

    def _kill_server(self, name: str) -> None:
        server = getattr(self._servers, name)
        assert server.pids(), f"{name} was down before it was killed"
        server.kill()
        self.kills[name] += 1
        _start(server)

    def _kill(self, replica: str) -> None:
        self._wait_until_up(replica)
        self._world.fleet.kill(replica)
        self.kills[_type(replica)] += 1

    def _freeze(self, replica: str, seconds: float) -> None:
        self._wait_until_up(replica)
        self._world.fleet.suspend(replica)
        self.freezes[seconds] += 1
        until = time.monotonic() + seconds
        self._frozen_until[replica] = max(until, self._frozen_until.get(replica, 0.0))
        thaw = threading.Timer(seconds, self._thaw, [replica])
        thaw.daemon = True
        self._thaws.append(thaw)
        thaw.start()

    def _thaw(self, replica: str) -> None:
        """Wake it, unless a freeze that began meanwhile lasts longer."""
        if time.monotonic() >= self._frozen_until[replica]:
            self._world.fleet.resume(replica)

    def _wait_until_up(self, replica: str) -> None:
        fleet = self._world.fleet
        self._world.wait_until(f"{replica} is up", lambda: replica not in fleet.dead, _BACK_WITHIN)


def _type(replica: str) -> str:
    return replica.rpartition(".")[0]


def _start(server: Any) -> None:
    """Start a killed server; what it leaves behind (PostgreSQL's shared memory) may stand in its way for a moment."""
    for _ in range(_START_ATTEMPTS):
        try:
            server.start()
            return
        except ServerFailed as failure:
            last = failure
            time.sleep(1)
    raise last
