"""Logs: JSON lines on stderr, or colour on a terminal; never a secret. Python's own logging goes the same way.

With tracing on, what is logged inside a span says so: `trace_id`, `span_id`.

Loggers come from `structlog.get_logger(__name__)`; fields are bound with `structlog.contextvars.bound_contextvars`.
`log.info("a sentence for people", _event="name_for_queries", ...)` becomes `message` and `event`.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import structlog
from pydantic import SecretBytes, SecretStr
from structlog.typing import EventDict, Processor, WrappedLogger

from vidgen import tracing
from vidgen.settings import Settings

MASK = "***"
SECRET_KEY = re.compile(
    r"secret|passw|token(?!s|iz)|access_?key|api_?key|private_?key|authorization|credential|cookie", re.I
)
USERINFO = re.compile(r"://[^/\s?#]*@")
SIGNED = re.compile(
    r"([?&](?:x-amz-(?:signature|credential|security-token)|signature|awsaccesskeyid|access_token|token)=)[^&\s\"'<>]+",
    re.I,
)
SECRETS, NUMBERS, SEQUENCES = (SecretStr, SecretBytes), (bool, int, float), (list, tuple, set, frozenset)
QUIET = ("httpx", "httpcore", "urllib3", "asyncio", "python_multipart")  # they log each request, or each byte


def configure(settings: Settings, service: str) -> None:
    """Send all logs of this process through structlog, each line naming `service`; call it once, first in `main`."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _named(service),
        _traced,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = _Stderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()], processors=_rendering(settings)
        )
    )
    _take_over(handler, settings.log_level.upper())


def mask_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor: hides values by their key, and credentials inside URLs, at any depth."""
    return {key: _masked(value, key) for key, value in event.items()}


def _masked(value: Any, key: str = "") -> Any:
    if value is None:
        return None
    if _is_secret(key) or isinstance(value, SECRETS):
        return MASK
    if isinstance(value, NUMBERS):
        return value
    if isinstance(value, Mapping):
        return {name: _masked(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, SEQUENCES):
        return [_masked(inner) for inner in value]
    # Anything else would be rendered as text later, when nothing could be hidden any more.
    text = value if isinstance(value, str) else str(value)
    if "@" in text:
        text = USERINFO.sub(f"://{MASK}@", text)
    return SIGNED.sub(rf"\1{MASK}", text) if "=" in text else text


@functools.lru_cache(maxsize=1000)
def _is_secret(key: str) -> bool:
    return SECRET_KEY.search(key) is not None


def _rendering(settings: Settings) -> list[Processor]:
    terminal = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    last: list[Processor] = (
        [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), event_key="message", exception_formatter=structlog.dev.plain_traceback
            )
        ]
        if terminal
        else [structlog.processors.JSONRenderer(ensure_ascii=False)]
    )
    # The traceback becomes text before the mask, so that a URL in an exception's message is hidden as well.
    return [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        _without_colour,
        structlog.processors.EventRenamer("message", replace_by="_event"),
        structlog.processors.format_exc_info,
        mask_secrets,
        *last,
    ]


def _named(service: str) -> Processor:
    def add_service(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    return add_service


def _traced(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event.update(tracing.ids())
    return event


def _without_colour(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)  # uvicorn's second copy of its message
    return event


def _take_over(handler: logging.Handler, level: str) -> None:
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is at the time: progress bars and tests replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _stream: TextIO) -> None:
        raise AttributeError("the stream is always sys.stderr")
