"""What nats-py and its server say, in our words. No nats-py exception passes it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import nats.errors
import nats.js.errors as js_errors

from vidgen import errors

WRONG_LAST_SEQUENCE = frozenset({10071, 10164})  # alone · in a cluster
STORE_FAILED = 10077
NO_CLUSTER = 10074
FULL_CODES = frozenset({10023, 10028, 10047, STORE_FAILED})


class ConsumerGoneError(errors.BusError):
    """The consumer is not there."""


class cancellable:  # noqa: N801
    """Let a cancel through that comes in the same moment as the answer.

    nats-py waits with `asyncio.wait_for`, which before Python 3.12 swallows such a cancel: a loop would go on for ever.
    """

    # Not made of generators, as what follows: they are entered for each message, and take a fifth of the time so.
    __slots__ = ("_before", "_task")

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._before = 0 if self._task is None else self._task.cancelling()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> None:
        if self._task is not None and self._task.cancelling() > self._before:
            raise asyncio.CancelledError from exc


class translated(cancellable):  # noqa: N801
    """Let nothing of nats-py through: what it raises in the block is one of our errors."""

    __slots__ = ()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> None:
        super().__exit__(kind, exc, _)
        if exc is not None and (ours := _ours(exc)) is not None:
            raise ours from exc


def _ours(exc: BaseException) -> errors.VidgenError | None:
    """What nats-py or the network raised, as our error; None for what is not theirs."""
    match exc:
        case js_errors.APIError():
            return from_api(exc)
        case nats.errors.MaxPayloadError():
            return errors.RejectedError(
                "the message is larger than the bus takes: send object keys, not contents", code="too_large"
            )
        case nats.errors.BadSubjectError() | nats.errors.BadHeaderError() | js_errors.InvalidKeyError():
            return errors.RejectedError(
                "the bus takes no such name: use letters, digits, - and _ only", code="bad_name"
            )
        case nats.errors.Error() | js_errors.Error() | TimeoutError() | OSError():
            return errors.BusError(f"the bus did not answer: {type(exc).__name__}")
    return None


def from_api(exc: js_errors.APIError) -> errors.VidgenError:
    """What the server refused, as our error."""
    # nats-py leaves these unset on some of its own errors.
    code, text = getattr(exc, "err_code", None), getattr(exc, "description", None) or type(exc).__name__
    if code in WRONG_LAST_SEQUENCE or isinstance(exc, js_errors.KeyWrongLastSequenceError):
        return errors.ConflictError()
    if code == STORE_FAILED and "per subject" in text:
        return errors.ConflictError("a message already waits on this subject", code="already_queued")
    if code == NO_CLUSTER:
        return errors.FatalError(
            f"the bus is one server ({text}): set VIDGEN_STREAM_REPLICAS=1, or have it be a cluster", code="settings"
        )
    if code in FULL_CODES:
        return errors.QueueFullError(f"the bus is full: {text}")
    return errors.BusError(f"the bus refused: {text}")


def headers_of(found: Mapping[Any, Any] | None) -> dict[str, str]:
    """A message's headers, as plain text."""
    return {str(name): str(value) for name, value in (found or {}).items()}


def expecting(revision: int | None) -> dict[str, str]:
    """The header by which a publish is stored only where the newest message of its subject has that sequence."""
    return {} if revision is None else {"Nats-Expected-Last-Subject-Sequence": str(revision)}
