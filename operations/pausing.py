"""Pauses: nothing is sent from a mailbox, by a route, or at all, until an operator or the clock ends it."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from typing import NamedTuple

import models
import runtime
from actors.budgets import OPERATORS_PATIENCE, turn
from limiter import Unavailable
from models import Route, audit, mailboxes
from models.mailboxes import Pause
from models.turns import EVERY

_ROUTES = {route.value for route in Route}


class Resumed(NamedTuple):
    """What a resumption ended.

    Attributes:
        stood: Whether there was a pause, or a mailbox that was probed.
        told: Whether Redis answered. If not, a pause of Graph's that it remembers ends by itself.
    """

    stood: bool
    told: bool


def pause(subject: str, *, why: str, who: str, wait: timedelta | None = None) -> Pause:
    """Begin nothing from a mailbox, by a route, or at all. Mail that a worker has in hand goes out.

    What is dispatched already and waits for a worker is put back when one takes it up. Backups that are, are made.

    Args:
        subject: A mailbox's address, a route, or `EVERY` mailbox.
        wait: For so long; None: until it is resumed.

    Returns:
        The pause that stands now: one that ends later than this one is kept.
    """
    with models.transaction():
        if subject in _ROUTES:
            standing = mailboxes.pause_route(Route(subject), why=why, who=who, wait=wait)
        else:
            standing = mailboxes.pause_by_hand(subject, why=why, who=who, wait=wait)
        seconds = wait.total_seconds() if wait else None
        audit.record(who, "pause", subject.lower(), why=why, seconds=seconds)
    return standing


def resume(subject: str, *, who: str) -> Resumed:
    """End a pause, the operator's or Graph's, and have the mail that it held back tried at once.

    What is paused by itself besides stays paused.
    """
    told = True
    with ExitStack() as open_turn:
        if subject not in _ROUTES:
            try:
                # A scheduler that knows of the pause has then written it, and what follows from it, wherever it does.
                open_turn.enter_context(turn(OPERATORS_PATIENCE))
                _end_graphs_pause(subject)
            except Unavailable:
                told = False
        with models.transaction():
            stood = mailboxes.resume_route(Route(subject)) if subject in _ROUTES else mailboxes.resume(subject)
            audit.record(who, "resume", subject.lower())
    if subject not in _ROUTES:
        mailboxes.release(subject)
    runtime.wake("schedule_emails")
    return Resumed(stood, told)


def _end_graphs_pause(mailbox: str) -> None:
    if mailbox == EVERY:
        runtime.limiter.resume_all()
    else:
        runtime.limiter.resume(mailbox)


def pauses() -> list[Pause]:
    """Return every pause that stands, the tenant's first where Redis alone knows of it.

    Raises:
        Unavailable: Redis does not answer.
    """
    until = runtime.limiter.tenant_paused_until()
    known = mailboxes.pauses()
    if until is None or any(pause.mailbox == EVERY and pause.route is None for pause in known):
        return known
    return [Pause(EVERY, until, "asked to wait or refused us", mailboxes.GRAPH), *known]
