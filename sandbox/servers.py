"""Private PostgreSQL, RabbitMQ and Redis to run the product against, gone without a trace afterwards.

A server that the environment names by its URL is used instead and never touched: it may hold somebody's data. The
others come from installed programs or, failing those, from containers. They listen on free loopback ports, are locked
by random passwords, and can be killed, frozen and started again, which is what tests of failures do to them.

    python -m sandbox.servers                   print the environment and stay until ^C
    python -m sandbox.servers -- COMMAND …      run a command with them, and end with its exit status
"""

import argparse
import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self, cast

from sandbox.containers import Container, Project
from sandbox.processes import MARK, Guard, end_all_in, new_mark
from sandbox.programs import NotInstalled, PostgreSQL, Program, RabbitMQ, Redis, ServerFailed, write_privately

KINDS: tuple[type[Program], ...] = (PostgreSQL, RabbitMQ, Redis)

#: Set for a command that runs with servers which are all ours, so that it may empty them.
PRIVATE_MARKER = "MAILFLEET_TEST_SERVERS"


class NotOurs(Exception):
    """Somebody tried to stop, freeze, wipe or inspect a server that this sandbox did not start."""


class Foreign:
    """A server that was given by its URL."""

    ours = False

    def __init__(self, kind: type[Program], url: str) -> None:
        self.name = kind.name
        self.variable = kind.variable
        self.url = url

    def start(self) -> None:
        """Do nothing: it is its owner's to start."""

    def __getattr__(self, verb: str) -> NoReturn:
        raise NotOurs(f"{self.name} was given by {self.variable} and is left alone")


class Servers:
    """The three servers for the length of a ``with`` block, started in parallel, answering when the block begins.

    However the block or the process ends, even by SIGKILL, the servers of ours and their data are gone within a second.

    Attributes:
        postgresql, rabbitmq, redis: Each has ``url``, ``ours``, ``kill``, ``stop``, ``start`` (same port, same data),
            ``suspend``, ``resume``; RabbitMQ and Redis also ``wipe`` (same port, user and password, nothing else),
            RabbitMQ ``rabbitmqctl`` and ``list_queues``.
        directory: This run's own directory, below the one that was given.
    """

    postgresql: PostgreSQL
    rabbitmq: RabbitMQ
    redis: Redis

    def __init__(
        self,
        directory: Path,
        *,
        durable: bool = True,
        keep: bool = False,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """Describe the servers.

        Args:
            directory: Where each run makes a directory of its own; created if it is missing.
            durable: Whether commits reach the disk. Without, servers are faster and still survive a SIGKILL.
            keep: Leave data and logs for a look afterwards; the next run removes them.
            environment: Where URLs of servers that exist already are looked for.
        """
        self._parent = directory.resolve()
        self._durable = durable
        self._keep = keep
        self._given = environment

    @property
    def ours(self) -> bool:
        """Whether all three are, so that everything in them may be deleted."""
        return all(server.ours for server in self._all)

    @property
    def environment(self) -> dict[str, str]:
        return {server.variable: server.url for server in self._all}

    def __enter__(self) -> Self:
        self.directory, self._claim = _fresh_directory(self._parent)
        self.guard = Guard()
        if not self._keep:
            self.guard.remove(self.directory)
        try:
            self._all = self._choose()
            self.postgresql, self.rabbitmq, self.redis = cast(tuple[PostgreSQL, RabbitMQ, Redis], self._all)
            self._start_all()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _start_all(self) -> None:
        threads = ThreadPoolExecutor(len(self._all))
        try:
            list(threads.map(lambda server: server.start(), self._all))
        finally:
            # One that failed, or ^C, ends the others at once: their threads see that and follow.
            threads.shutdown(wait=False, cancel_futures=True)

    def _close(self) -> None:
        self.guard.close()
        os.close(self._claim)

    def _choose(self) -> tuple[Program | Container | Foreign, ...]:
        lacking = missing(self._given)
        project = Project(self.directory, self.guard) if lacking and Project.available() else None

        def choose(kind: type[Program]) -> Program | Container | Foreign:
            if url := self._given.get(kind.variable):
                return Foreign(kind, url)
            if kind in lacking and project:
                return Container(kind, project)
            return kind(self.directory, self.guard, durable=self._durable)

        return tuple(choose(kind) for kind in KINDS)


def missing(environment: Mapping[str, str]) -> list[type[Program]]:
    """Return the servers that are neither named by ``environment`` nor installed as programs."""
    return [kind for kind in KINDS if not environment.get(kind.variable) and not _installed(kind)]


def _installed(kind: type[Program]) -> bool:
    with contextlib.suppress(NotInstalled):
        return bool(kind.find())
    return False


def _fresh_directory(parent: Path) -> tuple[Path, int]:
    """Make this run's directory in ``parent``; return it with a descriptor whose lock says that its owner lives.

    What earlier runs left there is removed, together with any process that still works in it: a run that was killed
    along with its guard, or one that was told to keep its files.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent):
        for left in parent.glob("servers-*"):
            with contextlib.suppress(BlockingIOError), _locked(left, fcntl.LOCK_NB):
                end_all_in(left)
                shutil.rmtree(left, ignore_errors=True)
        directory = Path(tempfile.mkdtemp(prefix="servers-", dir=parent))
        directory.chmod(0o711)  # PostgreSQL's user has to get through
        claim = os.open(directory, os.O_RDONLY)
        fcntl.flock(claim, fcntl.LOCK_EX)
    return directory, claim


@contextlib.contextmanager
def _locked(directory: Path, flags: int = 0) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sandbox.servers", description="Run private servers.")
    parser.add_argument("--directory", type=Path, default=Path(".local"), help="where they live (default: .local)")
    parser.add_argument("--durable", action=argparse.BooleanOptionalAction, default=True, help="flush commits to disk")
    parser.add_argument("--keep", action="store_true", help="leave their files for a look afterwards")
    parser.add_argument("--env-file", type=Path, help="write the environment to this file too, for `. FILE`")
    parser.add_argument("--missing", action="store_true", help="only name the servers that are not installed")
    parser.add_argument("command", nargs="*", help="run this with them instead of staying until ^C")
    options = parser.parse_args(arguments)
    if options.missing:
        print(*(kind.name for kind in missing(os.environ)))
        return 0
    signal.signal(signal.SIGTERM, _leave)
    try:
        with Servers(options.directory, durable=options.durable, keep=options.keep) as servers:
            return _run(servers, options.command) if options.command else _stay(servers, options.env_file)
    except (NotInstalled, ServerFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _stay(servers: Servers, env_file: Path | None) -> int:
    lines = "".join(f"export {name}={shlex.quote(url)}\n" for name, url in servers.environment.items())
    if env_file:
        env_file.unlink(missing_ok=True)
        write_privately(env_file, lines)
    with contextlib.suppress(KeyboardInterrupt):
        print(lines, end="", flush=True)
        signal.pause()
    return 0


def _run(servers: Servers, command: list[str]) -> int:
    mark = new_mark()
    environment = {**os.environ, **servers.environment, MARK: mark}
    if servers.ours:
        environment[PRIVATE_MARKER] = "1"
    process = servers.guard.launch(lambda: subprocess.Popen(command, env=environment), mark, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # the command, in the same terminal, has been told as well
            status = process.wait()
            return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
