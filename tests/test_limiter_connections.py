"""The connection to Redis that each thread has of its own: used again only when nothing can be left on it."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Any

import limiter_support
import pytest
from limiter_support import (
    LEASE,
    MAILBOX,
    ONE,
    Make,
    RedisServer,
    Wire,
    eventually,
    held,
    make_whole,
    only,
    used,
)
from redis import Redis

from limiter import Budgets, Emptied, Limiter, Slot, Unavailable, connections

limiter_redis, client, own_redis = limiter_support.limiter_redis, limiter_support.client, limiter_support.own_redis
prefix, make, wire = limiter_support.prefix, limiter_support.make, limiter_support.wire

forking = multiprocessing.get_context("fork")


@pytest.fixture
def limiter(own_redis: RedisServer) -> Limiter:
    """A worker's limiter that is alone with its Redis, and has used its connection."""
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    make_whole(limiter)
    use(limiter)
    return limiter


def use(limiter: Limiter) -> None:
    slot = limiter.acquire(MAILBOX)
    assert slot.at_ms > 0
    limiter.release(slot)


def connected(redis: RedisServer) -> set[str]:
    """Name the connections that Redis has."""
    with Redis.from_url(redis.url, decode_responses=True) as client:
        return {each["id"] for each in client.client_list()} - {str(client.client_id())}


def test_thread_uses_one_connection_again_and_again(limiter: Limiter, own_redis: RedisServer) -> None:
    before = connected(own_redis)
    for _ in range(10):
        use(limiter)
    assert connected(own_redis) == before


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Leave what refers to itself in memory."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_thread_that_ends_closes_its_connection(limiter: Limiter, own_redis: RedisServer) -> None:
    # Given threads that have used the limiter together
    before = connected(own_redis)
    together = threading.Barrier(4)

    def work() -> None:
        together.wait()
        use(limiter)
        together.wait()

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(work) for _ in range(4)]
        # When they end
    assert [each.result() for each in done] == [None] * 4
    # Then theirs are closed, and this thread's is not
    eventually(lambda: connected(own_redis) == before)


