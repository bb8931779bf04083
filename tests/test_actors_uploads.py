"""How files get onto a draft: several at a time, from sources that break off or change, under whatever names."""

from __future__ import annotations

import threading
import tracemalloc
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from email import message_from_bytes
from email.message import Message
from typing import Any

import pytest
import support
from support import SENDER, Fleet, email_row, sending, store, table
from test_actors_drafts import (
    LARGE,
    SMALL,
    attached,
    calls,
    draft_recorded,
    expected,
    file,
    killed_after,
)

import models
import runtime
from actors import drafts, outcomes, uploaders
from attachments import StoreUnavailable
from graph_client import SMALL_ATTACHMENT_BYTES, UPLOAD_RANGE_BYTES
from limiter import CONCURRENCY, Exhausted
from models import rows, uploads
from models.uploads import Upload
from simulator import files

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure, limit = support.configure, support.limit


def sent(fleet: Fleet, id: str) -> Callable[[], bool]:
    def is_sent() -> bool:
        fleet.settle(id)
        return sending(id) == "sent"

    return is_sent


# Several files at a time


def overlaps(fleet: Fleet) -> int:
    """How many requests to Graph were under way at a time at most, of those that bring bytes up."""
    instants = []
    for request in fleet.graph.requests():
        if request["operation"] in ("upload_range", "attach"):
            instants += [(request["arrived_monotonic"], 1), (request["answered_monotonic"], -1)]
    most = at_once = 0
    for _, step in sorted(instants):
        at_once += step
        most = max(most, at_once)
    return most


def test_several_files_of_a_mail_are_uploaded_at_a_time_and_fewer_than_the_mailbox_has_slots(fleet: Fleet) -> None:
    # Given
    fleet.graph.set_latency(0.3, "upload_range")
    names = ["a", "b", "c", "d", "e"]
    id = store(attachments=[file(fleet, name, LARGE) for name in names])
    # When
    assert fleet.send() == ["done"]
    # Then
    assert attached(fleet, id) == expected(**dict.fromkeys(names, LARGE))
    assert 1 < overlaps(fleet) <= 3
    assert email_row(id)["attempt_count"] == 1


def test_with_a_single_slot_the_files_of_a_mail_go_one_after_the_other_and_no_attempt_is_lost(
    fleet: Fleet, limit: Callable[..., None]
) -> None:
    limit(mailbox_concurrency=1)
    id = store(attachments=[file(fleet, name, LARGE) for name in ("a", "b", "c")])
    assert fleet.send() == ["done"]
    assert attached(fleet, id) == expected(a=LARGE, b=LARGE, c=LARGE)
    assert (overlaps(fleet), email_row(id)["attempt_count"]) == (1, 1)


def test_files_of_one_name_go_in_their_order_so_that_the_next_worker_can_tell_them_apart(fleet: Fleet) -> None:
    # Given two files of one name, of which a worker that died had brought one up without recording it
    sizes = [LARGE, LARGE + 1]
    id = store(attachments=[file(fleet, "same", size) for size in sizes])
    fleet.graph.lose_next_answer(operation="upload_range", times=None, probability=0.5)
    fleet.graph.set_latency(0.1, "upload_range")
    # When
    fleet.send()
    support.wait_until("it is sent", sent(fleet, id))
    # Then each is there once, and they never went side by side
    (delivery,) = fleet.graph.deliveries(tag=id)
    assert [each["sha256"] for each in delivery["attachments"]] == [files.sha256("same", size) for size in sizes]
    assert overlaps(fleet) == 1


def test_the_first_file_that_fails_stops_the_others_at_their_next_range_and_what_is_up_stays(fleet: Fleet) -> None:
    # Given a file whose source is gone beside two that take many ranges
    big = 4 * UPLOAD_RANGE_BYTES
    fleet.graph.set_latency(0.2, "upload_range")
    gone = file(fleet, "gone", LARGE, fail=404)
    id = store(attachments=[file(fleet, "a", big), gone, file(fleet, "b", big)])
    # When
    assert fleet.send() == ["dead-lettered"]
    # Then
    assert (email_row(id)["status"], table("dlq")[0]["reason"]) == ("failed", "source_gone")
    assert calls(fleet)["upload_range"] <= 2
    assert not [thread for thread in threading.enumerate() if thread.name == "uploader"]


