"""The process that serves the metrics of all processes of a worker type, and who sees to it that there is one.

It adds up the files that they write and knows nothing else: without broker, database, Graph and settings it starts at
once and has half the memory. One of the worker processes keeps it running: Dramatiq has `forks` for the like, and
starts none again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import dramatiq

import telemetry
from orphans import end_with_parent

log = logging.getLogger(__name__)

#: Short beside the interval of a scrape.
_AGAIN_AFTER = timedelta(seconds=2)


class ServeMetrics(dramatiq.Middleware):
    """Keeps the type's metrics served: ends with the worker process that started it, and then another starts it.

    Args:
        directory: Where the processes of the type add up their metrics; None: nothing is served.
        port: Where they are served.
        log_level: Of the process that serves them.
    """

    def __init__(self, directory: Path | None, port: int, log_level: str) -> None:
        self._directory = directory
        self._port = port
        self._log_level = log_level
        self._ended = Event()
        self._server: subprocess.Popen[bytes] | None = None

    def after_process_boot(self, _broker: Any) -> None:
        if self._directory:
            Thread(target=self._keep_serving, args=[self._directory], name="metrics", daemon=True).start()

    def after_worker_shutdown(self, _broker: Any, _worker: Any) -> None:
        self._ended.set()
        if self._server:
            self._server.terminate()

    def _keep_serving(self, directory: Path) -> None:
        with (directory / "served").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # by one process of the type, as long as it lives
            while not self._ended.is_set():
                command = [sys.executable, "-m", "worker_metrics", str(os.getpid()), str(self._port), self._log_level]
                self._server = subprocess.Popen(command)  # noqa: S603  nothing in it is from outside
                if self._ended.is_set():
                    self._server.terminate()
                self._server.wait()
                if not self._ended.wait(_AGAIN_AFTER.total_seconds()):
                    log.warning("the process that serves the metrics has ended: it is started again")


def serve(parent: int, port: int, log_level: str) -> None:
    """Serve the metrics until the process, or ``parent``, is ended."""
    end_with_parent(parent)
    telemetry.configure_logging(log_level)
    telemetry.serve_workers_metrics(port)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
