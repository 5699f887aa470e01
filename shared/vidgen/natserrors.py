"""What nats-py and its server say, in our words. No nats-py exception passes it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import nats.errors
import nats.js.errors as js_errors

from vidgen import errors

WRONG_LAST_SEQUENCE = frozenset({10071, 10164})  # alone · in a cluster
STORE_FAILED = 10077
FULL_CODES = frozenset({10023, 10028, 10047, STORE_FAILED})


class ConsumerGoneError(errors.BusError):
    """The consumer is not there."""


@contextlib.contextmanager
def cancellable() -> Iterator[None]:
    """Let a cancel through that comes in the same moment as the answer.

    nats-py waits with `asyncio.wait_for`, which before Python 3.12 swallows such a cancel: a loop would go on for ever.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Let nothing of nats-py through: what it raises in the block is one of our errors."""
    try:
        with cancellable():
            yield
    except js_errors.APIError as exc:
        raise from_api(exc) from exc
    except nats.errors.MaxPayloadError as exc:
        raise errors.RejectedError(
            "the message is larger than the bus takes: send object keys, not contents", code="too_large"
        ) from exc
    except (nats.errors.BadSubjectError, nats.errors.BadHeaderError, js_errors.InvalidKeyError) as exc:
        raise errors.RejectedError(
            "the bus takes no such name: use letters, digits, - and _ only", code="bad_name"
        ) from exc
    except (nats.errors.Error, js_errors.Error, TimeoutError, OSError) as exc:
        raise errors.BusError(f"the bus did not answer: {type(exc).__name__}") from exc


def from_api(exc: js_errors.APIError) -> errors.VidgenError:
    """What the server refused, as our error."""
    # nats-py leaves these unset on some of its own errors.
    code, text = getattr(exc, "err_code", None), getattr(exc, "description", None) or type(exc).__name__
    if code in WRONG_LAST_SEQUENCE or isinstance(exc, js_errors.KeyWrongLastSequenceError):
        return errors.ConflictError()
    if code == STORE_FAILED and "per subject" in text:
        return errors.ConflictError("a message already waits on this subject", code="already_queued")
    if code in FULL_CODES:
        return errors.QueueFullError(f"the bus is full: {text}")
    return errors.BusError(f"the bus refused: {text}")


def headers_of(found: Mapping[Any, Any] | None) -> dict[str, str]:
    """A message's headers, as plain text."""
    return {str(name): str(value) for name, value in (found or {}).items()}


def expecting(revision: int | None) -> dict[str, str]:
    """The header by which a publish is stored only where the newest message of its subject has that sequence."""
    return {} if revision is None else {"Nats-Expected-Last-Subject-Sequence": str(revision)}
