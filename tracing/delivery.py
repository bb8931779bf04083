"""What becomes of spans: OpenTelemetry's SDK makes them, gathers them and delivers them, in a thread of its own.

Importing this module imports the SDK, which takes a tenth of a second and some 20 MB: only a process that has something
to trace does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

#: One delivery to the receiver, its repeats included.
_DELIVER_WITHIN = timedelta(seconds=5)
#: Spans that wait for delivery, at about a kilobyte each; of more the oldest are dropped.
_MOST_WAITING = 8192


def failed(how: str) -> Status:
    return Status(StatusCode.ERROR, how)


class _Counted(SpanExporter):
    """Tells what is not delivered; the exporter beneath only logs it, in words that quote the receiver."""

    def __init__(self, exporter: SpanExporter, on_lost: Callable[[int], None]) -> None:
        self._exporter = exporter
        self._on_lost = on_lost

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self._on_lost(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class Delivery:
    """Makes spans, and delivers those that have ended to ``url``."""

    def __init__(self, url: str, headers: Mapping[str, str], version: str, on_lost: Callable[[int], None]) -> None:
        exporter = OTLPSpanExporter(url, headers=dict(headers), timeout=_DELIVER_WITHIN.total_seconds())
        # What is not sampled does not come as far as here.
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create({"service.name": "mailfleet", "service.version": version}),
            shutdown_on_exit=False,
        )
        waiting = BatchSpanProcessor(_Counted(exporter, on_lost), max_queue_size=_MOST_WAITING)
        self._provider.add_span_processor(waiting)
        self._tracer = self._provider.get_tracer("mailfleet", version)

    def begin(
        self, name: str, parent: re.Match[str] | None, kind: str, attributes: Mapping[str, Any], began_at: int | None
    ) -> Span:
        """Begin a span under the one that a ``traceparent`` names, or a new trace.

        Args:
            began_at: In nanoseconds since 1970; None: now.
        """
        surrounding = Context()
        if parent:
            ids = int(parent["trace"], 16), int(parent["span"], 16)
            known = SpanContext(*ids, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
            surrounding = set_span_in_context(NonRecordingSpan(known), surrounding)
        return self._tracer.start_span(name, surrounding, SpanKind[kind.upper()], attributes, start_time=began_at)

    def close(self) -> None:
        """Deliver what has ended, however long that takes."""
        self._provider.shutdown()
