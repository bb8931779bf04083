"""The mail log: whoever writes a line about a mail, it has the ids by which the mail is known."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
import support
from dramatiq.broker import MessageProxy
from support import Fleet, rows, send_email, table, work

import operations.dead_letters
import operations.emails
import runtime
from actors.ingest import Delivery, ingest
from models import dead_letters
from models.dead_letters import Filter
from telemetry import Step

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet

TRACE = "0af7651916cd43dd8448eb211c80319c"
DELIVERED = ("c-1", None, f"00-{TRACE}-b7ad6b7169203331-00")


def arrive(**changes: Any) -> str:
    """Have an email arrive with everything by which its publisher knows it, and return its id."""
    ingest([Delivery(orjson.dumps(send_email(**changes)), *DELIVERED)])
    ((id,),) = rows("SELECT id::text FROM incoming_emails ORDER BY id DESC LIMIT 1")
    return str(id)


def lines_of(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]


def assert_ids(lines: list[dict[str, Any]], id: str | None, publisher_message_id: str = "order-1") -> None:
    known = {"publisher_message_id": publisher_message_id, "correlation_id": "c-1", "trace_id": TRACE}
    for line in lines:
        assert line | known == line, line
        assert line.get("incoming_email_id") == id


def test_every_line_of_a_mails_life_has_its_ids(fleet: Fleet, capfd: pytest.CaptureFixture[str]) -> None:
    # Given a mail whose draft Graph refuses at first
    files = [{"name": "a.pdf", "size": 5000, "urlOrId": fleet.graph.file_url(5000)}]
    fleet.graph.fail(500, operation="create_draft")
    # When it goes all the way
    id = arrive(attachments=files)
    fleet.send()
    fleet.settle(id)
    fleet.backup()
    # Then
    lines = lines_of(capfd)
    assert_ids(lines, id)
    told = [line["event"] for line in lines]
    first_attempt = [Step.RECEIVED, Step.DISPATCHED, Step.CLAIMED, Step.RETRIED]
    second_attempt = [Step.DISPATCHED, Step.CLAIMED, Step.DRAFTED, Step.UPLOADED, Step.SENT]
    assert told == [*first_attempt, *second_attempt, Step.ARCHIVED]
    (row,) = table("sent_emails")
    assert all("graph_message_id" in line for line in lines[-4:])
    assert lines[-1]["graph_message_id"] == row["graph_message_id"]


def test_the_lines_of_a_mail_that_is_given_up_and_replayed_have_its_ids(
    fleet: Fleet, capfd: pytest.CaptureFixture[str]
) -> None:
    fleet.graph.fail(400, "ErrorInvalidRecipients")
    id = arrive()
    assert fleet.send() == ["dead-lettered"]
    operations.dead_letters.resolve(dead_letters.find_open(Filter(), None), replay=True, who="ann")
    lines = lines_of(capfd)
    assert [line["event"] for line in lines][-2:] == [Step.FAILED, Step.REPLAYED]
    assert_ids(lines, id)


def test_the_lines_of_a_mail_that_is_cancelled_expired_lost_or_rejected_have_its_ids(
    fleet: Fleet, capfd: pytest.CaptureFixture[str]
) -> None:
    # Given one that is cancelled, one that expires, one whose worker is gone, and one that is a conflict
    operations.emails.cancel(arrive(), who="ann")
    expired = arrive(publisher_message_id="order-2", expires_at="2999-01-01T00:00:00Z")
    rows("UPDATE incoming_emails SET expires_at = now() WHERE id = %(id)s", {"id": expired})
    lost = arrive(publisher_message_id="order-3")
    fleet.schedule()
    rows("UPDATE incoming_emails SET lease_until = now() WHERE id = %(id)s", {"id": lost})
    fleet.schedule()
    ingest([Delivery(orjson.dumps(send_email(subject="Another")), *DELIVERED)])
    # Then
    lines = lines_of(capfd)
    for step, name in [
        (Step.CANCELLED, "order-1"),
        (Step.EXPIRED, "order-2"),
        (Step.LEASE_LOST, "order-3"),
        (Step.REJECTED, "order-1"),
    ]:
        told = [line for line in lines if line["event"] == step]
        assert len(told) == 1, step
        ((id,),) = rows("SELECT id::text FROM incoming_emails WHERE publisher_message_id = %(name)s", {"name": name})
        assert_ids(told, id, name)


def test_dramatiqs_lines_about_a_message_tell_its_mail_as_far_as_its_word_can_be_trusted(
    fleet: Fleet, capfd: pytest.CaptureFixture[str]
) -> None:
    # Given a mail's message, and one of which nobody knows what it holds
    id = arrive()
    fleet.schedule()
    (message,) = fleet.take("send_plain")
    address = "ann@example.com"
    foreign = message.copy(kwargs={"incoming_email_id": address, "publisher_message_id": address})
    work(message)
    lines_of(capfd)
    # When something is logged about them around their actors
    for each in (message, foreign.copy(options={"traceparent": address})):
        runtime.fleet_broker.emit_before("process_message", MessageProxy(each))
        logging.getLogger("any").warning("in hand")
        runtime.fleet_broker.emit_after("process_message", MessageProxy(each))
        logging.getLogger("any").warning("nobody's")
    # Then
    ids = [{name: line[name] for name in line if name.endswith("_id")} for line in lines_of(capfd)]
    assert ids == [{"incoming_email_id": id, "trace_id": TRACE}, {}, {}, {}]


def test_the_steps_of_the_mail_log_are_documented_and_no_others() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "logs.md").read_text()
    table_of_steps = page.split("## The mail log")[1].split("##")[0]
    assert set(re.findall(r"^\| `([a-z ]+)` \|", table_of_steps, re.MULTILINE)) == set(Step)
