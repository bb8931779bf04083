"""``mailfleet``: the operator's command line.

It parses, calls `operations` and shows; nothing is decided here. Exit status: 0 fine, 1 a problem was found, 2 wrong
usage. Everything else is imported where it is used, so that ``--help`` does not wait for it.
"""

from __future__ import annotations

import getpass
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial, wraps
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import click

from cli.display import harmless, print_json, progress, show_letters, show_status, table

if TYPE_CHECKING:
    from models.dead_letters import Filter, Letter

Command = Callable[..., Any]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mailfleet", message="%(version)s")
def main() -> None:
    """Publish, look up and operate mail that is sent through Microsoft Graph."""


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def connected(command: Command) -> Command:
    """Give a command the connections of a process, and turn what is away into a sentence."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _problems_as_sentences():
            import runtime
            import telemetry

            telemetry.configure_logging("WARNING")
            try:
                return command(*args, **kwargs)
            finally:
                runtime.close()

    return run


@contextmanager
def _problems_as_sentences() -> Iterator[None]:
    import peewee

    import limiter
    import models
    import operations
    import outbox
    import vault

    try:
        yield
    except (
        models.DatabaseAway,
        limiter.Unavailable,
        operations.NotFound,
        outbox.Unconfirmed,
        vault.VaultError,
    ) as error:
        raise click.ClickException(str(error)) from None
    except peewee.ProgrammingError:
        raise click.ClickException("the database's schema is another version's; see mailfleet doctor") from None
    except UnicodeEncodeError as error:
        raise click.UsageError(f"some text cannot be encoded: {error.reason}") from None


def who() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli"


# Emails


@main.command()
@click.argument("file", type=click.File("rb"))
@connected
def publish(file: Any) -> None:
    """Publish the SendEmail in FILE (- for standard input) and print its id."""
    import operations
    from contracts import MAX_DELIVERY_BYTES, Unacceptable

    try:
        click.echo(operations.publish(file.read(MAX_DELIVERY_BYTES + 1), who=who()))
    except Unacceptable as unacceptable:
        raise click.ClickException(f"not a valid SendEmail: {unacceptable.detail}") from None


@main.command()
@click.argument("id")
@json_option
@connected
def status(id: str, as_json: bool) -> None:
    """Show everything that is known of an email, by our ID or the publisher's."""
    import operations

    known = operations.status(id)
    if as_json:
        print_json(known)
    else:
        show_status(known)


@main.command()
@click.argument("id")
@json_option
@connected
def cancel(id: str, as_json: bool) -> None:
    """Keep an email that waits from being sent, by our ID or the publisher's."""
    import operations

    try:
        outcome = "cancelled" if operations.cancel(id, who=who()) else "cancelled before"
    except operations.NotCancellable as reason:
        raise click.ClickException(f"{id} is not cancelled: {reason}") from None
    if as_json:
        print_json({"id": id, "outcome": outcome})
    else:
        click.echo(f"{id}  {outcome}")


# Dead letters


@main.group()
def dlq() -> None:
    """Look at dead letters, replay or discard them."""


def _narrowing_options(command: Command) -> Command:
    instant = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"])
    for option in (
        click.option("--reason", help="Only with this reason."),
        click.option("--mailbox", help="Only of this sending mailbox."),
        click.option("--since", type=instant, help="Only from this instant on (UTC)."),
        click.option("--until", type=instant, help="Only before this instant (UTC)."),
        json_option,
    ):
        command = option(command)
    return command


def _filter_options(command: Command, limit: int | None = None) -> Command:
    at_most = click.IntRange(1, 100_000)
    bound = click.option("--limit", type=at_most, default=limit, show_default=True, help="At most so many.")
    return _narrowing_options(bound(command))


def _filter(ids: tuple[str, ...], reason: str | None, mailbox: str | None, since: Any, until: Any) -> Filter:
    from models.dead_letters import Filter

    return Filter(reason, mailbox, utc(since), utc(until), tuple(_letter_id(id) for id in ids))


def _letter_id(id: str) -> str:
    import operations

    return operations.open_dead_letter(id).id


def utc(instant: datetime | None) -> datetime | None:
    return instant.replace(tzinfo=UTC) if instant and instant.tzinfo is None else instant


@dlq.command("list")
@partial(_filter_options, limit=1000)
@connected
def dlq_list(limit: int, as_json: bool, **filters: Any) -> None:
    """List the open dead letters, oldest first."""
    import operations

    show_letters(operations.find_dead_letters(_filter((), **filters), limit), as_json)


@dlq.command("groups")
@_narrowing_options
@connected
def dlq_groups(as_json: bool, **filters: Any) -> None:
    """Tell the open dead letters by their cause, the largest group first."""
    import operations

    groups = operations.dead_letter_groups(_filter((), **filters))
    if as_json:
        print_json([group._asdict() for group in groups])
        return
    table(
        ["reason", "queue", "count", "mailboxes", "for example", "oldest", "newest", "last error"],
        [list(group) for group in groups],
    )


