"""``mailfleet``: the operator's command line. It parses, calls `operations` and shows; nothing is decided here."""

import cli.archive
import cli.attaching
import cli.emails
import cli.forecasting
import cli.limits  # noqa: F401  they add their commands
from cli.commands import main

__all__ = ["main"]