def test_a_lease_that_is_lost_while_others_upload_ends_all_of_them(fleet: Fleet) -> None:
    id = store(attachments=[file(fleet, name, 3 * UPLOAD_RANGE_BYTES, slow=8_000_000) for name in ("a", "b", "c")])
    fleet.schedule()
    fleet.graph.set_latency(0.1, "upload_range")
    taken = threading.Event()

    def take_away() -> None:
        support.wait_until("a range is up", lambda: rows("SELECT 1 FROM file_uploads WHERE uploaded_bytes > 0"))
        rows("UPDATE incoming_emails SET lease_token = gen_random_uuid()")
        taken.set()
        models.disconnect()

    thief = threading.Thread(target=take_away)
    thief.start()
    assert fleet.run("send_attached") == ["done"]
    thief.join()
    assert taken.is_set()
    assert (fleet.mails(id), sending(id)) == (0, None)
    assert not [thread for thread in threading.enumerate() if thread.name == "uploader"]


def exhausted(budget: str) -> Exhausted:
    return Exhausted(budget, support.WITHIN, mailbox_wide=False)


def upload_of(name: str) -> Upload:
    return Upload(position=0, filename=name, size=1, uploaded_bytes=0, uploaded=False)


def test_who_finds_no_slot_leaves_its_file_to_the_others(tables: str) -> None:
    # Given one uploader that is refused a slot, once the other is at work
    brought_up: list[str] = []
    both = threading.Barrier(2)
    refused = threading.Event()

    def bring_up(upload: Upload) -> None:
        if not refused.is_set():
            first = both.wait(5) == 0
            if first:
                refused.set()
                raise exhausted(CONCURRENCY)
            refused.wait(5)
        brought_up.append(upload.filename)

    # When
    names = ["a", "b", "c"]
    uploaders.bring_up_all([upload_of(name) for name in names], bring_up, at_a_time=2, keep=lambda: None)
    # Then
    assert sorted(brought_up) == names


@pytest.mark.parametrize("budget", [CONCURRENCY, "upload_bytes"])
def test_when_all_are_refused_or_a_budget_is_used_up_the_refusal_is_told(tables: str, budget: str) -> None:
    def bring_up(_: Upload) -> None:
        raise exhausted(budget)

    with pytest.raises(Exhausted):
        uploaders.bring_up_all([upload_of("a"), upload_of("b")], bring_up, at_a_time=2, keep=lambda: None)


# Between the two ways


def test_an_attachment_that_graph_finds_too_large_for_a_request_goes_in_ranges(fleet: Fleet) -> None:
    # Given a Graph whose sessions take small files and whose requests take few bytes
    fleet.graph.set_behaviour(min_session_bytes=1)
    fleet.graph.fail(413, operation="attach", code="ErrorAttachmentSizeLimitExceeded")
    id = store(attachments=[file(fleet, "edge", SMALL_ATTACHMENT_BYTES)])
    # When
    assert fleet.send() == ["done"]
    # Then
    assert attached(fleet, id) == expected(edge=SMALL_ATTACHMENT_BYTES)
    assert (calls(fleet)["attach"], calls(fleet)["create_upload_session"]) == (1, 1)


# Sources


