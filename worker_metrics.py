"""The process that serves the metrics of all processes of a worker type, beside them.

It adds up the files that they write and knows nothing else: without broker, database and Graph it starts at once and
stays small.
"""

from __future__ import annotations

import settings
import telemetry
from orphans import end_with_parent


def serve() -> None:
    """Serve the metrics on ``METRICS_PORT`` until the process is ended. Dramatiq finds the function by its name."""
    end_with_parent()
    configuration = settings.load()
    telemetry.configure_logging(configuration.log_level)
    telemetry.serve_workers_metrics(configuration.metrics_port)
