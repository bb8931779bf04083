"""Traces: one from the publisher's ``traceparent`` to the archive copy, told to a receiver that nobody waits for."""

from __future__ import annotations

import os
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from textwrap import dedent
from typing import Any

import orjson
import pytest
import support
from otlp_receiver import Receiver
from support import SENDER, Fleet, send_email, table, wait_until
from test_bridge import publish, running

import models
import runtime
import tracing
from actors.ingest import Delivery, ingest
from tracing import Tracer

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet

ROOT = Path(__file__).resolve().parent.parent
TRACE, PUBLISHER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PUBLISHER}-01", f"00-{TRACE}-{PUBLISHER}-00"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with closing(Receiver()) as started:
        yield started


@pytest.fixture
def lost() -> list[int]:
    return []


@pytest.fixture
def trace(receiver: Receiver, lost: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tracer]]:
    """Have the actors of this process traced."""
    made = []

    def start(ratio: float = 0, url: str = receiver.url, **headers: str) -> Tracer:
        tracer = Tracer(url, headers=headers, ratio=ratio, version="1", on_lost=lost.append)
        monkeypatch.setattr(runtime, "tracer", tracer)
        made.append(tracer)
        return tracer

    yield start
    for tracer in made:
        tracer.close()


def received(fleet: Fleet, traceparent: str | None, **changes: Any) -> str:
    """Have an email arrive, and return its id."""
    ingest([Delivery(orjson.dumps(send_email(**changes)), "c-1", None, traceparent)])
    (row,) = table("incoming_emails")
    return str(row["id"])


def test_one_trace_leads_from_the_publisher_to_the_archive_copy(
    fleet: Fleet, receiver: Receiver, trace: Callable[..., Tracer]
) -> None:
    # Given an email that comes over the queue, with a file
    tracer = trace()
    email = send_email(attachments=[{"name": "a.pdf", "size": 5000, "urlOrId": fleet.graph.file_url(5000)}])
    publish(fleet, orjson.dumps(email), correlation_id="c-1", headers={"traceparent": SAMPLED})
    with running():
        wait_until("it is stored", lambda: table("outbox_events") and table("outbox_events")[0]["published_at"])
    # When it is sent and archived, each step knowing only what database and broker kept
    assert fleet.send() == ["done"]
    assert fleet.backup() == ["done"]
    tracer.close()
    # Then
    assert {span.trace_id for span in receiver.spans} == {TRACE}
    receive, dispatch = receiver.named("receive"), receiver.named("dispatch")
    send, backup = receiver.named("send_attached"), receiver.named("backup")
    parents = [span.parent_id for span in (receive, dispatch, send, backup)]
    assert parents == [PUBLISHER, receive.id, dispatch.id, receive.id]
    calls = [(span.name, span.parent_id) for span in receiver.spans if span.name.startswith("graph ")]
    of_send = ("create_draft", "attach", "attachments", "send_draft")
    assert calls[:4] == [(f"graph {name}", send.id) for name in of_send]
    assert {parent for _, parent in calls[4:]} == {backup.id}
    assert ("graph fetch_mime", backup.id) in calls
    # And each span of the mail's tells its ids
    (row,) = table("incoming_emails")
    for span in (receive, dispatch, send, backup):
        assert span.attributes["mailfleet.incoming_email_id"] == row["id"]
        assert span.attributes["mailfleet.publisher_message_id"] == "order-1"
        assert span.attributes["mailfleet.correlation_id"] == "c-1"
    assert not any(span.failed for span in receiver.spans if span.name != "graph fetch_mime")
    # And what listens to the events goes on with the trace
    runtime.events.close()
    told = [properties.headers["traceparent"] for properties, _ in fleet.take_raw("test.events")]
    assert [each[:52] for each in told] == [f"00-{TRACE}-{receive.id}"] * 2


def test_mails_that_are_archived_together_have_each_their_own_trace(
    fleet: Fleet, receiver: Receiver, trace: Callable[..., Tracer]
) -> None:
    # Given
    tracer = trace(ratio=1)
    bodies = [orjson.dumps(send_email(publisher_message_id=f"order-{n}")) for n in range(2)]
    ingest([Delivery(body) for body in bodies])
    fleet.send()
    # When
    assert fleet.backup() == ["done"]
    tracer.close()
    # Then
    backups = [span for span in receiver.spans if span.name == "backup"]
    assert len({span.trace_id for span in backups}) == 2
    calls = [span for span in receiver.spans if span.parent_id in {backup.id for backup in backups}]
    assert sorted(span.name for span in calls) == ["graph fetch_mime"] * 2 + ["graph find_by_tag"] * 2
    assert {(span.trace_id, span.parent_id) for span in calls} == {(span.trace_id, span.id) for span in backups}


def test_a_span_quotes_no_address_no_content_and_no_url(
    fleet: Fleet, receiver: Receiver, trace: Callable[..., Tracer]
) -> None:
    tracer = trace()
    fleet.graph.fail(400, "ErrorInvalidRecipients", mailbox=SENDER, message="bob@example.org is no recipient")
    received(fleet, SAMPLED, subject="Pl4nted", body={"contentType": "text", "content": "pl4nted"})
    assert fleet.send() == ["dead-lettered"]
    tracer.close()
    send = receiver.named("send_plain")
    assert (send.failed, send.attributes["error.type"]) == (True, "InvalidRecipient")
    for planted in (b"pl4nted", b"Pl4nted", b"example.org", b"example.com", b"https://"):
        assert planted not in b"".join(receiver.bodies)


