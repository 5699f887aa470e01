"""Photographs that tell more than they show (where they were taken, by whom, with what) wherever files have room."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image, PngImagePlugin

PLANTED = b"Pl4nted"  # found in none of what is kept


def _picture() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 48)).convert("RGB")


def exif() -> bytes:
    """An EXIF block with a place, a camera and its owner."""
    block = Image.Exif()
    block[0x010F] = PLANTED.decode()  # make
    block[0x8825] = {1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 36.0), 29: PLANTED.decode()}
    return block.tobytes()


def saved(kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    _picture().save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def in_png(kind: bytes, data: bytes, *, behind: bool = False) -> bytes:
    """A PNG with one more chunk, before its pixels or behind them."""
    plain = saved("PNG")
    place = plain.index(b"IEND" if behind else b"IDAT") - 4
    return plain[:place] + chunk(kind, data) + plain[place:]


def in_jpeg(marker: int, data: bytes) -> bytes:
    """A JPEG with one more segment."""
    plain = saved("JPEG")
    return plain[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + plain[2:]


def in_webp(kind: bytes, data: bytes) -> bytes:
    """A WebP with one more chunk at its end, and the length that goes with it."""
    plain = saved("WEBP")
    longer = plain[8:] + kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(longer)) + longer


def _text() -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", PLANTED.decode())
    return text


def _jpeg_with_thumbnail() -> bytes:
    plain = saved("JPEG")
    small = PLANTED.ljust(2 * 2 * 3, b"\0")
    header = b"JFIF\0\1\1\0\0\1\0\1\2\2" + small
    end = 4 + struct.unpack_from(">H", plain, 4)[0]
    return plain[:2] + struct.pack(">BBH", 0xFF, 0xE0, len(header) + 2) + header + plain[end:]


# What tells, by where it lies.
TELLING: dict[str, Callable[[], bytes]] = {
    "jpeg-exif": lambda: saved("JPEG", exif=exif()),
    "jpeg-xmp": lambda: saved("JPEG", xmp=b"<x:xmpmeta>" + PLANTED + b"</x:xmpmeta>"),
    "jpeg-comment": lambda: saved("JPEG", comment=PLANTED),
    "jpeg-iptc": lambda: in_jpeg(0xED, b"Photoshop 3.0\0" + PLANTED),
    "jpeg-unknown-segment": lambda: in_jpeg(0xE7, PLANTED),
    "jpeg-icc": lambda: saved("JPEG", icc_profile=PLANTED),
    "jpeg-thumbnail": _jpeg_with_thumbnail,
    "jpeg-behind-its-end": lambda: saved("JPEG") + PLANTED,
    "jpeg-progressive-exif": lambda: saved("JPEG", progressive=True, exif=exif()),
    "png-exif": lambda: saved("PNG", exif=exif()),
    "png-exif-behind-its-pixels": lambda: in_png(b"eXIf", exif()[6:], behind=True),
    "png-text": lambda: saved("PNG", pnginfo=_text()),
    "png-text-behind-its-pixels": lambda: in_png(b"tEXt", b"Author\0" + PLANTED, behind=True),
    "png-compressed-text": lambda: in_png(b"zTXt", b"Author\0\0" + zlib.compress(PLANTED)),
    "png-time": lambda: in_png(b"tIME", struct.pack(">H5B", 2026, 1, 2, 3, 4, 5)),
    "png-unknown-chunk": lambda: in_png(b"prIv", PLANTED),
    "png-behind-its-end": lambda: saved("PNG") + PLANTED,
    "png-in-its-end": lambda: saved("PNG")[:-12] + chunk(b"IEND", PLANTED),
    "webp-exif": lambda: saved("WEBP", exif=exif()),
    "webp-xmp": lambda: saved("WEBP", xmp=PLANTED),
    "webp-unknown-chunk": lambda: in_webp(b"PRIV", PLANTED),
    "webp-behind-its-end": lambda: saved("WEBP") + PLANTED,
    "webp-like-a-chunk-behind-its-end": lambda: (
        saved("WEBP") + b"VP8X" + struct.pack("<I", len(PLANTED)) + PLANTED + bytes(len(PLANTED) % 2)
    ),
    "avif-exif": lambda: saved("AVIF", exif=exif()),
}

PLAIN: dict[str, Callable[[], bytes]] = {
    "png": lambda: saved("PNG"),
    "png-with-resolution": lambda: saved("PNG", dpi=(300, 300)),
    "jpeg": lambda: saved("JPEG"),
    "jpeg-progressive": lambda: saved("JPEG", progressive=True),
    "jpeg-optimised": lambda: saved("JPEG", optimize=True, quality=95, subsampling=0),
    "jpeg-with-restarts": lambda: saved("JPEG", restart_marker_rows=1),
    "webp": lambda: saved("WEBP"),
    "webp-lossless": lambda: saved("WEBP", lossless=True),
}
