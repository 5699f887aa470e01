"""The images that came with a form: checked, made plain, and stored under their own checksum."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from gateway.api.forms import IMAGE_FIELD
from gateway.decoder import Decoder
from gateway.decoding import Decoding
from vidgen import artifacts, errors
from vidgen.artifacts import ArtifactStore
from vidgen.contracts import FieldError

FRESH = timedelta(hours=1)
EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/avif": "avif"}


@dataclass(frozen=True)
class Reference:
    """An image that every engine can read, as a local file."""

    path: Path
    content_type: str
    sha256: str

    def key(self, tenant: str) -> str:
        """The same upload of a tenant twice is one object."""
        return f"{artifacts.uploads_prefix(tenant)}{self.sha256}.{EXTENSIONS[self.content_type]}"


class References:
    """Checks and stores uploaded images."""

    def __init__(self, store: ArtifactStore, decoding: Decoding) -> None:
        self._store, self._decoding = store, decoding

    async def check(self, paths: tuple[Path, ...], tenant: str) -> tuple[list[Reference], list[FieldError]]:
        """What the files of a tenant are, and what is wrong with them, by field."""
        checked = await asyncio.gather(*(self._check(path, tenant) for path in paths), return_exceptions=True)
        found: list[Reference] = []
        wrong: list[FieldError] = []
        for index, result in enumerate(checked):
            if isinstance(result, errors.RejectedError):
                wrong.append(FieldError(field=f"{IMAGE_FIELD}.{index}", message=result.message))
            elif isinstance(result, BaseException):
                raise result
            else:
                found.append(result)
        return found, wrong

    async def store(self, references: list[Reference], tenant: str) -> list[str]:
        """Put them into the store for a tenant; their keys, in order."""
        await asyncio.gather(*(self._store_one(reference, reference.key(tenant)) for reference in references))
        return [reference.key(tenant) for reference in references]

    async def _check(self, path: Path, tenant: str) -> Reference:
        return await self._decoding.over(path, _examine, tenant)

    async def _store_one(self, reference: Reference, key: str) -> None:
        found = await self._store.stat(key)
        # One that was there long ago may be about to go: what is put anew is kept anew.
        if found is None or found.modified is None or found.modified < datetime.now(UTC) - FRESH:
            await self._store.put(key, reference.path, reference.content_type)


def _examine(decoder: Decoder, path: Path) -> Reference:
    facts = decoder.inspect(path)
    if not facts.normal:
        plain = path.with_suffix(".png")
        facts = decoder.normalise(path, plain)
        path = plain
    return Reference(path, f"image/{facts.format.lower()}", artifacts.sha256_of(path))
