"""Emails over HTTP: find them, see all that is known of one, cancel one. Their content is nowhere shown."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict

import operations
from console.access import Operator, Viewer
from console.api import Cursor, Id, Instant, Limit, PublishersId, Text, cursor_to, id_behind, make_router
from models.finding import EmailFilter
from models.states import Status

router = make_router("/emails", "emails")


class Email(BaseModel):
    """An email in a list."""

    model_config = ConfigDict(from_attributes=True)

    incoming_email_id: str
    publisher_message_id: str
    status: Status
    in_doubt: bool
    route: str
    mailbox: str
    tenant: str | None
    attempt_count: int
    next_attempt_at: datetime | None
    last_error: str | None
    created_at: datetime
    updated_at: datetime


class Emails(BaseModel):
    """A page of emails, newest first. It may be short, or empty, and not the last: that has no ``next``."""

    emails: list[Email]
    next: str | None


class Happening(BaseModel):
    """What happened to an email, in words for people."""

    at: datetime
    what: str


class EmailDetail(BaseModel):
    """Everything that is known of an email but its content."""

    model_config = ConfigDict(extra="allow")

    incoming_email_id: str
    publisher_message_id: str
    status: Status
    mailbox: str
    attempt_count: int
    last_error: str | None
    created_at: datetime
    updated_at: datetime
    sending: dict[str, Any] | None
    uploads: list[dict[str, Any]]
    receipts: list[dict[str, Any]]
    events: list[dict[str, Any]]
    backups: list[dict[str, Any]]
    dead_letters: list[dict[str, Any]]
    timeline: list[Happening]


class Cancellation(BaseModel):
    """What became of an email that was to be cancelled."""

    id: str
    outcome: Literal["cancelled", "cancelled before"]


@router.get("")
def find_emails(
    _who: Viewer,
    status: Status | None = None,
    in_doubt: Annotated[bool, Query(description="Only those whose send may or may not have happened.")] = False,
    mailbox: Text = None,
    tenant: Text = None,
    publisher_message_id: PublishersId = None,
    error: Annotated[Text, Query(description="A part of the last error, in any case.")] = None,
    since: Instant = None,
    until: Instant = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Emails:
    """Find emails, newest first. A request looks through a bounded number of them: follow `next` until it is null."""
    filter = EmailFilter(status, in_doubt, mailbox, tenant, publisher_message_id, error, since, until)
    page = operations.find_emails(filter, limit=limit, before=id_behind(cursor))
    return Emails(emails=[Email.model_validate(email) for email in page.emails], next=cursor_to(page.more_before))


@router.get("/{id}")
def show_email(_who: Viewer, id: Id) -> EmailDetail:
    """Show everything that is known of an email, by our id or the publisher's, but its content."""
    known = operations.status(id)
    timeline = [Happening(at=at, what=what) for at, what in operations.timeline(known)]
    return EmailDetail(**known, timeline=timeline)


@router.post("/{id}/cancel")
def cancel_email(who: Operator, id: Id) -> Cancellation:
    """Keep an email that waits from being sent. Repeating it is harmless. 409: it is, or may be, sent already."""
    cancelled = operations.cancel(id, who=f"api:{who}")
    return Cancellation(id=id, outcome="cancelled" if cancelled else "cancelled before")
