"""Serves the console on ``PORT``."""

from __future__ import annotations

import signal
import sys
from typing import Any

import uvicorn

import actors  # noqa: F401  declares the queues whose depth is shown
import runtime
import telemetry
from console.access import Access
from console.app import make_app
from console.failed_tries import FailedTries
from console_tokens import parse_tokens

#: A proxy in front may keep requests for a moment after SIGTERM.
_GRACE_SECONDS = 10


def _end(*_signal: Any) -> None:
    sys.exit(0)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    configuration = runtime.configuration
    secret = configuration.console_tokens
    tokens = parse_tokens(secret.get_secret_value() if secret else "")
    telemetry.serve_own_metrics(configuration.metrics_port)
    # uvicorn stops by itself and then passes the signal on to whoever was there before.
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    uvicorn.run(
        make_app(Access(tokens, FailedTries(configuration.console_failed_tries_per_minute))),
        host="0.0.0.0",  # noqa: S104  a process type is reached through its platform's router; tokens guard it
        port=configuration.port,
        log_config=None,
        access_log=False,
        proxy_headers=False,  # who asks is who connects, whatever FORWARDED_ALLOW_IPS says
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )


if __name__ == "__main__":
    main()
