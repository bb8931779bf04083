"""What the demo shows: steps, live counts, and the tables at the end. Without a terminal they are plain lines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sandbox.demo.findings import Finding, Row
from sandbox.demo.mails import Ending

#: The width where there is no terminal to ask: files and logs of builds are read without wrapping.
_PLAIN_WIDTH = 150
#: The whole table needs so many columns to be calm; on less, its numbers are shortened.
_WIDE = 140
_PLAIN_LINE_EVERY_SECONDS = 2.0

_COLOURS = {"processed": "green", "failed": "yellow", "expired": "yellow", "rejected": "yellow"}


class Counts(NamedTuple):
    """How far everything is; the fields' names are what is shown."""

    waiting: int
    sending: int
    in_doubt: int
    sent: int
    archived: int
    failed: int
    expired: int
    rejected: int
    events: int

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Self:
        findings = list(findings)
        statuses = Counter(finding.status for finding in findings)
        doubtful = sum(bool(finding.row and finding.row.in_doubt) for finding in findings)
        return cls(
            waiting=statuses["received"],
            sending=statuses["dispatched"] + statuses["processing"] - doubtful,
            in_doubt=doubtful,
            sent=statuses["processed"],
            archived=sum(bool(finding.row and finding.row.size_bytes) for finding in findings),
            failed=statuses["failed"],
            expired=statuses["expired"],
            rejected=statuses["rejected"],
            events=sum(len(finding.events) for finding in findings),
        )

    def text(self) -> Text:
        shown = Text()
        for name, value in self._asdict().items():
            shown.append(f"{value:>3} ", style="bold" if value else "dim")
            shown.append(name.replace("_", " ") + "  ", style="" if value else "dim")
        return shown


class Screen:
    """Where everything is printed."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=False)
        if not self._console.is_terminal:
            self._console.width = max(self._console.width, _PLAIN_WIDTH)

    @property
    def narrow(self) -> bool:
        return self._console.width < _WIDE

    def say(self, text: str = "", style: str = "") -> None:
        self._console.print(text, style=style, markup=False)

    def show(self, what: RenderableType) -> None:
        self._console.print(Padding(what, (1, 0, 0, 0)))

    @contextmanager
    def step(self, doing: str, done: str) -> Iterator[None]:
        """Say what goes on during the block, and how long it took when it has worked."""
        began = time.monotonic()
        with self._console.status(Text(doing)):
            yield
        line = Text("  ✓ ", style="green").append(f"{done:<72}", style="default")
        self._console.print(line.append(f"{time.monotonic() - began:5.1f} s", style="dim"))

    def progress(self, total: int) -> LiveCounts | PlainCounts:
        """Show counts that change, of ``total`` mails, for the length of a ``with`` block."""
        return LiveCounts(self._console, total) if self._console.is_terminal else PlainCounts(self._console, total)


class LiveCounts:
    """A bar and the counts, redrawn in place."""

    def __init__(self, console: Console, total: int) -> None:
        self._bar = Progress(
            TextColumn("  settled"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._task = self._bar.add_task("settled", total=total)
        self._live = Live(self._bar, console=console, refresh_per_second=8)

    def update(self, settled: int, counts: Counts) -> None:
        self._bar.update(self._task, completed=settled)
        self._live.update(Group(self._bar, Padding(counts.text(), (0, 0, 0, 1))))

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


class PlainCounts:
    """A line each time that something has changed, but not too often."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._shown: tuple[int, Counts] | None = None
        self._shown_at = float("-inf")

    def update(self, settled: int, counts: Counts) -> None:
        early = time.monotonic() - self._shown_at < _PLAIN_LINE_EVERY_SECONDS
        if (settled, counts) == self._shown or (early and settled < self._total):
            return
        self._shown, self._shown_at = (settled, counts), time.monotonic()
        self._console.print(f"  settled {settled:>2}/{self._total} ", counts.text())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put back: lines stay as they were printed."""


def outcome_table(findings: Sequence[Finding], *, narrow: bool = False) -> Table:
    """Return one line for each mail: what it was, and what became of it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading, options in _COLUMNS.items():
        table.add_column(heading.replace("MIME, ", "") if narrow else heading, **options)
    for finding in findings:
        row, problems = finding.row, finding.problems()
        table.add_row(
            Text("✗" if problems else "✓", style="red" if problems else "green"),
            finding.mail.key,
            finding.mail.scenario,
            Text(finding.status, style=_COLOURS.get(finding.status, "red")),
            str(row.attempts) if row else "",
            _sizes(row, narrow),
            str(len(finding.events)) if narrow else _events(finding),
            Text("; ".join(problems), style="red") if problems else _happened(finding),
        )
    return table


_COLUMNS: dict[str, dict[str, Any]] = {
    "": {"width": 1},
    "mail": {"no_wrap": True},
    "what it is": {"overflow": "fold"},
    "status": {"no_wrap": True},
    "tries": {"justify": "right"},
    "MIME, archived": {"justify": "right", "no_wrap": True},
    "events": {"no_wrap": True},
    "what happened": {"overflow": "fold"},
}


def _sizes(row: Row | None, narrow: bool) -> str:
    if not row or row.size_bytes is None or row.sealed_bytes is None:
        return ""
    return _size(row.sealed_bytes) if narrow else f"{_size(row.size_bytes)}, {_size(row.sealed_bytes)}"


def _size(size_bytes: int) -> str:
    if size_bytes < 1000:
        return f"{size_bytes} B"
    return f"{size_bytes / 1000:.1f} kB" if size_bytes < 1_000_000 else f"{size_bytes / 1_000_000:.1f} MB"


def _events(finding: Finding) -> str:
    names = sorted(type.removeprefix("SendEmail").lower() for type in finding.events)
    return ", ".join(sorted(names, key=lambda name: name != "received"))


def _happened(finding: Finding) -> str:
    """Tell a mail's story from its row: what Graph was asked, what was seen, how long it took."""
    row = finding.row
    if row is None:
        return "kept in send_email.rejected"
    if row.status == Ending.FAILED:
        return f"dead letter: {row.dead_letter}"
    if row.status == Ending.EXPIRED:
        return "not sent"
    looked_up = [each["seen"] for each in row.evidence if each.get("asked") == "messages by tag"]
    took = f"{(row.sent_at - row.created_at).total_seconds():.1f} s" if row.sent_at else "some time"
    if not looked_up:
        return f"sent after {took}"
    if looked_up[-1].startswith("1 sent"):
        return "looked up: it was sent; not repeated"
    return f"looked up: absent; sent after {took}"


def dead_letter_table(rows: Iterable[Sequence[Any]]) -> Table:
    """Return the open dead letters: mail, mailbox, reason, tries, error."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title="Dead letters", title_justify="left"
    )
    for heading in ("mail", "mailbox", "reason", "tries", "last error"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(str, row))
    return table
