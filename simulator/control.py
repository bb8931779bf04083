"""Starts, directs and questions a simulator, for tests, demos and benchmarks.

Faults are asked for in words: ``graph.lose_next_answer()``, ``graph.throttle("ann@example.com", retry_after="3")``.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import requests

from .process import start_process

Executed = bool | Literal["late"]


class Simulator:
    """A running simulator. As a context manager it stops the process, if it was started here."""

    def __init__(self, base: str, ca_bundle: str | Path) -> None:
        self.base_url = base
        self.graph_base_url = f"{base}/v1.0"
        self.authority = base
        self.ca_bundle = str(ca_bundle)
        self._process: subprocess.Popen[str] | None = None
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = self.ca_bundle

    @classmethod
    def start(cls, folder: str | Path, **options: str | int) -> Self:
        """Start a simulator whose files are kept in ``folder`` and return it when it serves.

        ``options`` are those of the command line, with underscores: ``port``, ``host``, ``client_id``,
        ``client_secret``, ``tenant``. The process ends with this one at the latest; its complaints are in
        ``simulator.log``.

        Raises:
            StartFailed: It does not come up.
        """
        folder = Path(folder).resolve()
        process = start_process(folder, options)
        announced = json.loads((folder / "simulator.json").read_text())
        simulator = cls(announced["base_url"], announced["ca"])
        simulator._process = process
        return simulator

    def pids(self) -> set[int]:
        """Return the process that ``start`` has started."""
        return {self._process.pid} if self._process else set()

    def stop(self) -> None:
        """End the process that ``start`` has started."""
        self._session.close()
        if self._process is None:
            return
        self._process.terminate()
        self._process.wait(timeout=5)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What goes wrong next. ``mailbox=None`` means any; ``times=None`` until cleared.

    def throttle(
        self,
        mailbox: str | None = None,
        retry_after: str | None = "3",
        times: int | None = 1,
        operation: str = "any",
        **details: Any,
    ) -> None:
        """Answer 429 with this literal Retry-After (None leaves it out); nothing is executed.

        For ``retry_after_date_seconds`` see ``fail``.
        """
        given = {
            "code": "ApplicationThrottled",
            "message": "Application is over its MailboxConcurrency limit.",
        } | details
        self.fail(429, mailbox=mailbox, retry_after=retry_after, times=times, operation=operation, **given)

    def unavailable(
        self,
        mailbox: str | None = None,
        retry_after: str | None = None,
        times: int | None = 1,
        operation: str = "any",
        **details: Any,
    ) -> None:
        """Answer 503."""
        given = {"code": "ErrorServerBusy", "message": "The server cannot service this request right now."} | details
        self.fail(503, mailbox=mailbox, retry_after=retry_after, times=times, operation=operation, **given)

    def fail(
        self,
        status: int,
        code: str = "UnknownError",
        *,
        executed: bool = False,
        times: int | None = 1,
        operation: str = "any",
        mailbox: str | None = None,
        message: str = "",
        body: Literal["json", "empty", "html"] = "json",
        retry_after: str | None = None,
        retry_after_date_seconds: float | None = None,
        probability: float = 1.0,
    ) -> None:
        """Answer with an error, after executing the call or instead of it.

        With ``retry_after_date_seconds`` the Retry-After is an HTTP date, so many seconds ahead of the answer or, since
        a date has no fractions, up to one more.
        """
        self._add_fault(
            "error",
            operation,
            mailbox,
            times,
            probability,
            status=status,
            code=code,
            message=message,
            body=body,
            retry_after=retry_after,
            retry_after_date_seconds=retry_after_date_seconds,
            executed=executed,
        )

    def lose_next_answer(
        self, mailbox: str | None = None, operation: str = "send_mail", times: int | None = 1, probability: float = 1.0
    ) -> None:
        """Execute the call and close the connection instead of answering."""
        self._add_fault("lose_answer", operation, mailbox, times, probability)

    def reset_connection(
        self, mailbox: str | None = None, operation: str = "send_mail", times: int | None = 1, probability: float = 1.0
    ) -> None:
        """Reset the connection without executing the call."""
        self._add_fault("reset", operation, mailbox, times, probability)

    def hang(
        self,
        mailbox: str | None = None,
        operation: str = "send_mail",
        *,
        seconds: float | None = None,
        executed: Executed = False,
        times: int | None = 1,
        probability: float = 1.0,
    ) -> None:
        """Hold the call for some seconds, or until ``release`` or until the client gives up.

        It takes effect before that (True), never (False) or at the end, whoever still waits (``"late"``): after all
        the ``seconds``, if they are given, however early the client gives up.
        """
        self._add_fault("hang", operation, mailbox, times, probability, seconds=seconds, executed=executed)

    def release(self) -> None:
        """Let go of all calls that are held."""
        self._ask("release")

    def accept_with_retry_after(
        self,
        mailbox: str | None = None,
        retry_after: str = "5",
        operation: str = "send_mail",
        times: int | None = 1,
        probability: float = 1.0,
    ) -> None:
        """Answer as usual, with a Retry-After besides."""
        self._add_fault("accepted_with_retry_after", operation, mailbox, times, probability, retry_after=retry_after)

    def deliver_twice(self, mailbox: str | None = None, operation: str = "any", times: int | None = 1) -> None:
        """Let one accepted send leave as two mails."""
        self._decide_fate("twice", mailbox, operation, times)

    def lose_mail(self, mailbox: str | None = None, operation: str = "any", times: int | None = 1) -> None:
        """Accept a send and never deliver nor store it."""
        self._decide_fate("lost", mailbox, operation, times)

    def keep_in_drafts(self, mailbox: str | None = None, operation: str = "any", times: int | None = 1) -> None:
        """Accept a send and leave the mail in Drafts."""
        self._decide_fate("stuck", mailbox, operation, times)

    def bounce(self, mailbox: str | None = None, operation: str = "any", times: int | None = 1) -> None:
        """Accept a send, store it in Sent Items, and put a non-delivery report into the Inbox."""
        self._decide_fate("bounced", mailbox, operation, times)

    def lose_upload_session(self, mailbox: str | None = None, times: int | None = 1, probability: float = 1.0) -> None:
        """Forget the session that the next range is for."""
        self._add_fault("upload_session_lost", "upload_range", mailbox, times, probability)

    def hide_next_draft(
        self, seconds: float, mailbox: str | None = None, times: int | None = 1, probability: float = 1.0
    ) -> None:
        """Let a draft be found only this long after its creation."""
        self._add_fault("draft_not_visible", "create_draft", mailbox, times, probability, seconds=seconds)

    def expire_token(
        self, mailbox: str | None = None, operation: str = "any", times: int | None = 1, probability: float = 1.0
    ) -> None:
        """Answer 401 and refuse the token of that call from then on."""
        self._add_fault("token_expired", operation, mailbox, times, probability)

    def expire_all_tokens(self) -> None:
        self._ask("expire-tokens")

    def break_mime(
        self,
        mailbox: str | None = None,
        how: Literal["unconvertible", "truncated"] = "unconvertible",
        times: int | None = 1,
        probability: float = 1.0,
    ) -> None:
        """Refuse to make a message's MIME, or break off in the middle of it."""
        self._add_fault("bad_mime", "mime", mailbox, times, probability, how=how)

    def deny(self, mailbox: str) -> None:
        """Put the mailbox out of the application's reach: 403 for everything, until ``allow``."""
        self._set_state(mailbox, "denied")

    def unlicense(self, mailbox: str) -> None:
        self._set_state(mailbox, "unlicensed")

    def remove_mailbox(self, mailbox: str) -> None:
        self._set_state(mailbox, "unknown")

    def allow(self, mailbox: str) -> None:
        """Undo ``deny``, ``unlicense`` and ``remove_mailbox``."""
        self._set_state(mailbox, "available")

    def clear_faults(self) -> None:
        """Forget all faults, let held calls go and allow every mailbox."""
        self._ask("clear-faults")

    def faults(self) -> list[dict[str, Any]]:
        """The faults that are still to come."""
        found: list[dict[str, Any]] = self._ask("faults")
        return found

    # How the tenant is set up.

    def reset(self) -> None:
        """Forget everything: mails, faults, limits, behaviour, tokens, counters."""
        self._ask("reset")

    def set_limits(self, **limits: float | str) -> dict[str, Any]:
        """Set some of Graph's limits (see ``throttling.Limits``); 0 switches one off. Returns all of them."""
        found: dict[str, Any] = self._ask("limits", limits)
        return found

    def set_behaviour(self, **behaviour: Any) -> dict[str, Any]:
        """Set some of what Graph leaves open (see ``behaviour.Behaviour``). Returns all of it."""
        found: dict[str, Any] = self._ask("behaviour", behaviour)
        return found

    def set_latency(self, seconds: float, operation: str | None = None) -> None:
        """Answer every call, or those of one operation, only after this time."""
        if operation is None:
            self.set_behaviour(latency_seconds=seconds)
        else:
            by_operation = self.set_behaviour()["latency_by_operation"] | {operation: seconds}
            self.set_behaviour(latency_by_operation=by_operation)

    def set_sent_items_delay(self, seconds: float, mailbox: str | None = None) -> None:
        """Let sent mails be found only after this time."""
        if mailbox is None:
            self.set_behaviour(sent_items_delay_seconds=seconds)
        else:
            by_mailbox = self.set_behaviour()["sent_items_delay_by_mailbox"] | {mailbox.lower(): seconds}
            self.set_behaviour(sent_items_delay_by_mailbox=by_mailbox)

    def set_token_lifetime(self, seconds: float | None) -> None:
        self.set_behaviour(token_lifetime_seconds=seconds)

    def allow_send_as(self, mailbox: str, address: str) -> None:
        self._ask("allow-send-as", {"mailbox": mailbox, "address": address})

    def register_app(
        self,
        client_id: str,
        secret: str | None = None,
        certificate: str | None = None,
        roles: Iterable[str] = ("Mail.ReadWrite", "Mail.Send"),
    ) -> None:
        """Add or change an application; ``certificate`` is PEM. New roles show in new tokens."""
        given = {"client_id": client_id, "secret": secret, "certificate": certificate, "roles": list(roles)}
        self._ask("register-app", given)

    # What happened.

    def deliveries(self, mailbox: str | None = None, tag: str | None = None) -> list[dict[str, Any]]:
        """Every mail that really left, the oldest first; ``tag`` is the value of an extended property."""
        found: list[dict[str, Any]] = self._ask("deliveries", {"mailbox": mailbox, "tag": tag})
        return found

    def delivery_counts_by_tag(self) -> dict[str, int]:
        """How often each tag left; mails without any are counted under an empty one."""
        found: dict[str, int] = self._ask("delivery-counts")
        return found

    def requests(
        self, mailbox: str | None = None, operation: str | None = None, after: int = 0, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """The latest requests (see ``journal.Request``) in the order of their answers, the oldest first.

        The status of one that got no answer is ``none``. Each has a ``number``, and ``after`` asks for what came behind
        that of the last one seen: so whoever asks often sees all, though the simulator remembers only the latest.
        """
        given = {"mailbox": mailbox, "operation": operation, "after": after, "limit": limit}
        found: list[dict[str, Any]] = self._ask("requests", given)
        return found

    def request_counts(self) -> dict[str, Any]:
        """Requests by operation, status and mailbox; most in flight; limits passed; retries that came too early."""
        found: dict[str, Any] = self._ask("request-counts")
        return found

    def messages(self, mailbox: str, folder: str | None = None) -> list[dict[str, Any]]:
        """What the mailbox shows now, the newest first."""
        found: list[dict[str, Any]] = self._ask("messages", {"mailbox": mailbox, "folder": folder})
        return found

    def file_url(self, size_bytes: int, seed: str | int = 0, name: str = "file.bin", **faults: str | int) -> str:
        """The address of a file of that size; ``files.content(seed, size_bytes)`` are its bytes."""
        query = {"bytes": size_bytes, "seed": seed, **faults}
        return f"{self.base_url}/files/{name}?" + "&".join(f"{key}={value}" for key, value in query.items())

    def _decide_fate(self, outcome: str, mailbox: str | None, operation: str, times: int | None) -> None:
        self._add_fault("fate", operation, mailbox, times, 1.0, outcome=outcome)

    def _set_state(self, mailbox: str, state: str) -> None:
        self._ask("mailbox-state", {"mailbox": mailbox, "state": state})

    def _add_fault(
        self, kind: str, operation: str, mailbox: str | None, times: int | None, probability: float, **details: Any
    ) -> None:
        given = {"operation": operation, "mailbox": mailbox, "times": times, "probability": probability}
        self._ask("add-fault", {"kind": kind, **given, **details})

    def _ask(self, command: str, given: dict[str, Any] | None = None) -> Any:
        response = self._session.post(f"{self.base_url}/control/{command}", json=given or {}, timeout=30)
        if response.status_code == requests.codes.bad_request:
            raise ValueError(response.text)
        response.raise_for_status()
        return response.json()
