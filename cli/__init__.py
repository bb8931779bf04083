"""``mailfleet``: the operator's command line. It parses, calls `operations` and shows; nothing is decided here."""

import cli.limits  # noqa: F401  adds its commands
from cli.commands import main

__all__ = ["main"]
