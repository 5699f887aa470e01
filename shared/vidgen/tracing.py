"""Traces: one for each job, from its request to its video. Off unless an OTLP endpoint is set, and then free.

A span is a piece of this process's work. What is published inside one carries its context in the headers `traceparent`
and `tracestate` (W3C), so whoever takes the message goes on in the same trace, whichever replica that is. Attributes
say what was done to which job, and codes; never prompts, object keys or messages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vidgen import errors, extras

if TYPE_CHECKING:
    from vidgen.otlp import OtlpTracer

Kind = Literal["internal", "server", "consumer"]
Value = str | int | float | bool | None  # None: not told

_tracer: OtlpTracer | None = None  # of the process, as its log is: a span knows of its parent without being given it
_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass
class Lap:
    """From and to when something was measured, in seconds since the epoch; `ended` is set when it is over."""

    begun: float
    ended: float | None = None


@contextlib.contextmanager
def running(endpoint: str | None, service: str, instance: str | None = None) -> Iterator[None]:
    """Send what the block does to an OTLP/HTTP endpoint, under the name of a service; None: do nothing at all.

    At the end what is left is sent, for a few seconds at the most. Raises FatalError where OpenTelemetry is not here.
    """
    if endpoint is None:
        yield
        return
    try:
        from vidgen.otlp import OtlpTracer, exporter
    except ImportError as exc:
        raise errors.FatalError(
            f"an OTLP endpoint is set and OpenTelemetry is not installed ({exc.name}): unset "
            f"OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, or: {extras.install('tracing')}",
            code="not_installed",
        ) from exc
    tracer = OtlpTracer(exporter(endpoint), service, instance)
    try:
        with using(tracer):
            yield
    finally:
        tracer.close()


@contextlib.contextmanager
def using(tracer: OtlpTracer) -> Iterator[None]:
    """Let all spans of this process go to `tracer` while the block runs."""
    global _tracer
    before, _tracer = _tracer, tracer
    try:
        yield
    finally:
        _tracer = before


def on() -> bool:
    """Whether anybody wants spans."""
    return _tracer is not None


def span(
    name: str, *, of: Mapping[str, str] | None = None, kind: Kind = "internal", **about: Value
) -> AbstractContextManager[None]:
    """A span around the block; an error that leaves the block ends it with that error's code.

    It goes on in the trace that the headers `of` carry, else in the one that the caller is in, else it begins one. The
    attributes `about` are called `vidgen.<name>`, unless they have a dot; which job it is, a span knows of its parent.
    """
    return _NOTHING if _tracer is None else _tracer.span(name, of, kind, about)


def timed(name: str, lap: Lap) -> AbstractContextManager[None]:
    """A span around the block, which ends `lap`: its begin and end are those of the lap; else as `span`."""
    return _NOTHING if _tracer is None else _tracer.span(name, None, "internal", {}, lap)


def took(name: str, begun: float, ended: float, *, of: Mapping[str, str] | None = None, **about: Value) -> None:
    """A span of what is over, from and to seconds since the epoch; else as `span`."""
    if _tracer is not None:
        _tracer.took(name, begun, ended, of, about)


def about(**attributes: Value) -> None:
    """Say more of the span that the caller is in."""
    if _tracer is not None:
        _tracer.about(attributes)


def rename(name: str) -> None:
    """Give the span that the caller is in a name that was not known at its begin."""
    if _tracer is not None:
        _tracer.rename(name)


def failed(code: str) -> None:
    """Mark the span that the caller is in as failed, with the error's code and nothing else of it."""
    if _tracer is not None:
        _tracer.failed(code)


def carried() -> dict[str, str]:
    """The headers with which a message goes on in the trace that the caller is in; empty where it is in none."""
    return {} if _tracer is None else _tracer.carried()


def ids() -> dict[str, str]:
    """`trace_id` and `span_id` of the span that the caller is in, for a line in the log."""
    return {} if _tracer is None else _tracer.ids()
