"""``mailfleet limits``, ``pause``, ``resume``: how much may be sent, and whether at all."""

from __future__ import annotations

import click

from cli.commands import connected, json_option, main, who
from cli.display import print_json, table


def _checked_mailbox(_context: click.Context, _argument: click.Parameter, mailbox: str | None) -> str | None:
    if mailbox is not None and not all(mailbox.partition("@")):
        raise click.BadParameter("a mailbox is named by its address")
    return mailbox


@main.group()
def limits() -> None:
    """See how much of Graph's limits is used."""


@limits.command("show")
@click.argument("mailbox", required=False, callback=_checked_mailbox)
@json_option
@connected
def limits_show(mailbox: str | None, as_json: bool) -> None:
    """Show the budgets of MAILBOX, or the tenant's, and every pause that stands."""
    import operations

    usage, pauses = operations.limits(mailbox), operations.pauses()
    if as_json:
        print_json({"budgets": [budget._asdict() for budget in usage], "pauses": [pause._asdict() for pause in pauses]})
        return
    table(
        ["budget", "used", "limit", "next free in"],
        [[b.budget, b.used, b.limit or "none", b.next_free_in] for b in usage],
    )
    if pauses:
        table(["paused mailbox", "until", "why", "by"], [list(pause) for pause in pauses])


@main.command()
@click.argument("mailbox", callback=_checked_mailbox)
@click.option("--why", default="paused by hand", show_default=True)
@connected
def pause(mailbox: str, why: str) -> None:
    """Send nothing more from MAILBOX until it is resumed."""
    import operations

    operations.pause(mailbox, why=why, who=who())
    click.echo(f"{mailbox} is paused")


@main.command()
@click.argument("mailbox", callback=_checked_mailbox)
@connected
def resume(mailbox: str) -> None:
    """Send from MAILBOX again, whoever paused it."""
    import operations

    click.echo(f"{mailbox} is resumed" if operations.resume(mailbox, who=who()) else f"{mailbox} was not paused")
