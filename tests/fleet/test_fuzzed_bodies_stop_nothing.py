"""Thousands of bodies that somebody might put on the queue: each is sent as it was asked for, or kept with the reason.

The bridge finds them all at once, so that good ones and bad ones share its batches.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pika
import pytest
from fleet_support import ADDRESS_MARK, a_mailbox, an_email, assert_each_left_once, put, settled, take_all
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from send_email_bodies import EVE, MARK, Body, bodies, emails, largest_rejected, largest_sent
from strange_properties import STRANGE_PROPERTIES

import contracts
from sandbox.world import World

#: Each comes intact, damaged in sixteen ways, and with a piece of noise.
EMAILS = 120
#: So many mailboxes, some with strange names, that none comes to its limit of recipients per day.
SENDERS = [
    f"{name}{number}-{ADDRESS_MARK}@fuzzed.example"
    for name in ("ann", "o'brien", "a/b?c#d%e&f=g", "ben+tag", "{x}|~", "z")
    for number in range(8)
]
WITHIN = timedelta(minutes=3)
_DEVICES = ("con", "prn", "aux", "nul", "conin$", "conout$")
#: Of the largest bodies three are in hand at a time, and one as Python's objects, which take up to 150 MB.
GROWTH_BYTES = 300_000_000


class Answered(NamedTuple):
    """What came of the bodies: originals and events by correlation id, ids of rows by the publisher's id."""

    published: dict[str, Body]
    kept: dict[str, tuple[pika.BasicProperties, bytes]]
    rejections: dict[str, list[Any]]
    ids: dict[str, str]

    def accepted(self) -> Iterator[tuple[Body, str]]:
        """Yield what was not rejected, each with the id under which it must be stored."""
        for correlation_id, body in self.published.items():
            if correlation_id not in self.kept:
                yield body, contracts.accept(body.content).publisher_message_id


@pytest.fixture(scope="module")
def files(world: World) -> Callable[[int], str]:
    return lambda size: world.simulator.file_url(size, seed="fuzzed")


@pytest.fixture(scope="module")
def fuzzed(files: Callable[[int], str]) -> list[Body]:
    """The same bodies each time, but for the ids."""
    drawn: list[Body] = []
    ids = st.builds(lambda: f"{MARK}-{uuid.uuid4()}")

    @hypothesis_settings(
        max_examples=EMAILS,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(emails(ids, st.sampled_from(SENDERS), files)))
    def draw(made: list[Body]) -> None:
        drawn.extend(made)

    draw()
    return drawn


@pytest.fixture(scope="module")
def answered(world: World, fuzzed: list[Body]) -> Answered:
    published = {f"fuzzed-{number}": body for number, body in enumerate(fuzzed)}
    world.fleet.suspend("bridge")
    try:
        publish(world, {correlation_id: body.content for correlation_id, body in published.items()})
    finally:
        world.fleet.resume("bridge")
    return answers(world, published)


def publish(world: World, contents: dict[str, bytes]) -> None:
    with pika.BlockingConnection(pika.URLParameters(world.environment["RABBITMQ_URL"])) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for correlation_id, content in contents.items():
            properties = pika.BasicProperties(delivery_mode=2, correlation_id=correlation_id)
            channel.basic_publish("", "send_email", content, properties, mandatory=True)


def answers(world: World, published: dict[str, Body]) -> Answered:
    """Wait until each body is in one place or the other, and the publishers of the bad ones are told."""
    answered = Answered(published, {}, {}, {})

    def all_answered() -> bool:
        kept = {each[0].correlation_id: each for each in take_all(world, "send_email.rejected")}
        # What other tests left there is theirs.
        answered.kept.update({id: each for id, each in kept.items() if id in published})
        rows = world.rows("SELECT publisher_message_id, id::text FROM incoming_emails")
        answered.ids.update(rows)
        try:
            return {id for _, id in answered.accepted()} <= answered.ids.keys()
        except contracts.Unacceptable:
            return False  # this one is still to be rejected

    def all_told() -> bool:
        answered.rejections.clear()
        for event in world.events("SendEmailRejected"):
            answered.rejections.setdefault(event.correlation_id or "", []).append(event)
        return answered.rejections.keys() >= answered.kept.keys()

    world.wait_until("the queue is empty", lambda: world.queue_depth("send_email") == 0, WITHIN)
    world.wait_until(f"{len(published)} bodies are answered", all_answered, WITHIN)
    world.wait_until("their publishers are told", all_told, WITHIN)
    return answered


