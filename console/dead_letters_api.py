"""Dead letters over HTTP: find them, see their causes, replay or discard them, a bounded number with each request."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Literal

from fastapi import HTTPException
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

import operations
from console.access import Operator, Viewer
from console.api import MAX_PAGE, Cursor, Id, Instant, Limit, Text, cursor_to_place, make_router, place_behind
from models.dead_letters import Filter, Letter, Place

router = make_router("/dead-letters", "dead letters")

#: What waits longer for its answer is taken for dead by proxies.
_LONGEST_REQUEST = timedelta(seconds=20)
_MAX_IDS = 100
_DONE = {"replay": "replayed", "discard": "discarded"}

Verb = Literal["replay", "discard"]
_ShortText = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00-\x1f\x7f]*$")]


class DeadLetter(BaseModel):
    """A message that was given up; ``incoming_email_id``: null if it belongs to no email."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    status: Literal["open", "replayed", "discarded"]
    incoming_email_id: str | None
    publisher_message_id: str | None
    mailbox: str | None
    queue_name: str
    reason: str
    attempts: int
    last_error: str | None
    created_at: datetime
    resolved_at: datetime | None
    resolved_by: str | None


class DeadLetters(BaseModel):
    """A page of open dead letters, oldest first; the last has no ``next``."""

    dead_letters: list[DeadLetter]
    next: str | None


class Group(BaseModel):
    """The open dead letters of one cause: how many, of how many mailboxes (one of them by name), the newest's error."""

    model_config = ConfigDict(from_attributes=True)

    reason: str
    queue_name: str
    dead_letters: int
    mailboxes: int
    mailbox: str | None
    oldest: datetime
    newest: datetime
    last_error: str | None


class Message(BaseModel):
    """The message of a dead letter, as an actor got it; null until RabbitMQ's copy of it has arrived."""

    message: str | None


class Which(BaseModel):
    """Which dead letters are meant, and how they are to be resolved. All of them only by ``all``."""

    model_config = ConfigDict(extra="forbid")

    ids: list[_ShortText] = Field([], max_length=_MAX_IDS, description="Their own, the emails' or the publishers'.")
    reason: _ShortText | None = None
    mailbox: _ShortText | None = None
    since: AwareDatetime | None = None
    until: AwareDatetime | None = None
    all: bool = False
    limit: int | None = Field(None, ge=1, le=MAX_PAGE, description="At most so many with this request.")
    per_second: float | None = Field(None, ge=0.01, le=1000, allow_inf_nan=False)
    cursor: str | None = Field(None, max_length=200, description="`next` of the request before.")
    dry_run: bool = False

    @model_validator(mode="after")
    def _says_which(self) -> Which:
        if not (self.ids or self.reason or self.mailbox or self.since or self.until or self.all):
            raise ValueError("say which: ids, filters or all")
        if self.per_second and self.limit and self.limit > self._in_time():
            raise ValueError(f"at that rate a request takes at most {self._in_time()}: follow next")
        return self

    @property
    def count(self) -> int:
        """How many dead letters this request is about."""
        return self.limit or min(self._in_time(), 100)

    def _in_time(self) -> int:
        """Return how many can be resolved while somebody waits."""
        return 1 + int(self.per_second * _LONGEST_REQUEST.total_seconds()) if self.per_second else MAX_PAGE


class Outcome(BaseModel):
    """What became of a dead letter: ``replayed``, ``discarded``, or why not."""

    id: str
    outcome: str


class Resolution(BaseModel):
    """What became of each; of a dry run, what would be meant. ``next``: there are more, to be asked for with it."""

    resolved: int
    outcomes: list[Outcome]
    would_be_meant: list[DeadLetter]
    next: str | None