def test_a_source_that_breaks_off_is_asked_for_the_rest_and_no_attempt_is_spent(fleet: Fleet) -> None:
    # Given a source that never gives more than a range and a half at once
    size = 4 * UPLOAD_RANGE_BYTES
    id = store(attachments=[file(fleet, "large", size, truncate=UPLOAD_RANGE_BYTES * 3 // 2)])
    # When
    assert fleet.send() == ["done"]
    # Then
    assert attached(fleet, id) == expected(large=size)
    assert (email_row(id)["attempt_count"], calls(fleet)["upload_range"]) == (1, 4)
    assert calls(fleet)["create_upload_session"] == 1


def test_of_a_source_that_names_no_version_nothing_is_put_together_of_two_fetches(fleet: Fleet) -> None:
    # Given a source that breaks off once, behind a range
    fault = {"etag": "none", "truncate": UPLOAD_RANGE_BYTES * 3 // 2}
    id = store(attachments=[file(fleet, "large", 2 * UPLOAD_RANGE_BYTES, **fault)])
    fleet.send()
    assert table("file_uploads")[0]["uploaded_bytes"] == UPLOAD_RANGE_BYTES
    # When the source has another file by then
    whole = file(fleet, "other", 2 * UPLOAD_RANGE_BYTES, etag="none")["urlOrId"]
    rows(
        "UPDATE incoming_emails SET payload = jsonb_set(payload::jsonb, '{attachments,0,urlOrId}', %(url)s::jsonb)",
        {"url": f'"{whole}"'},
    )
    support.wait_until("it is sent", sent(fleet, id))
    # Then the mail has that whole, brought up in a session of its own
    assert attached(fleet, id) == {"large": files.sha256("other", 2 * UPLOAD_RANGE_BYTES)}
    assert (calls(fleet)["create_upload_session"], calls(fleet)["cancel_upload_session"]) == (2, 1)


def test_a_source_that_gives_a_byte_at_a_time_costs_no_more_memory_than_its_bytes(tables: str) -> None:
    class Drops:
        def receive(self, at_most: int) -> bytes:
            return b"x" if at_most else b""

    email = support.claim(store(attachments=[]), intent=False)
    tracemalloc.start()
    try:
        assert len(drafts._read(email, Drops(), 500_000)) == 500_000  # type: ignore[arg-type]
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3_000_000


def test_while_the_store_is_away_a_mail_waits_and_spends_no_attempt(fleet: Fleet) -> None:
    id = store(attachments=[file(fleet, "small", SMALL)])
    email = support.claim(id, intent=False)
    outcomes.record(email, StoreUnavailable("the store of attachments is not there"))
    assert (email_row(id)["status"], email_row(id)["attempt_count"]) == ("received", 0)


def test_a_draft_with_much_on_it_is_kept_and_waits_until_nothing_can_be_late(
    fleet: Fleet, configure: Callable[..., None]
) -> None:
    # Given a mail of whose files one was asked for and never heard of, behind others that are up
    names = ["a", "b", "c", "d", "e"]
    id = store(attachments=[file(fleet, name, SMALL) for name in names])

    def asked_for_the_last(email: models.ClaimedEmail) -> None:
        configure(in_doubt_grace=timedelta(minutes=5))
        draft_recorded(email)
        *up, last = uploads.plan(email, email.payload["attachments"])
        for upload in up:
            drafts._attach(email, str(email.draft_id), upload, email.payload["attachments"][upload.position])
            drafts._record_uploaded(email, upload)
        last.attaching_for = timedelta()
        uploads.record_progress(email, last, lease=support.LEASE)

    killed_after(fleet, id, asked_for_the_last)
    before = calls(fleet)
    # When
    fleet.settle(id)
    # Then it waits for as long as a request may take effect, no attempt spent, and goes on with its draft
    assert 280 < support.seconds_until("incoming_emails", "next_attempt_at", "id", id) <= 300
    assert (email_row(id)["status"], email_row(id)["attempt_count"]) == ("received", 1)
    rows("UPDATE file_uploads SET updated_at = now() - interval '6 minutes'")
    fleet.settle(id)
    assert attached(fleet, id) == expected(**dict.fromkeys(names, SMALL))
    again = calls(fleet) - before
    assert (again["create_draft"], again["attach"]) == (0, 1)


def test_a_file_that_changed_at_its_source_begins_again_and_is_never_put_together_of_two(fleet: Fleet) -> None:
    # Given a mail whose worker died after a range
    id = store(attachments=[file(fleet, "large", LARGE, etag="one")])

    def a_range_up(email: models.ClaimedEmail) -> None:
        draft_recorded(email)
        (upload,) = uploads.plan(email, email.payload["attachments"])
        (attachment,) = email.payload["attachments"]
        session = drafts._session(email, str(email.draft_id), upload, attachment)
        content = files.content("large", LARGE)[:UPLOAD_RANGE_BYTES]
        upload.uploaded_bytes = runtime.graph.upload_range(session, 0, content, LARGE) or 0
        upload.source_version = '"one"'
        uploads.record_progress(email, upload, lease=support.LEASE)

    killed_after(fleet, id, a_range_up)
    # When the source has another file by then
    changed = file(fleet, "other", LARGE, etag="two")["urlOrId"]
    rows(
        "UPDATE incoming_emails SET payload = jsonb_set(payload::jsonb, '{attachments,0,urlOrId}', %(url)s::jsonb)",
        {"url": f'"{changed}"'},
    )
    support.wait_until("it is sent", sent(fleet, id))
    # Then the session of the first was given up, and the mail has the second whole
    assert attached(fleet, id) == {"large": files.sha256("other", LARGE)}
    assert (calls(fleet)["create_upload_session"], calls(fleet)["cancel_upload_session"]) == (2, 1)


# Names and sizes


HOSTILE = {
    "../../etc/passwd": "passwd",
    "C:\\Windows\\System32\\evil.exe": "evil.exe",
    "invoice\u202efdp.exe": "invoicefdp.exe",
    "..": "attachment",
    "Übersicht – 報告 📎.pdf": "Übersicht – 報告 📎.pdf",
    "x" * 251 + ".pdf": "x" * 251 + ".pdf",
}


def test_hostile_names_arrive_without_what_makes_them_so_and_others_as_they_are(fleet: Fleet) -> None:
    given = [file(fleet, f"f{number}", SMALL) | {"name": name} for number, name in enumerate(HOSTILE)]
    id = store(attachments=given)
    assert fleet.send() == ["done"]
    assert sorted(attached(fleet, id)) == sorted(HOSTILE.values())


def test_a_hostile_name_is_found_again_by_the_next_worker_and_not_attached_twice(fleet: Fleet) -> None:
    # Given a worker that died after it had attached a file under its harmless name
    id = store(attachments=[file(fleet, "small", SMALL) | {"name": "../small"}])

    def attached_unrecorded(email: models.ClaimedEmail) -> None:
        draft_recorded(email)
        uploads.plan(email, email.payload["attachments"])
        content = files.content("small", SMALL)
        runtime.graph.attach(
            email.mailbox, str(email.draft_id), name="small", content_type="text/plain", content=content
        )

    killed_after(fleet, id, attached_unrecorded)
    # When
    fleet.settle(id)
    # Then
    assert attached(fleet, id) == expected(small=SMALL)


def test_fifty_attachments_some_of_them_empty_arrive(fleet: Fleet) -> None:
    sizes = {f"f{number}": number % 3 * 1000 for number in range(50)}
    id = store(attachments=[file(fleet, name, size) for name, size in sizes.items()])
    assert fleet.send() == ["done"]
    assert attached(fleet, id) == expected(**sizes)


def part_of(id: str) -> Message:
    """The only attachment of a sent mail, as a reader's program finds it."""
    with runtime.graph.fetch_mime(SENDER, sent_id(id)) as chunks:
        message = message_from_bytes(b"".join(chunks))
    (part,) = [each for each in message.walk() if each.get_filename()]
    return part


def sent_id(id: str) -> str:
    (message,) = runtime.graph.find_by_tag(SENDER, id).messages
    return message.id


def test_an_inline_image_arrives_as_one(fleet: Fleet) -> None:
    given = file(fleet, "logo", SMALL) | {"contentType": "image/png", "is_inline": True, "content_id": "logo"}
    id = store(body={"contentType": "html", "content": '<img src="cid:logo">'}, attachments=[given])
    fleet.send()
    part = part_of(id)
    assert (part.get_content_type(), part["Content-ID"]) == ("image/png", "<logo>")
    assert part.get_content_disposition() == "inline"


def test_a_mail_larger_than_its_mailbox_may_send_fails_and_says_who_can_change_that(fleet: Fleet) -> None:
    fleet.graph.set_behaviour(max_message_bytes=1_000_000)
    id = store(attachments=[file(fleet, "a", 800_000), file(fleet, "b", 800_000)])
    assert fleet.send() == ["dead-lettered"]
    (letter,) = table("dlq")
    assert (email_row(id)["status"], letter["reason"]) == ("failed", "message_too_large")
    assert "2 attachments of 1,600,000 bytes together is larger than its mailbox may send" in letter["last_error"]
    assert "administrator" in letter["last_error"]


def test_a_mail_larger_than_is_allowed_here_fails_before_anything_is_made_of_it(
    fleet: Fleet, configure: Callable[..., None]
) -> None:
    configure(message_max_mb=1)
    store(attachments=[file(fleet, "a", 800_000), file(fleet, "b", 800_000)])
    assert fleet.send() == ["dead-lettered"]
    (letter,) = table("dlq")
    assert letter["reason"] == "message_too_large"
    assert "MESSAGE_MAX_MB" in letter["last_error"]
    assert calls(fleet)["create_draft"] == 0


@pytest.mark.parametrize("order", [[0, 0, 1], [1], [], [0, 1, 1]])
def test_of_files_of_one_name_each_arrives_once_whichever_a_frozen_worker_has_attached(
    fleet: Fleet, order: list[int]
) -> None:
    # Given a draft on which two files of one name are, in the end, in numbers that are wrong
    id = store(attachments=[file(fleet, "same", SMALL), file(fleet, "same", SMALL + 1)])

    def step(email: models.ClaimedEmail) -> None:
        draft_recorded(email)
        for upload in uploads.plan(email, email.payload["attachments"]):
            upload.uploaded = True
            uploads.record_progress(email, upload, lease=support.LEASE)
        for number in order:
            content = files.content("same", SMALL + number)
            runtime.graph.attach(
                email.mailbox, str(email.draft_id), name="same", content_type="text/plain", content=content
            )

    killed_after(fleet, id, step)
    # When
    support.wait_until("it is sent", sent(fleet, id))
    # Then
    (delivery,) = fleet.graph.deliveries(tag=id)
    checksums = sorted(each["sha256"] for each in delivery["attachments"])
    assert checksums == sorted([files.sha256("same", SMALL), files.sha256("same", SMALL + 1)])


# What Graph calls otherwise


def renamed_on_the_draft(fleet: Fleet, id: str, *, times: int) -> None:
    """Let a worker die when its only file was up, under a name that Graph has given it, so many times."""

    def step(email: models.ClaimedEmail) -> None:
        draft_recorded(email)
        (upload,) = uploads.plan(email, email.payload["attachments"])
        content = files.content("small", SMALL)
        for _ in range(times):
            runtime.graph.attach(
                email.mailbox, str(email.draft_id), name="small_.bin", content_type="text/plain", content=content
            )
        upload.uploaded = True
        uploads.record_progress(email, upload, lease=support.LEASE)

    killed_after(fleet, id, step)


def test_an_attachment_that_graph_has_renamed_is_neither_taken_off_nor_brought_up_again(fleet: Fleet) -> None:
    id = store(attachments=[file(fleet, "small", SMALL)])
    renamed_on_the_draft(fleet, id, times=1)
    fleet.settle(id)
    assert attached(fleet, id) == {"small_.bin": files.sha256("small", SMALL)}
    assert calls(fleet)["attach"] == 1


def test_an_attachment_that_graph_has_renamed_and_that_is_there_twice_is_brought_up_anew(fleet: Fleet) -> None:
    id = store(attachments=[file(fleet, "small", SMALL)])
    renamed_on_the_draft(fleet, id, times=2)
    support.wait_until("it is sent", sent(fleet, id))
    assert attached(fleet, id) == expected(small=SMALL)
    assert [mail["isDraft"] for mail in fleet.graph.messages(SENDER)] == [False]


# Progress


def test_the_bytes_that_graph_has_taken_are_counted(fleet: Fleet) -> None:
    before = counted("range")
    id = store(attachments=[file(fleet, "large", LARGE)])
    fleet.send()
    assert counted("range") - before == LARGE
    assert sending(id) == "sent"


def counted(way: str) -> float:
    return runtime.telemetry.UPLOADED_BYTES.labels(way)._value.get()


def test_a_file_without_a_word_of_what_it_is_goes_as_bytes(fleet: Fleet) -> None:
    given: dict[str, Any] = file(fleet, "small", SMALL)
    del given["contentType"]
    id = store(attachments=[given])
    fleet.send()
    assert part_of(id).get_content_type() == "application/octet-stream"


def test_the_memory_for_a_file_is_bound_by_its_ranges_and_not_by_its_length(fleet: Fleet) -> None:
    peaks = []
    for name, size in (("short", 2 * UPLOAD_RANGE_BYTES), ("long", 8 * UPLOAD_RANGE_BYTES)):
        store(publisher_message_id=name, attachments=[file(fleet, name, size)])
        tracemalloc.start()
        assert fleet.send() == ["done"]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < UPLOAD_RANGE_BYTES // 2


# Who leaves a file to whom


def test_a_file_is_not_left_to_an_uploader_that_has_just_found_nothing_to_do(tables: str) -> None:
    # Given one uploader that is refused a slot at the moment when the other has looked for more and found none
    in_hand = threading.Barrier(2)
    found_nothing, left = threading.Event(), threading.Event()
    holders: dict[str, int] = {}

    def bring_up(upload: Upload) -> None:
        holders[upload.filename] = threading.get_ident()
        in_hand.wait(5)
        if upload.filename == "refused":
            assert found_nothing.wait(5)
            raise exhausted(CONCURRENCY)

    class Watched:
        """The crew's lock, behind which the one that found nothing stands still until the other has left."""

        def __init__(self) -> None:
            self._lock = threading.Lock()

        def __enter__(self) -> None:
            self._lock.acquire()

        def __exit__(self, *_: object) -> None:
            self._lock.release()
            me = threading.get_ident()
            if me == holders.get("brought up") and not found_nothing.is_set():
                found_nothing.set()
                left.wait(5)
            elif me == holders.get("refused") and found_nothing.is_set():
                left.set()

    crew = uploaders._Crew([deque([upload_of("refused")]), deque([upload_of("brought up")])], bring_up)
    crew._lock = Watched()  # type: ignore[assignment]
    # Then the mail is told that it has to wait, and not that all its files are up
    with pytest.raises(Exhausted):
        crew.run(2, keep=lambda: None)
    assert left.is_set()
