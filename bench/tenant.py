"""How the simulated tenant behaves during one run where Graph leaves it open, drawn from the run's seed.

Most of all: how long a sent mail stays invisible. That is what the grace period of a mail in doubt is for, so some
mailboxes use up nearly all of it; a fleet that looks too early, or counts from too early, then sends a second mail.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

FILTER_LAG_SECONDS = 1.0
_SOON_SECONDS = 0.2
_USUAL_SECONDS = (1.0, 6.0)
_SOON_SHARE = 0.15
_LONGEST_SHARE = 0.2


def draw(mailboxes: Sequence[str], longest_delay_seconds: float, chance: random.Random) -> dict[str, Any]:
    """Return a behaviour as ``Simulator.set_behaviour`` takes it; no mail is invisible for longer than that."""
    longest = longest_delay_seconds - FILTER_LAG_SECONDS
    return {
        "while_submitting": chance.choice(("draft", "hidden")),
        "immutable_ids": chance.choice(("stable", "change")),
        "filter_lag_seconds": FILTER_LAG_SECONDS,
        "sent_items_delay_by_mailbox": {mailbox: _delay(longest, chance) for mailbox in mailboxes},
    }


def _delay(longest: float, chance: random.Random) -> float:
    lot = chance.random()
    if lot < _SOON_SHARE:
        return _SOON_SECONDS
    return longest if lot > 1 - _LONGEST_SHARE else chance.uniform(*_USUAL_SECONDS)
