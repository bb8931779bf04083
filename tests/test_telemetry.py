"""What is logged: JSON lines and a mail log of known steps, with ids and without anybody's mail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from dramatiq import Message
from prometheus_client import REGISTRY, generate_latest

import actors  # noqa: F401 (they are declared)
import runtime
from telemetry import Step, WorkerMetrics

ROOT = Path(__file__).resolve().parent.parent
PLANTED = "pl4nted"


def logged(program: str, level: str = "INFO") -> list[dict[str, Any]]:
    """Run a program in a process of its own and return its log; every line must be JSON."""
    begin = f"import logging, telemetry\ntelemetry.configure_logging({level!r})\n"
    ended = subprocess.run(
        [sys.executable, "-c", begin + dedent(program)], cwd=ROOT, env=os.environ, capture_output=True, check=True
    )
    return [orjson.loads(line) for line in ended.stderr.splitlines()]


def test_every_line_is_json_with_time_level_and_origin() -> None:
    lines = logged(
        """
        import warnings
        logging.getLogger("any").warning("%d emails", 3)
        warnings.warn("deprecated")
        logging.getLogger("any").info("line\\nbreak")
        try:
            1 / 0
        except ZeroDivisionError:
            logging.getLogger("any").exception("failed")
        """
    )
    assert [line["level"] for line in lines] == ["warning", "warning", "info", "error"]
    assert (lines[0]["event"], lines[0]["logger"]) == ("3 emails", "any")
    assert "ZeroDivisionError" in lines[3]["exception"]
    assert all(line["timestamp"].endswith("Z") for line in lines)


def test_the_mail_log_is_one_line_per_step_with_the_ids() -> None:
    (line,) = logged(
        """
        from telemetry import Step, mail_context, mail_log
        with mail_context(correlation_id="c-1", trace_id=None):
            mail_log(Step.SENT, incoming_email_id="e-1", publisher_message_id="p-1", attempt=2)
        """
    )
    assert {name: line[name] for name in line if name not in ("timestamp", "level")} == {
        "event": "sent",
        "incoming_email_id": "e-1",
        "publisher_message_id": "p-1",
        "correlation_id": "c-1",
        "attempt": 2,
    }


def test_a_line_of_the_mail_log_begins_with_whose_it_is_and_ends_with_what_happened_when() -> None:
    (line,) = logged(
        """
        from telemetry import Step, mail_context, mail_log
        with mail_context(incoming_email_id="e-1", trace_id="t-1"):
            mail_log(Step.IN_DOUBT, incoming_email_id="e-1", why="Ü", seconds=1.5, publisher_message_id="p-1")
        """
    )
    assert list(line) == [
        *("incoming_email_id", "trace_id", "why", "seconds", "publisher_message_id"),
        *("event", "level", "timestamp"),
    ]
    assert (line["event"], line["level"], line["why"]) == ("in doubt", "info", "Ü")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", line["timestamp"])


def test_the_steps_of_the_mail_log_are_a_closed_set() -> None:
    assert {step.value for step in Step} == {
        "received",
        "rejected",
        "dispatched",
        "claimed",
        "drafted",
        "uploading",
        "uploaded",
        "draft deleted",
        "sent",
        "in doubt",
        "settled",
        "snoozed",
        "retried",
        "failed",
        "backup retried",
        "backup failed",
        "dead letter mirrored",
        "expired",
        "cancelled",
        "archived",
        "replayed",
        "lease lost",
    }


def test_less_severe_lines_are_left_out() -> None:
    program = """
        logging.getLogger("any").info("no")
        telemetry.mail_log(telemetry.Step.SENT, incoming_email_id="e-1")
        logging.getLogger("any").warning("yes")
        """
    assert [line["event"] for line in logged(program, "WARNING")] == ["yes"]


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_dramatiqs_lines_about_a_failed_message_do_not_show_its_arguments(level: str) -> None:
    lines = logged(
        f"""
        import dramatiq
        from dramatiq.brokers.stub import StubBroker
        broker = StubBroker(middleware=[])
        @dramatiq.actor(broker=broker)
        def send(email): raise KeyError(email)
        broker.declare_queue("default")
        send.send("{PLANTED}")
        send.send(email="{PLANTED}")
        worker = dramatiq.Worker(broker, worker_timeout=50)
        worker.start(); broker.join("default", fail_fast=False); worker.stop()
        """,
        level,
    )
    assert any("send" in line["event"] for line in lines)
    assert PLANTED not in str(lines)


def test_an_errors_text_is_not_logged_since_it_may_quote_a_mail() -> None:
    lines = logged(
        f"""
        try:
            try:
                raise ValueError("{PLANTED}")
            except ValueError as error:
                raise KeyError("{PLANTED}") from error
        except KeyError:
            logging.getLogger("any").exception("unforeseen")
        """
    )
    (line,) = lines
    assert PLANTED not in str(line).replace(f'ValueError("{PLANTED}")', "").replace(f'KeyError("{PLANTED}")', "")
    assert "KeyError" in line["exception"]
    assert "ValueError" in line["exception"]


def test_no_statements_parameters_are_logged_at_any_level(servers: dict[str, str]) -> None:
    lines = logged(
        f"""
        import models
        models.connect("{servers["DATABASE_URL"]}", "tests")
        models.rows("SELECT %(text)s", {{"text": "{PLANTED}"}})
        """,
        "DEBUG",
    )
    assert PLANTED not in str(lines)


def test_counters_of_which_every_series_is_known_are_there_before_their_first_event() -> None:
    """Of a counter that appears with its first event no alert sees an increase."""
    lines = logged(
        """
        import sys, actors, orjson, runtime
        from types import SimpleNamespace
        from prometheus_client import generate_latest
        for middleware in runtime.fleet_broker.middleware:
            middleware.before_worker_boot(runtime.fleet_broker, SimpleNamespace(consumer_whitelist={"scheduler"}))
        logging.getLogger("any").info("%d", 1)
        for line in generate_latest().decode().splitlines():
            if line.startswith("mailfleet") and "_total" in line:
                print(orjson.dumps({"event": line}).decode(), file=sys.stderr)
        """
    )
    told = {line["event"] for line in lines}
    for series in (
        'dispatched_total{route="no-attachment"}',
        'dispatched_total{route="attachment"}',
        'deliveries_total{outcome="stored"}',
        'deliveries_total{outcome="duplicate"}',
        'deliveries_total{outcome="rejected"}',
        'messages_total{actor="schedule_emails",outcome="failed"}',
        'leases_expired_total{status="dispatched"}',
        'leases_expired_total{status="processing"}',
        'limits_lowered_total{budget="sends"}',
        'dead_letters_total{queue="backup",reason="backup_failed"}',
        'emails_total{step="backup failed"}',
        'dead_letter_notices_total{outcome="failed"}',
        'graph_token_renewals_total{outcome="failed"}',
        'events_published_total{type="SendEmailSent"}',
        'purged_total{kind="backups"}',
    ):
        assert f"mailfleet_{series} 0.0" in told
    # A worker counts nothing of actors that others work for.
    assert not [line for line in told if "mailfleet_messages_total" in line and "send_plain" in line]


def test_what_is_counted_in_a_series_from_before_a_fork_is_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    (line,) = logged(
        """
        import os
        from prometheus_client import CollectorRegistry, multiprocess
        from telemetry import EMAILS, Step, series
        series(EMAILS, Step.SENT).inc()
        if child := os.fork():
            os.waitpid(child, 0)
        series(EMAILS, Step.SENT).inc()
        if child:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
            sent = registry.get_sample_value("mailfleet_emails_total", {"step": "sent"})
            logging.getLogger("any").warning("%d", sent)
        """
    )
    assert line["event"] == "3"


def test_a_periodic_actor_tells_its_last_turn_that_ended_well_and_at_first_its_workers_begin() -> None:
    begun = time.time()
    middleware = WorkerMetrics()
    middleware.before_worker_boot(runtime.fleet_broker, SimpleNamespace(consumer_whitelist={"maintenance"}))
    assert begun <= turn_at("purge_expired") <= time.time()
    for exception, is_turn in ((KeyError(), False), (None, True)):
        before = turn_at("purge_expired")
        message = Message("maintenance", "purge_expired", (), {}, {})
        middleware.before_process_message(runtime.fleet_broker, message)
        middleware.after_process_message(runtime.fleet_broker, message, exception=exception)
        assert (turn_at("purge_expired") > before) == is_turn
    assert turn_at("send_plain") is None


def turn_at(actor: str) -> Any:
    return REGISTRY.get_sample_value("mailfleet_periodic_turn_timestamp_seconds", {"actor": actor})


def test_what_a_stranger_writes_becomes_no_series() -> None:
    """Each series costs memory for as long as the process lives, and a name may be an address."""
    strange = Message("send_plain", "eve@example.com", (), {}, {})
    middleware = WorkerMetrics()
    middleware.before_process_message(runtime.fleet_broker, strange)
    middleware.after_process_message(runtime.fleet_broker, strange, exception=KeyError())
    told = generate_latest().decode()
    assert "eve@" not in told
    assert 'mailfleet_messages_total{actor="other",outcome="failed"} 1.0' in told
