"""Processes that end completely: with all that they forked, and even when the process that started them is killed.

A server or worker left behind keeps its port, its memory and its claims, and spoils the next run. Two things prevent
it: a tree is ended by looking for its members among all processes, and a guard ends what its owner could not.
"""

import contextlib
import json
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

#: Below Linux's range for outgoing connections (32768 and up): no client takes a server's port while that is down.
PORTS = range(20_000, 32_000)

POLL = timedelta(milliseconds=20)
FAREWELL = timedelta(seconds=5)

#: The variable by which a process is told to be of a tree, whoever its parent is by now.
MARK = "MAILFLEET_SANDBOX_TREE"

_ports_given: set[int] = set()


class StillRunning(Exception):
    """A process did not end in the time it was given."""


def free_port() -> int:
    """Return a loopback port that nobody listens on and that this process was not given before."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            if port not in _ports_given:
                _ports_given.add(port)
                return port


def wait_until(condition: Callable[[], object], limit: timedelta) -> bool:
    """Ask ``condition`` every 20 ms until it holds; return whether it did within ``limit``."""
    deadline = time.monotonic() + limit.total_seconds()
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL.total_seconds())
    return True


class Guard:
    """A process that ends its owner's trees and removes its directories as soon as the owner closes it or dies.

    Both ends go the same way, so what a SIGKILL leaves to the guard is what every ordinary run has exercised.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: list[subprocess.Popen[bytes]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        self._closed = False

    def launch(
        self, start: Callable[[], subprocess.Popen[bytes]], mark: str, farewell: signal.Signals = signal.SIGKILL
    ) -> subprocess.Popen[bytes]:
        """Start a child and see to its end: first by ``farewell``, and by SIGKILL if that does not do.

        The child and what it starts have to carry ``mark`` in their environment.

        Raises:
            RuntimeError: The guard is closed; nothing was started.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("nothing may be started any more")
            process = start()
            self._watched.append(process)
            self._say("watch", process.pid, mark, farewell)
        return process

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """Leave alone what has ended: its process id may soon be another process's."""
        with self._lock:
            if not self._closed:
                self._watched.remove(process)
                self._say("forget", process.pid)

    def remove(self, directory: Path) -> None:
        """Remove ``directory`` after the trees have ended."""
        with self._lock:
            self._say("remove", str(directory))

    def run(self, command: Sequence[str]) -> None:
        """Run ``command`` before the directories are removed."""
        with self._lock:
            self._say("run", *command)

    def close(self) -> None:
        """Do all of it now; return when it is done."""
        with self._lock:
            self._closed = True
            self._pipe.close()
        self._process.wait()
        for process in self._watched:
            process.wait()

    def _say(self, *words: str | int) -> None:
        self._pipe.write(json.dumps(words) + "\n")
        self._pipe.flush()


class Tree:
    """A command in a session of its own, and everything that it starts."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        guard: Guard,
        environment: Mapping[str, str],
        directory: Path,
        log: Path,
        user: str | None = None,
        farewell: signal.Signals = signal.SIGKILL,
    ) -> None:
        """Start ``command`` in ``directory``, its output appended to ``log``, as ``user`` and its group."""
        self._guard = guard
        self._ended = False
        self._mark = new_mark()

        def start() -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=directory,
                    env={**environment, MARK: self._mark},
                    start_new_session=True,
                    user=user,
                    group=user,
                    extra_groups=[] if user else None,
                )

        self._process = guard.launch(start, self._mark, farewell)
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the command itself still runs; what it forked may outlive it, see `members`."""
        return self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        return self._process.poll()

    def members(self) -> set[int]:
        return family(self.pid, self._mark)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the command alone."""
        send_signal(self.pid, number)

    def suspend(self) -> None:
        for pid in self.members():
            send_signal(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self.members():
            send_signal(pid, signal.SIGCONT)

    def wait(self, limit: timedelta) -> None:
        """Wait until the command and all that it started have ended.

        Raises:
            StillRunning: Some of it runs when ``limit`` is over.
        """
        if not wait_until(lambda: not (self.alive or self.members()), limit):
            raise StillRunning(f"{sorted(self.members())} still run after {limit}")
        self._forget()

    def kill(self) -> None:
        """SIGKILL the whole tree and return when it is gone. A tree that has ended stays ended."""
        if not self._ended:
            end_family(self.pid, self._mark)
            self._process.wait()
            self._forget()

    def _forget(self) -> None:
        if not self._ended:
            self._ended = True
            self._guard.forget(self._process)


class _Process(NamedTuple):
    pid: int
    parent: int
    session: int


def _processes() -> Iterator[_Process]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            # The name in parentheses may contain anything, even parentheses; see proc(5).
            state, parent, _group, session, *_ = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if state not in "ZX":
                yield _Process(int(entry.name), int(parent), int(session))


def new_mark() -> str:
    """Return a value of `MARK` that no other process has."""
    return secrets.token_hex(8)


def family(root: int, mark: str) -> set[int]:
    """Return the living processes that ``root`` has started, and itself.

    Three things tell them, for each is lost in some way: descent when a parent dies, the session when a process opens
    its own, and the mark in the environment when a process writes its title over it, as PostgreSQL's do.
    """
    processes = list(_processes())
    members = {
        process.pid for process in processes if root in (process.pid, process.session) or _is_marked(process.pid, mark)
    }
    while born := {process.pid for process in processes if process.parent in members} - members:
        members |= born
    return members


def _is_marked(pid: int, mark: str) -> bool:
    with contextlib.suppress(OSError):
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def send_signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def end_all_in(directory: Path) -> None:
    """SIGKILL every process whose current directory is ``directory`` or below it."""
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if entry.readlink().is_relative_to(directory):
                send_signal(int(entry.parent.name), signal.SIGKILL)


def end_family(root: int, mark: str) -> None:
    """SIGKILL a whole family; its members are stopped first, so that none of them forks unseen."""
    members: set[int] = set()
    while found := family(root, mark) - members:
        members |= found
        for pid in found:
            send_signal(pid, signal.SIGSTOP)
    for pid in members:
        send_signal(pid, signal.SIGKILL)
    while family(root, mark):
        time.sleep(POLL.total_seconds())


class _Estate:
    """What a guard has to see to when its owner is gone."""

    def __init__(self) -> None:
        self.families: dict[int, tuple[str, int]] = {}
        self.commands: list[list[str]] = []
        self.directories: list[str] = []

    def note(self, word: str, *values: str | int) -> None:
        match (word, *values):
            case ("watch", int(pid), str(mark), int(farewell)):
                self.families[pid] = (mark, farewell)
            case ("forget", int(pid)):
                self.families.pop(pid, None)
            case ("run", *command):
                self.commands.append([str(argument) for argument in command])
            case ("remove", str(directory)):
                self.directories.append(directory)

    def settle(self) -> None:
        for pid, (_, farewell) in self.families.items():
            send_signal(pid, farewell)
        asked = [(pid, mark) for pid, (mark, farewell) in self.families.items() if farewell != signal.SIGKILL]
        wait_until(lambda: not any(family(*one) for one in asked), FAREWELL)
        for pid, (mark, _) in self.families.items():
            end_family(pid, mark)
        for command in self.commands:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)


def _guard(owner: int) -> None:
    """Note what the owner says on standard input until it falls silent; then settle its estate.

    The owner's end is looked for as well: a process that it forked may hold the pipe open.
    """
    estate = _Estate()
    pending = b""
    while os.getppid() == owner:
        if not select.select([0], [], [], 0.5)[0]:
            continue
        if not (said := os.read(0, 65536)):
            break
        *lines, pending = (pending + said).split(b"\n")
        for line in lines:
            estate.note(*json.loads(line))
    estate.settle()


if __name__ == "__main__":
    _guard(os.getppid())
