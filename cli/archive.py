"""``mailfleet backups verify|rotate-keys|purge`` and ``mailfleet hold|holds|release``: what the archive keeps."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from cli.commands import backups, connected, json_option, main, who
from cli.display import print_json, progress, table

if TYPE_CHECKING:
    from operations import Discrepancy

#: As of a pause's.
_MAX_REASON_CHARACTERS = 1000


def _reason(_context: click.Context, _option: click.Parameter, why: str | None) -> str | None:
    if why is not None and (len(why) > _MAX_REASON_CHARACTERS or "\x00" in why):
        raise click.BadParameter(f"is text of at most {_MAX_REASON_CHARACTERS} characters")
    return why


@backups.command("verify")
@json_option
@connected
def verify(as_json: bool) -> None:
    """Open every backup and look for those that are missing. Exit status 1: something is wrong."""
    import operations

    with progress(operations.count_to_verify()) as advance:
        found = operations.verify(who=who(), on_each=advance)
    if as_json:
        print_json({**found._asdict(), "discrepancies": [each._asdict() for each in found.discrepancies]})
    else:
        if found.discrepancies:
            show_discrepancies(found.discrepancies)
        click.echo(f"{found.backups} backups opened, {found.emails} mails looked up: {len(found.discrepancies)} wrong")
    if found.discrepancies:
        sys.exit(1)


def show_discrepancies(discrepancies: list[Discrepancy]) -> None:
    table(
        ["fault", "backup", "email", "publisher's id", "detail"],
        [[d.fault.value, d.backup_id, d.incoming_email_id, d.publisher_message_id, d.detail] for d in discrepancies],
    )


@backups.command("rotate-keys")
@json_option
@connected
def rotate_keys(as_json: bool) -> None:
    """Wrap all data keys under the newest key of BACKUP_KEYS. May be stopped and started again.

    Exit status 1: some stay under older keys, which must be kept.
    """
    import operations

    with progress(sum(operations.older_keys().values())) as advance:
        done = operations.rotate_keys(who=who(), on_batch=advance)
    left = operations.older_keys()
    if as_json:
        print_json({**done._asdict(), "stuck": [each._asdict() for each in done.stuck], "left": left})
    else:
        for each in done.stuck:
            click.echo(f"{each.table} {each.id} stays under {each.key_id}: {each.reason}")
        moved = f"{done.backups} backups, {done.attachments} attachments, {done.payload_keys} payload keys"
        click.echo(f"{moved} are now under {done.newest_key_id}")
        for key_id, count in sorted(left.items()):
            click.echo(f"{count} are under {key_id}: keep that key, and run this again")
    if left:
        sys.exit(1)


@backups.command("purge")
@click.option("--dry-run", is_flag=True, help="Only count what would be deleted.")
@json_option
@connected
def purge(dry_run: bool, as_json: bool) -> None:
    """Delete the backups whose retention has ended now, instead of within ten minutes; none on hold."""
    import operations

    count = operations.count_expired() if dry_run else operations.purge_backups(who=who())
    if as_json:
        print_json({"backups": count, "dry_run": dry_run})
    else:
        click.echo(f"{count} backups {'would be ' if dry_run else ''}deleted")


# Holds


@main.command()
@click.argument("id")
@click.option("--why", callback=_reason, help="Shown to whoever looks at the hold.")
@json_option
@connected
def hold(id: str, why: str | None, as_json: bool) -> None:
    """Keep everything of an email, by our ID or the publisher's, whatever its retention, until it is released."""
    import operations

    standing, placed = operations.hold(id, reason=why, who=who())
    if as_json:
        print_json({**standing._asdict(), "outcome": "held" if placed else "held before"})
        return
    click.echo(f"{standing.incoming_email_id}  {'held' if placed else 'held before'}")
    if not standing.has_payload:
        click.echo("Its payload was deleted before.")
    if not standing.has_backup:
        click.echo("There is no backup of it.")


@main.command()
@click.argument("id")
@json_option
@connected
def release(id: str, as_json: bool) -> None:
    """End the hold of an email: what is past its retention is deleted by the next purge."""
    import operations

    outcome = "released" if operations.release(id, who=who()) else "not on hold"
    if as_json:
        print_json({"id": id, "outcome": outcome})
    else:
        click.echo(f"{id}  {outcome}")


@main.command()
@click.option("--limit", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@json_option
@connected
def holds(limit: int, as_json: bool) -> None:
    """List the emails on hold, the newest hold first."""
    import operations

    found = operations.list_holds(limit=limit)
    if as_json:
        print_json([each._asdict() for each in found])
        return
    table(
        ["email", "publisher's id", "mailbox", "since", "by", "why"],
        [[h.incoming_email_id, h.publisher_message_id, h.mailbox, h.placed_at, h.placed_by, h.reason] for h in found],
    )
