"""Runs the demo: ``python -m sandbox.demo [--keep]``, or ``bin/demo``, which sets everything up first."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pika

import settings
from sandbox.demo.findings import Finding, look, strays, with_deliveries
from sandbox.demo.mails import Ending, Mail, Writer
from sandbox.demo.screen import Counts, Screen, dead_letter_table, outcome_table
from sandbox.fleet import ReleaseFailed, read_procfile
from sandbox.programs import NotInstalled, ServerFailed, last_lines, write_privately
from sandbox.servers import Servers
from sandbox.world import PROCFILE, ROOT, Overdue, World

LOCAL = ROOT / ".local"
ENV_FILE = LOCAL / "demo.env"
KEPT_LOGS = LOCAL / "demo-logs"

SETTLED_WITHIN = timedelta(seconds=90)
_LOOK_EVERY = timedelta(milliseconds=250)

#: As in production, with less patience: nobody wants to watch a demo wait five minutes for a mail in doubt.
_IMPATIENT = {
    "BACKUP_DELAY_SECONDS": 1,
    "IN_DOUBT_SETTLE_SECONDS": 2,
    "IN_DOUBT_GRACE_SECONDS": 4,
    "RETRY_BACKOFF_MIN_SECONDS": 1,
    "RETRY_BACKOFF_MAX_SECONDS": 4,
}


class EndedOtherwise(Exception):
    """Raised when the fleet did not do what it had to; the screen has told more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 if every mail ended as it had to, 1 if not, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(prog="bin/demo", description="Send, archive and check a mixed set of mails.")
    parser.add_argument("--keep", action="store_true", help="leave everything running afterwards, until ^C")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    screen = Screen()
    try:
        _run(screen, keep=options.keep)
    except (NotInstalled, ServerFailed, ReleaseFailed, Overdue, EndedOtherwise) as error:
        screen.say(f"\nThe demo failed: {error}", style="red")
        return 1
    except KeyboardInterrupt:
        screen.say("\nInterrupted; everything is stopped.")
        return 128 + signal.SIGINT
    return 0


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _run(screen: Screen, *, keep: bool) -> None:
    _forget_settings()
    screen.say("mailfleet, from the queue to the archive. Nothing leaves this machine.\n", style="bold")
    with contextlib.ExitStack() as stack:
        with screen.step("Starting PostgreSQL, RabbitMQ and Redis …", "PostgreSQL, RabbitMQ and Redis of its own"):
            servers = stack.enter_context(Servers(LOCAL, durable=False, environment={}))
        types = len(read_procfile(PROCFILE)) - 1
        with screen.step("Starting the fleet …", f"a simulated Microsoft Graph, and the fleet: {types} process types"):
            world = stack.enter_context(World(servers.environment, servers.directory / "demo", _IMPATIENT))
            stack.enter_context(_keeping_logs(servers.directory / "demo" / "logs"))
            world.wait_until_ready(timedelta(seconds=60))
        mails = Writer(world.simulator.file_url, datetime.now(UTC)).all()
        with screen.step("Publishing …", f"{sum(mail.copies for mail in mails)} messages published on send_email"):
            _publish(world, mails)
        _tell_addresses(screen, world)
        _watch(screen, world, mails)
        good = _report(screen, world, mails)
        if keep:
            _stay(screen, world)
        if not good:
            raise EndedOtherwise("not every mail ended as it had to")


@contextlib.contextmanager
def _keeping_logs(logs: Path) -> Iterator[None]:
    """Copy the logs to where they outlive the servers' directory, if the demo fails."""
    try:
        yield
    except (Overdue, EndedOtherwise) as error:
        shutil.rmtree(KEPT_LOGS, ignore_errors=True)
        shutil.copytree(logs, KEPT_LOGS)
        reason = str(error).partition(";")[0]
        raise EndedOtherwise(f"{reason}; the fleet's logs are in {KEPT_LOGS.relative_to(ROOT)}") from error


def _forget_settings() -> None:
    """Keep settings and servers of the shell that starts the demo away from it: none of them is touched."""
    for field in settings.Settings.model_fields.values():
        os.environ.pop(str(field.validation_alias), None)
        os.environ.pop(f"{field.validation_alias}_FILE", None)


