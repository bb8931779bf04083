"""Several files of one mail are brought up at a time, as far as its mailbox has slots to spare.

The worker's own thread takes part, so a small mail needs no other. Files of one name go in their order, one after the
other: after a death attachments are told apart by their names, and of several alike the first are taken for those that
are there. Who finds no slot leaves its file to the others, who may hold the slots; only the last one says that none is
left. Progress is kept in the `Upload` and in the table, so anyone goes on where another has left off.

The first error is that of the whole: the others stop at their next recovery point, and are waited for, since nobody may
work on a draft that its mail is about to let go.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar, copy_context
from datetime import timedelta

import models
from limiter import CONCURRENCY, Exhausted
from models.uploads import Upload

#: How often who waits for the other uploaders sees to the email's lease.
_LOOK_EVERY = timedelta(seconds=1)

_over: ContextVar[threading.Event | None] = ContextVar("over", default=None)


class Stopped(Exception):
    """Raised in an uploader when another has failed."""


def look() -> None:
    """Stop here if another uploader of the same mail has failed; what was committed until now is kept."""
    over = _over.get()
    if over is not None and over.is_set():
        raise Stopped


def bring_up_all(
    uploads: Iterable[Upload], bring_up: Callable[[Upload], None], *, at_a_time: int, keep: Callable[[], None]
) -> None:
    """Bring all files up, so many at a time at most.

    Args:
        keep: Called each second by who waits for the others, to keep the email's lease.

    Raises what the first ``bring_up`` to fail has raised, when none is at work any more.
    """
    by_name: dict[str, deque[Upload]] = {}
    for upload in uploads:
        by_name.setdefault(upload.filename, deque()).append(upload)
    crew = _Crew(by_name.values(), bring_up)
    crew.run(min(at_a_time, len(by_name)), keep)


class _Crew:
    """The threads that share the files of one mail."""

    def __init__(self, files: Iterable[deque[Upload]], bring_up: Callable[[Upload], None]) -> None:
        self._waiting = deque(files)
        self._bring_up = bring_up
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._working = 0
        self._error: Exception | None = None

    def run(self, uploaders: int, keep: Callable[[], None]) -> None:
        token = _over.set(self._over)
        self._working = max(uploaders, 1)
        others = [
            threading.Thread(target=copy_context().run, args=(self._work_beside,), name="uploader", daemon=True)
            for _ in range(uploaders - 1)
        ]
        started: list[threading.Thread] = []
        try:
            for thread in others:
                thread.start()
                started.append(thread)
            self._work()
            self._wait(started, keep)
        finally:
            self._over.set()  # an error that is not ours, such as the actor's time limit, ends the others too
            for thread in started:
                thread.join()
            _over.reset(token)
        if self._error is not None:
            raise self._error

    def _wait(self, others: Iterable[threading.Thread], keep: Callable[[], None]) -> None:
        for thread in others:
            while thread.is_alive():
                keep()
                thread.join(_LOOK_EVERY.total_seconds())

    def _work_beside(self) -> None:
        try:
            self._work()
        finally:
            models.disconnect()

    def _work(self) -> None:
        files: deque[Upload] = deque()
        try:
            while files := self._take():
                while files:
                    look()
                    self._bring_up(files[0])
                    files.popleft()
            return
        except Stopped:
            pass
        except Exhausted as busy:
            self._leave(files, busy)
            return
        except Exception as error:
            self._fail(error)
        with self._lock:
            self._working -= 1

    def _take(self) -> deque[Upload]:
        """Return the next files of one name; whoever gets none is at work no more, and so nobody leaves files to it."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._working -= 1
            return deque()

    def _leave(self, files: deque[Upload], busy: Exhausted) -> None:
        """Leave the files to the others if it is slots that are lacking and anyone is left."""
        with self._lock:
            self._waiting.append(files)
            self._working -= 1
            alone = self._working == 0
        if alone or busy.budget != CONCURRENCY:
            self._fail(busy)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
        self._over.set()
