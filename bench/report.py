"""How every bench ends: one table on the screen, the same as JSON, and a status that says if all bounds hold."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson
from rich.console import Console
from rich.table import Table

#: Options that do not change what is measured.
_NOT_SHOWN = {"json"}
_FILE_WIDTH = 120


class Report(Protocol):
    """What was measured: `bench.limits.findings.Findings` or `bench.comparison.Comparison`."""

    @property
    def hold(self) -> bool: ...

    def table(self, title: str) -> Table: ...

    def as_json(self) -> list[dict[str, Any]]: ...


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a bench's parser, which knows ``--json``; the description is the first paragraph of the module's text."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=(doc or "").split("\n\n")[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return made


def add_durable(arguments: argparse.ArgumentParser, *, default: bool) -> None:
    """Add ``--durable`` and ``--no-durable``."""
    arguments.add_argument(
        "--durable",
        action=argparse.BooleanOptionalAction,
        default=default,
        help="flush commits to disk (default: %(default)s)",
    )


def tell(report: Report, title: str, options: argparse.Namespace, more: Mapping[str, Any] | None = None) -> int:
    """Print the table, write the JSON if it is wanted, and return the exit status.

    Args:
        more: Further members of the JSON.
    """
    # A file has no width of its own, and a reader of one scrolls rather than puts wrapped cells together.
    Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(report.table(title))
    if options.json:
        figures = {
            "options": {name: value for name, value in vars(options).items() if name not in _NOT_SHOWN},
            "cpus": os.cpu_count(),
            "holds": report.hold,
            "figures": report.as_json(),
            **(more or {}),
        }
        options.json.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return 0 if report.hold else 1