def _publish(world: World, mails: Sequence[Mail]) -> None:
    for mail in mails:
        if mail.trouble:
            mail.trouble(world.simulator)
    with pika.BlockingConnection(pika.URLParameters(world.environment["RABBITMQ_URL"])) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for mail in mails:
            properties = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent, correlation_id=mail.key)
            for _ in range(mail.copies):
                channel.basic_publish("", "send_email", mail.message, properties, mandatory=True)


def _tell_addresses(screen: Screen, world: World) -> None:
    screen.say(f"\n  Console          http://127.0.0.1:{world.fleet.ports['console.1'].port}/")
    screen.say(f"  Simulated Graph  {world.simulator.base_url}/   (a browser will not know its certificate)\n")


def _watch(screen: Screen, world: World, mails: Sequence[Mail]) -> None:
    """Show how it goes until all is settled, or for so long that it never will be."""
    deadline = time.monotonic() + SETTLED_WITHIN.total_seconds()
    with screen.progress(len(mails)) as progress:
        while time.monotonic() < deadline:
            findings = look(world, mails)
            settled = sum(finding.settled for finding in findings)
            progress.update(settled, Counts.of(findings))
            if settled == len(mails):
                return
            time.sleep(_LOOK_EVERY.total_seconds())


def _report(screen: Screen, world: World, mails: Sequence[Mail]) -> bool:
    """Show what became of everything; return whether it is what had to."""
    deliveries = world.simulator.deliveries()
    findings = with_deliveries(look(world, mails), deliveries)
    screen.show(outcome_table(findings, narrow=screen.narrow))
    screen.show(dead_letter_table(world.rows(_DEAD_LETTERS)))
    problems = list(_problems(world, findings, strays(findings, deliveries)))
    lost, duplicated = sum(each.lost for each in findings), sum(each.duplicated for each in findings)
    others = ", ".join(f"{_ended(findings, ending)} {ending}" for ending in Ending if ending is not Ending.SENT)
    screen.say(f"\n{len(deliveries)} mails delivered, {lost} lost, {duplicated} duplicated; {others}.", style="bold")
    for problem in problems:
        screen.say(f"  {problem}", style="red")
    if not problems:
        screen.say("Every mail ended as it had to, by the record of what Graph really delivered.", style="green")
    return not problems


_DEAD_LETTERS = """
    SELECT e.publisher_message_id, dlq.mailbox, dlq.reason, dlq.attempts, dlq.last_error
    FROM dlq LEFT JOIN incoming_emails e ON e.id = dlq.incoming_email_id
    WHERE dlq.status = 'open' ORDER BY dlq.created_at
"""


def _problems(world: World, findings: Sequence[Finding], strays: int) -> Iterator[str]:
    for finding in findings:
        for problem in finding.problems():
            yield f"{finding.mail.key}: {problem}"
    if strays:
        yield f"{strays} mails were delivered that nobody had published"
    for name in world.fleet.dead:
        yield f"{name} ended by itself; its last lines:\n{last_lines(world.fleet.logs[name])}"


def _ended(findings: Sequence[Finding], ending: Ending) -> int:
    return sum(finding.status == ending for finding in findings)


def _stay(screen: Screen, world: World) -> None:
    """Leave everything running until ^C, with a file by which other commands find it."""
    own = {name: value for name, value in world.environment.items() if os.environ.get(name) != value}
    del own["TMPDIR"]
    ENV_FILE.unlink(missing_ok=True)
    write_privately(ENV_FILE, "".join(f"{name}={shlex.quote(value)}\n" for name, value in own.items()))
    file = ENV_FILE.relative_to(ROOT)
    screen.say("\nEverything keeps running until ^C. In another terminal, from this directory:\n")
    screen.say(f"  set -a; . {file}; set +a")
    for words in ("status receipt", "dlq list", "backups list", "--help"):
        screen.say(f"  .venv/bin/mailfleet {words}")
    _tell_addresses(screen, world)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    finally:
        ENV_FILE.unlink(missing_ok=True)
    screen.say("Stopping …")


if __name__ == "__main__":
    sys.exit(main())
