"""A mailbox that Graph wants left alone is called by nobody, in whatever form Graph says it.

One call in twenty is answered 429, with a Retry-After in each form in which it has been seen, and without one. Mail
with and without files is sent and archived meanwhile, so every type of worker that calls Graph has to heed what another
was told. A call that comes within 50 ms of the answer was on its way and could not know: it is counted apart.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from bench.limits import backlog
from bench.limits.findings import Findings
from bench.limits.measures import Call, Early, by_mailbox, early_calls
from bench.limits.recorder import Recorder
from sandbox.world import World
from simulator.control import Simulator

#: How each form is asked of the simulator.
FORMS: dict[str, dict[str, Any]] = {
    "seconds": {"retry_after": "2"},
    "decimal": {"retry_after": "1.249"},
    "list": {"retry_after": "0,2"},
    "date": {"retry_after": None, "retry_after_date_seconds": 2},
    "absent": {"retry_after": None},
}
_ATTACHED_EVERY = 10
#: Large enough for an upload session.
_ATTACHED_BYTES = 3_500_000


@dataclass(frozen=True)
class Plan:
    """What to run."""

    mailboxes: int = 20
    #: For each mailbox.
    emails: int = 60
    throttled_share: float = 0.05
    lasts: timedelta = timedelta(minutes=2)
    latency: timedelta = timedelta(milliseconds=150)
    #: What comes so soon after the answer was on its way when it left.
    on_its_way: timedelta = timedelta(milliseconds=50)
    #: See `backlog.let_go`.
    at_once: bool = True


SCALE = {"send_plain": 2, "send_attached": 2, "backup": 2}


def settings(_: Plan) -> dict[str, str | int]:
    """Return the fleet's settings: the limits that Graph documents, but for sends, or mailboxes would mostly wait."""
    return {"MAILBOX_SENDS_PER_MINUTE": 0, "BACKUP_DELAY_SECONDS": 1}


def measure(world: World, plan: Plan) -> Findings:
    """Send for as long as the plan says, or until all is sent and archived, and judge what Graph saw."""
    world.simulator.set_latency(plan.latency.total_seconds())
    senders = backlog.mailboxes(plan.mailboxes, "throttled")
    for form in FORMS.values():
        world.simulator.throttle(times=None, probability=plan.throttled_share / len(FORMS), **form)
    with Recorder(world.simulator) as recorder:
        count = backlog.let_go(world, _mail(plan, senders, world.simulator), at_once=plan.at_once)
        over = time.monotonic() + plan.lasts.total_seconds()
        world.wait_until(
            "it is over",
            lambda: time.monotonic() > over or backlog.settled(world, senders) >= count,
            2 * plan.lasts + timedelta(minutes=1),
        )
        world.simulator.clear_faults()
        time.sleep(2 * plan.latency.total_seconds())
    return judge(plan, [call for call in recorder.calls if call.mailbox in senders])


def _mail(plan: Plan, senders: list[str], simulator: Simulator) -> Iterator[dict[str, Any]]:
    for number, email in enumerate(backlog.emails(plan.emails, senders)):
        if number % _ATTACHED_EVERY == 0:
            seed = uuid.uuid4().hex
            url = simulator.file_url(_ATTACHED_BYTES, seed)
            email["attachments"] = [{"name": f"{seed}.bin", "size": _ATTACHED_BYTES, "urlOrId": url}]
        yield email


def judge(plan: Plan, calls: list[Call]) -> Findings:
    findings = Findings()
    throttled = Counter(_form(call) for call in calls if call.status == "429")
    early = [each for of_mailbox in by_mailbox(calls).values() for each in early_calls(of_mailbox)]
    late = [each for each in early if each.known_for_seconds >= plan.on_its_way.total_seconds()]
    findings.tell("calls", len(calls))
    for form in FORMS:
        name = f"429 with Retry-After: {form}"
        # Those without demand nothing that could be counted; the others show nothing if they did not happen.
        findings.tell(name, throttled[form]) if form == "absent" else findings.at_least(name, throttled[form], 1)
    findings.tell("early, on their way", len(early) - len(late))
    findings.tell("latest of these after the answer, ms", _latest(early, late))
    findings.at_most("early, could be known", len(late), 0)
    findings.tell("latest of those after the answer, ms", _latest(late))
    findings.tell("those were", _described(late))
    return findings


def _latest(early: list[Early], but: list[Early] | None = None) -> float:
    return 1000 * max((each.known_for_seconds for each in early if each not in (but or [])), default=0.0)


def _described(early: list[Early]) -> str:
    operations = Counter(each.call.operation for each in early)
    return ", ".join(f"{count} × {operation}" for operation, count in operations.most_common()) or "none"


def _form(call: Call) -> str:
    if call.retry_after is None:
        return "absent"
    if call.retry_after.endswith("GMT"):
        return "date"
    if "," in call.retry_after:
        return "list"
    return "decimal" if "." in call.retry_after else "seconds"
