"""The Procfile's process types as real processes on this machine, for the demo, the tests of failures and the benches.

It does what a platform would: a process per line and replica, ports and a log for each, SIGTERM before SIGKILL, a new
process for one that ended. Unlike a platform it also kills and freezes a replica on purpose.
"""

import re
import signal
import threading
import time
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from sandbox.processes import Guard, StillRunning, Tree, free_port
from sandbox.programs import last_lines

RELEASE = "release"
RELEASE_LIMIT = timedelta(minutes=2)
STOP_LIMIT = timedelta(seconds=15)
SUPERVISED_EVERY = timedelta(milliseconds=200)

_LINE = re.compile(r"(?P<name>[A-Za-z0-9_-]+):\s*(?P<command>\S.*)")


class ReleaseFailed(Exception):
    """The ``release`` line did not succeed, so nothing else was started; the text ends with what it last wrote."""


class Ports(NamedTuple):
    """What a replica finds in ``PORT`` and ``METRICS_PORT``."""

    port: int
    metrics_port: int


def read_procfile(path: Path) -> dict[str, str]:
    """Return each process type's command, in the file's order.

    Raises:
        ValueError: A line is neither ``name: command`` nor a comment.
    """
    commands = {}
    for line in filter(None, map(str.strip, path.read_text().splitlines())):
        if line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"not a line of a Procfile: {line}")
        commands[match["name"]] = match["command"]
    return commands


class Replica:
    """One process of a type. Its ports and its log stay the same however often it ends and starts."""

    def __init__(self, command: str, log: Path, directory: Path, environment: Mapping[str, str], guard: Guard) -> None:
        self.ports = Ports(free_port(), free_port())
        self.log = log
        self.wanted = False
        self.tree: Tree | None = None
        self._command = command
        self._directory = directory
        self._environment = environment
        self._guard = guard

    @property
    def alive(self) -> bool:
        return self.tree is not None and self.tree.alive

    def start(self) -> None:
        """Start it unless it runs. What an earlier process of its left behind is killed first."""
        self.wanted = True
        if self.alive:
            return
        self.kill()
        self.tree = Tree(
            # The shell becomes the command, so that a signal reaches it: a line has to be one simple command.
            ["sh", "-c", f"exec {self._command}"],
            guard=self._guard,
            environment={
                "METRICS_PORT": str(self.ports.metrics_port),
                **self._environment,
                "PORT": str(self.ports.port),
            },
            directory=self._directory,
            log=self.log,
        )

    def ask_to_end(self) -> None:
        """Send SIGTERM to the command alone, as a container's engine does: passing it on is its own business."""
        self.wanted = False
        if self.tree:
            self.tree.signal(signal.SIGTERM)
            self.tree.resume()

    def ended_within(self, limit: timedelta) -> bool:
        try:
            if self.tree:
                self.tree.wait(limit)
        except StillRunning:
            return False
        return True

    def kill(self) -> None:
        if self.tree:
            self.tree.kill()


