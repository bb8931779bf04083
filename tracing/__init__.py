"""Traces: of each mail that is sampled one, from its publisher to its archive copy, told over OTLP/HTTP.

A mail waits in the database between its steps; what holds its trace together is the ``traceparent`` (W3C Trace Context)
in its row, in its dispatch and on its events. Whether it is traced is decided once: by the publisher, if it sent a
``traceparent``, else by lot when the mail is received. The decision is part of the ``traceparent``, so that a step of a
mail that is not traced costs a look at a string; and without a receiver OpenTelemetry is not even imported. A mail that
is not traced has an id of a trace all the same, by which its lines are found.

Nobody waits for the receiver: a thread sends spans in batches, and what it cannot deliver is counted and dropped.

A span has ids, counts and the kinds of errors: no address, no text, no URL.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

#: An unknown version may have more behind the flags; version 00 may not (https://www.w3.org/TR/trace-context/).
_TRACEPARENT = re.compile(
    r"(?:00(?=.{53}$)|(?!00|ff)[0-9a-f]{2})"
    r"-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?:-.*)?"
)
_SAMPLED = 1
_HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
#: A process has 15 seconds to end in all; spans that are not delivered by then are lost.
_CLOSE_WITHIN = timedelta(seconds=2)
#: In nanoseconds, which is what OpenTelemetry counts instants in.
_MICROSECOND = 1000

Kind = Literal["internal", "client", "producer", "consumer"]


def trace_id(traceparent: str | None) -> str | None:
    """Return the id of the trace that a ``traceparent`` names; None if it is not of the form that it must have."""
    found = _parse(traceparent)
    return found["trace"] if found else None


def check_endpoint(url: str) -> None:
    """Raise ValueError if this is no address of a receiver. Its text does not quote it."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ValueError("must be of the form http(s)://host:port")
    if parts.username or parts.password:
        raise ValueError("must hold no password: OTEL_EXPORTER_OTLP_HEADERS is for that")