@dlq.command("show")
@click.argument("id")
@json_option
@connected
def dlq_show(id: str, as_json: bool) -> None:
    """Show a dead letter and its message, by its ID, the email's or the publisher's; who did is written down."""
    import operations

    letter, body = operations.read_message(id, who=who())
    message = body.decode("utf-8", "replace") if body is not None else None
    if as_json:
        print_json({**letter._asdict(), "message": message})
    else:
        table(["", ""], [[name, value] for name, value in letter._asdict().items() if value is not None])
        click.echo(harmless(message) if message else "RabbitMQ's copy of the message has not arrived yet.")


def finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):  # what is not a number is within any range
        raise click.BadParameter("must be a finite number")
    return value


def _resolving(replay: bool) -> Command:
    def resolve(
        ids: tuple[str, ...],
        limit: int | None,
        as_json: bool,
        dry_run: bool,
        all_letters: bool,
        rate: float | None,
        **filters: Any,
    ) -> None:
        import operations

        if not (ids or all_letters or any(filters.values())):
            raise click.UsageError("say which: IDs, filters or --all")
        letters = operations.find_dead_letters(_filter(ids, **filters), limit)
        if dry_run:
            show_letters(letters, as_json)
            return
        _resolve(letters, as_json, replay=replay, per_second=rate)

    for decorate in (
        connected,
        _filter_options,
        click.option("--rate", type=click.FloatRange(0.01), callback=finite, help="At most so many per second."),
        click.option("--dry-run", is_flag=True, help="Only list what would be meant."),
        click.option("--all", "all_letters", is_flag=True, help="Every open dead letter."),
        click.argument("ids", nargs=-1),
    ):
        resolve = decorate(resolve)
    return resolve


def _resolve(letters: list[Letter], as_json: bool, *, replay: bool, per_second: float | None) -> None:
    import operations

    outcomes: list[dict[str, str]] = []
    with progress(len(letters)) as advance:

        def note(letter: Letter, outcome: str) -> None:
            outcomes.append({"id": letter.id, "outcome": outcome})
            advance()

        resolved = operations.resolve(letters, replay=replay, who=who(), per_second=per_second, on_each=note)
    if as_json:
        print_json(outcomes)
    else:
        for outcome in outcomes:
            click.echo(f"{outcome['id']}  {outcome['outcome']}")
        click.echo(f"{resolved} of {len(letters)} {'replayed' if replay else 'discarded'}")
    if resolved < len(letters):
        sys.exit(1)


dlq.command("replay", help="Send the emails of dead letters again (IDs or filters).")(_resolving(replay=True))
dlq.command("discard", help="Set dead letters aside for good (IDs or filters).")(_resolving(replay=False))


# Backups


@main.group()
def backups() -> None:
    """Look at the archive and take mail out of it."""


@backups.command("list")
@click.option("--mailbox", help="Only of this sending mailbox.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True)
@json_option
@connected
def backups_list(mailbox: str | None, limit: int, as_json: bool) -> None:
    """List the newest backups."""
    import operations

    found = operations.list_backups(mailbox=mailbox, limit=limit)
    if as_json:
        print_json([backup._asdict() for backup in found])
        return
    table(
        ["id", "created", "mailbox", "bytes", "stored", "key", "expires", "email"],
        [
            [b.id, b.created_at, b.mailbox, b.size, b.compressed_size, b.key_id, b.expires_at, b.publisher_message_id]
            for b in found
        ],
    )


@backups.command("export")
@click.argument("id")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A new file; default: standard output."
)
@connected
def backups_export(id: str, output: Path | None) -> None:
    """Write the exact MIME of a backup, by its ID, the email's, the publisher's or Graph's."""
    import operations

    _backup, chunks = operations.export_backup(id, who=who())
    if output is None:
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
        return
    _write_whole(output, chunks)


def _write_whole(path: Path, chunks: Iterator[bytes]) -> None:
    """Make a file that is either whole or not there: only the last chunk proves that the backup is genuine."""
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=".mailfleet-") as part:
            part.writelines(chunks)
            part.flush()
            os.link(part.name, path)  # unlike a rename it replaces nothing
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from None


# The installation


@main.command("settings")
@json_option
def settings_command(as_json: bool) -> None:
    """Show the effective settings, secrets masked."""
    import runtime  # with every check that a process makes when it starts

    shown = runtime.configuration.shown()
    if as_json:
        print_json(shown)
    else:
        table(["setting", "value"], [[name, value] for name, value in shown.items()])


@main.command()
@click.option(
    "--mailbox",
    "mailboxes",
    multiple=True,
    metavar="ADDRESS",
    help="Try also whether Graph lets us work in it, by a draft that is deleted again.",
)
@json_option
@connected
def doctor(mailboxes: Sequence[str], as_json: bool) -> None:
    """Check everything that the fleet needs. Exit status 1: something is not well."""
    import operations

    findings = operations.doctor(mailboxes)
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        table(["", "", ""], [["ok" if f.fine else "PROBLEM", f.subject, f.detail] for f in findings])
    if not all(finding.fine for finding in findings):
        sys.exit(1)
