"""Spans as tests look at them: traced in memory, found by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id

from vidgen import otlp, tracing


class Traced:
    """What was traced while the block ran; a span is there when it has ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = otlp.OtlpTracer(self._exporter, "a-test")

    def spans(self) -> list[ReadableSpan]:
        self.tracer.flush()
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def all(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        [span] = self.all(name)
        return span


@contextlib.contextmanager
def traced() -> Iterator[Traced]:
    found = Traced()
    with tracing.using(found.tracer):
        yield found
    found.tracer.close()


def said(span: ReadableSpan) -> dict[str, Any]:
    """What is said of a span, without the prefix."""
    return {name.removeprefix("vidgen."): value for name, value in (span.attributes or {}).items()}


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return format_trace_id(span.context.trace_id)


def id_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return format_span_id(span.context.span_id)


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else format_span_id(span.parent.span_id)


def traceparent(span: ReadableSpan) -> str:
    """The header of what was published directly inside a span."""
    assert span.context is not None
    return f"00-{trace_of(span)}-{id_of(span)}-{span.context.trace_flags:02x}"
