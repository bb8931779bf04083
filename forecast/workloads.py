"""What is to be sent, and what may be used for it: what a forecast is made from, as value objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from fractions import Fraction
from typing import NamedTuple

NO_TIME = timedelta(0)


class Window(NamedTuple):
    """The setting of a budget, the time in which the budget is counted, and how that is said after a number."""

    setting: str
    length: timedelta
    per: str


#: Every budget that has a window.
WINDOWS: Mapping[str, Window] = {
    "requests": Window("MAILBOX_REQUESTS_PER_10_MINUTES", timedelta(minutes=10), "in 10 min"),
    "upload_bytes": Window("MAILBOX_UPLOAD_MB_PER_5_MINUTES", timedelta(minutes=5), "in 5 min"),
    "sends": Window("MAILBOX_SENDS_PER_MINUTE", timedelta(minutes=1), "a minute"),
    "recipients": Window("MAILBOX_RECIPIENTS_PER_DAY", timedelta(days=1), "a day"),
    "tenant_requests": Window("TENANT_REQUESTS_PER_10_SECONDS", timedelta(seconds=10), "in 10 s"),
    "tenant_external_recipients": Window("TENANT_EXTERNAL_RECIPIENTS_PER_DAY", timedelta(days=1), "a day"),
}
#: A limit without a window: requests at a time.
CONCURRENCY = "concurrency"
#: For how many windows a charge is counted: until the last of 120 sub-windows has left that it can have been in, and
#: for two more as slack. It is charged again as soon as it is back, at the beginning of one, hence nearly always 1/40.
STAY = 1 + 1 / 40


class Usage(NamedTuple):
    """A budget: its limit (0: none), what is used of it, and when a part of that is back, and all.

    ``all_free_in`` None: nobody knows, so not before the end of the window.
    """

    budget: str
    limit: int
    used: int = 0
    next_free_in: timedelta | None = None
    all_free_in: timedelta | None = None


class Later(NamedTuple):
    """So many emails are not due yet; when the first, the mean and the last of them is."""

    emails: int
    first_in: timedelta
    mean_in: timedelta
    last_in: timedelta

    @property
    def from_in(self) -> timedelta:
        """When they begin to fall due, if they do so evenly until the last, around the mean: few early ones are left
        out, for a newsletter of tomorrow is no trickle because one retry is due in a minute.
        """
        return max(self.first_in, min(2 * self.mean_in - self.last_in, self.last_in))


@dataclass(frozen=True)
class Workload:
    """What is to be sent from one mailbox, or from each of ``alike`` mailboxes.

    Args:
        plain, attached: Emails without and with attachments.
        recipients, external_recipients, upload_bytes: Of all of them together.
        attach_requests: Requests that bring the attachments up: one for a small one, else a session and its ranges.
        later: Those of the emails that are not due yet.
        paused_for: Nothing is sent before.
        paused: Emails besides that wait until an operator ends a pause.
        usage: The mailbox's budgets.
    """

    mailbox: str
    plain: int = 0
    attached: int = 0
    recipients: int = 0
    external_recipients: int = 0
    upload_bytes: int = 0
    attach_requests: int = 0
    later: Later | None = None
    paused_for: timedelta = NO_TIME
    paused: int = 0
    usage: Sequence[Usage] = ()
    alike: int = 1

    @property
    def emails(self) -> int:
        return self.plain + self.attached

    def limit(self, budget: str) -> int:
        """Return the mailbox's limit; 0: none."""
        return next((usage.limit for usage in self.usage if usage.budget == budget), 0)

    def part(self, parts: int) -> Workload:
        """Return one of so many equal parts, rounded up."""
        sizes = {
            name: -(-getattr(self, name) // parts)
            for name in (
                "plain",
                "attached",
                "recipients",
                "external_recipients",
                "upload_bytes",
                "attach_requests",
            )
        }
        later = self.later and self.later._replace(emails=-(-self.later.emails // parts))
        return replace(self, later=later, **sizes)

    def from_elsewhere(self, mailboxes: int) -> Workload:
        """Return the same for each of so many mailboxes that have used nothing and are not paused."""
        fresh = [Usage(usage.budget, usage.limit) for usage in self.usage]
        return replace(self, usage=fresh, paused_for=NO_TIME, paused=0, alike=self.alike * mailboxes)


@dataclass(frozen=True)
class Fleet:
    """What all mailboxes share.

    Args:
        plain_concurrency, attached_concurrency: Emails in flight per route.
        call: How long a call to Graph takes, on average.
        plain_calls: Requests that send an email without attachments, and that archive it. At once: ``sendMail``; the
            search by the tag and the MIME. As a draft: the draft and its send; the MIME.
        usage: The tenant's budgets.
        paused_for: Nothing is sent before from any mailbox.
    """

    plain_concurrency: int
    attached_concurrency: int
    call: timedelta
    plain_calls: tuple[int, int] = (1, 2)
    usage: Sequence[Usage] = ()
    paused_for: timedelta = NO_TIME

    def send_requests(self, workload: Workload) -> int:
        """Return how many requests send it: of an email with attachments the draft, those for its files, the send."""
        return self.plain_send_requests(workload) + self.attached_send_requests(workload)

    def plain_send_requests(self, workload: Workload) -> int:
        return self.plain_calls[0] * workload.plain

    def attached_send_requests(self, workload: Workload) -> int:
        return 2 * workload.attached + workload.attach_requests

    def requests(self, workload: Workload) -> int:
        """Return how many requests send and archive it: of a draft the MIME alone, for its id is known."""
        return self.send_requests(workload) + self.plain_calls[1] * workload.plain + workload.attached


def charged(budget: str, workload: Workload, fleet: Fleet) -> tuple[int, Fraction]:
    """Return what the workload costs of a budget, and what is charged at a time, which must fit into the limit."""
    one = Fraction(1)
    if budget == "sends":
        return workload.emails, one
    if budget in ("requests", "tenant_requests"):
        return fleet.requests(workload), one
    if budget == "upload_bytes":
        charges = workload.emails + workload.attach_requests
        return workload.upload_bytes, max(one, Fraction(workload.upload_bytes, max(charges, 1)))
    units = workload.recipients if budget == "recipients" else workload.external_recipients
    return units, max(one, Fraction(units, max(workload.emails, 1)))


def planned(
    emails: int, mailboxes: int, *, upload_bytes: int, attach_requests: int, usage: Sequence[Usage]
) -> list[Workload]:
    """Return emails to one external recipient each, shared evenly among mailboxes that have used nothing.

    Args:
        upload_bytes: Of each email's attachment, as they go up.
        attach_requests: Requests that bring it up; 0: it has no attachment.
        usage: The limits of such a mailbox.
    """
    fewer, with_one_more = divmod(emails, mailboxes)
    shares = [(fewer + 1, with_one_more, "mailboxes"), (fewer, mailboxes - with_one_more, "others")]
    attached = attach_requests > 0
    return [
        Workload(
            _called(alike, what if with_one_more else "mailboxes"),
            plain=0 if attached else each,
            attached=each if attached else 0,
            recipients=each,
            external_recipients=each,
            upload_bytes=each * upload_bytes,
            attach_requests=each * attach_requests,
            usage=usage,
            alike=alike,
        )
        for each, alike, what in shares
        if each and alike
    ]


def _called(count: int, what: str) -> str:
    if count > 1:
        return f"each of {count:,} {what}"
    return "the other mailbox" if what == "others" else "one mailbox"
