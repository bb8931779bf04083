"""What the limiter's tests share: workers' limiters that count together, a Redis that may be stopped, and processes.

A test module takes over the fixtures that it wants by name: ``make = limiter_support.make``.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisAway

from limiter import Budgets, BudgetUsage, Limiter, Wanted

LEASE = timedelta(seconds=30)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
MILLISECOND = timedelta(milliseconds=1)
UNLIMITED = Budgets(0, 0, 0, 0, 0, 0, 0)
MAILBOX = "a@example.com"
#: A send to one recipient, internal.
ONE = Wanted(1, 0)

#: Graph's windows, short enough for a test.
WINDOWS = {
    "requests": 600,
    "upload_bytes": 500,
    "sends": 400,
    "recipients": 700,
    "tenant_requests": 300,
    "tenant_external_recipients": 800,
}
#: Windows that no test outlasts.
LONG = dict.fromkeys(WINDOWS, 60_000)

Make = Callable[..., Limiter]
processes = multiprocessing.get_context("spawn")


def only(**limits: int) -> Budgets:
    """Budgets that limit nothing else."""
    return replace(UNLIMITED, **limits)


class RedisServer:
    """A Redis of the tests' own, which may be stopped; started again it knows what it has saved."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder)]
        self.process = subprocess.Popen([*command, "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
        with Redis.from_url(self.url) as client:
            eventually(lambda: answers(client))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def execute(self, command: str) -> None:
        with Redis.from_url(self.url) as client:
            client.execute_command(*command.split())


class Wire:
    """A way to a Redis, at ``url``, that can lose the next answer to a script: it runs, and what it says is gone."""

    def __init__(self, redis_url: str) -> None:
        parts = urlsplit(redis_url)
        self._redis = (parts.hostname or "127.0.0.1", parts.port or 6379)
        self._listener = socket.create_server(("127.0.0.1", 0))
        credentials = parts.netloc.rpartition("@")[:2]
        own = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = parts._replace(netloc="".join([*credentials, own])).geturl()
        #: How the next is lost: "swallowed" leaves the connection open, "cut" ends it. None: it is not, or is lost.
        self.loses: str | None = None
        self._ends = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._redis)
                self._ends += [near, far]
                lost = threading.Event()
                threading.Thread(target=self._ask, args=(near, far, lost), daemon=True).start()
                threading.Thread(target=self._answer, args=(far, near, lost), daemon=True).start()

    def _ask(self, near: socket.socket, far: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while asked := near.recv(65536):
                if self.loses and b"EVALSHA" in asked:
                    lost.set()
                far.sendall(asked)
            far.shutdown(socket.SHUT_RDWR)

    def _answer(self, far: socket.socket, near: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while answer := far.recv(65536):
                if not lost.is_set():
                    near.sendall(answer)
                    continue
                loses, self.loses = self.loses, None
                if loses == "cut":
                    break
            near.shutdown(socket.SHUT_RDWR)


def answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisAway:
        return False


def eventually(holds: Callable[[], bool], within: timedelta = timedelta(seconds=20)) -> None:
    deadline = time.monotonic() + within.total_seconds()
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        let_pass(timedelta(milliseconds=10))


def let_pass(duration: timedelta) -> None:
    threading.Event().wait(duration.total_seconds())


@pytest.fixture(scope="module")
def limiter_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis, which may be someone else's: tests keep to keys of their own."""
    if url := os.environ.get("REDIS_URL"):
        yield url
        return
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server.url
    server.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis for this test alone, to be stopped and emptied."""
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def wire(limiter_redis: str) -> Iterator[Wire]:
    wire = Wire(limiter_redis)
    yield wire
    wire.close()


@pytest.fixture
def client(limiter_redis: str) -> Iterator[Redis]:
    with Redis.from_url(limiter_redis, decode_responses=True) as client:
        yield client


@pytest.fixture
def prefix(limiter_redis: str) -> str:
    """What the keys of this test's fleet begin with. Nothing was spent yet, and Redis knows it."""
    prefix = f"test-{secrets.token_hex(6)}"
    make_whole(Limiter(limiter_redis, UNLIMITED, LEASE, prefix=prefix))
    return prefix


@pytest.fixture
def make(limiter_redis: str, prefix: str) -> Make:
    """Make a worker's limiter; those of one test share the prefix, as a fleet does."""

    def make(budgets: Budgets = UNLIMITED, slot_lease: timedelta = LEASE, **more: object) -> Limiter:
        return Limiter(limiter_redis, budgets, slot_lease, **{"windows": WINDOWS, "prefix": prefix, **more})

    return make


def make_whole(limiter: Limiter) -> None:
    with limiter.restoring() as mine:
        assert mine


def keys_of(client: Redis, prefix: str) -> list[str]:
    """The keys of the traffic."""
    return sorted(key for key in client.scan_iter(f"{prefix}:*") if not key.endswith(":born"))


def used(limiter: Limiter, mailbox: str = MAILBOX) -> dict[str, int]:
    usages = limiter.usage(mailbox) + limiter.tenant_usage()
    return {usage.budget: usage.used for usage in usages}


def usage_of(limiter: Limiter, budget: str, mailbox: str = MAILBOX) -> BudgetUsage:
    (found,) = (usage for usage in limiter.usage(mailbox) if usage.budget == budget)
    return found


def sums(client: Redis, prefix: str, budget: str) -> tuple[int, int]:
    """What a window says it has, and what its parts come to."""
    (key,) = (key for key in keys_of(client, prefix) if f":{budget}:" in key)
    fields = {name: int(value) for name, value in client.hgetall(key).items()}
    assert min(fields.values()) >= 0
    return fields["used"], sum(units for name, units in fields.items() if name.isdigit())


def held(client: Redis, prefix: str) -> int:
    """How many slots are held, of all mailboxes."""
    return sum(client.zcard(key) for key in keys_of(client, prefix) if key.endswith(":slots"))


def waiting(client: Redis, prefix: str) -> int:
    """How many calls wait for a slot, of all mailboxes."""
    return sum(client.zcard(key) for key in keys_of(client, prefix) if key.endswith((":waiting", ":waiting_send")))


def run_all(target: Callable[..., None], arguments: list[tuple[object, ...]]) -> None:
    workers = [processes.Process(target=target, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * len(workers)


@contextmanager
def worker(target: Callable[..., None], *arguments: object) -> Iterator[multiprocessing.process.BaseProcess]:
    """A process that is killed at the end of the block, if not before."""
    process = processes.Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def busiest(calls: list[tuple[int, int]], length_ms: int) -> int:
    """The most units in any window of a length, of calls at an instant with units."""
    return max(sum(units for at, units in calls if start <= at < start + length_ms) for start, _ in calls)
