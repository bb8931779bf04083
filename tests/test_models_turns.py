"""Whose turn it is within a mailbox, and who is passed over."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import pytest
import support
from support import LEASE, claim, dispatch, rows, seconds_until, store

from models import Route, mailboxes, scheduling, turns
from models.scheduling import Pick
from models.turns import Busy, Candidate, Full

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

MINUTE = timedelta(minutes=1)
IDLE = Busy({}, {})


def fill(**counts: int) -> None:
    """Store so many emails of each tenant, or priority, of one mailbox."""
    for name, count in counts.items():
        for n in range(count):
            changes = {"priority": name} if name in ("high", "normal", "bulk") else {"metadata": {"tenant": name}}
            store(publisher_message_id=f"{name}-{n}", **changes)


def chosen(capacity: int, share: int = 100) -> list[Candidate]:
    found = turns.candidates(Route.PLAIN, capacity=capacity, share=share, busy=IDLE, after="")
    return turns.choose(found, capacity)


def names(mails: list[Candidate]) -> list[str]:
    known = dict(rows("SELECT id::text, publisher_message_id FROM incoming_emails"))
    return [known[mail.id].split("-")[0] for mail in mails]


def take(mails: list[Candidate]) -> None:
    """Dispatch these, as the scheduler does."""
    with scheduling.sweep():
        scheduling.claim(
            Route.PLAIN, [Pick(mail.id, mail.mailbox, None) for mail in mails], capacity=len(mails), lease=LEASE
        )
        turns.note_served(mails)


# Tenants


def test_tenants_of_a_mailbox_take_turns_whatever_waits_for_each() -> None:
    fill(ann=50, ben=2, cyd=1)
    assert names(chosen(4)) == ["ann", "ben", "cyd", "ann"]


def test_the_tenant_that_was_served_last_is_written_down_only_where_it_is_another() -> None:
    # Given one mailbox with tenants and one without
    fill(ann=2)
    store(**{"publisher_message_id": "other", "from": "other@example.com"})
    take(chosen(3)[:1])
    before = rows("SELECT mailbox, last_tenant, xmin::text FROM mailboxes")
    # When the same tenant is served again, and the mailbox that has none
    take(chosen(3))
    # Then
    assert rows("SELECT mailbox, last_tenant, xmin::text FROM mailboxes") == before
    # When the first is served without a tenant
    store(**{"publisher_message_id": "none", "from": before[0][0]})
    take(chosen(3))
    # Then
    assert rows("SELECT last_tenant FROM mailboxes") == [(None,)]


def test_turns_go_on_behind_the_tenant_that_was_served_last() -> None:
    fill(ann=50, ben=50, cyd=50)
    served = []
    for _ in range(6):
        mails = chosen(1)
        take(mails)
        served += names(mails)
    assert served == ["ann", "ben", "cyd"] * 2


def test_mail_without_a_tenant_takes_turns_with_that_of_tenants() -> None:
    fill(ann=50, normal=50)
    served = []
    for _ in range(4):
        mails = chosen(1)
        take(mails)
        served += names(mails)
    assert sorted(served) == ["ann", "ann", "normal", "normal"]


def test_more_tenants_than_a_sweep_has_room_for_are_all_served_in_time() -> None:
    fill(**{f"t{n:02}": 3 for n in range(30)})
    served: Counter[str] = Counter()
    for _ in range(15):
        mails = chosen(4, share=4)
        take(mails)
        served.update(names(mails))
    assert served == {f"t{n:02}": 2 for n in range(30)}


def test_within_a_lane_the_oldest_goes_first() -> None:
    ids = [store(publisher_message_id=f"normal-{n}") for n in range(5)]
    assert [mail.id for mail in chosen(3)] == ids[:3]


# Priorities


def test_priorities_are_weights_and_none_starves() -> None:
    # When one after the other is chosen of three backlogs that never end
    fill(high=3, normal=3, bulk=3)
    drawn = Counter(names([chosen(1)[0] for _ in range(600)]))
    # Then each has about its share of 6 : 3 : 1; five standard deviations are 12 %
    for name, share in {"high": 0.6, "normal": 0.3, "bulk": 0.1}.items():
        assert drawn[name] / 600 == pytest.approx(share, abs=0.12), drawn
        assert drawn[name]


def test_what_is_not_waiting_leaves_its_share_to_the_others() -> None:
    fill(normal=3, bulk=3)
    drawn = Counter(names([chosen(1)[0] for _ in range(400)]))
    assert drawn["bulk"] / 400 == pytest.approx(0.25, abs=0.12), drawn


def test_a_backlog_of_one_priority_is_served_whole() -> None:
    fill(bulk=7)
    assert len(chosen(10)) == 7


# Who is passed over


def test_a_full_mailbox_is_passed_over_until_budget_comes_back_but_its_look_ups_are_not() -> None:
    # Given mail to send and mail in doubt, of a mailbox whose budget is used up
    doubted = store(publisher_message_id="doubted-1")
    claim(doubted).mark_in_doubt(look_again_in=timedelta(), evidence={"seen": "timeout"})
    with scheduling.sweep():
        scheduling.wake_due()
    fill(normal=1)
    turns.note_full({"ann@example.com": Full(MINUTE, "limit: sends")})
    # Then
    assert [each.incoming_email_id for each in dispatch()] == [doubted]
    rows("UPDATE mailboxes SET full_until = now()")
    assert [each.publisher_message_id for each in dispatch()] == ["normal-0"]


def test_look_ups_of_a_mailbox_without_room_do_not_keep_others_from_their_turn() -> None:
    # Given more mail in doubt of one mailbox than is read at a time, all older than that of another
    rows("INSERT INTO mailboxes (mailbox, limits) VALUES ('ann@example.com', '{\"concurrency\": 1}')")
    for n in range(turns.BATCH + 1):
        store(publisher_message_id=f"{n}")
    other = store(**{"publisher_message_id": "other", "from": "ben@example.com"})
    rows(
        """
        UPDATE incoming_emails SET status = 'processing',
                                   updated_at = CASE WHEN id = %(other)s THEN now() ELSE now() - interval '1 hour' END
        """,
        {"other": other},
    )
    # When the one has its share in flight
    found = turns.look_ups(Route.PLAIN, capacity=10, share=4, busy=Busy({"ann@example.com": 1}, {}))
    # Then
    assert [each.id for each in found] == [other]


def test_a_full_mailbox_is_not_looked_at_for_every_mail_that_comes_back() -> None:
    turns.note_full({"ann@example.com": Full(timedelta(milliseconds=3), "limit: sends")})
    assert seconds_until("mailboxes", "full_until", "mailbox", "ann@example.com") > 0.2


def test_while_a_mailbox_has_little_left_smaller_mail_goes_and_none_is_touched() -> None:
    large = [store(publisher_message_id=f"large-{n}", to=["a@example.org", "b@example.org"]) for n in range(9)]
    small = store(publisher_message_id="small")
    other = store(**{"publisher_message_id": "other", "from": "zoe@example.com", "to": ["a@x.org", "b@x.org"]})
    before = rows("SELECT id, xmin::text FROM incoming_emails ORDER BY id")
    turns.note_full({"ann@example.com": Full(MINUTE, "limit: recipients", from_recipients=2)})
    assert [mail.id for mail in chosen(4, share=2)] == [small, other]
    assert rows("SELECT id, xmin::text FROM incoming_emails ORDER BY id") == before
    rows("UPDATE mailboxes SET full_until = now()")
    assert [mail.id for mail in chosen(2, share=2)] == large[:2]


def test_while_few_external_recipients_are_left_mail_with_fewer_goes() -> None:
    ids = {n: store(publisher_message_id=f"n-{n}", to=[f"{x}@example.org" for x in "abc"[:n]]) for n in (3, 2, 1)}
    inward = store(publisher_message_id="inward")
    rows("UPDATE incoming_emails SET external_recipient_count = 0 WHERE id = %(id)s", {"id": inward})
    found = {
        left: {
            mail.id
            for mail in turns.candidates(Route.PLAIN, capacity=9, share=9, busy=IDLE, after="", external_from=left)
        }
        for left in (None, 3, 2, 1)
    }
    assert found == {
        None: {*ids.values(), inward},
        3: {ids[2], ids[1], inward},
        2: {ids[1], inward},
        1: {inward},
    }


def test_a_mailbox_is_not_left_alone_for_long_whatever_it_waits_for() -> None:
    turns.note_full({"ann@example.com": Full(timedelta(days=1), "limit: recipients")})
    assert seconds_until("mailboxes", "full_until", "mailbox", "ann@example.com") <= 300


def test_room_that_comes_back_is_seen_at_once() -> None:
    fill(normal=1)
    turns.note_full({name: Full(MINUTE, "limit: recipients") for name in ("ann@example.com", "*", "ben@example.com")})
    turns.note_room("ann@example.com", external=False)
    assert [held.mailbox for held in mailboxes.held()] == ["*", "ben@example.com"]
    assert len(chosen(1)) == 1
    turns.note_room("ann@example.com", external=True)
    assert [held.mailbox for held in mailboxes.held()] == ["ben@example.com"]


def test_a_mailbox_with_large_mail_alone_takes_no_others_turn() -> None:
    for name in ("ann", "ben", "cyd"):
        store(**{"publisher_message_id": name, "from": f"{name}@example.com", "to": ["a@x.org", "b@x.org"]})
    small = store(**{"publisher_message_id": "small", "from": "zoe@example.com"})
    turns.note_full(
        {f"{name}@example.com": Full(MINUTE, "limit: recipients", from_recipients=2) for name in ("ann", "ben", "cyd")}
    )
    assert [mail.id for mail in chosen(1)] == [small]
    rows("UPDATE mailboxes SET full_until = now()")
    found = turns.candidates(Route.PLAIN, capacity=1, share=9, busy=IDLE, after="", external_from=2)
    assert [mail.id for mail in found] == [small]


def test_look_ups_wait_for_requests_and_for_no_other_budget() -> None:
    doubted = store()
    claim(doubted).mark_in_doubt(look_again_in=timedelta(), evidence={"seen": "timeout"})
    with scheduling.sweep():
        scheduling.wake_due()
    turns.note_full({"ann@example.com": Full(MINUTE, "limit: requests")})
    assert turns.look_ups(Route.PLAIN, capacity=1, share=4, busy=IDLE) == []
    turns.note_full({"ann@example.com": Full(MINUTE, "limit: sends")})
    assert len(turns.look_ups(Route.PLAIN, capacity=1, share=4, busy=IDLE)) == 1


def test_what_waits_for_its_time_has_not_waited_before_it() -> None:
    now, later = store(publisher_message_id="1"), store(publisher_message_id="2", send_at="2099-01-01T00:00:00Z")
    rows("UPDATE incoming_emails SET created_at = now() - interval '2 hours'")
    waited = turns.waited([now, later])
    assert (waited[now] > timedelta(hours=1), waited[later] < timedelta()) == (True, True)


@pytest.mark.parametrize("set_for", ["ann@example.com", "*"])
def test_a_concurrency_of_its_own_decides_how_many_are_in_flight(set_for: str) -> None:
    fill(normal=9)
    for concurrency, in_flight in [(2, 2), (0, 9), (7, 7)]:
        rows(
            """
            INSERT INTO mailboxes (mailbox, limits) VALUES (%(mailbox)s, %(limits)s)
            ON CONFLICT (mailbox) DO UPDATE SET limits = excluded.limits
            """,
            {"mailbox": set_for, "limits": f'{{"concurrency": {concurrency}}}'},
        )
        assert len(chosen(9, share=4)) == in_flight


def test_a_mailboxs_own_concurrency_counts_before_every_mailboxs() -> None:
    fill(normal=9)
    rows(
        """
        INSERT INTO mailboxes (mailbox, limits)
        VALUES ('ann@example.com', '{"concurrency": 3}'), ('*', '{"concurrency": 1}')
        """
    )
    assert len(chosen(9, share=4)) == 3


def test_a_mailbox_that_refuses_us_is_probed_by_one_call_at_a_time_be_it_a_send_or_a_backup() -> None:
    fill(normal=2)
    mailboxes.refuse("ann@example.com", why="403", first_wait=timedelta(), longest_wait=timedelta())
    backing_up = Busy({}, {"ann@example.com": 1})
    assert turns.candidates(Route.PLAIN, capacity=9, share=4, busy=backing_up, after="") == []
    assert len(chosen(9)) == 1


@pytest.mark.parametrize(
    ("paused", "routes"),
    [
        (
            "INSERT INTO routes (route, paused_until) VALUES ('attachment', now() + interval '1 minute')",
            {Route.ATTACHED},
        ),
        ("INSERT INTO mailboxes (mailbox, paused_until) VALUES ('*', now() + interval '1 minute')", set(Route)),
        ("INSERT INTO routes (route, paused_until) VALUES ('attachment', now())", set()),
    ],
)
def test_routes_and_everything_can_be_paused(paused: str, routes: set[Route]) -> None:
    rows(paused)
    assert scheduling.agenda().closed.routes == routes
