"""When the mail will be out: what waits and what may be used of the limits, put together for a forecast."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import runtime
from actors import concurrency
from forecast import Fleet, Forecast, Later, Usage, Workload, foresee, planned
from graph_client import ATTACH_JSON_BYTES, SMALL_ATTACHMENT_BYTES, UPLOAD_RANGE_BYTES, attach_bytes
from limiter import BudgetUsage
from models import workload
from models.workload import Waiting

#: Until the first call was made: nobody documents how long one takes, users tell of 0.2 to 1 s.
_UNMEASURED_CALL = timedelta(milliseconds=300)
_FILES = {
    "small_bytes": SMALL_ATTACHMENT_BYTES,
    "attach_json_bytes": ATTACH_JSON_BYTES,
    "range_bytes": UPLOAD_RANGE_BYTES,
}


def forecast(*, emails: int | None = None, mailboxes: int = 1, attachment_bytes: int = 0) -> Forecast:
    """Say when the waiting mail will be with Graph, or so many emails alone from mailboxes that have used nothing.

    Raises:
        Unavailable: Redis does not answer.
    """
    if emails is None:
        workloads = [_workload(each) for each in workload.waiting(**_FILES)]
    else:
        unused = runtime.limiter.usage("a mailbox that nothing was sent from")
        upload_bytes, attach_requests = _cost(attachment_bytes)
        workloads = planned(
            emails, mailboxes, upload_bytes=upload_bytes, attach_requests=attach_requests, usage=_usage(unused)
        )
    paused_until = runtime.limiter.tenant_paused_until()
    at_work = concurrency.effective()
    fleet = Fleet(
        plain_concurrency=at_work.send_plain_concurrency,
        attached_concurrency=at_work.send_attached_concurrency,
        call=workload.send_duration() or _UNMEASURED_CALL,
        plain_calls=(1, 2) if runtime.configuration.send_plain_via == "sendmail" else (2, 1),
        usage=_usage(runtime.limiter.tenant_usage()),
        paused_for=paused_until - datetime.now(UTC) if paused_until else timedelta(),
    )
    return foresee(workloads, fleet)


def _cost(attachment_bytes: int) -> tuple[int, int]:
    """Return how many bytes go up for an attachment, and in how many requests."""
    if attachment_bytes == 0:
        return 0, 0
    if attachment_bytes <= SMALL_ATTACHMENT_BYTES:
        return attach_bytes(attachment_bytes), 1
    return attachment_bytes, 1 - (-attachment_bytes // UPLOAD_RANGE_BYTES)


def _workload(waiting: Waiting) -> Workload:
    told = waiting._asdict()
    later, due_in = told.pop("later"), told.pop("due_in")
    usage = _usage(runtime.limiter.usage(waiting.mailbox))
    return Workload(**told, later=Later(later, *due_in) if due_in else None, usage=usage)


def _usage(budgets: list[BudgetUsage]) -> list[Usage]:
    return [Usage(each.budget, each.limit, each.used, each.next_free_in, each.all_free_in) for each in budgets]