def test_every_body_is_rejected_or_stored_as_it_deserves(answered: Answered) -> None:
    # Given thousands of bodies, most of them bad
    assert len(answered.published) >= 2000
    # Then what is valid is stored, what is not is rejected, and of each kind there was some
    stored = {id(body) for body, _ in answered.accepted()}
    wrong = [
        body.kind for body in answered.published.values() if body.fate == ("rejected" if id(body) in stored else "sent")
    ]
    assert wrong == []
    assert min(Counter(body.kind for body in answered.published.values()).values()) == EMAILS
    assert {body.kind for body, _ in answered.accepted()} >= {"intact", "a wrong value", "something left out"}


def test_a_rejected_body_is_kept_as_it_came_and_explained_without_repeating_it(answered: Answered) -> None:
    for correlation_id, (properties, kept) in answered.kept.items():
        assert kept == answered.published[correlation_id].content
        reason, detail = properties.headers["x-reject-reason"], properties.headers["x-reject-detail"]
        assert reason in {"invalid", "not_json", "too_large"}
        assert 10 < len(detail) <= 2000
        assert detail.isprintable()
        assert MARK not in detail
        assert EVE not in detail
        told = {
            (each.message_id, each.body["reason"], each.body["detail"]) for each in answered.rejections[correlation_id]
        }
        assert [each[1:] for each in told] == [(reason, detail)]


class Mail(NamedTuple):
    """One email as its recipients and its sender see it."""

    sender: str
    recipients: dict[str, list[str]]
    subject: str
    body_type: str
    body_sha256: str
    headers: dict[str, str]
    importance: str
    attachments: list[tuple[str, int]]


_FIELDS = {"toRecipients": "to", "ccRecipients": "cc", "bccRecipients": "bcc", "replyTo": "reply_to"}


def asked(content: bytes) -> Mail:
    email = json.loads(content)
    reply_to = email.get("reply_to", [])
    email["reply_to"] = [reply_to] if isinstance(reply_to, str) else reply_to
    return Mail(
        email["from"].lower(),
        {field: email.get(field, []) for field in _FIELDS.values()},
        email.get("subject", ""),
        email["body"]["contentType"],
        hashlib.sha256(email["body"]["content"].encode()).hexdigest(),
        email.get("headers", {}),
        email.get("importance", "normal"),
        [(shown(each["name"]), each["size"]) for each in email.get("attachments", [])],
    )


def shown(name: str) -> str:
    """A file's name as recipients see it: what is behind the last slash, nothing invisible, fit for any disk."""
    last = name.replace("\\", "/").rpartition("/")[2]
    visible = [each for each in last if unicodedata.category(each) not in ("Cc", "Cf") or each in "\u200c\u200d"]
    fit = "".join("_" if each in '<>:"|?*' else each for each in visible).rstrip(". ").lstrip()
    device = fit.partition(".")[0].rstrip(" ").lower()
    is_device = device in _DEVICES or (device[:-1] in ("com", "lpt") and device[-1] in "0123456789¹²³")
    return f"_{fit}" if is_device else fit or "attachment"


def sent_mails(world: World, mailboxes: Iterable[str]) -> dict[str, list[Mail]]:
    """Return what left these mailboxes, by the id that each mail is tagged with."""
    mails: dict[str, list[Mail]] = {}
    for mailbox in mailboxes:
        shown = {each["internetMessageId"]: each for each in world.simulator.messages(mailbox, "sentitems")}
        for delivery in world.simulator.deliveries(mailbox):
            mails.setdefault(delivery["tags"][0], []).append(mail(delivery, shown[delivery["internetMessageId"]]))
    return mails


def mail(delivery: dict[str, Any], shown: dict[str, Any]) -> Mail:
    return Mail(
        delivery["mailbox"],
        {ours: [each["emailAddress"]["address"] for each in shown[theirs]] for theirs, ours in _FIELDS.items()},
        shown["subject"],
        shown["body"]["contentType"],
        delivery["body_sha256"],
        delivery["headers"],
        shown["importance"],
        [(each["name"], each["bytes"]) for each in delivery["attachments"]],
    )


def test_what_is_stored_is_sent_once_and_as_it_was_asked_for(
    world: World, answered: Answered, files: Callable[[int], str]
) -> None:
    # Given what the contract took, damaged or not
    due = {id: content for content, id, fate in accepted_fates(answered, files) if fate == "processed"}
    assert len(due) > EMAILS
    # When all of it has come to its end
    known = settled(world, [{"publisher_message_id": id} for id in due], seconds=WITHIN.total_seconds())
    # Then Graph refused none of it, and sent what its publisher wrote
    assert {each.last_error for each in known.values() if each.status != "processed"} == set()
    wanted = {known[id].id: [asked(content)] for id, content in due.items()}
    sent = sent_mails(world, {mails[0].sender for mails in wanted.values()})
    assert {tag: mails for tag, mails in sent.items() if mails != wanted.get(tag)} == {}
    assert sent.keys() == wanted.keys()
    assert all(each.archived for each in known.values())


