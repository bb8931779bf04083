"""``mailfleet``: the operator's command line. It parses, calls `operations` and shows; nothing is decided here."""

from cli.commands import main

__all__ = ["main"]
