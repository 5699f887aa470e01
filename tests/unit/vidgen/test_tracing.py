"""Spans: what they say and whose children they are, the trace of a task, and that nobody ever waits for a collector."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode
from tests import engines
from tests.spans import Traced, id_of, parent_of, said, trace_of, traced, traceparent
from tests.workbench import BOUND, Bench

from vidgen import errors, extras, otlp, telemetry, topology, tracing
from vidgen.engine import Engine
from vidgen.settings import GatewaySettings, Settings, read

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def seen() -> Iterator[Traced]:
    with traced() as found:
        yield found


# ── off ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_an_endpoint_nothing_is_traced_and_opentelemetry_is_not_even_imported() -> None:
    code = (
        "import sys\n"
        "from vidgen import handler, jetstream, telemetry, tracing\n"
        f"with tracing.running(None, 'x'), tracing.span('a', of={HEADERS}):\n"
        "    tracing.about(job_id='j1'), tracing.failed('x'), tracing.rename('b'), tracing.took('c', 1.0, 2.0)\n"
        "    assert (tracing.on(), tracing.carried(), tracing.ids()) == (False, {}, {})\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')]\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.exporter')]\n"
    )  # fmt: skip

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)

    assert (done.returncode, done.stderr) == (0, "")


def test_an_endpoint_without_opentelemetry_ends_the_process_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "vidgen.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)

    with (
        pytest.raises(errors.FatalError, match=re.escape(extras.install("tracing"))) as caught,
        tracing.running("http://127.0.0.1:1/v1/traces", "x"),
    ):
        raise AssertionError("it must not go on")

    assert caught.value.code == "not_installed"


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, None),
        ({"ENDPOINT": ""}, None),
        ({"ENDPOINT": "http://collector:4318"}, "http://collector:4318/v1/traces"),
        ({"ENDPOINT": "https://collector/otlp/"}, "https://collector/otlp/v1/traces"),
        ({"TRACES_ENDPOINT": "http://c:4318/mine"}, "http://c:4318/mine"),
        ({"ENDPOINT": "http://a:1", "TRACES_ENDPOINT": "http://b:2/v1/traces"}, "http://b:2/v1/traces"),
    ],
)
def test_the_endpoint_is_the_standard_one(
    given: dict[str, str], url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ENDPOINT", "TRACES_ENDPOINT"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)

    assert read(Settings).traces_url == url


def test_a_wrong_endpoint_is_named_as_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317")
    monkeypatch.setenv("VIDGEN_HTTP_PORT", "-1")

    with pytest.raises(errors.FatalError) as caught:
        read(GatewaySettings)

    assert "VIDGEN_HTTP_PORT: " in caught.value.message
    assert "; OTEL_EXPORTER_OTLP_ENDPOINT: " in f"; {caught.value.message.partition(': ')[2]}"


# ── spans ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_span_goes_on_in_the_trace_of_a_message_and_what_is_sent_inside_goes_on_in_the_span(seen: Traced) -> None:
    given = {"Traceparent": HEADERS["traceparent"], "tracestate": "a=1"}
    with tracing.span("outer", of=given), tracing.span("inner"):
        sent, ids = tracing.carried(), tracing.ids()

    outer, inner = seen.one("outer"), seen.one("inner")
    assert (trace_of(outer), parent_of(outer)) == (TRACE, PARENT)
    assert (trace_of(inner), parent_of(inner)) == (TRACE, id_of(outer))
    assert sent == {"traceparent": traceparent(inner), "tracestate": "a=1"}
    assert ids == {"trace_id": TRACE, "span_id": id_of(inner)}
    assert (tracing.carried(), tracing.ids()) == ({}, {})


@pytest.mark.parametrize(
    "header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "é" * 5000]
)
def test_a_header_that_is_none_begins_a_fresh_trace(header: str, seen: Traced) -> None:
    with tracing.span("a", of={"traceparent": header}):
        pass

    assert seen.one("a").parent is None


def test_a_client_that_wants_no_spans_gets_none_and_its_trace_goes_on(seen: Traced) -> None:
    with tracing.span("a", of={"traceparent": f"00-{TRACE}-{PARENT}-00"}):
        sent = tracing.carried()["traceparent"]

    assert sent.startswith(f"00-{TRACE}-")
    assert sent.endswith("-00")
    assert seen.spans() == []


def test_which_job_it_is_a_span_has_from_its_parent_and_keeps_its_own_word(seen: Traced) -> None:
    with tracing.span("outer", job_id="j1", stage="edit", lane="batch"):
        tracing.about(attempt=2, nothing=None)
        with tracing.span("inner", stage="i2v"):
            tracing.took("over", 10.0, 12.5)

    assert said(seen.one("inner")) == {"job_id": "j1", "stage": "i2v", "attempt": 2}
    over = seen.one("over")
    assert said(over) == {"job_id": "j1", "stage": "i2v", "attempt": 2}
    assert (over.start_time, over.end_time) == (10_000_000_000, 12_500_000_000)
    assert parent_of(over) == id_of(seen.one("inner"))


def test_a_span_of_a_lap_has_its_begin_and_end_even_where_the_block_fails(seen: Traced) -> None:
    lap = tracing.Lap(10.0)
    with contextlib.suppress(ZeroDivisionError), tracing.timed("a", lap):
        lap.ended = 12.5
        raise ZeroDivisionError

    span = seen.one("a")
    assert (span.start_time, span.end_time) == (10_000_000_000, 12_500_000_000)
    assert span.status.description == "ZeroDivisionError"


def test_who_asked_is_linked_where_a_span_goes_on_in_another_trace(seen: Traced) -> None:
    with tracing.span("asked"), tracing.span("done", of=HEADERS):
        pass

    asked, done = seen.one("asked"), seen.one("done")
    assert (trace_of(done), parent_of(done)) == (TRACE, PARENT)
    [link] = done.links
    assert link.context == asked.context


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (errors.RejectedError("send uploads/secret.png again", code="bad_image"), "bad_image"),
        (ZeroDivisionError("of a secret"), "ZeroDivisionError"),
    ],
)
def test_of_an_error_a_span_has_the_code_and_nothing_else(exc: Exception, code: str, seen: Traced) -> None:
    with pytest.raises(type(exc)), tracing.span("a"):
        raise exc

    span = seen.one("a")
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, code)
    assert said(span) == {"error.type": code}
    assert "secret" not in span.to_json()


def test_a_cancel_is_no_error(seen: Traced) -> None:
    with pytest.raises(errors.Cancelled), tracing.span("a"):
        raise errors.Suspended(1, 4)

    assert seen.one("a").status.status_code is StatusCode.UNSET


def test_a_line_in_the_log_says_in_which_span_it_was_written(seen: Traced, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        telemetry.configure(Settings(log_format="json"), "x")
        with tracing.span("a"):
            structlog.get_logger().info("ours")
            logging.getLogger("a.library").warning("theirs")
        structlog.get_logger().info("outside")
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = handlers, level
        structlog.reset_defaults()

    ours, theirs, outside = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    ids = {"trace_id": trace_of(seen.one("a")), "span_id": id_of(seen.one("a"))}
    assert ids.items() <= ours.items()
    assert ids.items() <= theirs.items()
    assert not ids.keys() & outside.keys()


# ── a task ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bench_of() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(engine: Engine, **given: Any) -> Bench:
        made.append(Bench(engine, **given))
        return made[-1]

    with structlog.testing.capture_logs():
        yield make
    for bench in made:
        if isinstance(bench.engine, engines.Gated):
            bench.engine.open_all()
        bench.close()


def times(span: ReadableSpan) -> tuple[float, float]:
    """Begin and end, in seconds since the epoch."""
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9, span.end_time / 1e9


async def queue(bench: Bench, **given: Any) -> None:
    """A task that a gateway published inside a span of its own."""
    with tracing.span("decide", of=HEADERS):
        await bench.queue(**given)


async def test_a_task_is_a_span_with_one_for_each_phase_from_the_moment_it_was_queued(
    bench_of: Callable[..., Bench], seen: Traced
) -> None:
    bench = bench_of(engines.Paced(0.02))
    await queue(bench)

    assert await bench.run() == "completed"

    decide, task = seen.one("decide"), seen.one("edit")
    assert {trace_of(span) for span in seen.spans()} == {TRACE}
    assert parent_of(task) == id_of(decide)
    assert said(task) == {
        "job_id": "j1", "stage": "edit", "lane": "interactive", "run": 1, "attempt": 1, "tries": 1, "deliveries": 1,
        "engine": "paced", "outcome": "completed",
    }  # fmt: skip
    waited, for_the_device = seen.all("queued")
    assert (parent_of(waited), parent_of(for_the_device)) == (id_of(decide), id_of(task))
    phases = {span.name for span in seen.spans() if parent_of(span) == id_of(task)}
    assert phases == {"queued", "prepare", "device", "encode", "store"}
    device = seen.one("device")
    assert {span.name for span in seen.spans() if parent_of(span) == id_of(device)} == {"denoise", "decode"}
    assert all(said(span)["job_id"] == "j1" for span in seen.spans() if span.name != "decide")


async def test_the_spans_of_a_task_are_as_long_as_its_timings_and_lie_inside_it(
    bench_of: Callable[..., Bench], seen: Traced
) -> None:
    bench = bench_of(engines.Paced(0.02))
    await queue(bench)

    await bench.run()

    timings = bench.events()[-1].timings
    for name, seconds in timings:
        spans = [times(span) for span in seen.all(name)]
        assert sum(end - start for start, end in spans) == pytest.approx(seconds, abs=1e-5), name
    begin, last = times(seen.one("edit"))
    for span in (each for each in seen.spans() if parent_of(each) != id_of(seen.one("decide"))):
        start, end = times(span)
        assert span.name == "decide" or begin <= start <= end <= last, span.name


async def test_what_a_worker_says_of_a_task_goes_on_in_its_span(bench_of: Callable[..., Bench], seen: Traced) -> None:
    bench = bench_of(engines.Instant())
    await queue(bench)

    await bench.run()

    told = bench.bus.messages(topology.EVENTS, topology.subject_of_events("j1"))
    assert {message.headers["traceparent"] for message in told} == {traceparent(seen.one("edit"))}


async def test_a_second_try_is_in_the_same_trace_and_the_first_one_says_why(
    bench_of: Callable[..., Bench], seen: Traced
) -> None:
    bench = bench_of(engines.FailsOnce())
    bench.policy = replace(bench.policy, backoff_base=0.0)
    bench.use(bench.engine)
    await queue(bench, prompt="a-secret-prompt")

    assert [await bench.run(), await bench.run()] == ["retried", "completed"]

    first, second = seen.all("edit")
    assert (said(first)["attempt"], said(second)["attempt"]) == (1, 2)
    assert (first.status.description, said(first)["error.type"]) == ("out_of_memory", "out_of_memory")
    assert second.status.status_code is StatusCode.UNSET
    assert parent_of(first) == parent_of(second) == id_of(seen.one("decide"))
    assert len([span for span in seen.all("queued") if parent_of(span) == parent_of(first)]) == 1
    told = "".join(span.to_json() for span in seen.spans())
    assert "a-secret-prompt" not in told
    assert "uploads/" not in told


async def test_an_attempt_that_goes_on_in_the_middle_is_in_the_same_trace(
    bench_of: Callable[..., Bench], seen: Traced
) -> None:
    engine = engines.Resumes()
    gate = engine.hold("generate", step=2)
    bench = bench_of(engine)
    await queue(bench)
    turn = bench.turn()
    running = await bench.begin(turn)
    assert await asyncio.to_thread(gate.reached.wait, BOUND)
    turn.stop.now("drained")
    gate.open()
    async with asyncio.timeout(BOUND):
        assert await running == "released"
    bench.use(engines.Resumes())

    assert await bench.run() == "completed"

    first, second = seen.all("edit")
    assert (said(first)["outcome"], said(first)["attempt"], first.status.status_code) == (
        "released", 1, StatusCode.UNSET,
    )  # fmt: skip
    assert (said(second)["attempt"], said(second)["checkpoint_step"]) == (2, 2)
    assert {trace_of(span) for span in seen.spans()} == {TRACE}


async def test_a_task_that_is_given_up_says_so_in_its_trace(bench_of: Callable[..., Bench], seen: Traced) -> None:
    bench = bench_of(engines.Instant())
    await queue(bench)
    await bench.start_elsewhere(attempt=3, alone=True, worker=bench.policy.worker_id)

    assert await bench.run() == "dead"

    assert seen.one("edit").status.description == "attempts_exhausted"


# ── the collector ────────────────────────────────────────────────────────────────────────────────────────────────


class Hangs(SpanExporter):
    """A collector that takes a connection and never answers, until `released`."""

    def __init__(self) -> None:
        self.asked, self.released, self.left = threading.Event(), threading.Event(), threading.Event()
        self.taken = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.released.wait(BOUND)
        self.left.set()
        self.taken += len(spans)
        return SpanExportResult.FAILURE


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[otlp.OtlpTracer, Hangs]]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    collector = Hangs()
    tracer = otlp.OtlpTracer(collector, "x")
    with tracing.using(tracer):
        yield tracer, collector
    collector.released.set()
    tracer.close(BOUND)


async def test_a_collector_that_hangs_holds_up_no_task(
    bench_of: Callable[..., Bench], hanging: tuple[otlp.OtlpTracer, Hangs]
) -> None:
    _, collector = hanging
    with tracing.span("before"):
        pass
    assert await asyncio.to_thread(collector.asked.wait, BOUND)
    bench = bench_of(engines.Instant())

    for number in range(30):
        await queue(bench, job=f"j{number}")
        assert await bench.run() == "completed"

    assert not collector.left.is_set()  # it has not answered once


def test_a_collector_that_hangs_keeps_no_process(hanging: tuple[otlp.OtlpTracer, Hangs]) -> None:
    tracer, collector = hanging
    with tracing.span("a"):
        pass
    assert collector.asked.wait(BOUND)

    with structlog.testing.capture_logs() as logs:
        tracer.close(bound=0.01)

    assert not collector.left.is_set()
    assert [line["_event"] for line in logs] == ["tracing_cut"]


def test_more_spans_than_can_be_kept_are_dropped(hanging: tuple[otlp.OtlpTracer, Hangs]) -> None:
    tracer, collector = hanging
    with tracing.span("on its way"):
        pass
    assert collector.asked.wait(BOUND)

    for _ in range(3000):
        with tracing.span("a"):
            pass

    collector.released.set()
    tracer.flush()
    assert collector.taken == 1 + 2048


class Told(SpanExporter):
    """Answers as it is told."""

    def __init__(self, *answers: SpanExportResult) -> None:
        self.answers = list(answers)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self.answers.pop(0)


def test_a_collector_that_is_down_is_a_line_in_the_log_and_so_is_its_return() -> None:
    lost, taken = SpanExportResult.FAILURE, SpanExportResult.SUCCESS
    exporter = otlp.ToldOnce(Told(taken, lost, lost, lost, taken, taken, lost))

    with structlog.testing.capture_logs() as logs:
        for _ in range(7):
            exporter.export([])

    assert [line["_event"] for line in logs] == ["tracing_lost", "tracing_back", "tracing_lost"]