@router.get("")
def find_dead_letters(
    _who: Viewer,
    reason: Text = None,
    mailbox: Text = None,
    since: Instant = None,
    until: Instant = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> DeadLetters:
    """List the open dead letters, oldest first. Follow `next` until it is null."""
    letters, more = _page(Filter(reason, mailbox, since, until), limit, cursor)
    return DeadLetters(dead_letters=[DeadLetter.model_validate(letter) for letter in letters], next=more)


def _page(filter: Filter, limit: int, cursor: str | None) -> tuple[list[Letter], str | None]:
    found = operations.find_dead_letters(filter, limit + 1, place_behind(cursor))
    letters = found[:limit]
    more = cursor_to_place(Place(letters[-1].created_at, letters[-1].id)) if len(found) > limit else None
    return letters, more


@router.get("/groups")
def group_dead_letters(
    _who: Viewer, reason: Text = None, mailbox: Text = None, since: Instant = None, until: Instant = None
) -> list[Group]:
    """Tell the open dead letters by their cause, the largest group first."""
    groups = operations.dead_letter_groups(Filter(reason, mailbox, since, until))
    return [Group.model_validate(group) for group in groups]


@router.get("/{id}")
def show_dead_letter(_who: Viewer, id: Id) -> DeadLetter:
    """Show a dead letter, by its id, the email's or the publisher's: of several an open one, or the newest."""
    return DeadLetter.model_validate(operations.dead_letter(id))


@router.get("/{id}/message")
def show_message(who: Operator, id: Id) -> Message:
    """Show the message of a dead letter; who read it is written down.

    Of an email it has the id alone; of a foreign one, whatever somebody wrote.
    """
    _, body = operations.read_message(id, who=f"api:{who}")
    return Message(message=None if body is None else body.decode("utf-8", "replace"))


@router.post("/replay")
def replay_dead_letters(who: Operator, which: Which) -> Resolution:
    """Send the emails of dead letters again, a bounded number with each request. Replaying twice sends once."""
    return _resolve_all("replay", which, who)


@router.post("/discard")
def discard_dead_letters(who: Operator, which: Which) -> Resolution:
    """Set dead letters aside for good, a bounded number with each request."""
    return _resolve_all("discard", which, who)


@router.post("/{id}/replay")
def replay_dead_letter(who: Operator, id: Id) -> Outcome:
    """Send the email of a dead letter again. Repeating it is harmless. 409: it cannot be, or was discarded."""
    return _resolve_one("replay", id, who)


@router.post("/{id}/discard")
def discard_dead_letter(who: Operator, id: Id) -> Outcome:
    """Set a dead letter aside for good. Repeating it is harmless. 409: it was replayed."""
    return _resolve_one("discard", id, who)


def _resolve_one(verb: Verb, id: str, who: str) -> Outcome:
    letter = operations.dead_letter(id)
    if letter.status == _DONE[verb]:
        return Outcome(id=letter.id, outcome=f"{letter.status} before")
    (outcome,) = _resolved(verb, [operations.open_dead_letter(letter.id)], who, None)
    if outcome.outcome != _DONE[verb]:
        raise HTTPException(409, outcome.outcome)
    return outcome


def _resolve_all(verb: Verb, which: Which, who: str) -> Resolution:
    ids, refused = _open_ones(which.ids)
    if which.ids and not ids:
        return Resolution(resolved=0, outcomes=refused, would_be_meant=[], next=None)
    filter = Filter(which.reason, which.mailbox, which.since, which.until, ids)
    letters, more = _page(filter, which.count, which.cursor)
    if which.dry_run:
        meant = [DeadLetter.model_validate(letter) for letter in letters]
        return Resolution(resolved=0, outcomes=refused, would_be_meant=meant, next=more)
    outcomes = _resolved(verb, letters, who, which.per_second)
    resolved = sum(outcome.outcome == _DONE[verb] for outcome in outcomes)
    return Resolution(resolved=resolved, outcomes=[*refused, *outcomes], would_be_meant=[], next=more)


def _open_ones(ids: list[str]) -> tuple[tuple[str, ...], list[Outcome]]:
    """Return the ids of the open dead letters that are named, and why the others are not meant."""
    found, refused = [], []
    for id in ids:
        try:
            found.append(operations.open_dead_letter(id).id)
        except operations.NotFound as reason:
            refused.append(Outcome(id=id, outcome=str(reason)))
    return tuple(found), refused


def _resolved(verb: Verb, letters: list[Letter], who: str, per_second: float | None) -> list[Outcome]:
    outcomes: list[Outcome] = []
    operations.resolve(
        letters,
        replay=verb == "replay",
        who=f"api:{who}",
        per_second=per_second,
        on_each=lambda letter, outcome: outcomes.append(Outcome(id=letter.id, outcome=outcome)),
    )
    return outcomes
