"""What a stretch of time cost in processor time: a reader has to see when the machine was the limit."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.limits.findings import Findings
from bench.processor import Groups, cpu_seconds, spent
from sandbox.world import World


class Effort(NamedTuple):
    """Processors used on average: 1.0 is one processor all the time."""

    fleet: float
    simulator: float
    #: Of the whole machine, whoever it worked for; 1.0 is all its processors.
    machine_busy_share: float

    def tell(self, findings: Findings) -> None:
        findings.tell("processors used by the fleet", self.fleet)
        findings.tell("processors used by the simulator", self.simulator)
        findings.tell(f"busy share of the machine's {os.cpu_count()} processors", self.machine_busy_share)


class Meter:
    """Measures from its making on."""

    def __init__(self, world: World) -> None:
        names = sorted(world.fleet.ports)
        self._groups: Groups = {
            **{name: partial(world.fleet.pids, name) for name in names},
            "simulator": world.simulator.pids,
        }
        self._began = time.monotonic()
        self._before = cpu_seconds(self._groups)
        self._machine_before = _machine()

    def read(self) -> Effort:
        """Return what was used since; a process that has ended meanwhile counts for nothing."""
        seconds = time.monotonic() - self._began
        used = spent(self._before, cpu_seconds(self._groups))
        simulator = used.pop("simulator")
        busy, idle = (now - then for now, then in zip(_machine(), self._machine_before, strict=True))
        fleet = sum(max(0.0, each) for each in used.values())
        return Effort(fleet / seconds, simulator / seconds, busy / (busy + idle))


def _machine() -> tuple[int, int]:
    """Return for how many ticks all processors together have worked and have not; see proc(5), ``/proc/stat``."""
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return user + nice + system + irq + softirq + steal, idle + iowait
