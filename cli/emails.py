"""``mailfleet emails``: find emails."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from cli.commands import connected, json_option, main, utc
from cli.display import print_json, table

if TYPE_CHECKING:
    from models.finding import EmailFilter, ListedEmail

#: As in ``models.states.Status``, which is imported only when a command runs.
STATUSES = ["received", "dispatched", "processing", "processed", "failed", "cancelled", "expired"]
_INSTANT = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"])
_PAGE = 500


@main.group()
def emails() -> None:
    """Find emails."""


@emails.command("list")
@click.option("--status", type=click.Choice(STATUSES), help="Only in this status.")
@click.option("--in-doubt", is_flag=True, help="Only those whose send may or may not have happened.")
@click.option("--mailbox", help="Only of this sending mailbox.")
@click.option("--tenant", help="Only of this tenant (metadata.tenant).")
@click.option("--publisher-message-id", help="Only the one that its publisher named so.")
@click.option("--error", help="Only with this in the last error.")
@click.option("--since", type=_INSTANT, help="Only taken in from this instant on (UTC).")
@click.option("--until", type=_INSTANT, help="Only taken in before this instant (UTC).")
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="At most so many.")
@json_option
@connected
def emails_list(
    status: str | None, since: datetime | None, until: datetime | None, limit: int, as_json: bool, **narrowed: Any
) -> None:
    """List emails, newest first."""
    from models.finding import EmailFilter
    from models.states import Status

    filter = EmailFilter(status=Status(status) if status else None, since=utc(since), until=utc(until), **narrowed)
    found = _find(filter, limit)
    if as_json:
        print_json([email._asdict() for email in found])
        return
    table(
        ["id", "taken in", "status", "mailbox", "attempts", "publisher's id", "last error"],
        [
            [
                e.incoming_email_id,
                e.created_at,
                _told(e),
                e.mailbox,
                e.attempt_count,
                e.publisher_message_id,
                e.last_error,
            ]
            for e in found
        ],
    )


def _find(filter: EmailFilter, limit: int) -> list[ListedEmail]:
    """Return the newest that match, however many emails are looked through for them."""
    import operations

    page = operations.find_emails(filter, limit=min(limit, _PAGE))
    found = page.emails
    while page.more_before and len(found) < limit:
        page = operations.find_emails(filter, limit=min(limit - len(found), _PAGE), before=page.more_before)
        found += page.emails
    return found


def _told(email: ListedEmail) -> str:
    return f"{email.status} (in doubt)" if email.in_doubt else email.status