def test_connection_that_redis_has_closed_is_made_anew(
    limiter: Limiter, own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    # When Redis closes it between any two calls
    slot = limiter.acquire(MAILBOX)
    own_redis.execute("CLIENT KILL TYPE normal")
    # Then the next is answered all the same
    limiter.release(slot)
    assert used(limiter)["concurrency"] == 0
    own_redis.execute("CLIENT KILL TYPE normal")
    use(limiter)
    assert not caplog.records


def test_connection_is_made_anew_when_redis_was_restarted(limiter: Limiter, own_redis: RedisServer) -> None:
    # When Redis is started anew between two calls
    own_redis.stop()
    own_redis.start()
    # Then it is asked, and says that it has lost its counts
    with pytest.raises(Emptied):
        limiter.acquire(MAILBOX)
    make_whole(limiter)
    use(limiter)


def test_script_that_redis_has_forgotten_is_run_once(limiter: Limiter, own_redis: RedisServer) -> None:
    before, requests = connected(own_redis), used(limiter)["requests"]
    # When Redis forgets the scripts before each call
    own_redis.execute("SCRIPT FLUSH")
    slot = limiter.acquire(MAILBOX)
    own_redis.execute("SCRIPT FLUSH")
    limiter.release(slot)
    # Then each has run once, by the connection that there was
    assert (used(limiter)["requests"], used(limiter)["concurrency"]) == (requests + 1, 0)
    assert connected(own_redis) == before


@pytest.mark.parametrize("loses", ["swallowed", "cut"])
def test_slot_that_is_returned_without_an_answer_is_returned_once(
    make: Make, wire: Wire, client: Redis, prefix: str, loses: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a worker that has used its connection
    distant = Limiter(wire.url, only(mailbox_concurrency=2), LEASE, prefix=prefix)
    use(distant)
    slot = distant.acquire(MAILBOX)
    # When the answer is lost as it returns a slot
    wire.loses = loses
    distant.release(slot)
    # Then the slot is back, and the log has a word about it
    assert (wire.loses, held(client, prefix)) == (None, 0)
    (record,) = caplog.records
    assert record.getMessage().startswith("Redis does not answer, a slot is left to its lease: ")
    # And what comes next is answered
    use(distant)


def test_answer_that_comes_late_is_not_taken_for_the_next_one(limiter: Limiter, own_redis: RedisServer) -> None:
    # Given a Redis that hangs for longer than it is waited for
    requests = used(limiter)["requests"]
    own_redis.process.send_signal(signal.SIGSTOP)
    with pytest.raises(Unavailable, match="TimeoutError"):
        limiter.acquire(MAILBOX)
    # When it goes on, and runs what it was sent
    own_redis.process.send_signal(signal.SIGCONT)
    eventually(lambda: used(limiter)["concurrency"] == 1)
    # Then the next call has an answer of its own
    slot = limiter.acquire(MAILBOX, send=ONE)
    assert (used(limiter)["requests"], used(limiter)["concurrency"]) == (requests + 2, 2)
    limiter.release(slot)
    assert used(limiter)["concurrency"] == 1


class Interruption(BaseException):
    """What ends a thread's work at any line, as a time limit does."""


def interrupted(release: Callable[[], None], at: int) -> bool:
    """Return a slot, but be interrupted at so manieth line that asks Redis; say whether there are so many."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != connections.__file__ or frame.f_code.co_name == "__del__":
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        release()
    except Interruption:
        return True
    finally:
        sys.settrace(before)
    return False


def test_thread_that_is_interrupted_at_any_line_leaves_no_answer_to_the_next_call(own_redis: RedisServer) -> None:
    limiter = Limiter(own_redis.url, only(), LEASE)
    make_whole(limiter)
    use(limiter)
    before, line = connected(own_redis), 0
    while True:
        # Given a Redis that takes its time to answer
        line += 1
        slot = limiter.acquire(MAILBOX)
        own_redis.execute("CLIENT PAUSE 50")
        # When a thread that returns a slot is interrupted at a line
        if not interrupted(partial(limiter.release, slot), line):
            break
        # Then the next call has an answer of its own
        use(limiter)
    assert line > 10
    # And what was left behind is closed
    eventually(lambda: len(connected(own_redis)) == len(before))


def test_forked_process_makes_a_connection_of_its_own_and_leaves_its_parents_alone(
    limiter: Limiter, own_redis: RedisServer
) -> None:
    # Given a process that was forked from one that has a connection
    before = connected(own_redis)
    taken, go_on = forking.SimpleQueue(), forking.Event()

    def work() -> None:
        taken.put(limiter.acquire(MAILBOX))
        go_on.wait(10)

    child = forking.Process(target=work)
    child.start()
    # When it uses the limiter
    slot: Slot = taken.get()
    # Then it has another
    assert len(connected(own_redis) - before) == 1
    # And the parent goes on with its own, also when the child has ended
    use(limiter)
    go_on.set()
    child.join(10)
    assert child.exitcode == 0
    limiter.release(slot)
    eventually(lambda: connected(own_redis) == before)


def test_connection_is_made_with_what_the_client_was_made_with(own_redis: RedisServer) -> None:
    # Given a Redis that wants a name and a password
    own_redis.execute("ACL SETUSER worker on >secret ~* +@all")
    own_redis.execute("ACL SETUSER default off")
    url = own_redis.url.replace("redis://", "redis://worker:secret@").replace("/0", "/3")
    # When the limiter is used, by a thread that has no connection yet
    limiter = Limiter(url, Budgets(), LEASE)
    make_whole(limiter)
    use(limiter)
    # Then all that it counts is in the database that the URL names
    with Redis.from_url(url) as client:
        assert {f"db{each['db']}" for each in client.client_list()} == {"db3"}
        assert list(client.info("keyspace")) == ["db3"]
