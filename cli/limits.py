"""``mailfleet limits``, ``pause``, ``resume``: how much may be sent, and whether at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from cli.commands import Command, connected, json_option, main, who
from cli.display import harmless, print_json, table

if TYPE_CHECKING:
    from models.limits import SetLimit
    from models.mailboxes import Held, Pause
    from operations import Limit, LimitsChange

#: As in the contract with publishers.
_MAX_ADDRESS_CHARACTERS = 254
_MAX_REASON_CHARACTERS = 1000
_LONGEST_PAUSE = timedelta(days=365)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_BYTES_PER_MB = 1_000_000


def _checked_mailbox(_context: click.Context, _argument: click.Parameter, mailbox: str | None) -> str | None:
    return mailbox if mailbox is None else _address(mailbox)


def _address(mailbox: str) -> str:
    if not all(mailbox.partition("@")) or len(mailbox) > _MAX_ADDRESS_CHARACTERS:
        raise click.BadParameter("a mailbox is named by its address")
    return mailbox


class Duration(click.ParamType):
    """``90s``, ``30m``, ``2h``, ``1d``."""

    name = "duration"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> timedelta:
        written = re.fullmatch(r"([1-9][0-9]{0,7})([smhd])", value)
        duration = timedelta(**{_UNITS[written[2]]: int(written[1])}) if written else None
        if duration is None or duration > _LONGEST_PAUSE:
            self.fail("a duration is written as 90s, 30m, 2h or 1d, up to 365d", parameter, context)
        return duration


# Limits


@main.group()
def limits() -> None:
    """See how much of Graph's limits is used, and set other limits while the fleet runs."""


@limits.command("show")
@click.argument("mailbox", required=False, callback=_checked_mailbox)
@json_option
@connected
def limits_show(mailbox: str | None, as_json: bool) -> None:
    """Show the budgets of MAILBOX, or the tenant's, what is held back, and every pause that stands."""
    import operations

    usage, held, pauses = operations.limits(mailbox), operations.held(mailbox), operations.pauses()
    stand = operations.limits_set() if mailbox is None else []
    if as_json:
        told = {"budgets": usage, "limits": stand, "held": held, "pauses": pauses}
        print_json({name: [each._asdict() for each in rows] for name, rows in told.items()})
        return
    table(
        ["budget", "used", "limit", "next free in", "why"],
        [[b.budget, b.used, b.limit or "none", b.next_free_in, _why(b)] for b in usage],
    )
    if stand:
        table(
            ["limit of", "budget", "limit", "by", "since"],
            [[_whose(each), each.budget, each.limit or "none", each.set_by, each.set_at] for each in stand],
        )
    if held:
        table(["held back", "until", "why"], list(_held_rows(held)))
    if pauses:
        table(["paused", "until", "why", "by"], [[_paused(p), _end(p), p.pause_reason, p.paused_by] for p in pauses])


def _why(budget: Limit) -> str:
    if budget.why is None:
        return ""
    set_by = f" by {budget.set_by}, {budget.set_at:%Y-%m-%d %H:%M}" if budget.set_at else ""
    slowed = f"; else {budget.configured}" if budget.limit != budget.configured else ""
    return f"{budget.why}{slowed}{set_by}"


def _held_rows(held: list[Held]) -> Iterator[list[Any]]:
    for each in held:
        if each.full_until:
            yield [_named(each.mailbox), each.full_until, f"waits for budget: {each.full_reason}{_passed_over(each)}"]
        if each.refusal_count:
            times = f"{each.refusal_count} times in a row" if each.refusal_count > 1 else "once"
            yield [_named(each.mailbox), "it takes one", f"refuses us ({times}): probed one mail at a time"]


def _passed_over(held: Held) -> str:
    import operations

    if held.full_from > 1:
        return f" (mail with {held.full_from} or more)"
    return " (mail that has any)" if held.mailbox == operations.EVERY else ""


def _whose(limit: SetLimit) -> str:
    import operations

    return "the fleet" if limit.budget in operations.FLEET_LIMITS else _named(limit.mailbox)


def _named(mailbox: str) -> str:
    import operations

    return "every mailbox" if mailbox == operations.EVERY else mailbox


def _paused(pause: Pause) -> str:
    return f"route {pause.route}" if pause.route else _named(pause.mailbox)


def _end(pause: Pause) -> str:
    return "resumed" if pause.until_resumed else f"{pause.paused_until:%Y-%m-%d %H:%M:%S}"