@pytest.mark.parametrize(
    ("ratio", "traceparent", "recorded"),
    [(0, None, 0), (0, SAMPLED, 1), (0, "no traceparent", 0), (1, None, 1), (1, UNSAMPLED, 0), (1, "00-a-b-01", 1)],
)
def test_the_publisher_decides_whether_a_mail_is_traced_and_else_the_lot(
    fleet: Fleet, receiver: Receiver, trace: Callable[..., Tracer], ratio: int, traceparent: str | None, recorded: int
) -> None:
    tracer = trace(ratio=ratio)
    received(fleet, traceparent)
    fleet.send()
    tracer.close()
    assert [span.name for span in receiver.spans].count("receive") == recorded
    assert [span.name for span in receiver.spans].count("send_plain") == recorded
    # Traced or not, its lines can be found by one id.
    ((kept,),) = models.rows("SELECT traceparent FROM incoming_emails")
    assert tracing.trace_id(kept) is not None


def test_without_a_receiver_every_line_of_a_mail_has_its_traces_id_all_the_same(
    fleet: Fleet, capfd: pytest.CaptureFixture[str]
) -> None:
    # Given a fleet as it is by default, and mails without a traceparent and with one that is none
    assert runtime.configuration.otlp_endpoint is None
    ingest(
        [
            Delivery(orjson.dumps(send_email())),
            Delivery(orjson.dumps(send_email(publisher_message_id="2")), "c", None, "no"),
        ]
    )
    # When they are sent and archived
    assert fleet.send() == ["done", "done"]
    assert fleet.backup() == ["done"]
    runtime.events.close()
    # Then every line tells the id that is kept in the mail's row, and so do its events; none is recorded
    kept = dict(models.rows("SELECT publisher_message_id, traceparent FROM incoming_emails"))
    assert len({tracing.trace_id(each) for each in kept.values()} - {None}) == 2
    lines = [orjson.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    told = [(line["event"], line.get("trace_id")) for line in lines if line.get("publisher_message_id") == "2"]
    assert told == [
        (event, tracing.trace_id(kept["2"])) for event in ("received", "dispatched", "claimed", "sent", "archived")
    ]
    events = fleet.take_raw("test.events")
    assert len(events) == 4
    assert {properties.headers["traceparent"] for properties, _ in events} == set(kept.values())
    assert all(each.endswith("-00") for each in kept.values())


def test_an_id_for_a_trace_that_nobody_records_costs_microseconds() -> None:
    tracer = Tracer(None, headers={}, ratio=1, version="1", on_lost=lambda _count: None)
    best = min(timeit.repeat(lambda: tracer.root("receive", None, correlation_id="c"), number=1000, repeat=5))
    assert best / 1000 < 50e-6


def test_a_mail_is_sent_although_the_receiver_is_away(
    fleet: Fleet, receiver: Receiver, trace: Callable[..., Tracer], lost: list[int]
) -> None:
    receiver.status = 400
    tracer = trace(ratio=1)
    id = received(fleet, None)
    assert fleet.send() == ["done"]
    tracer.close()
    assert fleet.mails(id) == 1
    assert sum(lost) == len(receiver.spans) > 0


def test_what_the_receiver_wants_as_headers_is_sent(
    fleet: Fleet, receiver: Receiver, trace: Callable[..., Tracer]
) -> None:
    tracer = trace(**tracing.header_pairs("X-Api-Key=a%20key, tenant=t"))
    with tracer.span("an operation", SAMPLED):
        pass
    tracer.close()
    assert (receiver.headers[0]["x-api-key"], receiver.headers[0]["tenant"]) == ("a key", "t")


@pytest.mark.parametrize("text", ["no pair", "a b=c", "a=\x00", "=x", "a=%C3%BC"])
def test_headers_of_another_form_are_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(ValueError, match="must be name=value pairs, comma-separated"):
        tracing.header_pairs(text)


@pytest.mark.parametrize("url", ["collector:4318", "ftp://a", "http://", "http://u:pass@a", "http://a?token=pass"])
def test_an_endpoint_that_is_none_or_holds_a_password_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must") as refused:
        tracing.check_endpoint(url)
    assert "pass@" not in str(refused.value)


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (SAMPLED, TRACE),
        (f"{SAMPLED}-later", None),
        (f"cc{SAMPLED[2:]}-later", TRACE),
        (f"ff{SAMPLED[2:]}", None),
        (f"00-{'0' * 32}-{PUBLISHER}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (SAMPLED.upper(), None),
        (f"{SAMPLED}\n", None),
        ("", None),
        (None, None),
    ],
)
def test_a_traceparent_is_read_as_its_standard_says(traceparent: str | None, trace_id: str | None) -> None:
    assert tracing.trace_id(traceparent) == trace_id


def run(program: str, **settings: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", dedent(program)],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        check=True,
        text=True,
    ).stdout


def test_without_a_receiver_nothing_is_traced_and_what_delivers_is_not_even_imported() -> None:
    program = f"""
        import sys, runtime
        with runtime.tracer.span("an operation", {SAMPLED!r}) as span:
            print(span.recorded, runtime.tracer.root("receive", None).recorded)
        print("tracing.delivery" in sys.modules, any("opentelemetry.exporter" in name for name in sys.modules))
        """
    assert run(program).split() == ["False"] * 4


def test_a_worker_that_was_forked_delivers_its_last_spans_before_it_ends(receiver: Receiver) -> None:
    program = f"""
        import os, runtime
        child = os.fork()
        with runtime.tracer.span("the child's" if child == 0 else "the parent's", {SAMPLED!r}):
            pass
        for middleware in runtime.fleet_broker.middleware:
            middleware.after_worker_shutdown(runtime.fleet_broker, None)
        if child:
            os.waitpid(child, 0)
        """
    run(program, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    assert sorted(span.name for span in receiver.spans) == ["the child's", "the parent's"]
