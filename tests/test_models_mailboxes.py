"""Pauses of mailboxes, of routes and of everything: which of two stands, and whom it binds."""

from __future__ import annotations

from datetime import timedelta

import pytest
import support
from support import rows, seconds_until, table

from models import Route, mailboxes
from models.mailboxes import EVERY, FOREVER, Pause

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
ANN = "ann@example.com"


def paused_for() -> float:
    return seconds_until("mailboxes", "paused_until", "mailbox", ANN)


def test_a_pause_stands_with_its_reason_until_it_ends() -> None:
    mailboxes.pause("Ann@Example.com", MINUTE, why="429")
    (pause,) = mailboxes.pauses()
    assert (pause.mailbox, pause.pause_reason, pause.paused_by) == (ANN, "429", "graph")
    assert 55 < paused_for() <= 60
    rows("UPDATE mailboxes SET paused_until = now()")
    assert mailboxes.pauses() == []


def test_a_longer_pause_is_never_shortened_and_a_shorter_one_is_lengthened() -> None:
    mailboxes.pause(ANN, HOUR, why="first")
    mailboxes.pause(ANN, MINUTE, why="second")
    assert mailboxes.pauses()[0].pause_reason == "first"
    mailboxes.pause(ANN, 2 * HOUR, why="third")
    assert mailboxes.pauses()[0].pause_reason == "third"


def test_an_operators_pause_lasts_until_it_is_resumed() -> None:
    mailboxes.pause_by_hand(ANN, why="migration", who="olga")
    mailboxes.pause(ANN, HOUR, why="429")
    (pause,) = mailboxes.pauses()
    assert (pause.paused_until, pause.paused_by) == (FOREVER, "olga")
    assert mailboxes.resume("ANN@example.com")
    assert mailboxes.pauses() == []
    assert not mailboxes.resume(ANN)


def by_graph(wait: timedelta) -> None:
    mailboxes.pause(ANN, wait, why="429")


def by_hand(wait: timedelta | None) -> None:
    mailboxes.pause_by_hand("Ann@Example.com", why="migration", who="olga", wait=wait)


def test_of_graphs_pause_and_an_operators_the_one_that_ends_later_stands_under_its_own_name() -> None:
    for first, second, stands in (
        (by_hand, by_graph, "olga"),
        (by_graph, by_hand, "graph"),
    ):
        first(HOUR)
        second(MINUTE)
        (pause,) = mailboxes.pauses()
        assert (pause.paused_by, pause.pause_reason == "migration") == (stands, stands == "olga")
        assert 3590 < paused_for() <= 3600
        # And the longer one of the other's is not cut short either
        second(2 * HOUR)
        (pause,) = mailboxes.pauses()
        assert (pause.paused_by == stands, 7190 < paused_for() <= 7200) == (False, True)
        mailboxes.resume(ANN)


def test_an_operators_pause_until_it_is_resumed_outlasts_every_other() -> None:
    by_hand(None)
    by_hand(HOUR)
    by_graph(1000 * HOUR)
    mailboxes.refuse(ANN, why="403", first_wait=HOUR, longest_wait=HOUR)
    (pause,) = mailboxes.pauses()
    assert (pause.paused_until, pause.paused_by, pause.until_resumed) == (FOREVER, "olga", True)


def test_whoever_pauses_is_told_which_pause_stands() -> None:
    by_graph(HOUR)
    standing = mailboxes.pause_by_hand(ANN, why="a moment", who="olga", wait=MINUTE)
    assert (standing.mailbox, standing.pause_reason, standing.until_resumed) == (ANN, "429", False)
    standing = mailboxes.pause_route(Route.PLAIN, why="a moment", who="olga", wait=MINUTE)
    assert (standing.route, standing.paused_by) == ("no-attachment", "olga")


def test_routes_and_everything_are_paused_and_resumed_like_mailboxes() -> None:
    # Given
    by_hand(MINUTE)
    mailboxes.pause_by_hand(EVERY, why="moving", who="olga", wait=HOUR)
    mailboxes.pause_route(Route.ATTACHED, why="store is down", who="ben")
    mailboxes.pause_route(Route.ATTACHED, why="shorter", who="ben", wait=HOUR)
    # Then all are told, the longest first
    assert [pause._replace(paused_until=FOREVER) for pause in mailboxes.pauses()] == [
        Pause(EVERY, FOREVER, "store is down", "ben", "attachment"),
        Pause(EVERY, FOREVER, "moving", "olga"),
        Pause(ANN, FOREVER, "migration", "olga"),
    ]
    # And each ends by itself
    assert (mailboxes.resume_route(Route.ATTACHED), mailboxes.resume_route(Route.ATTACHED)) == (True, False)
    assert not mailboxes.resume_route(Route.PLAIN)
    assert mailboxes.resume(EVERY)
    assert [pause.mailbox for pause in mailboxes.pauses()] == [ANN]
    rows("UPDATE routes SET paused_until = now()")
    assert [pause.route for pause in mailboxes.pauses()] == [None]


def test_a_mailbox_whose_pause_has_ended_and_that_is_only_probed_is_resumed_too() -> None:
    mailboxes.refuse(ANN, why="403", first_wait=HOUR, longest_wait=HOUR)
    rows("UPDATE mailboxes SET paused_until = now()")
    assert mailboxes.resume(ANN)
    assert table("mailboxes")[0]["refusal_count"] == 0
    assert not mailboxes.resume(ANN)


def refuse(longest: timedelta = 5 * MINUTE) -> timedelta:
    return mailboxes.refuse(ANN, why="403", first_wait=MINUTE, longest_wait=longest)


def pause_passes() -> None:
    rows("UPDATE mailboxes SET paused_until = now()")


def test_refusals_in_a_row_pause_longer_each_time_up_to_the_longest() -> None:
    waits = []
    for _ in range(5):
        waits.append(refuse())
        pause_passes()
    assert waits == [MINUTE, 2 * MINUTE, 4 * MINUTE, 5 * MINUTE, 5 * MINUTE]
    rows("UPDATE mailboxes SET refusal_count = 1000")
    assert refuse(HOUR) == HOUR
    assert 3595 < paused_for() <= 3600


def test_calls_that_are_refused_together_count_as_one_refusal() -> None:
    # Given four calls that were under way when the mailbox began to refuse
    waits = [refuse() for _ in range(4)]
    # Then its pause is that of the first
    assert table("mailboxes")[0]["refusal_count"] == 1
    assert 55 < paused_for() <= 60
    assert waits == sorted(waits, reverse=True)
    # And when it is over, the next one counts
    pause_passes()
    assert refuse() == 2 * MINUTE


def test_a_refusal_counts_while_another_pause_stands_and_does_not_shorten_it() -> None:
    by_hand(None)
    # Then whoever was refused asks again in a while, as the operator may have ended the pause
    assert refuse() == 5 * MINUTE
    assert table("mailboxes")[0]["refusal_count"] == 1
    assert mailboxes.pauses()[0].paused_by == "olga"


def test_resuming_forgets_the_refusals() -> None:
    mailboxes.refuse(ANN, why="403", first_wait=MINUTE, longest_wait=HOUR)
    mailboxes.resume(ANN)
    assert table("mailboxes")[0]["refusal_count"] == 0
