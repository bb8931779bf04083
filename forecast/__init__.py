"""When will it be done, which budget binds, and what would help: a calculation, with no database and no Redis.

**A window allows a burst.** Of N mails from a mailbox that may send L in a window, the first L go as fast as its slots
permit, and each later one when what was charged L mails before it has come back, a period later. The last one goes
after ``ceil(N / L) - 1`` periods and the rest of a burst, not after N / L windows. What is used already delays the
mails that need it until it is back.

**Several budgets** bind together: each mail waits for the slowest of them, and the waits follow each other. The last
mail goes at the end of the longest chain: so many periods of one budget, so many of the next, what had to come back
first, and a burst. Chains are not walked mail by mail but found by division (`convoys`), so that a million mails cost
what ten do.

**The fleet** is one more convoy, in which all mailboxes have their turns: what the routes may have in flight, and the
tenant's budgets. By the last mail of a mailbox with n the others have had n turns each, or as many as they needed.

**What is left out**: the fleet's own processors and threads, attempts that fail, what Graph may yet ask us to wait for,
and mail that comes later. Backups give way to sends, but their requests are counted: those of the earlier mails are
made meanwhile.

Durations count from the instant at which the usage was looked up. Done is when Graph has accepted the last mail.
"""

from .advice import Forecast, foresee, setting_of, told
from .outlooks import Outlook
from .workloads import STAY, WINDOWS, Fleet, Later, Usage, Window, Workload, planned

__all__ = [
    "STAY",
    "WINDOWS",
    "Fleet",
    "Forecast",
    "Later",
    "Outlook",
    "Usage",
    "Window",
    "Workload",
    "foresee",
    "planned",
    "setting_of",
    "told",
]
