"""Reads ``Retry-After``, because Graph writes it in more ways than its documentation says.

Documented are whole seconds (https://learn.microsoft.com/graph/throttling). Seen in the wild besides: decimals
("0.249"), lists ("0,120") and nothing at all. A date is allowed by RFC 9110, section 10.2.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

#: No wait is longer: a clock that is wrong, here or there, must not silence a mailbox for days. Asking again after an
#: hour costs one refused call; msal caps its own waits at the same value.
MAX_RETRY_AFTER = timedelta(hours=1)

_SECONDS = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def parse_retry_after(value: str | None, now: datetime) -> timedelta | None:
    """Return how long to wait, between zero and ``MAX_RETRY_AFTER``; None when the header is absent or makes no sense.

    Of a list the longest wait counts. ``now`` (aware) is what a date is compared with.
    """
    if value is None:
        return None
    seconds = [float(part) for part in map(str.strip, value.split(",")) if _SECONDS.fullmatch(part)]
    if seconds:
        return timedelta(seconds=min(max(seconds), MAX_RETRY_AFTER.total_seconds()))
    at = _instant(value)
    return None if at is None else min(max(at - now, timedelta(0)), MAX_RETRY_AFTER)


def retry_after_in(headers: Mapping[str, str]) -> timedelta | None:
    """Return how long an answer asks to wait, see `parse_retry_after`.

    A date is compared with the answer's own: by our clock, if it is ahead, the wait would be over already.
    """
    value = headers.get("retry-after")
    if value is None:
        return None
    return parse_retry_after(value, _instant(headers.get("date", "")) or datetime.now(UTC))


def _instant(http_date: str) -> datetime | None:
    try:
        at = parsedate_to_datetime(http_date.strip())
        # "-0000" and a missing zone give a naive date; HTTP knows no zone but GMT.
        return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
