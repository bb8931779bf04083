"""The demo's mails and its verdict: it must not praise itself when a mail is lost, doubled, altered or forgotten."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

import contracts
from sandbox.demo.findings import Finding, Row, strays, with_deliveries
from sandbox.demo.mails import Ending, Mail, Writer
from sandbox.demo.screen import Counts, PlainCounts, outcome_table
from simulator import files

NOW = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
EMAIL_ID = "0197c3c4-0000-7000-8000-000000000001"


def file_url(size_bytes: int, seed: str = "", name: str = "file.bin", **faults: int) -> str:
    return f"https://localhost/files/{name}?bytes={size_bytes}&seed={seed}"


@pytest.fixture
def mails() -> list[Mail]:
    return Writer(file_url, NOW).all()


@pytest.fixture
def mail(mails: list[Mail]) -> Mail:
    return named(mails, "report")


def named(mails: list[Mail], key: str) -> Mail:
    return next(mail for mail in mails if mail.key == key)


def row(**changes: Any) -> Row:
    sent = Row(EMAIL_ID, "processed", 1, NOW, NOW + timedelta(seconds=2), "sent", [], False, 4000, 2500, None)
    return sent._replace(**changes)


def delivery(mail: Mail, **changes: Any) -> dict[str, Any]:
    assert isinstance(mail.content, dict)
    attachments = [{"name": file.name, "sha256": files.sha256(file.name, file.size_bytes)} for file in mail.files]
    return {
        "tags": [EMAIL_ID],
        "recipients": mail.recipients,
        "subject": mail.content["subject"],
        "body": mail.content["body"]["content"],
        "attachments": attachments,
    } | changes


def sent(mail: Mail, *deliveries: dict[str, Any], **changes: Any) -> Finding:
    return Finding(mail, row(**changes), frozenset({"SendEmailReceived", "SendEmailSent"}), deliveries)


# The mails


def test_every_mail_but_those_to_be_rejected_is_acceptable(mails: list[Mail]) -> None:
    for mail in mails:
        if mail.ending is not Ending.REJECTED:
            assert contracts.accept(mail.message).publisher_message_id == mail.key


def test_rejected_mails_are_unacceptable_or_use_the_id_of_another_with_other_content(mails: list[Mail]) -> None:
    first = contracts.accept(named(mails, "order-1").message)
    reasons = []
    for mail in mails:
        if mail.ending is Ending.REJECTED:
            try:
                again = contracts.accept(mail.message)
            except contracts.Unacceptable as error:
                reasons.append(error.reason)
            else:
                assert again.publisher_message_id == first.publisher_message_id
                assert again.content_hash != first.content_hash
                reasons.append("conflict")
    assert sorted(reasons) == ["conflict", "invalid", "not_json"]


def test_no_two_mails_have_one_key_and_there_are_enough_of_each_ending(mails: list[Mail]) -> None:
    assert len({mail.key for mail in mails}) == len(mails) >= 38
    assert {mail.ending for mail in mails} == set(Ending)


def test_trouble_strikes_only_mails_whose_scenario_says_so(mails: list[Mail]) -> None:
    def sender(mail: Mail) -> str:
        assert isinstance(mail.content, dict)
        return str(mail.content["from"])

    for troubled in (mail for mail in mails if mail.trouble):
        sharing = [mail for mail in mails if isinstance(mail.content, dict) and sender(mail) == sender(troubled)]
        assert {mail.scenario for mail in sharing} == {troubled.scenario}


# The verdict on one mail


def test_mail_that_was_delivered_once_unaltered_and_archived_has_no_problem(mail: Mail) -> None:
    finding = sent(mail, delivery(mail))

    assert finding.problems() == []
    assert not finding.lost
    assert not finding.duplicated
    assert finding.settled


def test_mail_that_mailfleet_believes_sent_but_nobody_delivered_is_lost(mail: Mail) -> None:
    finding = sent(mail)

    assert finding.lost
    assert finding.problems() == ["lost: it was never delivered"]


def test_mail_that_was_delivered_twice_is_duplicated(mail: Mail) -> None:
    finding = sent(mail, delivery(mail), delivery(mail))

    assert finding.duplicated
    assert finding.problems() == ["duplicated: delivered 2 times"]


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("recipients", {"recipients": ["someone.else@fabrikam.example"]}),
        ("subject", {"subject": "Another"}),
        ("body", {"body": "Another"}),
        ("attachments", {"attachments": []}),
        ("attachments", {"attachments": [{"name": "report.docx", "sha256": "0" * 64}]}),
    ],
)
def test_mail_that_arrived_altered_is_told(mail: Mail, part: str, changes: dict[str, Any]) -> None:
    assert sent(mail, delivery(mail, **changes)).problems() == [f"its {part} differ from what was published"]


def test_sent_mail_that_is_missing_from_the_archive_is_told(mail: Mail) -> None:
    assert sent(mail, delivery(mail), size_bytes=None).problems() == ["it is not in the archive"]


def test_sent_mail_that_nobody_was_told_of_is_told(mail: Mail) -> None:
    finding = replace(sent(mail, delivery(mail)), events=frozenset({"SendEmailReceived"}))

    assert finding.problems() == ["its events are SendEmailReceived"]


def test_mail_that_was_to_fail_and_was_delivered_all_the_same_is_told(mails: list[Mail]) -> None:
    summons = named(mails, "summons")

    assert "delivered although it should not be" in sent(summons, delivery(summons)).problems()


def test_failed_mail_needs_a_dead_letter(mails: list[Mail]) -> None:
    events = frozenset({"SendEmailReceived", "SendEmailFailed"})
    failed = row(status="failed", sent_at=None, sending=None, size_bytes=None)

    summons = Finding(named(mails, "summons"), failed, events)

    assert summons.problems() == ["it has no dead letter"]
    assert replace(summons, row=failed._replace(dead_letter="invalid_recipient")).problems() == []


def test_mail_that_was_to_be_rejected_and_was_accepted_is_told(mails: list[Mail]) -> None:
    nobody = named(mails, "nobody")

    assert Finding(nobody, None, frozenset({"SendEmailRejected"})).problems() == []
    assert "received instead of rejected" in Finding(nobody, row(status="received")).problems()


def test_mail_of_which_nothing_is_known_is_lost_and_not_settled(mail: Mail) -> None:
    finding = Finding(mail)

    assert finding.status == "not received"
    assert finding.lost
    assert not finding.settled


def test_mail_is_settled_only_when_its_last_event_is_out_and_its_backup_is_made(mail: Mail) -> None:
    assert not replace(sent(mail), events=frozenset({"SendEmailReceived"})).settled
    assert not sent(mail, backup_due=True).settled
    assert sent(mail).settled


# All of them together


def test_deliveries_are_found_by_the_tag_and_what_has_no_owner_is_counted(mail: Mail) -> None:
    foreign = delivery(mail, tags=["of nobody"])
    untagged = delivery(mail, tags=[])
    deliveries = [delivery(mail), foreign, untagged]

    (finding,) = with_deliveries([sent(mail)], deliveries)

    assert len(finding.deliveries) == 1
    assert strays([finding], deliveries) == 2


def test_counts_tell_mail_in_doubt_from_mail_that_is_being_sent(mail: Mail) -> None:
    doubtful = sent(mail, status="processing", sending="in_doubt", size_bytes=None)
    under_way = sent(mail, status="processing", sending="sending", size_bytes=None)

    counts = Counts.of([doubtful, under_way, sent(mail), Finding(mail)])

    assert (counts.in_doubt, counts.sending, counts.sent, counts.archived) == (1, 1, 1, 1)


def test_table_marks_what_went_wrong_and_tells_the_story_of_what_went_right(mails: list[Mail]) -> None:
    looked_up = [{"asked": "send", "seen": "lost"}, {"asked": "messages by tag", "seen": "1 sent, 0 drafts"}]
    receipt, order = named(mails, "receipt"), named(mails, "order-1")
    console = Console(width=200, record=True, file=None, quiet=False)

    with console.capture() as capture:
        console.print(outcome_table([sent(receipt, delivery(receipt), evidence=looked_up), sent(order)]))

    good, bad = re.findall("^[✓✗].*$", capture.get(), re.MULTILINE)
    assert good.startswith("✓  receipt")
    assert "it was sent; not repeated" in good
    assert bad.startswith("✗  order-1")
    assert "lost: it was never delivered" in bad


def test_without_a_terminal_the_last_counts_are_printed_however_soon_they_come(mail: Mail) -> None:
    console = Console(width=150)
    with console.capture() as capture, PlainCounts(console, total=2) as progress:
        progress.update(1, Counts.of([sent(mail), Finding(mail)]))
        progress.update(2, Counts.of([sent(mail), sent(mail)]))

    assert "settled  1/2" in capture.get()
    assert "settled  2/2" in capture.get()
