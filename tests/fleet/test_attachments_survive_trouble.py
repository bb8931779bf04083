"""Files that cannot be read, and drafts and uploads that Graph loses: the mail goes out whole, or says why not."""

from __future__ import annotations

from typing import Any

import pytest
from fleet_support import (
    Fate,
    a_mailbox,
    an_attachment,
    an_email,
    assert_each_left_once,
    attached_sha256,
    deliveries,
    events_of,
    settled,
)

from sandbox.world import World
from simulator.control import Simulator

LARGE_BYTES = 7 * 1024 * 1024
SMALL_BYTES = 50_000


def _attached(simulator: Simulator, mailbox: str, *sizes: int, **faults: Any) -> dict[str, Any]:
    return an_email(mailbox, attachments=[an_attachment(simulator, size, **faults) for size in sizes])


def _from(url: str) -> dict[str, Any]:
    return an_email(a_mailbox(), attachments=[{"name": "a.bin", "size": 1000, "urlOrId": url}])


def _recoverable(simulator: Simulator) -> dict[str, dict[str, Any]]:
    mailboxes = {
        what: a_mailbox("whole")
        for what in (
            "the session is lost at its first range",
            "the session is lost twice",
            "the draft is not visible yet",
            "the answer to the draft is lost",
            "the answer to an attachment is lost",
            "the answer to a range is lost",
            "an attachment is throttled",
            "the source is busy twice",
        )
    }
    emails = {what: _attached(simulator, mailbox, LARGE_BYTES, SMALL_BYTES) for what, mailbox in mailboxes.items()}
    simulator.lose_upload_session(mailboxes["the session is lost at its first range"])
    simulator.lose_upload_session(mailboxes["the session is lost twice"], times=2)
    simulator.hide_next_draft(1.0, mailboxes["the draft is not visible yet"])
    simulator.lose_next_answer(mailboxes["the answer to the draft is lost"], "create_draft")
    simulator.lose_next_answer(mailboxes["the answer to an attachment is lost"], "attach")
    simulator.lose_next_answer(mailboxes["the answer to a range is lost"], "upload_range")
    simulator.throttle(mailboxes["an attachment is throttled"], "1", operation="attach")
    busy = mailboxes["the source is busy twice"]
    emails["the source is busy twice"] = _attached(simulator, busy, SMALL_BYTES, fail=503, times=2)
    return emails


RECOVERABLE = [
    "the session is lost at its first range",
    "the session is lost twice",
    "the draft is not visible yet",
    "the answer to the draft is lost",
    "the answer to an attachment is lost",
    "the answer to a range is lost",
    "an attachment is throttled",
    "the source is busy twice",
]


@pytest.fixture(scope="module")
def recovered(world: World, simulator: Simulator) -> dict[str, tuple[dict[str, Any], Fate]]:
    emails = _recoverable(simulator)
    world.publish(*emails.values())
    known = settled(world, emails.values())
    return {what: (email, known[email["publisher_message_id"]]) for what, email in emails.items()}


@pytest.mark.parametrize("what", RECOVERABLE)
def test_the_mail_goes_out_once_and_whole(
    world: World, recovered: dict[str, tuple[dict[str, Any], Fate]], what: str
) -> None:
    email, known = recovered[what]

    assert (known.status, known.archived) == ("processed", True)
    assert_each_left_once(world, [known])
    [delivery] = world.simulator.deliveries(tag=known.id)
    arrived = sorted((each["name"], each["sha256"]) for each in delivery["attachments"])
    assert arrived == sorted((each["name"], attached_sha256(each)) for each in email["attachments"])


def test_an_upload_that_is_throttled_halfway_goes_on_where_it_was(world: World, simulator: Simulator) -> None:
    # Given a large file of which a part is up
    mailbox = a_mailbox()
    simulator.set_latency(0.5, "upload_range")
    email = _attached(simulator, mailbox, 15_000_000)
    world.publish(email)
    progress = """
        SELECT uploaded_bytes FROM file_uploads u JOIN incoming_emails e ON e.id = u.incoming_email_id
        WHERE e.mailbox = %(mailbox)s AND uploaded_bytes > 0
    """
    world.wait_until("a part is up", lambda: world.rows(progress, {"mailbox": mailbox}))

    # When the next range is refused for a second
    simulator.throttle(mailbox, "1", operation="upload_range")

    # Then the same session goes on, and no byte is sent again
    known = settled(world, [email])[email["publisher_message_id"]]
    simulator.set_latency(0, "upload_range")
    assert len(simulator.requests(mailbox, "create_upload_session")) == 1
    ranges = simulator.requests(mailbox, "upload_range")
    assert [each["status"] for each in ranges].count("429") == 1
    assert sum(each["request_bytes"] for each in ranges if each["status"] != "429") == 15_000_000
    [delivery] = world.simulator.deliveries(tag=known.id)
    assert [each["sha256"] for each in delivery["attachments"]] == [attached_sha256(email["attachments"][0])]


#: What is wrong with the source, and the reason that the publisher is given.
HOPELESS = {
    "gone": "source_gone",
    "forbidden": "source_gone",
    "another size": "size_mismatch",
    "a private address": "source_forbidden",
    "a loopback address": "source_forbidden",
    "a cloud's metadata": "source_forbidden",
    "a host that is not allowed": "source_forbidden",
    "a redirect to a private address": "source_forbidden",
    "an id that nobody stored": "not_stored",
}


@pytest.fixture(scope="module")
def hopeless(world: World, simulator: Simulator) -> dict[str, Fate]:
    emails = {
        "gone": _attached(simulator, a_mailbox(), SMALL_BYTES, fail=404),
        "forbidden": _attached(simulator, a_mailbox(), SMALL_BYTES, fail=403),
        "another size": _from(simulator.file_url(2000)),
        "a private address": _from("https://10.0.0.1/file.bin"),
        "a loopback address": _from("https://127.0.0.1:9/file.bin"),
        "a cloud's metadata": _from("https://169.254.169.254/latest/meta-data/"),
        "a host that is not allowed": _from("https://localhost:1/file.bin"),
        "a redirect to a private address": _from(f"{simulator.base_url}/files/redirect?to=https://10.0.0.1/file.bin"),
        "an id that nobody stored": _from("no-such-attachment"),
    }
    world.publish(*emails.values())
    known = settled(world, emails.values())
    return {what: known[email["publisher_message_id"]] for what, email in emails.items()}


@pytest.mark.parametrize("what", HOPELESS)
def test_a_mail_whose_file_cannot_be_had_fails_with_the_reason(
    world: World, hopeless: dict[str, Fate], what: str
) -> None:
    known = hopeless[what]

    assert (known.status, known.attempt_count) == ("failed", 1)
    assert deliveries(world, [known]) == {known.publisher_message_id: 0}
    [event] = world.wait_until("its publisher is told", lambda: events_of(world, known, "SendEmailFailed"))
    assert event.body["reason"] == HOPELESS[what]
