"""Why a call to Graph may not be made now, and when to ask again.

A refusal never names a mailbox: its text ends up in logs.
"""

from datetime import timedelta

#: How soon to ask again when Redis does not answer.
UNAVAILABLE_RETRY = timedelta(seconds=1)


class Refused(Exception):
    """Raised when a call to Graph may not be made now."""

    #: What refuses, by the name that it has in metrics.
    budget: str
    retry_after: timedelta
    mailbox_wide: bool


class Exhausted(Refused):
    """Raised when a budget or the slots are used up, or the mailbox or the tenant is paused. Nothing was charged.

    After ``retry_after`` the same call is admitted unless others were first; for ``concurrency`` it is a hint.
    ``budget`` is a name of `WINDOWS`, ``pause`` or ``tenant_pause``, of several that refuse the one that does so for
    longest; ``concurrency`` if nothing else refuses. ``mailbox_wide`` is true when nothing is left, so that any other
    call charged to the budget would be refused too, and false when a smaller one might still fit.
    """

    def __init__(self, budget: str, retry_after: timedelta, mailbox_wide: bool) -> None:
        super().__init__(budget, retry_after, mailbox_wide)
        self.budget = budget
        self.retry_after = retry_after
        self.mailbox_wide = mailbox_wide

    def __str__(self) -> str:
        return f"{self.budget}: none left, try again in {self.retry_after / timedelta(seconds=1):.3f} s"


class Unavailable(Refused):
    """Raised when Redis does not answer. A charge may have been made all the same: that errs on the strict side."""

    budget = "unavailable"
    retry_after = UNAVAILABLE_RETRY
    mailbox_wide = True

    def __str__(self) -> str:
        return f"Redis does not answer the limiter: {type(self.__cause__).__name__}"


class Emptied(Refused):
    """Raised when Redis has lost its counts, and what was spent is not written down again yet."""

    budget = "unavailable"
    retry_after = UNAVAILABLE_RETRY
    mailbox_wide = True

    def __str__(self) -> str:
        return "Redis was emptied: the limiter waits until what was spent is written down again"


class NeverFits(ValueError):
    """Raised when a call asks for more than a budget's whole limit: waiting would not help."""

    def __init__(self, budget: str, asked: int, limit: int) -> None:
        super().__init__(budget, asked, limit)
        self.budget = budget

    def __str__(self) -> str:
        return "{}: {} asked for, the limit is {}".format(*self.args)
