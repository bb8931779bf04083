"""``mailfleet forecast``: when the mail will be out, what binds it, and what would help."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from cli.commands import connected, json_option, main
from cli.display import print_json, table

if TYPE_CHECKING:
    from forecast import Forecast

#: Mailboxes that people are shown; ``--json`` has all.
_SHOWN = 20
_BYTES_PER_MB = 1_000_000


def _in_bytes(_context: click.Context, _option: click.Parameter, megabytes: float | None) -> int | None:
    if megabytes is not None and math.isnan(megabytes):
        raise click.BadParameter("it is no number")
    return None if megabytes is None else round(megabytes * _BYTES_PER_MB)


@main.command()
@click.option("--emails", type=click.IntRange(1, 10**9), help="So many emails instead of those that wait.")
@click.option("--mailboxes", type=click.IntRange(1, 10**6), help="Sent from so many mailboxes, evenly; default: 1.")
@click.option(
    "--attachments-mb",
    "attachment_bytes",
    type=click.FloatRange(0, 150),
    callback=_in_bytes,
    help="Each with so many MB attached; default: none.",
)
@json_option
@connected
def forecast(emails: int | None, mailboxes: int | None, attachment_bytes: int | None, as_json: bool) -> None:
    """Say when the waiting mail will be with Graph, which limit binds, and what would help.

    With --emails: how long so many take alone, from mailboxes that have used nothing of their limits.
    """
    import operations

    if emails is None and (mailboxes is not None or attachment_bytes is not None):
        raise click.UsageError("--mailboxes and --attachments-mb say more of --emails, which is missing")
    asked_at = datetime.now(UTC)
    foreseen = operations.forecast(emails=emails, mailboxes=mailboxes or 1, attachment_bytes=attachment_bytes or 0)
    if as_json:
        print_json({"asked_at": asked_at, "done_at": _at(asked_at, foreseen.done_in), **foreseen._asdict()})
    else:
        _show(foreseen, asked_at)


def _at(asked_at: datetime, done_in: timedelta | None) -> datetime | None:
    try:
        return None if done_in is None else asked_at + done_in
    except OverflowError:  # beyond the year 9999
        return None


def _show(foreseen: Forecast, asked_at: datetime) -> None:
    from forecast import setting_of, told

    done_at = _at(asked_at, foreseen.done_in)
    when = f" ({done_at:%Y-%m-%d %H:%M:%S} UTC)" if done_at else ""
    if foreseen.emails:
        done = "never" if foreseen.done_in is None else f"in {told(foreseen.done_in)}{when}"
        click.echo(f"{foreseen.emails:,} emails: done {done}")
    click.echo(foreseen.advice)
    if not foreseen.mailboxes:
        return
    table(
        ["mailbox", "emails", "paused", "done in", "done at", "binds"],
        [
            [
                outlook.mailbox,
                f"{outlook.emails:,}",
                outlook.paused or None,
                "never" if outlook.done_in is None else told(outlook.done_in),
                _at(asked_at, outlook.done_in),
                setting_of(outlook.binds),
            ]
            for outlook in foreseen.mailboxes[:_SHOWN]
        ],
    )
    if (further := len(foreseen.mailboxes) - _SHOWN) > 0:
        click.echo(f"and {further:,} more mailboxes, done no later (--json lists them)")