def _split(arguments: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """Take the mailbox, which alone has an ``@``, off the arguments."""
    if arguments and "@" in arguments[0]:
        return _address(arguments[0]), arguments[1:]
    return None, arguments


def _limit(argument: str) -> tuple[str, int]:
    name, _, value = argument.partition("=")
    if not re.fullmatch(r"[0-9]{1,15}", value):
        raise click.UsageError(f"{argument}: a limit is set as BUDGET=VALUE, a whole number, 0 for no limit")
    return ("upload_bytes", int(value) * _BYTES_PER_MB) if name == "upload_mb" else (name, int(value))


def _changing(command: Command, named_as: str) -> Command:
    """Give a command that changes limits its arguments, and show what became of them."""

    @click.argument("arguments", nargs=-1, required=True, metavar=f"[MAILBOX] {named_as}...")
    @json_option
    @connected
    def run(arguments: tuple[str, ...], as_json: bool) -> None:
        import operations

        mailbox, named = _split(arguments)
        if not named:
            raise click.UsageError("say which limit")
        try:
            change: LimitsChange = command(mailbox, named)
        except operations.NotALimit as error:
            raise click.UsageError(str(error)) from None
        if as_json:
            print_json(change._asdict())
        else:
            table(
                ["budget", "was", "is"],
                [[name, _told(change.before[name]), _told(limit)] for name, limit in change.after.items()],
            )
        for warning in change.warnings:
            click.echo(warning, err=True)
        if not change.told:
            click.echo("Redis is away: this takes effect within a minute after it is back.", err=True)

    run.__doc__ = command.__doc__
    return run


def _told(limit: int | None) -> str:
    return "not set" if limit is None else str(limit or "none")


@limits.command("set")
@partial(_changing, named_as="BUDGET=VALUE")
def limits_set(mailbox: str | None, named: tuple[str, ...]) -> LimitsChange:
    """Set limits (BUDGET=VALUE) of MAILBOX, or of every mailbox, the tenant and the fleet.

    They take the place of the settings at once, and stay. 0 switches a limit off, except of the fleet's.

    \b
    concurrency, requests, upload_mb, sends, recipients: of a mailbox
    tenant_requests, tenant_external_recipients: of the tenant, without a MAILBOX
    send_plain_concurrency, send_attached_concurrency, backup_concurrency: of the fleet
    """
    import operations

    limits = [_limit(argument) for argument in named]
    if len(dict(limits)) < len(limits):
        raise click.UsageError("a limit is given twice")
    return operations.set_limits(mailbox, dict(limits), who=who())


@limits.command("unset")
@partial(_changing, named_as="BUDGET")
def limits_unset(mailbox: str | None, named: tuple[str, ...]) -> LimitsChange:
    """Go back to what the settings, or what is set for every mailbox, say of each BUDGET."""
    import operations

    names = ["upload_bytes" if name == "upload_mb" else name for name in named]
    return operations.unset_limits(mailbox, names, who=who())


# Pauses


def _what_options(command: Command) -> Command:
    """Let a command name a mailbox, a route or everything, and nothing else."""
    for option in (
        click.option("--all", "everything", is_flag=True, help="Everything."),
        click.option(
            "--route",
            type=click.Choice(["attachment", "no-attachment"]),
            help="All mail with, or without, attachments.",
        ),
        click.argument("mailbox", required=False, callback=_checked_mailbox),
    ):
        command = option(command)
    return command


def _what(mailbox: str | None, route: str | None, everything: bool) -> tuple[str, str]:
    """Return what is meant, as `operations` and as people name it."""
    import operations

    every = operations.EVERY if everything else None
    meant = ((mailbox, str(mailbox)), (route, f"the route {route}"), (every, "everything"))
    named = [(subject, name) for subject, name in meant if subject]
    if len(named) != 1:
        raise click.UsageError("say what: MAILBOX, --route or --all")
    return named[0]


def _checked_reason(_context: click.Context, _option: click.Parameter, why: str) -> str:
    if len(why) > _MAX_REASON_CHARACTERS:
        raise click.BadParameter(f"at most {_MAX_REASON_CHARACTERS} characters")
    return why


@main.command()
@_what_options
@click.option("--why", default="paused by hand", show_default=True, callback=_checked_reason)
@click.option("--for", "wait", type=Duration(), help="90s, 30m, 2h, 1d; default: until it is resumed.")
@connected
def pause(mailbox: str | None, route: str | None, everything: bool, why: str, wait: timedelta | None) -> None:
    """Send nothing more from MAILBOX, by a route or at all, until the end or until it is resumed."""
    import operations

    subject, name = _what(mailbox, route, everything)
    standing = operations.pause(subject, why=why, who=who(), wait=wait)
    click.echo(f"{name} is paused until {_end(standing)} by {standing.paused_by}: {harmless(standing.pause_reason)}")


@main.command()
@_what_options
@connected
def resume(mailbox: str | None, route: str | None, everything: bool) -> None:
    """Send from MAILBOX, by a route or at all again, whoever paused it."""
    import operations

    subject, name = _what(mailbox, route, everything)
    resumed = operations.resume(subject, who=who())
    click.echo(f"{name} is resumed" if resumed.stood else f"{name} was not paused")
    if not resumed.told:
        click.echo("Redis is away: a pause of Graph's that it remembers ends by itself.", err=True)