def header_pairs(text: str) -> dict[str, str]:
    """Read headers as OpenTelemetry has them in one variable: ``name=value`` pairs, values percent-encoded.

    Raises:
        ValueError: One is not of that form. Its text quotes none.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    headers = {name.strip().lower(): unquote(value.strip()) for name, _, value in pairs}
    for name, value in headers.items():
        if not (_HEADER_NAME.fullmatch(name) and value.isascii() and value.isprintable()):
            raise ValueError("must be name=value pairs, comma-separated")
    return headers


def _parse(traceparent: str | None) -> re.Match[str] | None:
    return _TRACEPARENT.fullmatch(traceparent) if traceparent else None


def _is_sampled(traceparent: str | None) -> bool:
    found = _parse(traceparent)
    return found is not None and bool(int(found["flags"], 16) & _SAMPLED)


class Span:
    """One operation of a trace; of a mail that is not traced, nothing but its ``traceparent``.

    Attributes:
        traceparent: What the operations that follow from this one are to have as theirs.
    """

    __slots__ = ("_recorded", "traceparent")

    def __init__(self, traceparent: str | None, recorded: Any = None) -> None:
        self.traceparent = traceparent
        self._recorded = recorded

    @property
    def recorded(self) -> bool:
        return self._recorded is not None

    def note(self, **attributes: Any) -> None:
        """Add attributes, each ``mailfleet.…``; those that are None are left out."""
        if self._recorded is not None:
            self._recorded.set_attributes(_named(attributes))

    def fail(self, error: BaseException) -> None:
        """Mark the operation as failed. The error is named by its class: its text may quote a mail."""
        if self._recorded is not None:
            _set_failed(self._recorded, type(error).__name__)

    def end(self) -> None:
        if self._recorded is not None:
            self._recorded.end()


#: What a call that is recorded now belongs to: several, if it is made for several mails.
_current: ContextVar[tuple[Span, ...]] = ContextVar("current_spans", default=())


@contextmanager
def active(spans: Iterable[Span]) -> Iterator[None]:
    """Have what is recorded within the block belong to these spans, and mark them as failed if the block raises."""
    recorded = tuple(span for span in spans if span.recorded)
    token = _current.set(recorded)
    try:
        yield
    except BaseException as error:
        for span in recorded:
            span.fail(error)
        raise
    finally:
        _current.reset(token)


@contextmanager
def ending(spans: Iterable[Span]) -> Iterator[None]:
    """Do as `active` does, and end the spans with the block."""
    recorded = [span for span in spans if span.recorded]
    if not recorded and not _current.get():  # as for almost every mail
        yield
        return
    try:
        with active(recorded):
            yield
    finally:
        for span in recorded:
            span.end()


@contextmanager
def _block_of(span: Span) -> Iterator[Span]:
    with ending([span]):
        yield span


class Tracer:
    """Begins spans, and hands those that have ended to the receiver.

    Safe for threads and before a fork: the first span of a process starts the thread that delivers them.

    Args:
        endpoint: Where the receiver takes OTLP over HTTP, without ``/v1/traces``; None: nothing is traced.
        headers: Sent with each delivery: a receiver may want a token.
        ratio: How many of the mails without a ``traceparent`` of their own are traced, 0 to 1.
        version: Of this software, for the receiver.
        on_lost: Told how many spans could not be delivered, each time.
    """

    def __init__(
        self,
        endpoint: str | None,
        *,
        headers: Mapping[str, str],
        ratio: float,
        version: str,
        on_lost: Callable[[int], None],
    ) -> None:
        if endpoint is not None:
            import tracing.delivery  # noqa: F401  so that the first mail does not wait for it
        self._endpoint = endpoint
        self._headers = headers
        self._ratio = ratio
        self._version = version
        self._on_lost = on_lost
        self._start = threading.Lock()
        self._delivery: Any = None

    def root(self, name: str, traceparent: str | None, **attributes: Any) -> Span:
        """Begin the first operation on a mail that has come: in its publisher's trace, or in a new one.

        What is told to no receiver has a trace's id as well: its lines are found by it.
        """
        if _parse(traceparent):
            return self.begin(name, traceparent, kind="consumer", **attributes)
        # No secret depends on these numbers.
        if self._endpoint is None or random.random() >= self._ratio:  # noqa: S311
            return Span(f"00-{random.getrandbits(128) or 1:032x}-{random.getrandbits(64) or 1:016x}-00")
        return self._begin(name, None, "consumer", attributes)

    def begin(self, name: str, traceparent: str | None, *, kind: Kind = "internal", **attributes: Any) -> Span:
        """Begin an operation that follows from the one that ``traceparent`` names, if that is traced."""
        if self._endpoint is None or not _is_sampled(traceparent):
            return Span(traceparent)
        return self._begin(name, traceparent, kind, attributes)

    def span(
        self, name: str, traceparent: str | None, *, kind: Kind = "internal", **attributes: Any
    ) -> AbstractContextManager[Span]:
        """Begin an operation that is the block."""
        span = self.begin(name, traceparent, kind=kind, **attributes)
        return _block_of(span) if span.recorded or _current.get() else nullcontext(span)  # as for almost every mail

    @staticmethod
    def is_recording() -> bool:
        """Say whether a call that is made now is one of a mail that is traced."""
        return bool(_current.get())

    def record_call(self, name: str, took: timedelta, *, failure: str | None, **attributes: Any) -> None:
        """Tell of a call to another system that has just ended, for each mail that it was made for.

        Args:
            failure: In what way it failed; None: it did not.
        """
        for parent in _current.get():
            ended_at = time.time_ns()
            began_at = ended_at - took // timedelta(microseconds=1) * _MICROSECOND
            span = self._begin(name, parent.traceparent, "client", attributes, began_at)
            if failure:
                _set_failed(span._recorded, failure)
            span._recorded.end(ended_at)

    def _begin(
        self, name: str, traceparent: str | None, kind: str, attributes: Mapping[str, Any], began_at: int | None = None
    ) -> Span:
        recorded = self._started().begin(name, _parse(traceparent), kind, _named(attributes), began_at)
        context = recorded.get_span_context()
        return Span(f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}", recorded)

    def _started(self) -> Any:
        with self._start:
            if self._delivery is None:
                from tracing.delivery import Delivery

                url = f"{(self._endpoint or '').rstrip('/')}/v1/traces"
                self._delivery = Delivery(url, self._headers, self._version, self._on_lost)
            return self._delivery

    def close(self) -> None:
        """Deliver what has ended, for a moment. Whoever begins another span afterwards starts anew."""
        with self._start:
            delivery, self._delivery = self._delivery, None
        if delivery is not None:
            # OpenTelemetry would wait for as long as the receiver takes.
            ending = threading.Thread(target=delivery.close, name="last spans", daemon=True)
            ending.start()
            ending.join(_CLOSE_WITHIN.total_seconds())


def _set_failed(recorded: Any, how: str) -> None:
    from tracing.delivery import failed

    recorded.set_attribute("error.type", how)
    recorded.set_status(failed(how))


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Give attributes the product's prefix, unless OpenTelemetry's conventions have a name for them."""
    return {
        name if "." in name else f"mailfleet.{name}": value for name, value in attributes.items() if value is not None
    }
