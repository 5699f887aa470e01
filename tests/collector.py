"""An OTLP/HTTP collector in this process: keeps the spans that it is sent, as protobuf has them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """A span, with ids as headers have them, times in seconds, and the service that sent it."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    begun: float
    ended: float
    attributes: dict[str, Any]
    error: str

    @property
    def job(self) -> Any:
        return self.attributes.get("vidgen.job_id")


class Collector:
    """What arrived; `until` waits for more."""

    def __init__(self) -> None:
        self.url = ""
        self._spans: list[Span] = []
        self._changed = threading.Condition()

    def take(self, body: bytes) -> None:
        found = list(_spans(ExportTraceServiceRequest.FromString(body)))
        with self._changed:
            self._spans += found
            self._changed.notify_all()

    def of(self, job_id: str) -> list[Span]:
        """The spans of a job, as they began."""
        return sorted((span for span in self._spans if span.job == job_id), key=lambda span: span.begun)

    def jobs(self, trace: str) -> set[Any]:
        """The jobs that the spans of a trace name; None where one names none."""
        return {span.job for span in self._spans if span.trace == trace}

    def until(self, job_id: str, there: Callable[[list[Span]], bool], bound: float) -> list[Span]:
        """The spans of a job once `there` says that they are all there; blocks, at most for `bound` seconds."""
        with self._changed:
            assert self._changed.wait_for(lambda: there(self.of(job_id)), bound), [s.name for s in self.of(job_id)]
            return self.of(job_id)


@contextlib.contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_port}"
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        try:
            yield collector
        finally:
            server.shutdown()
            serving.join()


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for sent in request.resource_spans:
        resource = _plain(sent.resource.attributes)
        for scope in sent.scope_spans:
            for span in scope.spans:
                yield Span(
                    service=resource["service.name"], name=span.name, trace=span.trace_id.hex(), id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(), begun=span.start_time_unix_nano / 1e9,
                    ended=span.end_time_unix_nano / 1e9, attributes=_plain(span.attributes),
                    error=span.status.message if span.status.code == span.status.STATUS_CODE_ERROR else "",
                )  # fmt: skip


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}
