"""Records on JetStream: a key-value bucket by its stream."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import nats.errors
import nats.js.errors as js_errors

from vidgen import errors
from vidgen.natserrors import expecting, from_api, translated

if TYPE_CHECKING:
    from vidgen.jetstream import JetStreamBus

RECORDS_AT_ONCE = 64
KEY = re.compile(r"(?!\.)[-/_=.a-zA-Z0-9]+(?<!\.)")


class JetStreamRecords:
    """A bucket by its stream: nats-py's `KeyValue` takes longer, and asks for the state, which not all may read."""

    def __init__(self, bus: JetStreamBus, bucket: str) -> None:
        self._bus, self._bucket = bus, bucket
        self._stream, self._prefix = f"KV_{bucket}", f"$KV.{bucket}."

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        with translated():
            try:
                yield
            except nats.errors.NoRespondersError as exc:
                raise errors.BusError(
                    f"the bucket {self._bucket} is not there: start a gateway, it creates what is missing"
                ) from exc

    async def get(self, key: str) -> tuple[bytes, int] | None:
        with self._translated():
            found = await self._find(key)
        return None if found is None or found[0] is None else (found[0], found[1])

    async def latest(self, key: str) -> tuple[bytes, int] | None:
        with self._translated():
            stored = await self._bus.newest(self._stream, f"{self._prefix}{_checked(key)}")
        return None if stored is None or _ended(stored.headers) else (stored.body, stored.seq)

    async def _find(self, key: str) -> tuple[bytes | None, int] | None:
        """Value and revision; a key that was deleted, or expired with a marker, has a revision and no value."""
        msg = await self._bus.direct(self._stream, f"{self._prefix}{_checked(key)}")
        if msg is None:
            return None
        told = msg.headers or {}
        return None if _ended(told) else msg.data, int(told["Nats-Sequence"])

    async def put(self, key: str, value: bytes, revision: int | None = None) -> int:
        subject = f"{self._prefix}{_checked(key)}"
        with self._translated():
            if revision != 0:
                return await self._write(subject, value, revision)
            try:
                return await self._write(subject, value, 0)
            except errors.ConflictError:
                found = await self._find(key)
                if found is None or found[0] is not None:
                    raise
                return await self._write(subject, value, found[1])  # it is there no longer, but for its marker

    async def _write(self, subject: str, value: bytes, revision: int | None) -> int:
        try:
            return (await self._bus.store(subject, value, expecting(revision)))[0]
        except js_errors.APIError as exc:
            raise from_api(exc) from exc

    async def all(self) -> dict[str, bytes]:
        prefix = self._prefix
        with translated():
            state = (await self._bus.jetstream.stream_info(self._stream, subjects_filter=f"{prefix}>")).state
        keys = sorted(subject.removeprefix(prefix) for subject in state.subjects or {})
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), RECORDS_AT_ONCE):
            some = keys[start : start + RECORDS_AT_ONCE]
            for key, record in zip(some, await asyncio.gather(*map(self.get, some)), strict=True):
                if record is not None:  # None: it expired in between
                    found[key] = record[0]
        return found


def _ended(headers: Mapping[str, str]) -> bool:
    return headers.get("KV-Operation") in ("DEL", "PURGE") or "Nats-Marker-Reason" in headers


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise errors.RejectedError("the bus takes no such name: use letters, digits, - and _ only", code="bad_name")
    return key
