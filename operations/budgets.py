"""Limits: how much of Graph may be used, and is."""

from __future__ import annotations

import runtime
from limiter import BudgetUsage


def limits(mailbox: str | None) -> list[BudgetUsage]:
    """Return how much of each budget is used: the mailbox's, or the tenant's."""
    return runtime.limiter.usage(mailbox) if mailbox else runtime.limiter.tenant_usage()
