"""The ways in which Graph fails, asked for by name, each for a number of calls of one operation at one mailbox.

What matters to a client is whether the call was executed although it looks failed; every fault that can be both says
which it is. A call that Graph itself refuses does not use a fault up.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from itertools import count
from typing import Any, ClassVar, Literal, Protocol

from . import errors
from .calls import Answer, Call, Outcome

StillConnected = Callable[[], bool]

#: How often a held call looks whether it is released or its client has gone.
_LOOK_AGAIN_SECONDS = 0.02


class StruckCall(Protocol):
    """A call that goes wrong, and what a fault can do with it."""

    @property
    def call(self) -> Call: ...
    def execute(self) -> Answer: ...
    async def hold(self, seconds: float | None, *, even_if_deserted: bool = False) -> None: ...
    def lose_upload_session(self) -> None: ...
    def expire_token(self) -> None: ...
    def shut_out(self, retry_after: str | None) -> None: ...


@dataclass
class Fault:
    """Something that goes wrong; the subclasses say what."""

    kind: ClassVar[str]

    operation: str = "any"
    mailbox: str | None = None
    #: None goes on until it is cleared.
    times: int | None = 1
    probability: float = 1.0
    id: int = field(default=0)

    def matches(self, operation: str, mailbox: str) -> bool:
        """Tell whether it is meant for such a call; ``any`` is any of Graph's, not of the authority's."""
        covered = self.operation == operation or (self.operation == "any" and operation != "token")
        return covered and self.mailbox in (None, mailbox)

    async def strike(self, struck: StruckCall) -> Answer:
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass
class ErrorAnswer(Fault):
    """An error answer, with or without the call having been executed."""

    kind = "error"

    status: int = 500
    code: str = "ErrorInternalServerError"
    message: str = "An internal server error occurred. The operation failed."
    body: errors.BodyForm = "json"
    retry_after: str | None = None
    #: Instead: a date so many seconds ahead of the answer, or, since it has no fractions, up to one more.
    retry_after_date_seconds: float | None = None
    executed: bool = False

    async def strike(self, struck: StruckCall) -> Answer:
        if self.executed:
            struck.execute()
        retry_after = self._retry_after()
        if self.status in (429, 503):
            struck.shut_out(retry_after)
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        raise errors.GraphError(self.status, self.code, self.message, headers, self.body)

    def _retry_after(self) -> str | None:
        if self.retry_after_date_seconds is None:
            return self.retry_after
        return formatdate(math.ceil(time.time() + self.retry_after_date_seconds), usegmt=True)


@dataclass
class LostAnswer(Fault):
    """The call is executed and the connection closed instead of answered."""

    kind = "lose_answer"

    async def strike(self, struck: StruckCall) -> Answer:
        struck.execute()
        raise errors.ConnectionDropped


@dataclass
class Reset(Fault):
    """The connection is reset before the call is executed."""

    kind = "reset"

    async def strike(self, _: StruckCall) -> Answer:
        raise errors.ConnectionDropped(hard=True)


@dataclass
class Hang(Fault):
    """The call is held for some seconds or until it is released or given up.

    ``executed`` tells when it takes effect: before it is held, never (the connection is closed at the end), or
    ``late``: at the end, even if the client has given up, which then does not hasten it if ``seconds`` are given.
    """

    kind = "hang"

    executed: bool | Literal["late"] = False
    seconds: float | None = None

    async def strike(self, struck: StruckCall) -> Answer:
        if self.executed is True:
            answer = struck.execute()
            await struck.hold(self.seconds)
            return answer
        late = self.executed == "late"
        await struck.hold(self.seconds, even_if_deserted=late and self.seconds is not None)
        if late:
            return struck.execute()
        raise errors.ConnectionDropped


@dataclass
class AcceptedWithRetryAfter(Fault):
    """The call succeeds, and its answer carries a Retry-After all the same."""

    kind = "accepted_with_retry_after"

    retry_after: str = "5"

    async def strike(self, struck: StruckCall) -> Answer:
        answer = struck.execute()
        answer.headers["Retry-After"] = self.retry_after
        return answer


@dataclass
class Fate(Fault):
    """A send is accepted, and afterwards the mail leaves twice, not at all, stays in Drafts or bounces."""

    kind = "fate"

    outcome: Outcome = "twice"

    def matches(self, operation: str, mailbox: str) -> bool:
        return operation in ("send_mail", "send_draft") and super().matches(operation, mailbox)

    async def strike(self, struck: StruckCall) -> Answer:
        struck.call.outcome = self.outcome
        return struck.execute()


@dataclass
class DraftNotVisible(Fault):
    """A draft is created, and not found for some seconds."""

    kind = "draft_not_visible"

    seconds: float = 1.0

    async def strike(self, struck: StruckCall) -> Answer:
        struck.call.draft_hidden_for_seconds = self.seconds
        return struck.execute()


@dataclass
class UploadSessionLost(Fault):
    """The upload session is forgotten with all that it had taken."""

    kind = "upload_session_lost"

    async def strike(self, struck: StruckCall) -> Answer:
        struck.lose_upload_session()
        raise errors.upload_session_not_found()


@dataclass
class TokenExpired(Fault):
    """The token that the call carries is expired from now on."""

    kind = "token_expired"

    async def strike(self, struck: StruckCall) -> Answer:
        struck.expire_token()
        raise errors.expired_token()


@dataclass
class BadMime(Fault):
    """The MIME of a message cannot be made, or breaks off in the middle."""

    kind = "bad_mime"

    how: Literal["unconvertible", "truncated"] = "unconvertible"

    async def strike(self, struck: StruckCall) -> Answer:
        if self.how == "unconvertible":
            raise errors.GraphError(500, "ErrorMimeContentConversionFailed", "Could not convert the item to MIME.")
        struck.call.truncate_mime = True
        return struck.execute()


KINDS: dict[str, type[Fault]] = {
    each.kind: each
    for each in (
        ErrorAnswer,
        LostAnswer,
        Reset,
        Hang,
        AcceptedWithRetryAfter,
        Fate,
        DraftNotVisible,
        UploadSessionLost,
        TokenExpired,
        BadMime,
    )
}


class FaultPlan:
    """The faults that are still to come, struck in the order in which they were asked for."""

    def __init__(self, seed: int = 0) -> None:
        self._faults: list[Fault] = []
        self._serial = count(1)
        self._chance = random.Random(seed)
        self._release = asyncio.Event()

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._faults)

    def add(self, kind: str, **details: Any) -> Fault:
        """Ask for a fault.

        Raises:
            KeyError: There is no such kind.
            TypeError: That kind has no such detail.
        """
        fault = KINDS[kind](**details, id=next(self._serial))
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all faults and let go of the calls that are held."""
        self._faults.clear()
        self.release()

    def take(self, operation: str, mailbox: str) -> Fault | None:
        for fault in self._faults:
            if fault.matches(operation, mailbox) and self._chance.random() < fault.probability:
                self._use(fault)
                return fault
        return None

    def give_back(self, fault: Fault) -> None:
        """Keep a fault whose call was refused before it could strike."""
        if fault.times is None:
            return
        fault.times += 1
        if fault not in self._faults:
            self._faults.insert(0, fault)

    def release(self) -> None:
        """Let go of every call that is held now."""
        self._release.set()
        self._release = asyncio.Event()

    async def hold(self, seconds: float | None, still_connected: StillConnected) -> None:
        """Wait for so long, or until the calls are released or this one's client has gone."""
        release = self._release
        deadline = None if seconds is None else time.monotonic() + seconds
        while not release.is_set() and still_connected() and (deadline is None or time.monotonic() < deadline):
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)

    def _use(self, fault: Fault) -> None:
        if fault.times is None:
            return
        fault.times -= 1
        if fault.times <= 0:
            self._faults.remove(fault)