def accepted_fates(answered: Answered, files: Callable[[int], str]) -> Iterator[tuple[bytes, str, str]]:
    """Yield each accepted body with the publisher's id and the status that it must come to."""
    now = datetime.now(UTC)
    for body, id in answered.accepted():
        email = contracts.accept(body.content).email
        if email.expires_at and email.expires_at <= now:
            yield body.content, id, "expired"
        elif email.send_at and email.send_at > now:
            yield body.content, id, "received"
        elif any(each.url_or_id != files(each.size) for each in email.attachments):
            yield body.content, id, "failed"
        else:
            yield body.content, id, "processed"


def test_what_cannot_be_sent_comes_to_its_own_end(
    world: World, answered: Answered, files: Callable[[int], str]
) -> None:
    others = {id: fate for _, id, fate in accepted_fates(answered, files) if fate != "processed"}

    def all_over() -> bool:
        rows = dict(world.rows("SELECT publisher_message_id, status FROM incoming_emails"))
        return {id: rows[id] for id in others} == others

    world.wait_until(f"{len(others)} emails are not sent", all_over)


def test_nobody_else_got_a_mail_and_no_mail_another_header(world: World, answered: Answered) -> None:
    everything = world.simulator.deliveries()
    assert [each for each in everything if EVE in each["recipients"]] == []
    headers = {name for each in everything for name in each["headers"]}
    assert {name for name in headers if not re.fullmatch(r"[xX]-[A-Za-z0-9-]+", name)} == set()
    assert not {"x-injected"} & {name.lower() for name in headers}
    ours = [each for each in everything if each["mailbox"].endswith("@fuzzed.example")]
    assert {tag for each in ours for tag in each["tags"]} <= set(answered.ids.values())


# Properties


def test_strange_properties_stop_neither_an_email_nor_a_rejection(world: World) -> None:
    # Given an email and a bad body with each
    strange = {what: an_email(a_mailbox()) for what in STRANGE_PROPERTIES}
    with pika.BlockingConnection(pika.URLParameters(world.environment["RABBITMQ_URL"])) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        # When they are published
        for what, properties in STRANGE_PROPERTIES.items():
            for content in (orjson.dumps(strange[what]), what.encode()):
                channel.basic_publish("", "send_email", content, properties, mandatory=True)
    # Then
    assert_each_left_once(world, settled(world, strange.values(), WITHIN.total_seconds()).values())
    rejected: set[bytes] = set()

    def all_rejected() -> bool:
        rejected.update(body for _, body in take_all(world, "send_email.rejected"))
        return rejected >= {what.encode() for what in STRANGE_PROPERTIES}

    world.wait_until("the bad bodies are rejected", all_rejected)


# Size


def memory(pid: int, what: str) -> int:
    """Return one of the figures of /proc in bytes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{what}:")]
    return int(line.split()[1]) * 1024


def test_the_largest_bodies_take_bounded_memory(world: World) -> None:
    # Given
    [bridge] = world.fleet.pids("bridge")
    before = memory(bridge, "VmRSS")
    email = an_email(a_mailbox())
    rejected = largest_rejected(email)
    sent = largest_sent(an_email(a_mailbox()))
    # When they come at once
    put(world, "send_email", *rejected, *sent)
    # Then each is settled
    ids = [{"publisher_message_id": json.loads(content)["publisher_message_id"]} for content in sent]
    assert_each_left_once(world, settled(world, ids, WITHIN.total_seconds()).values())
    found: list[bytes] = []

    def all_rejected() -> bool:
        found.extend(body for _, body in take_all(world, "send_email.rejected") if len(body) > 1_000_000)
        return len(found) >= len(rejected)

    world.wait_until("the others are rejected", all_rejected, WITHIN)
    assert Counter(map(len, found)) == Counter(map(len, rejected))
    # And the bridge is the same process, and was never too large
    assert world.fleet.pids("bridge") == {bridge}
    assert memory(bridge, "VmHWM") < before + GROWTH_BYTES


def test_no_process_ended_meanwhile(world: World) -> None:
    assert world.fleet.dead == []
