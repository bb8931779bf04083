"""How much processor time a group of processes has used, as the kernel counts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from sandbox.servers import Servers
from sandbox.world import World

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

#: The processes of each group that is measured, asked again at each reading: workers fork and backends come and go.
Groups = Mapping[str, Callable[[], Iterable[int]]]


def groups(servers: Servers, world: World, types: Iterable[str]) -> Groups:
    """Return a group for each of these process types, for each server, and for the simulator."""
    return {
        **{name: partial(world.fleet.pids, name) for name in types},
        "postgresql": servers.postgresql.pids,
        "rabbitmq": servers.rabbitmq.pids,
        "redis": servers.redis.pids,
        "simulator": world.simulator.pids,
    }


def cpu_seconds(groups: Groups) -> dict[str, float]:
    """Return the seconds of user and system time of each group, with those of the children that it has waited for."""
    return {name: sum(map(_seconds, pids())) for name, pids in groups.items()}


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return what each group has used between two readings, in seconds."""
    return {name: after[name] - before[name] for name in before}


def _seconds(pid: int) -> float:
    with suppress(OSError):  # it ended meanwhile
        # The name in parentheses may contain anything; utime, stime, cutime and cstime are fields 14 to 17 of proc(5).
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS_PER_SECOND
    return 0.0