class Fleet:
    """A Procfile's processes for the length of a ``with`` block; none of them, nor of their children, outlives it.

    Entering runs the ``release`` line to its end and then starts the others; it does not wait until they are ready.
    A name is that of a type (``send_plain``: all its replicas) or of one replica (``send_plain.2``, counted from 1).
    """

    def __init__(
        self,
        procfile: Path,
        environment: Mapping[str, str],
        directory: Path,
        *,
        only: Collection[str] | None = None,
        scale: Mapping[str, int] | None = None,
        supervise: bool = False,
        stop_limit: timedelta = STOP_LIMIT,
    ) -> None:
        """Describe the fleet.

        Args:
            procfile: The file; its commands run in the directory where it lies.
            environment: The whole environment of each process, to which ``PORT`` is added and, unless it has one (0: no
                metrics), ``METRICS_PORT``.
            directory: Where the logs go, ``NAME.N.log`` for each replica and ``release.log``.
            only: The types to start; all of them by default. ``release`` is run in any case.
            scale: How many replicas of a type, where that is not one.
            supervise: Start again whatever ends, within a fraction of a second.
            stop_limit: How long `stop` lets processes end by themselves.
        """
        self._commands = read_procfile(procfile)
        self._root = procfile.resolve().parent
        self._environment = environment
        self._directory = directory
        self._only = self._commands.keys() if only is None else only
        self._scale = scale or {}
        self._supervise = supervise
        self._stop_limit = stop_limit
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._replicas: dict[str, Replica] = {}
        if unknown := {*self._only, *self._scale} - self._commands.keys():
            raise ValueError(f"not in the Procfile: {', '.join(sorted(unknown))}")

    @property
    def ports(self) -> dict[str, Ports]:
        return {name: replica.ports for name, replica in self._replicas.items()}

    @property
    def logs(self) -> dict[str, Path]:
        return {name: replica.log for name, replica in self._replicas.items()}

    @property
    def dead(self) -> list[str]:
        """The replicas that should run and do not: they ended by themselves or were killed."""
        return [name for name, replica in self._replicas.items() if replica.wanted and not replica.alive]

    def pids(self, name: str) -> set[int]:
        """Return the living processes of a type or replica, with all that they forked."""
        return {pid for replica in self._named(name) if replica.tree for pid in replica.tree.members()}

    def start(self, name: str) -> None:
        with self._lock:
            for replica in self._named(name):
                replica.start()

    def kill(self, name: str) -> None:
        """SIGKILL it with all that it forked, and return when it is gone. A supervised one is started again."""
        with self._lock:
            for replica in self._named(name):
                replica.kill()

    def suspend(self, name: str) -> None:
        """Freeze it with all that it forked, as a machine that swaps or is moved does."""
        for replica in self._named(name):
            if replica.tree:
                replica.tree.suspend()

    def resume(self, name: str) -> None:
        for replica in self._named(name):
            if replica.tree:
                replica.tree.resume()

    def restart_dead(self) -> list[str]:
        """Start again what should run and does not; return the names."""
        with self._lock:
            dead = self.dead
            for name in dead:
                self._replicas[name].start()
        return dead

    def stop(self, *names: str) -> list[str]:
        """End the named ones, or all, as a platform does: SIGTERM to all at once, SIGKILL to those that stay.

        Returns:
            The replicas that had to be killed. They or something that they forked ignored the SIGTERM.
        """
        with self._lock:
            stopping = [replica for name in names or self._replicas for replica in self._named(name)]
            for replica in stopping:
                replica.ask_to_end()
            deadline = time.monotonic() + self._stop_limit.total_seconds()
            late = [replica for replica in stopping if not replica.ended_within(_until(deadline))]
            for replica in late:
                replica.kill()
        return [name for name, replica in self._replicas.items() if replica in late]

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._guard = Guard()
        try:
            if RELEASE in self._commands:
                self._release()
            self._replicas = {
                f"{name}.{number}": self._replica(name, f"{name}.{number}.log")
                for name in self._commands
                if name in self._only and name != RELEASE
                for number in range(1, self._scale.get(name, 1) + 1)
            }
            for replica in self._replicas.values():
                replica.start()
        except BaseException:
            self._guard.close()
            raise
        self._supervisor = threading.Thread(target=self._restart_the_dead, daemon=True)
        if self._supervise:
            self._supervisor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        try:
            if self._supervise:
                self._supervisor.join()
            self.stop()
        finally:
            self._guard.close()

    def _named(self, name: str) -> list[Replica]:
        found = [replica for full, replica in self._replicas.items() if name in (full, full.rpartition(".")[0])]
        if not found:
            raise KeyError(name)
        return found

    def _replica(self, name: str, log: str) -> Replica:
        return Replica(self._commands[name], self._directory / log, self._root, self._environment, self._guard)

    def _release(self) -> None:
        release = self._replica(RELEASE, "release.log")
        release.start()
        assert release.tree is not None
        ended = release.ended_within(RELEASE_LIMIT)
        if not ended or release.tree.exit_status:
            fate = f"ended with status {release.tree.exit_status}" if ended else f"still runs after {RELEASE_LIMIT}"
            raise ReleaseFailed(f"release {fate}\n{last_lines(release.log)}")

    def _restart_the_dead(self) -> None:
        while not self._over.wait(SUPERVISED_EVERY.total_seconds()):
            self.restart_dead()


def _until(deadline: float) -> timedelta:
    return timedelta(seconds=max(0.0, deadline - time.monotonic()))
