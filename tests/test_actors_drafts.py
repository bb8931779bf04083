"""``send_attached``: draft, uploads, send; a worker may die at each arrow, and nothing is there twice."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import support
from support import SENDER, Fleet, email_row, lapse, sending, store, table

import models
import runtime
from actors import drafts, outcomes
from actors.composition import graph_message
from attachments import SourceUnavailable
from graph_client import SMALL_ATTACHMENT_BYTES, UPLOAD_RANGE_BYTES, GraphClient
from models import rows, scheduling, uploads
from simulator import files

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure = support.configure

SMALL = 100
LARGE = UPLOAD_RANGE_BYTES + 1000


def file(fleet: Fleet, name: str, size: int, **faults: Any) -> dict[str, Any]:
    return {"name": name, "size": size, "contentType": "application/pdf", "urlOrId": url(fleet, name, size, **faults)}


def url(fleet: Fleet, name: str, size: int, **faults: Any) -> str:
    return fleet.graph.file_url(size, seed=name, name=name, **faults)


def attached(fleet: Fleet, id: str) -> dict[str, str]:
    """The names and checksums of the attachments of the only mail that left for this email."""
    (delivery,) = fleet.graph.deliveries(tag=id)
    found = {attachment["name"]: attachment["sha256"] for attachment in delivery["attachments"]}
    assert len(found) == len(delivery["attachments"])
    return found


def expected(**sizes: int) -> dict[str, str]:
    return {name: files.sha256(name, size) for name, size in sizes.items()}


def calls(fleet: Fleet) -> Counter[str]:
    return Counter(request["operation"] for request in fleet.graph.requests() if request["status"] != "401")


def test_a_mail_is_sent_with_small_and_large_attachments(fleet: Fleet) -> None:
    # Given
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", LARGE), file(fleet, "empty", 0)])
    # When
    assert fleet.send() == ["done"]
    # Then
    assert (email_row(id)["status"], sending(id)) == ("processed", "sent")
    assert attached(fleet, id) == expected(small=SMALL, large=LARGE, empty=0)
    assert {row["filename"]: (row["status"], row["uploaded_bytes"]) for row in table("file_uploads")} == {
        "small": ("uploaded", SMALL),
        "large": ("uploaded", LARGE),
        "empty": ("uploaded", 0),
    }
    assert calls(fleet)["upload_range"] == 2
    assert fleet.events() == ["SendEmailSent"]


def test_two_attachments_of_the_same_name_are_both_there(fleet: Fleet) -> None:
    id = store(attachments=[file(fleet, "a", SMALL), file(fleet, "a", SMALL + 1)])
    fleet.send()
    (delivery,) = fleet.graph.deliveries(tag=id)
    checksums = {attachment["sha256"] for attachment in delivery["attachments"]}
    assert checksums == {files.sha256("a", SMALL), files.sha256("a", SMALL + 1)}


# A worker dies


def killed_after(fleet: Fleet, id: str, step: Callable[[models.ClaimedEmail], object]) -> None:
    """Let a worker claim the email, take some steps and be heard of no more."""
    step(support.claim(id, intent=False))
    lapse(id)


def make_draft(email: models.ClaimedEmail) -> str:
    return runtime.graph.create_draft(email.mailbox, graph_message(email.id, email.payload)).id


def draft_made(email: models.ClaimedEmail) -> None:
    make_draft(email)


def draft_recorded(email: models.ClaimedEmail) -> None:
    email.record_draft(make_draft(email))


def attach_small(draft_id: str) -> None:
    content = files.content("small", SMALL)
    runtime.graph.attach(SENDER, draft_id, name="small", content_type="text/plain", content=content)


def attaching_begun(email: models.ClaimedEmail) -> None:
    draft_recorded(email)
    upload = uploads.plan(email, email.payload["attachments"])[0]
    upload.attaching_for = timedelta()
    uploads.record_progress(email, upload, lease=support.LEASE)


def attached_unrecorded(email: models.ClaimedEmail) -> None:
    attaching_begun(email)
    attach_small(str(email.draft_id))


def session_opened(email: models.ClaimedEmail) -> uploads.Upload:
    draft_recorded(email)
    upload = uploads.plan(email, email.payload["attachments"])[1]
    drafts._session(email, str(email.draft_id), upload, email.payload["attachments"][1])
    return upload


def half_uploaded(email: models.ClaimedEmail, *, record: bool = True) -> None:
    upload = session_opened(email)
    session = runtime_session(email, upload)
    content = files.content("large", LARGE)[:UPLOAD_RANGE_BYTES]
    following = runtime.graph.upload_range(session, 0, content, LARGE)
    if record:
        upload.source_version = version_of(email.payload["attachments"][1])
        upload.uploaded_bytes = int(following or 0)
        uploads.record_progress(email, upload, lease=support.LEASE)


def version_of(attachment: dict[str, Any]) -> str | None:
    with runtime.source.open(attachment["urlOrId"]) as stream:
        return stream.version


def range_unrecorded(email: models.ClaimedEmail) -> None:
    half_uploaded(email, record=False)


def runtime_session(email: models.ClaimedEmail, upload: uploads.Upload) -> Any:
    return drafts._session(email, str(email.draft_id), upload, email.payload["attachments"][1])


def all_uploaded(email: models.ClaimedEmail) -> None:
    drafts.prepare_draft(email)


RECOVERY_POINTS: dict[str, Callable[[models.ClaimedEmail], object]] = {
    "claimed": lambda email: None,
    "draft made, unrecorded": draft_made,
    "draft recorded": draft_recorded,
    "attaching begun": attaching_begun,
    "attached, unrecorded": attached_unrecorded,
    "session opened": session_opened,
    "half uploaded": half_uploaded,
    "range uploaded, unrecorded": range_unrecorded,
    "all uploaded": all_uploaded,
}


@pytest.mark.parametrize("point", RECOVERY_POINTS)
def test_whatever_a_dead_worker_did_the_next_one_goes_on_and_nothing_is_there_twice(fleet: Fleet, point: str) -> None:
    # Given
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", LARGE)])
    killed_after(fleet, id, RECOVERY_POINTS[point])
    assert sending(id) is None
    # When

    def sent() -> bool:
        fleet.settle(id)
        return sending(id) == "sent"

    support.wait_until("it is sent", sent)
    # Then
    assert attached(fleet, id) == expected(small=SMALL, large=LARGE)
    assert fleet.graph.messages(SENDER, "drafts") == []
    assert [mail["isDraft"] for mail in fleet.graph.messages(SENDER, "sentitems")] == [False]
    assert fleet.events() == ["SendEmailSent"]


def test_a_recorded_draft_and_recorded_ranges_are_not_made_again(fleet: Fleet) -> None:
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", LARGE)])
    killed_after(fleet, id, half_uploaded)
    before = calls(fleet)
    fleet.settle(id)
    again = calls(fleet) - before
    assert fleet.mails(id) == 1
    assert (again["create_draft"], again["create_upload_session"], again["upload_range"]) == (0, 0, 1)


def test_a_draft_on_which_a_file_may_still_appear_is_given_up_for_another(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a request to attach that takes effect when nobody waits for it any more
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "other", SMALL)])
    fleet.graph.hang(operation="attach", seconds=2, executed="late")
    with monkeypatch.context() as patched:
        hasty = GraphClient(
            runtime.configuration.graph_base_url, runtime.tokens, timeout=timedelta(seconds=0.5), tag_id=runtime.TAG
        )
        patched.setattr(runtime, "graph", hasty)
        fleet.send()
    first = email_row(id)["draft_id"]
    # When that is while the next attempt sends
    fleet.graph.set_latency(3, "send_draft")
    fleet.settle(id)
    # Then
    assert email_row(id)["draft_id"] != first
    assert attached(fleet, id) == expected(small=SMALL, other=SMALL)
    assert fleet.graph.messages(SENDER, "drafts") == []


def test_a_file_of_which_graph_has_more_than_was_recorded_begins_anew_in_another_session(fleet: Fleet) -> None:
    # Given a range that Graph took of which nobody lived to hear
    size = 2 * UPLOAD_RANGE_BYTES + 1000
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", size)])

    def second_range_unrecorded(email: models.ClaimedEmail) -> None:
        upload, content = session_opened(email), files.content("large", size)
        upload.source_version = version_of(email.payload["attachments"][1])
        session = runtime_session(email, upload)
        upload.uploaded_bytes = int(runtime.graph.upload_range(session, 0, content[:UPLOAD_RANGE_BYTES], size) or 0)
        uploads.record_progress(email, upload, lease=support.LEASE)
        runtime.graph.upload_range(session, UPLOAD_RANGE_BYTES, content[UPLOAD_RANGE_BYTES:-1000], size)

    killed_after(fleet, id, second_range_unrecorded)
    before = calls(fleet)
    # When
    for _ in range(2):
        fleet.settle(id)
    # Then Graph refuses the range that it has, and does not say where it would go on
    assert attached(fleet, id) == {"small": files.sha256("small", SMALL), "large": files.sha256("large", size)}
    again = calls(fleet) - before
    assert (again["create_draft"], again["create_upload_session"], again["upload_range"]) == (0, 1, 1 + 3)


def test_a_file_that_is_up_though_nobody_recorded_it_is_not_brought_up_again(fleet: Fleet) -> None:
    # Given the last range of a file, which Graph has taken
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", LARGE)])

    def last_range_unrecorded(email: models.ClaimedEmail) -> None:
        half_uploaded(email)
        upload = uploads.plan(email, email.payload["attachments"])[1]
        rest = files.content("large", LARGE)[UPLOAD_RANGE_BYTES:]
        assert runtime.graph.upload_range(runtime_session(email, upload), UPLOAD_RANGE_BYTES, rest, LARGE) is None

    killed_after(fleet, id, last_range_unrecorded)
    before = calls(fleet)
    # When
    fleet.settle(id)
    # Then
    assert attached(fleet, id) == expected(small=SMALL, large=LARGE)
    again = calls(fleet) - before
    assert (again["create_upload_session"], again["upload_range"], again["delete_attachment"]) == (0, 0, 0)


@pytest.mark.parametrize("fault", ["throttle", "unavailable"])
def test_a_file_that_graph_has_refused_for_now_is_attached_to_the_same_draft(fleet: Fleet, fault: str) -> None:
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "other", SMALL)])
    getattr(fleet.graph, fault)(operation="attach")
    fleet.send()
    assert {row["status"] for row in table("file_uploads")} == {"pending"}

    def sent() -> bool:
        fleet.settle(id)
        return sending(id) == "sent"

    support.wait_until("it is sent", sent)
    assert attached(fleet, id) == expected(small=SMALL, other=SMALL)
    assert calls(fleet)["create_draft"] == 1


def test_what_is_attached_behind_our_back_is_taken_off_again(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a first attempt
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "other", SMALL)])
    attach_all = drafts._attach_all

    def attached_then(email: models.ClaimedEmail, draft_id: str, planned: list[uploads.Upload]) -> None:
        attach_all(email, draft_id, planned)
        attach_small(draft_id)

    # When a file of its draft's is attached twice, whoever did it
    monkeypatch.setattr(drafts, "_attach_all", attached_then)
    fleet.send()
    # Then
    assert attached(fleet, id) == expected(small=SMALL, other=SMALL)


def test_small_files_are_on_the_mail_in_its_order(fleet: Fleet) -> None:
    names = [f"file-{number}" for number in range(8)]
    id = store(attachments=[file(fleet, name, SMALL) for name in names])
    fleet.send()
    (delivery,) = fleet.graph.deliveries(tag=id)
    assert [each["name"] for each in delivery["attachments"]] == names


def test_a_draft_that_lacks_what_was_brought_up_is_not_sent_so(fleet: Fleet) -> None:
    # Given an attachment that Graph has taken, and lost
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "other", SMALL)])
    killed_after(fleet, id, all_uploaded)
    draft_id = str(email_row(id)["draft_id"])
    (lost,) = [each for each in runtime.graph.attachments(SENDER, draft_id) if each.name == "small"]
    runtime.graph.delete_attachment(SENDER, draft_id, lost.id)
    # When
    fleet.settle(id)
    # Then it is brought up again, an attempt later
    assert (fleet.mails(id), email_row(id)["status"]) == (0, "received")
    fleet.settle(id)
    assert attached(fleet, id) == expected(small=SMALL, other=SMALL)


@pytest.mark.parametrize("sent", [True, False])
def test_a_worker_that_died_around_the_send_leaves_the_mail_in_doubt_and_it_is_sent_once(
    fleet: Fleet, sent: bool
) -> None:
    # Given
    id = store(attachments=[file(fleet, "small", SMALL)])
    email = support.claim(id, intent=False)
    draft_id = drafts.prepare_draft(email)
    email.record_intent(support.LEASE, str(email.draft_id))
    if sent:
        runtime.graph.send_draft(SENDER, draft_id)
    lapse(id)
    assert sending(id) == "in_doubt"
    # When
    fleet.settle(id)
    # Then
    assert (sending(id), fleet.mails(id)) == ("sent", 1)
    assert attached(fleet, id) == expected(small=SMALL)


def test_a_draft_that_graph_does_not_find_yet_is_given_a_moment_each_time_and_not_made_again(fleet: Fleet) -> None:
    # Given
    fleet.graph.hide_next_draft(3600)
    id = store(attachments=[file(fleet, "small", SMALL)])
    for attempt in (1, 2):
        # When
        assert fleet.settle(id) == ["done"]
        # Then
        assert email_row(id)["attempt_count"] == attempt
        assert support.seconds_until("incoming_emails", "next_attempt_at", "id", id) > 0.9
    assert calls(fleet)["create_draft"] == 1


def test_a_lost_answer_to_the_send_of_a_draft_does_not_send_twice(fleet: Fleet) -> None:
    fleet.graph.lose_next_answer(operation="send_draft")
    id = store(attachments=[file(fleet, "small", SMALL)])
    fleet.send()
    assert sending(id) == "in_doubt"
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def test_a_mail_without_attachments_may_be_sent_by_way_of_a_draft(fleet: Fleet, configure: Callable[..., None]) -> None:
    configure(send_plain_via="draft")
    fleet.graph.lose_next_answer(operation="send_draft")
    id = store()
    fleet.send()
    assert (sending(id), calls(fleet)["send_mail"]) == ("in_doubt", 0)
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


# Graph fails on the way


@pytest.mark.parametrize("operation", ["create_draft", "attach", "create_upload_session", "upload_range"])
@pytest.mark.parametrize("fault", ["throttle", "unavailable", "lose_next_answer", "reset_connection"])
def test_a_step_that_fails_is_repeated_and_nothing_is_there_twice(fleet: Fleet, operation: str, fault: str) -> None:
    # Given
    getattr(fleet.graph, fault)(operation=operation)
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", LARGE)])
    # When
    fleet.send()
    # Then
    row = email_row(id)
    assert (row["status"], row["attempt_count"], sending(id)) == ("received", 0 if fault == "throttle" else 1, None)

    def sent() -> bool:
        fleet.settle(id)
        return sending(id) == "sent"

    support.wait_until("it is sent", sent)
    assert attached(fleet, id) == expected(small=SMALL, large=LARGE)
    assert email_row(id)["attempt_count"] <= 4


def test_a_wait_that_graph_asks_for_with_another_error_binds_everyone_who_talks_to_the_mailbox(fleet: Fleet) -> None:
    fleet.graph.fail(500, operation="create_draft", retry_after="90")
    id = store(attachments=[file(fleet, "small", SMALL)])
    fleet.send()
    assert email_row(id)["attempt_count"] == 1
    assert 85 < support.seconds_until("mailboxes", "paused_until", "mailbox", SENDER) <= 90
    assert runtime.limiter.paused_until(SENDER) is not None
    assert 85 < support.seconds_until("incoming_emails", "next_attempt_at", "id", id) <= 90


def test_a_source_that_asks_to_wait_holds_back_its_own_mail_alone(fleet: Fleet) -> None:
    id = store(attachments=[file(fleet, "small", SMALL)])
    email = support.claim(id, intent=False)
    outcomes.record(email, SourceUnavailable("busy", retry_after=timedelta(seconds=90)))
    assert 85 < support.seconds_until("incoming_emails", "next_attempt_at", "id", id) <= 90
    assert runtime.limiter.paused_until(SENDER) is None
    assert rows("SELECT 1 FROM mailboxes WHERE paused_until IS NOT NULL") == []


def test_a_lost_upload_session_begins_that_file_again_and_leaves_the_others(fleet: Fleet) -> None:
    # Given
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", LARGE)])
    fleet.graph.lose_upload_session()
    # When
    fleet.send()
    # Then
    progress = {row["filename"]: (row["status"], row["uploaded_bytes"]) for row in table("file_uploads")}
    assert progress["small"] == ("uploaded", SMALL)
    assert progress["large"][1] == 0
    fleet.settle(id)
    assert attached(fleet, id) == expected(small=SMALL, large=LARGE)
    assert calls(fleet)["attach"] == 1


def test_a_draft_that_somebody_deleted_is_made_again(fleet: Fleet) -> None:
    id = store(attachments=[file(fleet, "small", SMALL)])
    killed_after(fleet, id, draft_recorded)
    first = email_row(id)["draft_id"]
    runtime.graph.delete_message(SENDER, first)
    rows("UPDATE incoming_emails SET attempt_count = 5")

    def sent() -> bool:
        fleet.settle(id)
        return sending(id) == "sent"

    support.wait_until("it is sent", sent)
    assert fleet.mails(id) == 1
    assert attached(fleet, id) == expected(small=SMALL)


def test_an_attachment_that_graph_finds_too_small_for_a_session_is_attached(fleet: Fleet) -> None:
    fleet.graph.set_behaviour(min_session_bytes=SMALL_ATTACHMENT_BYTES + 1000)
    size = SMALL_ATTACHMENT_BYTES + 10
    id = store(attachments=[file(fleet, "edge", size)])
    fleet.send()
    assert attached(fleet, id) == expected(edge=size)


# The source fails


@pytest.mark.parametrize(
    ("faults", "reason"),
    [({"status": 404}, "source_gone"), ({"status": 403}, "source_gone"), ({"size": SMALL + 1}, "size_mismatch")],
)
def test_a_source_that_does_not_have_the_file_ends_the_mail(fleet: Fleet, faults: dict[str, int], reason: str) -> None:
    given = file(fleet, "small", SMALL)
    if "size" in faults:
        given["size"] = faults["size"]
    else:
        given["urlOrId"] += f"&fail={faults['status']}"
    id = store(attachments=[given])
    assert fleet.send() == ["dead-lettered"]
    assert (email_row(id)["status"], table("dlq")[0]["reason"]) == ("failed", reason)
    assert given["urlOrId"] not in str(table("dlq"))
    assert fleet.mails(id) == 0


def test_a_source_in_a_private_network_is_refused(fleet: Fleet) -> None:
    id = store(attachments=[file(fleet, "small", SMALL) | {"urlOrId": "https://169.254.169.254/latest/meta-data"}])
    assert fleet.send() == ["dead-lettered"]
    assert (email_row(id)["status"], table("dlq")[0]["reason"]) == ("failed", "source_forbidden")


def test_a_source_that_fails_for_now_is_asked_again(fleet: Fleet) -> None:
    given = file(fleet, "small", SMALL)
    id = store(attachments=[given | {"urlOrId": given["urlOrId"] + "&fail=503"}])
    assert fleet.send() == ["done"]
    assert (email_row(id)["status"], email_row(id)["attempt_count"], sending(id)) == ("received", 1, None)


# A mail that takes longer than its lease


@contextmanager
def swept() -> Iterator[list[tuple[str, str]]]:
    """Let a scheduler take back expired leases all the while; yield what it took."""
    taken: list[tuple[str, str]] = []
    over = threading.Event()

    def sweep() -> None:
        while not over.wait(0.1):
            with scheduling.sweep():
                taken.extend(scheduling.expire_leases())
        models.disconnect()

    sweeping = threading.Thread(target=sweep)
    sweeping.start()
    try:
        yield taken
    finally:
        over.set()
        sweeping.join()


def from_a_slow_source(fleet: Fleet) -> dict[str, Any]:
    return file(fleet, "slow", 400_000, slow=150_000)


def in_slow_ranges(fleet: Fleet) -> dict[str, Any]:
    fleet.graph.set_latency(0.8, "upload_range")
    return file(fleet, "slow", 2 * UPLOAD_RANGE_BYTES + 1000)


@pytest.mark.parametrize("slow", [from_a_slow_source, in_slow_ranges])
def test_a_file_that_takes_longer_than_the_lease_keeps_its_mail(
    fleet: Fleet, configure: Callable[..., None], slow: Callable[[Fleet], dict[str, Any]]
) -> None:
    # Given
    attachment = slow(fleet)
    id = store(attachments=[attachment])
    fleet.schedule()
    configure(lease=timedelta(seconds=1.5), graph_timeout=timedelta(seconds=1))
    # When
    began = time.monotonic()
    with swept() as taken:
        assert fleet.run("send_attached") == ["done"]
    # Then
    assert time.monotonic() - began > 1.5
    assert taken == []
    assert (email_row(id)["status"], email_row(id)["attempt_count"]) == ("processed", 1)
    assert attached(fleet, id) == expected(slow=attachment["size"])
