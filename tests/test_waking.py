"""Wake-ups while Redis or RabbitMQ is away: the last of them is made up for, or mail would wait for the next minute."""

from __future__ import annotations

import pytest
import support
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from support import Fleet, wait_until, work

import runtime
from outbox import Publisher, connection_parameters

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet


def test_a_wake_up_that_comes_too_soon_after_another_without_redis_comes_later(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    monkeypatch.setattr(runtime.wake_ups, "redis", Redis(port=1, retry=Retry(NoBackoff(), 0)))
    runtime.wake("schedule_emails")
    wait_until("it is woken", lambda: fleet.take("scheduler"))
    # When
    for _ in range(50):
        runtime.wake("schedule_emails")
    # Then
    (message,) = wait_until("it is woken again", lambda: fleet.take("scheduler"))
    assert message.actor_name == "schedule_emails"


def test_a_wake_up_that_rabbitmq_did_not_take_comes_when_it_is_back(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    away = Publisher(connection_parameters("amqp://127.0.0.1:1", "tests"), runtime.declare)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "publisher", away)
        # When
        runtime.wake("schedule_emails")
        wait_until("it was refused", lambda: "schedule_emails" in runtime.wake_ups.postponed)
    away.close()
    # Then
    (message,) = wait_until("it is woken", lambda: fleet.take("scheduler"))
    assert message.actor_name == "schedule_emails"


def test_a_message_takes_no_mark_away_but_its_own(fleet: Fleet) -> None:
    # Given a wake-up that is on its way, and the clock's message before it
    runtime.wake("schedule_emails")
    (wake_up,) = wait_until("it is woken", lambda: fleet.take("scheduler"))
    clocks = runtime.fleet_broker.get_actor("schedule_emails").message()
    # When the clock's is worked on
    work(clocks)
    # Then nobody is woken besides, until the wake-up itself has been worked on
    runtime.wake("schedule_emails")
    assert runtime.redis.exists("mailfleet:wake:schedule_emails")
    assert not fleet.take("scheduler")
    work(wake_up)
    runtime.wake("schedule_emails")
    assert wait_until("it is woken again", lambda: fleet.take("scheduler"))


def test_the_mark_of_an_earlier_version_is_taken_away_by_its_message(fleet: Fleet) -> None:
    runtime.redis.set("mailfleet:wake:schedule_emails", 1)
    work(runtime.fleet_broker.get_actor("schedule_emails").message())
    assert not runtime.redis.exists("mailfleet:wake:schedule_emails")
