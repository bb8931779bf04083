"""A campaign of two hundred emails from ten mailboxes, some with files, some published twice; each way to send."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any, NamedTuple

import pytest
from fleet_support import BODY_MARK, Fate, a_mailbox, an_attachment, an_email, assert_each_left_once, attached_sha256
from fleet_support import settled as settle
from worlds import Worlds

from sandbox.world import World
from vault import Keyring, Tampered, Vault, bind_to

MEBIBYTE = 1024 * 1024
SMALL_SIZES = [1, 10_000, 900_000, 2_900_000]
LARGE_SIZES = [4 * MEBIBYTE, 9 * MEBIBYTE, 18 * MEBIBYTE]
FOREIGN_KEY = "A" * 43 + "="


class Campaign(NamedTuple):
    emails: dict[str, dict[str, Any]]
    fates: dict[str, Fate]

    @property
    def ids(self) -> set[str]:
        return {fate.id for fate in self.fates.values()}

    def with_attachments(self) -> list[tuple[dict[str, Any], Fate]]:
        return [(email, self.fates[id]) for id, email in self.emails.items() if email.get("attachments")]


@pytest.fixture(scope="module")
def world(worlds: Worlds, way: str) -> World:
    return worlds.get({"SEND_PLAIN_VIA": way})


@pytest.fixture(scope="module")
def campaign(world: World) -> Campaign:
    mailboxes = [a_mailbox("campaign") for _ in range(10)]
    published = [an_email(mailboxes[number % 10]) for number in range(200)]
    for number, email in enumerate(published[:30]):
        email["attachments"] = [an_attachment(world.simulator, SMALL_SIZES[number % 4])]
    for email, size_bytes in zip(published[30:33], LARGE_SIZES, strict=True):
        email["attachments"] = [an_attachment(world.simulator, size_bytes), an_attachment(world.simulator, 1000)]
    world.publish(*published, *published[20:60])
    return Campaign({email["publisher_message_id"]: email for email in published}, settle(world, published, 90))


def test_every_email_leaves_once(campaign: Campaign, world: World) -> None:
    assert Counter(fate.status for fate in campaign.fates.values()) == {"processed": 200}
    assert_each_left_once(world, campaign.fates.values())


@pytest.mark.parametrize("type", ["SendEmailReceived", "SendEmailSent"])
def test_the_publisher_is_told_once(campaign: Campaign, world: World, type: str) -> None:
    def told() -> Counter[str]:
        ids = (event.body["incoming_email_id"] for event in world.events(type))
        return Counter(id for id in ids if id in campaign.ids)

    world.wait_until("every event has arrived", lambda: told().keys() == campaign.ids)
    assert set(told().values()) == {1}


def test_no_email_needed_a_second_attempt(campaign: Campaign) -> None:
    assert {fate.attempt_count for fate in campaign.fates.values()} == {1}


def test_the_scheduler_knows_which_worker_had_it_in_hand(campaign: Campaign, world: World) -> None:
    unacknowledged = """
        SELECT count(*) FROM incoming_emails e LEFT JOIN worker_receipts r ON r.incoming_email_id = e.id
        WHERE e.publisher_message_id LIKE 'order-%' AND r.acknowledged_at IS NULL
    """
    world.wait_until("all receipts are acknowledged", lambda: world.count(unacknowledged) == 0)


def test_attachments_arrive_byte_for_byte(campaign: Campaign, world: World) -> None:
    for email, fate in campaign.with_attachments():
        [delivery] = world.simulator.deliveries(tag=fate.id)
        arrived = {each["name"]: each["sha256"] for each in delivery["attachments"]}
        assert arrived == {each["name"]: attached_sha256(each) for each in email["attachments"]}


def test_every_email_is_archived_once(campaign: Campaign, world: World) -> None:
    archived = Counter(id for (id,) in world.rows("SELECT incoming_email_id::text FROM email_backups"))
    assert {id: archived[id] for id in campaign.ids} == dict.fromkeys(campaign.ids, 1)


def _sealed(world: World, fate: Fate) -> tuple[bytes, str, str, str]:
    [(blob, *rest)] = world.rows(
        """
        SELECT compressed_blob, key_id, graph_message_id, checksum FROM email_backups
        WHERE incoming_email_id = %(id)s
        """,
        {"id": fate.id},
    )
    return bytes(blob), *rest


def _opened(world: World, fate: Fate) -> EmailMessage:
    blob, key_id, graph_message_id, checksum = _sealed(world, fate)
    vault = Vault(Keyring.parse(world.environment["BACKUP_KEYS"]))
    mime = vault.open(blob, key_id=key_id, associated_data=bind_to(fate.id, graph_message_id), checksum=checksum)
    return message_from_bytes(b"".join(mime), policy=policy.default)


def test_the_archive_gives_the_message_back_with_its_attachments(campaign: Campaign, world: World) -> None:
    for email, fate in campaign.with_attachments():
        message = _opened(world, fate)
        body = message.get_body(("plain", "html"))
        assert body is not None
        assert BODY_MARK in body.get_content()
        attached = {
            part.get_filename(): hashlib.sha256(part.get_payload(decode=True)).hexdigest()  # type: ignore[arg-type]
            for part in message.iter_attachments()
        }
        assert attached == {each["name"]: attached_sha256(each) for each in email["attachments"]}


def test_the_archive_says_nothing_without_its_key(campaign: Campaign, world: World) -> None:
    for fate in list(campaign.fates.values())[:50]:
        blob, key_id, graph_message_id, _ = _sealed(world, fate)

        assert BODY_MARK.encode() not in blob
        assert not any(_inflates(blob[start:]) for start in range(200))
        foreign = Vault(Keyring.parse(f"{key_id}:{FOREIGN_KEY}"))
        with pytest.raises(Tampered):
            b"".join(foreign.open(blob, key_id=key_id, associated_data=bind_to(fate.id, graph_message_id)))


def _inflates(data: bytes) -> bool:
    """Whether the data begins like a gzip or zlib stream of text."""
    try:
        return b"Subject" in zlib.decompressobj(wbits=47).decompress(data)
    except zlib.error:
        return False
