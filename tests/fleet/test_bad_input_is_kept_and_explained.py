"""What cannot be accepted: told apart, explained, kept, and no obstacle to what comes behind it."""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple

import orjson
import pika
import pytest
from fleet_support import (
    a_mailbox,
    an_email,
    assert_each_left_once,
    events_of,
    fate,
    put,
    settled,
    settled_one,
    take_all,
)

from sandbox.world import World

MAILBOX = a_mailbox("careless")


def _with(**changes: Any) -> bytes:
    return orjson.dumps(an_email(MAILBOX, **changes))


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def _attached(**changes: Any) -> bytes:
    attachment = {"name": "a.pdf", "size": 10, "urlOrId": "https://files.contoso.example/a.pdf"} | changes
    return _with(attachments=[attachment])


#: What is sent, the reason that is given for its rejection, and a word that its explanation must contain.
BAD = {
    "nothing": (b"", "not_json", "JSON"),
    "half an object": (b'{"from": "ann@contoso.example"', "not_json", "JSON"),
    "Latin-1": ('{"subject": "Grüße"}'.encode("latin-1"), "not_json", "JSON"),
    "binary": (bytes(range(256)), "not_json", "JSON"),
    "a bottomless list": (_nested(100_000), "not_json", "JSON"),
    "a number": (b"17", "invalid", "message"),
    "a list": (b"[]", "invalid", "message"),
    "null": (b"null", "invalid", "message"),
    "an empty object": (b"{}", "invalid", "from"),
    "too many bytes": (_with(body={"contentType": "text", "content": "x" * 4_100_000}), "too_large", "bytes"),
    "too long a body": (_with(body={"contentType": "text", "content": "x" * 3_100_000}), "invalid", "body"),
    "no sender": (_with(**{"from": None}), "invalid", "from"),
    "a sender without a domain": (_with(**{"from": "ann"}), "invalid", "from"),
    "no recipient": (_with(to=[]), "invalid", "recipients"),
    "a recipient with a line break": (_with(to=["bob@fabrikam.example\r\nBcc: eve@evil.example"]), "invalid", "to.0"),
    "a recipient with a dot before the at": (_with(to=["bob.@fabrikam.example"]), "invalid", "to.0"),
    "recipients as one word": (_with(to="bob@fabrikam.example"), "invalid", "to"),
    "501 recipients": (_with(to=[f"b{n}@fabrikam.example" for n in range(501)]), "invalid", "to"),
    "a line break in the subject": (_with(subject="Hello\nBcc: eve@evil.example"), "invalid", "subject"),
    "a number as subject": (_with(subject=17), "invalid", "subject"),
    "half a character in the subject": (
        _with(subject="SURROGATE").replace(b"SURROGATE", b"\\ud800"),
        "not_json",
        "JSON",
    ),
    "NUL in the body": (_with(body={"contentType": "text", "content": "a\0b"}), "invalid", "body"),
    "an unknown kind of body": (_with(body={"contentType": "rtf", "content": "x"}), "invalid", "contentType"),
    "an unknown field": (_with(colour="red"), "invalid", "colour"),
    "recipients twice": (_with(to=[]).replace(b'"to":[]', b'"to":["a@b.example"],"to":["c@d.e"]'), "invalid", "to"),
    "a million values": (b'{"metadata": [' + b"0," * 1_000_000 + b"0]}", "invalid", "metadata"),
    "an integer of 65 bits": (_with(metadata={"n": 2**63}), "invalid", "metadata.n"),
    "NUL in the id": (_with(publisher_message_id="a\0b"), "invalid", "publisher_message_id"),
    "an empty id": (_with(publisher_message_id=""), "invalid", "publisher_message_id"),
    "a header of Exchange's own": (_with(headers={"Subject": "x"}), "invalid", "headers"),
    "a line break in a header": (_with(headers={"x-ref": "a\r\nBcc: eve@evil.example"}), "invalid", "headers"),
    "one header in two cases": (_with(headers={"x-ref": "1", "X-Ref": "2"}), "invalid", "headers"),
    "six headers": (_with(headers={f"x-{n}": "1" for n in range(6)}), "invalid", "headers"),
    "a time without a zone": (_with(send_at="2026-03-01T10:00:00"), "invalid", "send_at"),
    "a word as time": (_with(send_at="tomorrow"), "invalid", "send_at"),
    "expiry before sending": (
        _with(send_at="2126-03-01T10:00:00Z", expires_at="2126-03-01T09:00:00Z"),
        "invalid",
        "expires_at",
    ),
    "an unknown priority": (_with(priority="urgent"), "invalid", "priority"),
    "a file without TLS": (_attached(urlOrId="http://files.contoso.example/file.bin"), "invalid", "urlOrId"),
    "a negative size": (_attached(size=-1), "invalid", "size"),
    "151 MB": (_attached(size=151 * 1024 * 1024), "invalid", "size"),
    "an attachment on our own disk": (_attached(urlOrId="file:///etc/passwd"), "invalid", "urlOrId"),
    "an attachment without an address": (_with(attachments=[{"name": "a.pdf", "size": 1}]), "invalid", "urlOrId"),
}  # fmt: skip


