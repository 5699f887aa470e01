"""Multipart bodies, written to files as they come; what is too much ends the reading at once."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gateway.api.problems import HttpError
from gateway.intake import MAX_REQUEST_BYTES, InvalidRequestError
from vidgen.contracts import MAX_REFERENCES, FieldError

REQUEST_FIELD, IMAGE_FIELD = "request", "image"


@dataclass(frozen=True)
class Form:
    """What a form brought: the request as JSON bytes, and the images as files, in order."""

    request: bytes
    images: tuple[Path, ...]


async def read_form(content_type: str, chunks: AsyncIterator[bytes], folder: Path, max_image_bytes: int) -> Form:
    """Read a form into `folder`; raises HttpError 400 and 413, and InvalidRequestError."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise HttpError(400, "not_a_form", "the Content-Type lacks its boundary: let your HTTP client set it")
    with _Reader(folder, max_image_bytes) as reader:
        try:
            parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": reader.on_part_begin, "on_header_field": reader.on_header_field,
                    "on_header_value": reader.on_header_value, "on_header_end": reader.on_header_end,
                    "on_headers_finished": reader.on_headers_finished, "on_part_data": reader.on_part_data,
                    "on_part_end": reader.on_part_end, "on_end": reader.on_end,
                },
            )  # fmt: skip
            async for chunk in chunks:
                parser.write(chunk)
        except FormParserError:
            raise HttpError(400, "not_a_form", "the body is not multipart/form-data: see RFC 7578") from None
        return reader.form()


class _Reader:
    """The parser's callbacks. The files are small and local: writing them here does not hold up the loop."""

    def __init__(self, folder: Path, max_image_bytes: int) -> None:
        self._folder, self._max_image_bytes = folder, max_image_bytes
        self._images: list[Path] = []
        self._request: bytearray | None = None
        self._stack = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._part_bytes = 0
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._ended = False

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def form(self) -> Form:
        if not self._ended:
            raise HttpError(400, "not_a_form", "the form is cut short: send the whole body, with its last boundary")
        wrong = []
        if self._request is None:
            wrong.append(FieldError(field=REQUEST_FIELD, message="missing: add the request as JSON in this form field"))
        if not self._images:
            wrong.append(FieldError(field=IMAGE_FIELD, message=f"missing: send 1 to {MAX_REFERENCES} images"))
        if wrong:
            raise InvalidRequestError(wrong)
        return Form(bytes(self._request or b""), tuple(self._images))

    def on_part_begin(self) -> None:
        self._disposition, self._part_bytes = b"", 0
        self._header.clear()
        self._value.clear()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name", b"").decode(errors="replace")
        if name == IMAGE_FIELD and len(self._images) < MAX_REFERENCES:
            path = self._folder / f"image-{len(self._images)}"
            self._file = self._stack.enter_context(path.open("wb"))
            self._images.append(path)
        elif name == REQUEST_FIELD and self._request is None:
            self._request = bytearray()
        elif name == IMAGE_FIELD:
            raise InvalidRequestError([FieldError(field=name, message=f"too many: send 1 to {MAX_REFERENCES} images")])
        elif name == REQUEST_FIELD:
            raise InvalidRequestError([FieldError(field=name, message="given twice: send it once")])
        else:
            field = name[:100] or "form"
            raise InvalidRequestError(
                [FieldError(field=field, message=f"unknown form field: send {REQUEST_FIELD} and {IMAGE_FIELD}")]
            )

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._part_bytes += end - start
        if self._file is not None:
            if self._part_bytes > self._max_image_bytes:
                raise _too_large(f"{IMAGE_FIELD}.{len(self._images) - 1}", self._max_image_bytes)
            self._file.write(data[start:end])
        elif self._request is not None:
            if self._part_bytes > MAX_REQUEST_BYTES:
                raise _too_large(REQUEST_FIELD, MAX_REQUEST_BYTES)
            self._request += data[start:end]

    def on_part_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def on_end(self) -> None:
        self._ended = True


def _too_large(field: str, limit: int) -> HttpError:
    message = f"larger than the {limit:,} bytes allowed: send a smaller one"
    return HttpError(413, "too_large", f"{field}: {message}", fields=[FieldError(field=field, message=message)])
