"""How long to wait before something is tried again."""

from __future__ import annotations

import random
from datetime import timedelta

import runtime
from graph_client.errors import Throttled
from limiter import Refused

#: A mail cannot have been sent before it was received; Graph's clock and ours differ by less than this.
CLOCKS_DIFFER = timedelta(minutes=10)
#: Graph throttles without saying for how long, now and then.
_UNSAID = timedelta(seconds=30)
#: Graph says "0" now and then, or names an instant that has passed: that must not become a loop without a pause.
_LEAST = timedelta(seconds=1)
_OUT_OF_REACH = timedelta(seconds=15)
#: Mails that were refused together should not come back together.
_SPREAD = 0.1


def backoff(attempt: int) -> timedelta:
    """Return a random wait of at most the attempt's share, which doubles with each attempt.

    Full jitter spreads retries best (aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter).
    """
    configuration = runtime.configuration
    ceiling = min(configuration.retry_backoff_min * 2 ** min(attempt - 1, 20), configuration.retry_backoff_max)
    return ceiling * random.random()  # noqa: S311  not a secret


def unreachable() -> timedelta:
    """Return when to see whether Graph, or its word on our credential, is back; spread over as much again."""
    return _OUT_OF_REACH * (1 + random.random())  # noqa: S311  not a secret


def after_throttling(throttled: Throttled) -> timedelta:
    """Return for how long Graph wants to be left alone."""
    return _UNSAID if throttled.retry_after is None else max(throttled.retry_after, _LEAST)


def after_refusal(refused: Refused) -> timedelta:
    """Return when to ask the limiter again."""
    return refused.retry_after * (1 + _SPREAD * random.random())  # noqa: S311  not a secret
