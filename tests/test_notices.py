"""New dead letters wake somebody: once for all of a minute, whatever dies or is away, and without an address."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson
import pytest
import support
from operator_support import foreign, give_up, letter_of
from pydantic import SecretStr
from support import Fleet, rows, table

import actors
import notices
import operations
import runtime
from crash_points import CrashPoint
from outbox import Unconfirmed

shared_database, tables, fleet, configure = support.shared_database, support.tables, support.fleet, support.configure

SECRET = "a-secret-of-the-receiver"


class Post(NamedTuple):
    """What the webhook was told."""

    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        return orjson.loads(self.content)


class Receiver:
    """Somebody's webhook."""

    def __init__(self) -> None:
        self.posts: list[Post] = []
        self.answer = 204
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.posts.append(Post({name.lower(): value for name, value in self.headers.items()}, content))
                self.send_response(receiver.answer)
                self.send_header("Location", receiver.url)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook/{SECRET}"


@pytest.fixture
def receiver(configure: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A webhook that the fleet knows."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = Receiver()
    threading.Thread(target=started.server.serve_forever, args=[0.02], daemon=True).start()
    configure(dead_letter_webhook_url=SecretStr(started.url), dead_letter_webhook_secret=SecretStr(SECRET))
    yield started
    started.server.shutdown()
    started.server.server_close()


def notify() -> None:
    actors.notify_dead_letters()


def make_due() -> None:
    rows("UPDATE dead_letter_notices SET deliver_at = now() WHERE deliver_at IS NOT NULL")


def test_a_webhook_on_this_machine_is_told_without_the_environments_proxy(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    notices.deliver(receiver.url, None, "n-1", b"{}", datetime.now(UTC))
    assert [post.content for post in receiver.posts] == [b"{}"]


def test_what_came_since_the_last_turn_is_one_notice_with_counts_and_ids(fleet: Fleet, receiver: Receiver) -> None:
    # Given
    ids = [give_up("order-1"), give_up("order-2"), give_up("order-3", reason="mailbox_full")]
    foreign(b"no message")
    # When
    notify()
    notify()
    # Then
    (post,) = receiver.posts
    assert post.body["count"] == 4
    assert post.body["by_reason"] == {"invalid_recipient": 2, "mailbox_full": 1, "actor_failed": 1}
    assert post.body["by_queue"] == {"send_plain": 3, "maintenance": 1}
    told = post.body["dead_letters"]
    assert [letter["incoming_email_id"] for letter in told] == [*ids, None]
    assert [letter["id"] for letter in told[:3]] == [letter_of(id) for id in ids]


def test_a_notice_has_no_address_and_no_text_that_a_stranger_wrote(fleet: Fleet, receiver: Receiver) -> None:
    give_up("carl@example.com")
    foreign(b"dora@example.com", queue_name="eve@example.com")
    notify()
    (post,) = receiver.posts
    assert b"@" not in post.content
    assert post.body["by_queue"] == {"send_plain": 1, "other": 1}


def test_the_webhook_can_tell_that_a_notice_is_ours_and_which(fleet: Fleet, receiver: Receiver) -> None:
    give_up()
    notify()
    (post,) = receiver.posts
    signed = f"{post.headers['webhook-id']}.{post.headers['webhook-timestamp']}.".encode() + post.content
    mac = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    assert post.headers["webhook-signature"] == f"v1,{mac}"
    assert post.headers["webhook-id"] == post.body["notice_id"]


def test_the_signature_is_that_of_the_standard() -> None:
    # The example of github.com/standard-webhooks/standard-webhooks, libraries/python/tests.
    at = datetime.fromtimestamp(1614265330, UTC)
    given = notices.signature(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", at, b'{"test": 2432232314}'
    )
    assert given == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secret", ["short", "whsec_", "whsec_c2hvcnQ=", "whsec_no base64 at all ..."])
def test_a_secret_that_protects_nothing_is_refused(secret: str) -> None:
    with pytest.raises(ValueError, match="must have") as refused:
        notices.check_secret(secret)
    assert secret not in str(refused.value)


@pytest.mark.parametrize("answer", [301, 404, 429, 500])
def test_a_notice_that_the_webhook_does_not_take_is_told_again_later_to_the_byte(
    fleet: Fleet, receiver: Receiver, answer: int
) -> None:
    # Given
    receiver.answer = answer
    give_up("order-1")
    notify()
    # When its time has not come, nothing is tried, not even what came since
    give_up("order-2")
    notify()
    assert len(receiver.posts) == 1
    # Then it comes again, with the other behind it
    receiver.answer = 200
    make_due()
    notify()
    first, again, other = receiver.posts
    assert again.content == first.content
    assert again.headers["webhook-id"] == first.headers["webhook-id"]
    assert other.body["count"] == 1
    assert {(notice["attempt_count"], notice["deliver_at"]) for notice in table("dead_letter_notices")} == {
        (2, None),
        (1, None),
    }


def test_the_waits_double_up_to_an_hour() -> None:
    assert [notices.wait_before(attempt).total_seconds() / 60 for attempt in (1, 2, 3, 7, 500)] == [1, 2, 4, 60, 60]


def test_a_webhook_that_is_away_is_named_in_no_error(fleet: Fleet, receiver: Receiver) -> None:
    receiver.server.shutdown()
    receiver.server.server_close()
    give_up()
    notify()
    (notice,) = table("dead_letter_notices")
    assert notice["last_error"] == "no answer (ConnectionError)"
    assert notice["deliver_at"] is not None


class Died(Exception):
    """Raised in the place of a death of the process."""


@pytest.mark.parametrize("line", [CrashPoint.NOTICE_RECORDED, CrashPoint.NOTICE_TOLD])
def test_a_death_loses_no_notice_and_repeats_it_under_the_same_id(
    fleet: Fleet, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, line: CrashPoint
) -> None:
    # Given
    def die(point: CrashPoint) -> None:
        if point is line:
            raise Died

    give_up()
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "crash_point", die)
        with pytest.raises(Died):
            notify()
    # When its lease is over
    rows("UPDATE dead_letter_notices SET claimed_until = now()")
    notify()
    # Then
    assert len(receiver.posts) == 1
    events = [properties.message_id for properties, _ in notices_on_mail_events(fleet)]
    assert set(events) == {receiver.posts[0].headers["webhook-id"]}


def notices_on_mail_events(fleet: Fleet) -> list[tuple[Any, bytes]]:
    runtime.events.close()
    return [taken for taken in fleet.take_raw("test.events") if taken[0].type == notices.TYPE]


def test_a_foreign_dead_letter_is_an_event_too_even_without_a_webhook(fleet: Fleet) -> None:
    foreign(b"no message")
    notify()
    ((properties, body),) = notices_on_mail_events(fleet)
    assert properties.message_id == orjson.loads(body)["notice_id"]
    assert orjson.loads(body)["by_reason"] == {"actor_failed": 1}
    (notice,) = table("dead_letter_notices")
    assert (notice["published_at"] is not None, notice["deliver_at"]) == (True, None)


def test_what_rabbitmq_does_not_confirm_is_published_at_the_next_turn(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away:
        def publish(self, _messages: Any) -> None:
            raise Unconfirmed("RabbitMQ is away")

    foreign(b"no message")
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "publisher", Away())
        with pytest.raises(Unconfirmed):
            notify()
    notify()
    assert len(notices_on_mail_events(fleet)) == 1


def test_a_letter_that_is_resolved_before_the_turn_wakes_nobody_and_one_that_fails_again_does(
    fleet: Fleet, receiver: Receiver
) -> None:
    # Given
    discarded = foreign(b"no message")
    letter = operations.dead_letter(discarded)
    operations.resolve([letter], replay=False, who="ann")
    notify()
    assert receiver.posts == []
    # When the same message of an email fails, is replayed and fails again
    id = give_up()
    notify()
    letter = operations.dead_letter(id)
    operations.resolve([letter], replay=True, who="ann")
    message_id = table("dlq")[-1]["message_id"]
    support.claim(id).fail(
        reason="mailbox_full",
        error="Graph says no",
        message_id=message_id,
        queue_name="send_plain",
        actor_name="send_plain",
        publish_within=support.WITHIN,
    )
    notify()
    # Then
    assert [post.body["by_reason"] for post in receiver.posts] == [{"invalid_recipient": 1}, {"mailbox_full": 1}]


def test_many_are_counted_and_only_some_are_named(fleet: Fleet, receiver: Receiver) -> None:
    for _ in range(notices.MAX_NAMED + 5):
        foreign(b"no message")
    notify()
    (post,) = receiver.posts
    assert (post.body["count"], len(post.body["dead_letters"])) == (notices.MAX_NAMED + 5, notices.MAX_NAMED)


def test_old_notices_are_deleted(fleet: Fleet) -> None:
    foreign(b"no message")
    notify()
    rows("UPDATE dead_letter_notices SET created_at = now() - interval '31 days'")
    notify()
    assert table("dead_letter_notices") == []