class Answers(NamedTuple):
    """What came of each bad message, by its correlation id."""

    kept: dict[str, tuple[pika.BasicProperties, bytes]]
    replies: dict[str, tuple[pika.BasicProperties, bytes]]


@pytest.fixture(scope="module")
def reply_to(world: World) -> str:
    name = f"publisher.{uuid.uuid4().hex}"
    with pika.BlockingConnection(pika.URLParameters(world.environment["RABBITMQ_URL"])) as connection:
        connection.channel().queue_declare(name, arguments={"x-expires": 600_000})
    return name


@pytest.fixture(scope="module")
def answers(world: World, reply_to: str) -> Answers:
    for what, (body, _, _) in BAD.items():
        put(world, "send_email", body, correlation_id=what, reply_to=reply_to)
    kept: dict[str, tuple[pika.BasicProperties, bytes]] = {}
    replies: dict[str, tuple[pika.BasicProperties, bytes]] = {}

    def all_came() -> bool:
        kept.update({each[0].correlation_id: each for each in take_all(world, "send_email.rejected")})
        replies.update({each[0].correlation_id: each for each in take_all(world, reply_to)})
        return kept.keys() >= BAD.keys() <= replies.keys()

    world.wait_until("every bad message is rejected", all_came)
    return Answers(kept, replies)


@pytest.mark.parametrize("what", BAD)
def test_a_message_that_cannot_be_accepted_is_kept_with_the_reason(what: str, answers: Answers) -> None:
    body, reason, word = BAD[what]

    properties, kept = answers.kept[what]
    assert kept == body
    assert properties.headers["x-reject-reason"] == reason
    assert word in properties.headers["x-reject-detail"]


@pytest.mark.parametrize("what", BAD)
def test_its_publisher_is_told(what: str, answers: Answers, world: World) -> None:
    _, reason, word = BAD[what]

    properties, body = answers.replies[what]
    told = orjson.loads(body)
    assert (properties.type, told["status"], told["reason"]) == ("SendEmailRejected", "rejected", reason)
    assert word in told["detail"]
    [event] = world.wait_until(
        "the event arrives", lambda: [e for e in world.events("SendEmailRejected") if e.correlation_id == what]
    )
    assert (event.message_id, event.body) == (properties.message_id, told)


def test_good_mail_behind_bad_mail_goes_out(world: World) -> None:
    good = an_email(MAILBOX)

    world.publish(*(body for body, _, _ in BAD.values()), good, b"bad again")

    assert_each_left_once(world, [settled_one(world, good)])


def test_the_same_id_with_other_content_is_rejected_and_changes_nothing(world: World) -> None:
    # Given an email that was received
    email = an_email(MAILBOX, subject="The first")
    world.publish(email)
    settled_one(world, email)

    # When its id comes again with another subject
    world.publish(email | {"subject": "The second"}, correlation_id="conflict")

    # Then the second is rejected, with the first one's id, and the first stays as it was
    event = world.wait_until(
        "the conflict is told",
        lambda: next((e for e in world.events("SendEmailRejected") if e.correlation_id == "conflict"), None),
    )
    first = fate(world, email)
    assert first is not None
    assert event.body["reason"] == "conflict"
    assert event.body["incoming_email_id"] == first.id
    [delivery] = world.simulator.deliveries(tag=first.id)
    assert delivery["subject"] == "The first"


def test_an_email_without_an_id_is_known_by_its_content(world: World) -> None:
    # Given an email without an id, published twice, the second time with its fields in another order
    email = an_email(a_mailbox("nameless"), publisher_message_id=None)
    world.publish(email, dict(reversed(email.items())))

    # Then it has an id made of its content, and leaves once
    found = world.wait_until(
        "it is received",
        lambda: world.rows("SELECT publisher_message_id FROM incoming_emails WHERE mailbox = %(from)s", email),
    )
    [(publisher_message_id,)] = found
    assert publisher_message_id.startswith("sha256:")
    known = settled_one(world, {"publisher_message_id": publisher_message_id})
    assert_each_left_once(world, [known])
    [event] = events_of(world, known, "SendEmailReceived")
    assert event.body["publisher_message_id"] == publisher_message_id


ODD_PROPERTIES: list[dict[str, Any]] = [
    {"correlation_id": "a\0b"},
    {"reply_to": "a\0b"},
    {"headers": {"traceparent": "a\0b"}},
    {"correlation_id": b"\xff\xfe"},
    {"reply_to": b"\xff\xfe"},
    {"headers": {"traceparent": 17}},
    {"headers": {"traceparent": "x" * 5000}},
    {"reply_to": "a queue that does not exist"},
    {"content_type": "text/html", "content_encoding": "gzip", "expiration": "600000", "priority": 200},
]


def test_odd_properties_do_not_stop_an_email(world: World) -> None:
    odd = [an_email(MAILBOX) for _ in ODD_PROPERTIES]

    for email, properties in zip(odd, ODD_PROPERTIES, strict=True):
        put(world, "send_email", orjson.dumps(email), **properties)

    known = settled(world, odd)
    assert_each_left_once(world, known.values())
    for each in known.values():
        world.wait_until("its publisher is told", lambda each=each: events_of(world, each, "SendEmailSent"))
