"""The mails of the demo: what is published, what goes wrong with it on purpose, and how it has to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import orjson

from simulator.control import Simulator

#: How long the throttled mailbox is to be left alone.
THROTTLED_SECONDS = 3
SEND_LATER = timedelta(seconds=5)

_KB = 1000
_MB = 1_000_000


class Ending(StrEnum):
    """How a mail has to end; the value is the status that it then has."""

    SENT = "processed"
    FAILED = "failed"
    EXPIRED = "expired"
    REJECTED = "rejected"


@dataclass(frozen=True)
class File:
    """A file that the simulator serves; its bytes follow from its name."""

    name: str
    size_bytes: int
    content_type: str
    inline: bool = False
    #: Answer of the server that has it no longer.
    gone: int | None = None


@dataclass(frozen=True)
class Mail:
    """One mail of the demo.

    Attributes:
        key: Unlike the publisher's id it is never used twice; it travels as the ``correlation_id``.
        scenario: What is special about it, in words.
        content: The ``SendEmail`` as a mapping, or bytes that are none.
        copies: How often it is published.
        trouble: Asks the simulator to do to its mailbox what the scenario says.
    """

    key: str
    scenario: str
    content: dict[str, Any] | bytes
    ending: Ending = Ending.SENT
    files: tuple[File, ...] = ()
    copies: int = 1
    trouble: Callable[[Simulator], None] | None = field(default=None, compare=False)

    @property
    def message(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else orjson.dumps(self.content)

    @property
    def recipients(self) -> list[str]:
        """Everyone who has to get it, in order of address."""
        if isinstance(self.content, bytes):
            return []
        return sorted(address for kind in ("to", "cc", "bcc") for address in self.content.get(kind, ()))


class Writer:
    """Writes the mails of one demo.

    Args:
        file_url: Gives the address of a file of so many bytes, as `Simulator.file_url` does.
        now: When the demo publishes.
    """

    def __init__(self, file_url: Callable[..., str], now: datetime) -> None:
        self._file_url = file_url
        self._now = now

    def all(self) -> list[Mail]:
        """Return every mail, in the order in which they are to be published."""
        return [*self._troubled(), *self._attached(), *self._plain(), *self._timed(), *self._unacceptable()]

    def _plain(self) -> Iterator[Mail]:
        for number in range(1, 9):
            yield self._mail(f"news-{number}", "newsletter", "plain HTML", html=True)
        for number in range(1, 7):
            yield self._mail(f"order-{number}", "orders", "plain text")
        yield self._mail(
            "minutes", "office", "to, cc and bcc", to=["ann", "bob", "carl"], cc=["dora", "emil"], bcc=["finn"]
        )
        yield self._mail(
            "ticket-7", "support", "high priority, own header", priority="high", importance="high",
            headers={"x-ticket": "7"}, reply_to="desk@contoso.example",
        )  # fmt: skip
        yield self._mail("order-7", "orders", "published three times", copies=3)

    def _attached(self) -> Iterator[Mail]:
        large = File("site-plan.pdf", 9 * _MB, "application/pdf")
        yield self._mail("plan", "projects", "a 9 MB attachment", files=(large,))
        for number in range(1, 5):
            invoice = File(f"invoice-{number}.pdf", 40 * _KB * number, "application/pdf")
            yield self._mail(f"invoice-{number}", "billing", "one small attachment", files=(invoice,))
        report = (File("report.docx", 300 * _KB, "application/octet-stream"), File("data.csv", 12 * _KB, "text/csv"))
        yield self._mail("report", "projects", "two attachments", files=report)
        logo = File("logo.png", 15 * _KB, "image/png", inline=True)
        yield self._mail("card", "marketing", "an inline image", html=True, files=(logo,))

    def _timed(self) -> Iterator[Mail]:
        later = self._now + SEND_LATER
        yield self._mail("reminder", "events", f"send_at in {SEND_LATER.seconds} seconds", send_at=later.isoformat())
        yield self._mail(
            "offer", "events", "expired before it came", Ending.EXPIRED,
            expires_at=(self._now - timedelta(minutes=1)).isoformat(),
        )  # fmt: skip

    def _troubled(self) -> Iterator[Mail]:
        yield self._mail(
            "receipt", "shop", "sent, but the answer gets lost",
            trouble=lambda graph: graph.lose_next_answer(_mailbox("shop")),
        )  # fmt: skip
        yield self._mail(
            "alert", "alerts", "504, and not sent",
            trouble=lambda graph: graph.fail(504, mailbox=_mailbox("alerts"), operation="send_mail"),
        )  # fmt: skip
        for number in range(1, 5):
            yield self._mail(
                f"payslip-{number}", "payroll", f"mailbox throttled: 429, wait {THROTTLED_SECONDS} s",
                trouble=_throttle if number == 1 else None,
            )  # fmt: skip
        yield self._mail(
            "contract", "people", "mailbox busy: 503 twice",
            files=(File("contract.pdf", 80 * _KB, "application/pdf"),),
            trouble=lambda graph: graph.unavailable(_mailbox("people"), times=2, operation="create_draft"),
        )  # fmt: skip
        yield self._mail(
            "summons", "legal", "Graph refuses it for good", Ending.FAILED,
            trouble=lambda graph: graph.fail(
                400, "ErrorInvalidRecipients", mailbox=_mailbox("legal"), operation="send_mail"
            ),
        )  # fmt: skip
        gone = File("photo.jpg", 200 * _KB, "image/jpeg", gone=404)
        yield self._mail("photo", "press", "its attachment is gone: 404", Ending.FAILED, files=(gone,))

    def _unacceptable(self) -> Iterator[Mail]:
        yield self._mail(
            "order-1 again", "orders", "an id used before, other content", Ending.REJECTED,
            publisher_message_id="order-1", subject="Your order 1 has changed",
        )  # fmt: skip
        yield self._mail("nobody", "orders", "names no recipient", Ending.REJECTED, to=[])
        yield Mail("garbled", "not even JSON", b"Dear customer,", Ending.REJECTED)

    def _mail(
        self,
        key: str,
        sender: str,
        scenario: str,
        ending: Ending = Ending.SENT,
        *,
        to: list[str] | None = None,
        html: bool = False,
        files: tuple[File, ...] = (),
        copies: int = 1,
        trouble: Callable[[Simulator], None] | None = None,
        **fields: Any,
    ) -> Mail:
        name = key.replace("-", " ")
        recipients: dict[str, Any] = {
            kind: list(map(_reader, fields.pop(kind))) for kind in ("cc", "bcc") if kind in fields
        }
        content: dict[str, Any] = {
            "publisher_message_id": key,
            "from": _mailbox(sender),
            "to": list(map(_reader, ["ann"] if to is None else to)),
            "subject": f"Your {name}",
            "body": _html(name, files) if html else {"contentType": "text", "content": f"Here is your {name}."},
            "attachments": [self._attachment(file) for file in files],
            "metadata": {"tenant": "demo"},
            **recipients,
            **fields,
        }
        return Mail(key, scenario, content, ending, files, copies, trouble)

    def _attachment(self, file: File) -> dict[str, Any]:
        faults = {"fail": file.gone} if file.gone else {}
        return {
            "name": file.name,
            "size": file.size_bytes,
            "contentType": file.content_type,
            "urlOrId": self._file_url(file.size_bytes, seed=file.name, name=file.name, **faults),
            "is_inline": file.inline,
            "content_id": file.name if file.inline else None,
        }


def _throttle(graph: Simulator) -> None:
    graph.throttle(_mailbox("payroll"), retry_after=str(THROTTLED_SECONDS))


def _mailbox(name: str) -> str:
    return f"{name}@contoso.example"


def _reader(name: str) -> str:
    return f"{name}@fabrikam.example"


def _html(name: str, files: tuple[File, ...]) -> dict[str, str]:
    images = "".join(f'<img src="cid:{file.name}">' for file in files if file.inline)
    return {"contentType": "html", "content": f"<p>Here is your <b>{name}</b>.</p>{images}"}
