"""What the command line shows: JSON for scripts, tables for people, progress on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.text import Text

    from models.dead_letters import Letter

#: Lines that go into a file or a pipe are not folded at 80 characters.
_FILE_WIDTH = 250


def print_json(value: Any) -> None:
    import orjson

    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=_plain).decode())


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    return value.total_seconds() if isinstance(value, timedelta) else str(value)


def table(columns: list[str], rows: list[list[Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns))
    for column in columns:
        # What is copied into the next command must not be broken.
        table.add_column(column, no_wrap=column == "id", overflow="fold")
    for row in rows:
        table.add_row(*(_shown(cell) for cell in row))
    console.print(table)


def _shown(value: Any) -> Text:
    from rich.text import Text

    if isinstance(value, datetime):
        return Text(value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S"))
    if isinstance(value, timedelta):
        return Text(f"{value.total_seconds():.1f} s")
    return Text("" if value is None else harmless(str(value)))


def harmless(text: str) -> str:
    """Return text of unknown origin without what would direct a terminal."""
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)


def show_status(known: dict[str, Any]) -> None:
    import operations

    sending = known["sending"]
    doubt = " (in doubt)" if sending and sending["status"] == "in_doubt" else ""
    facts = {
        "email": known["incoming_email_id"],
        "publisher's id": known["publisher_message_id"],
        "status": f"{known['status']}{doubt}",
        "mailbox": known["mailbox"],
        "attempts": known["attempt_count"],
        "next attempt": known["next_attempt_at"],
        "leased until": known["lease_until"],
        "last error": known["last_error"],
        "recipient firewall": known.get("recipient_firewall"),
        "Graph message": sending and sending["graph_message_id"],
        "on hold since": known["hold"] and known["hold"]["placed_at"],
        "content deleted": known["payload_purged_at"],
        "backup deleted": sending and sending["backup_purged_at"],
    }
    table(["", ""], [[name, value] for name, value in facts.items() if value is not None])
    if known["uploads"]:
        table(
            ["attachment", "uploaded", "", ""],
            [
                [each["filename"], bar(each["uploaded_bytes"], each["size"], done=each["status"] == "uploaded"), *text]
                for each in known["uploads"]
                for text in [_how_far(each)]
            ],
        )
    table(
        ["when", "what"],
        [[at, what] for at, what in operations.timeline(known)],
    )


#: Eighths of a cell, so that a large file is seen to move.
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR_CELLS = 24


def bar(part: int, whole: int, *, done: bool = False) -> str:
    """Return a progress bar of a fixed width; what is done is full, though it be of nothing."""
    eighths = _BAR_CELLS * 8 if done else _BAR_CELLS * 8 * min(part, whole) // max(whole, 1)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_BAR_CELLS, "░")


def _how_far(upload: dict[str, Any]) -> tuple[str, str]:
    if upload["status"] == "uploaded":
        return "100 %", f"{upload['size']:,} bytes"
    share = 100 * upload["uploaded_bytes"] // max(upload["size"], 1)
    return f"{share} %", f"{upload['uploaded_bytes']:,} of {upload['size']:,} bytes"


def show_letters(letters: list[Letter], as_json: bool) -> None:
    if as_json:
        print_json([letter._asdict() for letter in letters])
        return
    table(
        ["id", "created", "mailbox", "reason", "attempts", "email"],
        [[d.id, d.created_at, d.mailbox, d.reason, d.attempts, d.publisher_message_id] for d in letters],
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[..., None]]:
    """Show progress on a terminal, on standard error; elsewhere nothing. What is yielded takes how many were done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=total)
        yield lambda done=1: progress.advance(task, done)
