"""How Redis is reached: a client, and a connection of each thread's own for what every call to Graph asks.

What a script costs a worker is mostly redis-py's pool, its way to repeat a command and what it measures: three times as
much as to send the command and read the answer. So the scripts of every call do without: each thread has a connection
that nobody else uses, made as the client's pool makes its own. What is rare, and what waits, stays with the client.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from hashlib import sha1
from typing import Any, NamedTuple

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

#: How long to wait for Redis before giving up, in seconds as redis-py wants it.
REDIS_TIMEOUT_SECONDS = 1


def connect(url: str) -> Redis:
    """Return a client that gives up soon: a worker that waits for Redis holds a thread and sends nothing.

    It repeats no command whose answer it lost. Before it sends one it looks whether the connection has ended meanwhile,
    as after a restart of Redis, and makes another: redis-py's pool does so without being told.
    """
    return Redis.from_url(
        url,
        socket_timeout=REDIS_TIMEOUT_SECONDS,
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), retries=0),
    )


class OwnConnections:
    """A connection to a client's Redis for each thread that asks, closed when the thread ends.

    As redis-py's pool does, it looks whether a connection has ended before it sends a command, and makes another; and a
    forked process makes its own. It repeats nothing. A connection whose last command was not answered, whatever came
    between, is not used again: the answer might be taken for the next one's.
    """

    def __init__(self, redis: Redis) -> None:
        self._pool = redis.connection_pool
        self._of_thread = threading.local()

    def ask(self, command: bytes, load: bytes) -> Any:
        """Send a script's command and return the answer; a script that Redis does not know is loaded before.

        Raises:
            RedisError: As the client raises it.
        """
        own = self._take()
        try:
            answer = own.ask(command)
        except NoScriptError:
            # It has not run.
            own.ask(load)
            answer = own.ask(command)
        self._of_thread.own = own
        return answer

    def _take(self) -> _Connection:
        # Taken away: whatever fails, or interrupts the thread at whatever line before the answer is read, leaves none.
        own: _Connection | None = self._of_thread.__dict__.pop("own", None)
        if own and own.is_usable():
            return own
        # A new one, not the old one connected again: the client's settings may be others by now.
        return _Connection(self._pool.connection_class(**self._pool.connection_kwargs))


class _Connection:
    """A connection of redis-py's that ends with the last reference to it; by itself it would wait for the collector."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        connection.connect()

    def __del__(self) -> None:
        self._connection.disconnect()

    def is_usable(self) -> bool:
        """Say whether this process has made it, and Redis has neither closed it nor said anything unasked."""
        if self._connection.pid != os.getpid():
            return False
        try:
            return not self._connection.can_read()
        except RedisError:
            return False

    def ask(self, command: bytes) -> Any:
        self._connection.send_packed_command([command])
        return self._connection.read_response()


class Opening(NamedTuple):
    """How a command begins that is sent again and again: so many words, as Redis wants them."""

    words: int
    packed: bytes


class Script:
    """A script that every call asks, by the connection of the thread's own.

    Most of what it is told is the same each time, and packed once (`opening`).
    """

    def __init__(self, connections: OwnConnections, text: str) -> None:
        self._connections = connections
        self._digest = sha1(text.encode(), usedforsecurity=False).hexdigest()
        load = ("SCRIPT", "LOAD", text)
        self._load = b"*%d\r\n%b" % (len(load), _packed(load))

    def opening(self, keys: Sequence[str], arguments: Sequence[str | int] = ()) -> Opening:
        """Pack the keys, and the arguments that come first."""
        words = ("EVALSHA", self._digest, len(keys), *keys, *arguments)
        return Opening(len(words), _packed(words))

    def ask(self, opening: Opening, *arguments: str | int) -> Any:
        """Run it with further arguments, once, even if the answer is lost.

        Raises:
            RedisError: Redis does not answer, or answers with an error.
        """
        words = opening.words + len(arguments)
        return self._connections.ask(b"*%d\r\n%b%b" % (words, opening.packed, _packed(arguments)), self._load)


def _packed(words: Sequence[str | int]) -> bytes:
    return b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in [str(word).encode() for word in words]])
