"""The clock: periodiq, kept alive while RabbitMQ is away.

periodiq ends at the first tick that it cannot send. A missed tick is harmless, the next one does the same work; so the
clock waits and goes on. Two clocks are harmless too: every periodic actor may run twice.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from typing import Any

import pika.exceptions
from dramatiq.errors import BrokerError
from periodiq import Scheduler
from pika.adapters.utils.connection_workflow import AMQPConnectorException

import actors
import runtime
import telemetry

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 5


def _end(*_signal: Any) -> None:
    sys.exit(0)


def main() -> None:
    """Send every periodic actor its ticks until SIGTERM or SIGINT."""
    telemetry.serve_own_metrics(runtime.configuration.metrics_port)
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    declared = (getattr(actors, name) for name in actors.__all__)
    periodic = [actor for actor in declared if "periodic" in actor.options]
    log.info("the clock is up")
    while True:
        try:
            scheduler = Scheduler(actors=periodic)
            scheduler.schedule()
            scheduler.loop()
        except (BrokerError, pika.exceptions.AMQPError, AMQPConnectorException, OSError) as error:
            log.warning("RabbitMQ is away: %s", type(error).__name__)
            time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main()
