"""Spans by OpenTelemetry, sent over OTLP/HTTP by a thread of its own: the one module that imports OpenTelemetry.

The provider stays in here instead of becoming the process's global one: what other libraries would trace stays off.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import vidgen
from vidgen import errors
from vidgen.tracing import Kind, Lap, Value

log = structlog.get_logger(__name__)

CLOSE_S = 3.0  # what is left to send may take so long at the end; then the process leaves without it
PREFIX = "vidgen."
HANDED_DOWN = tuple(PREFIX + name for name in ("job_id", "stage", "run", "attempt"))
KINDS = {
    "internal": trace.SpanKind.INTERNAL, "server": trace.SpanKind.SERVER, "consumer": trace.SpanKind.CONSUMER,
}  # fmt: skip

_headers = TraceContextTextMapPropagator()


def exporter(endpoint: str) -> SpanExporter:
    """Sends spans to this URL; headers, time-outs and certificates are those of OTEL_EXPORTER_OTLP_*."""
    # A collector that is down is one line in our log, not one for each batch.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    return ToldOnce(OTLPSpanExporter(endpoint=endpoint))


class ToldOnce(SpanExporter):
    """Says once that spans cannot be delivered, and once that they can be again."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self._lost = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        lost = result is not SpanExportResult.SUCCESS
        if lost and not self._lost:
            log.warning("the collector takes no spans: they are dropped until it does", _event="tracing_lost")
        elif self._lost and not lost:
            log.info("the collector takes spans again", _event="tracing_back")
        self._lost = lost
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)


class _HandDown(SpanProcessor):
    """Gives each span what its parent in this process says of the job."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        parent = trace.get_current_span(parent_context)
        if isinstance(parent, ReadableSpan) and parent.attributes is not None:
            own = span.attributes or {}
            known = {name: parent.attributes[name] for name in HANDED_DOWN if name in parent.attributes}
            span.set_attributes({name: value for name, value in known.items() if name not in own})


class OtlpTracer:
    """What `vidgen.tracing` does while it is on."""

    def __init__(self, exporter: SpanExporter, service: str, instance: str | None = None) -> None:
        named = {"service.name": service, "service.version": vidgen.__version__}
        if instance is not None:
            named["service.instance.id"] = instance
        # Not at exit: that would wait for a collector without a bound.
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(_HandDown())
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vidgen", vidgen.__version__)

    @contextlib.contextmanager
    def span(
        self, name: str, of: Mapping[str, str] | None, kind: Kind, about: Mapping[str, Value], lap: Lap | None = None
    ) -> Iterator[None]:  # fmt: skip
        context = _context_of(of)
        with self._tracer.start_as_current_span(
            name, context=context, kind=KINDS[kind], attributes=_attributes(about), links=_links(context),
            start_time=_ns(lap.begun) if lap else None, end_on_exit=False,
            record_exception=False, set_status_on_exception=False,
        ) as made:  # fmt: skip
            try:
                yield
            except Exception as exc:
                if not isinstance(exc, errors.Cancelled):
                    self.failed(exc.code if isinstance(exc, errors.VidgenError) else type(exc).__name__)
                raise
            finally:
                made.end(_ns(lap.ended) if lap and lap.ended is not None else None)

    def took(
        self, name: str, begun: float, ended: float, of: Mapping[str, str] | None, about: Mapping[str, Value]
    ) -> None:
        made = self._tracer.start_span(
            name, context=_context_of(of), attributes=_attributes(about), start_time=_ns(begun)
        )
        made.end(_ns(max(begun, ended)))

    def about(self, attributes: Mapping[str, Value]) -> None:
        trace.get_current_span().set_attributes(_attributes(attributes))

    def rename(self, name: str) -> None:
        trace.get_current_span().update_name(name)

    def failed(self, code: str) -> None:
        here = trace.get_current_span()
        here.set_status(trace.StatusCode.ERROR, code)
        here.set_attribute("error.type", code)

    def carried(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        _headers.inject(headers)
        return headers

    def ids(self) -> dict[str, str]:
        here = trace.get_current_span().get_span_context()
        if not here.is_valid:
            return {}
        return {"trace_id": trace.format_trace_id(here.trace_id), "span_id": trace.format_span_id(here.span_id)}

    def flush(self) -> None:
        """Send what has ended so far, however long that takes."""
        self._provider.force_flush()

    def close(self, bound: float = CLOSE_S) -> None:
        """Send what is left and end, within `bound` seconds: a collector that hangs keeps no process."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(bound)
        if closing.is_alive():
            log.warning("the collector is too slow: the last spans are lost", _event="tracing_cut")


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _attributes(about: Mapping[str, Value]) -> dict[str, str | int | float | bool]:
    return {name if "." in name else PREFIX + name: value for name, value in about.items() if value is not None}


def _context_of(headers: Mapping[str, str] | None) -> Context | None:
    """The context that the headers of a message or a request carry; None where they carry none."""
    context = _headers.extract({name.lower(): value for name, value in (headers or {}).items()}, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def _links(context: Context | None) -> list[trace.Link]:
    """What led to a span that goes on in another trace: the span that the caller is in."""
    here = trace.get_current_span().get_span_context()
    return [trace.Link(here)] if context is not None and here.is_valid else []
