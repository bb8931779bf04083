"""Wake-ups: an actor is run at once when there is something for it to do, and a burst of them is one.

Whoever wakes an actor leaves a mark in Redis, and nobody else does while the mark is there. The actor takes the mark
away before it looks at the tables, so no wake-up is lost. It takes away only the mark of the message that it works on:
that of a message which is still on its way stands, or each message too many (the clock's, or one whose mark had run out
meanwhile) would let another be sent, and under a steady load they would become more and more. What is lost with a
process the next minute's sweep makes up for; what Redis or RabbitMQ did not take is tried again by the process that
wanted it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from secrets import token_hex

from redis import Redis, RedisError

from crash_points import CrashPoint, CrashPoints

log = logging.getLogger(__name__)

#: A wake-up that got lost on its way blocks others for no longer than this.
_MARK_LASTS = timedelta(seconds=2)
#: Without Redis each process wakes an actor no more often than this.
_PAUSE = timedelta(seconds=1)
_MILLISECOND = timedelta(milliseconds=1)
#: The mark that an earlier version leaves, for messages that name none.
NO_MARK = "1"
#: KEYS: the mark. ARGV: which one is to go; nothing: whichever is there.
_TAKE_AWAY = """
if ARGV[1] == '' or redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class WakeUps:
    """Wakes actors by name, for all threads of a process.

    Args:
        send: Sends the actor's message, which names its mark; the future ends when it is confirmed, or with an error.
    """

    def __init__(self, redis: Redis, send: Callable[[str, str], Future[None]], crash_point: CrashPoints) -> None:
        self.redis = redis
        self._send = send
        self._crash_point = crash_point
        self._next_turn_at: dict[str, float] = {}
        self._lock = threading.Lock()
        #: Actors that are to be woken a while later.
        self.postponed: set[str] = set()

    def wake(self, actor_name: str) -> None:
        """Have an actor run at once, wherever a worker is free for it; returns before it does.

        A process that dies at ``wake-up.marked`` leaves nobody woken for as long as the mark lasts.
        """
        mark = token_hex(8)
        try:
            if not self.redis.set(_key(actor_name), mark, nx=True, px=_MARK_LASTS // _MILLISECOND):
                return
        except RedisError:
            if wait := self._until_next_turn(actor_name):
                self._postpone(actor_name, wait)
                return
        self._crash_point(CrashPoint.WAKE_UP_MARKED)
        sent = self._send(actor_name, mark)
        # By then the mark, which keeps others from trying, is gone.
        sent.add_done_callback(lambda done: self._postpone(actor_name, _MARK_LASTS) if done.exception() else None)

    def arrived(self, actor_name: str, mark: str = "") -> bool:
        """Take a message's mark away: from here on another wake-up may come. Return whether Redis answered.

        Args:
            mark: What the message names, see `wake`; without it whatever mark there is goes.
        """
        try:
            self.redis.eval(_TAKE_AWAY, 1, _key(actor_name), mark)
        except RedisError:
            log.warning("Redis is away")
            return False
        return True

    def _until_next_turn(self, actor_name: str) -> timedelta | None:
        """Return how long to wait before the actor may be woken without asking Redis; None: it may now."""
        wait = self._next_turn_at.get(actor_name, float("-inf")) - time.monotonic()
        if wait > 0:
            return timedelta(seconds=wait)
        self._next_turn_at[actor_name] = time.monotonic() + _PAUSE.total_seconds()
        return None

    def _postpone(self, actor_name: str, wait: timedelta) -> None:
        """Wake the actor after a while, once however many ask for it meanwhile."""
        with self._lock:
            if actor_name in self.postponed:
                return
            self.postponed.add(actor_name)
        timer = threading.Timer(wait.total_seconds(), self._wake_postponed, [actor_name])
        timer.daemon = True
        timer.start()

    def _wake_postponed(self, actor_name: str) -> None:
        with self._lock:
            self.postponed.discard(actor_name)
        self.wake(actor_name)


def _key(actor_name: str) -> str:
    return f"mailfleet:wake:{actor_name}"
