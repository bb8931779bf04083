"""``mailfleet attach``: store a file for the mails that will name it."""

from __future__ import annotations

import mimetypes
import os
import stat
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import click

from cli.commands import connected, json_option, main, who
from cli.display import print_json, progress
from cli.limits import Duration

_CHUNK_BYTES = 256 * 1024


@main.command()
@click.argument("file", type=click.File("rb"))
@click.option("--name", help="The file's name in the store; default: its own.")
@click.option("--content-type", help="Default: what its name says.")
@click.option(
    "--expires-in", type=Duration(), help="Kept at most so long, as 12h or 7d; default and most: the setting."
)
@json_option
@connected
def attach(
    file: BinaryIO, name: str | None, content_type: str | None, expires_in: timedelta | None, as_json: bool
) -> None:
    """Store FILE (- for standard input) and print its id, which a SendEmail may name as urlOrId."""
    import operations
    from attachments import StoreUnavailable, TooLarge

    name, size = name or _own_name(file), _size(file)
    try:
        with progress(-(-(size or 0) // _CHUNK_BYTES)) as advance:
            stored = operations.attach(
                _chunks(file, advance),
                name=name,
                content_type=content_type or mimetypes.guess_type(name)[0] or "application/octet-stream",
                who=who(),
                expires_in=expires_in,
                declared_bytes=size,
            )
    except (operations.NotAttachable, TooLarge, StoreUnavailable) as reason:
        raise click.ClickException(f"not stored: {reason}") from None
    if as_json:
        print_json(stored._asdict())
    else:
        click.echo(stored.id)


def _own_name(file: BinaryIO) -> str:
    name = getattr(file, "name", None)
    if not isinstance(name, str) or name == "<stdin>":
        raise click.UsageError("standard input has no name: give --name")
    return Path(name).name


def _size(file: BinaryIO) -> int | None:
    """Return how many bytes a file has; None: it is no file, but a pipe."""
    try:
        found: Any = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _chunks(file: BinaryIO, advance: Callable[[], None]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
        advance()
