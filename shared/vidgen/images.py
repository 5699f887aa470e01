"""Images in and out: what a reference may be, and how it becomes upright 8-bit RGB before any engine sees it.

The number of pixels is read from the header and checked before a single one is decoded.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    Image,
    ImageCms,
    ImageDraw,
    ImageFile,
    ImageFont,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from vidgen import errors

MAX_PIXELS = 50_000_000
MAX_PIXELS_KEPT = 2048 * 2048  # larger references are scaled down to this area
MIN_IMAGE_SIDE = 16
MAX_ASPECT = 100
MAX_SCANS = 200  # of a progressive JPEG; a camera writes about 10, and each costs a pass over all pixels
SMALL_READ = 1 << 16  # bytes: not worth asking how many there are
MARK_SHARE = 0.06  # of the height, at the bottom: where `mark` writes

FORMATS = "PNG, JPEG, WebP or AVIF"
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/avif")
# The parts of a file that say how its pixels look. What has others (EXIF, GPS, XMP, ICC, text, thumbnails, parts that
# nobody knows, bytes behind the end) is encoded anew.
PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"pHYs", b"bKGD"})
WEBP_CHUNKS = frozenset({b"VP8 ", b"VP8L", b"VP8X"})
JPEG_TABLES = frozenset({0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC),
                         *range(0xCD, 0xD0)})  # fmt: skip
JPEG_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # in a scan: neither a stuffed byte nor a restart
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image file; the size is that of the upright image.

    `normal`: a single frame of 8-bit RGB in PNG, JPEG or WebP, upright, small enough and with nothing else in the file,
    to its last byte: it can be used as it is.
    """

    width: int
    height: int
    format: str
    normal: bool


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG whose EXIF block is left alone: Pillow looks for a resolution in it, and warns where it is broken."""

    def _read_dpi_from_exif(self) -> None:
        return


class _File(io.BufferedReader):
    """A file of which nobody reads more than there is: a chunk that claims to have 2 GB is not given the memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and 0 <= size <= SMALL_READ:  # nearly all of a decoder's
            return super().read(size)
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def pixels(path: Path) -> int:
    """How many pixels an image says that it has, none of which is decoded; raises as `inspect` does."""
    with _opened(path) as image:
        return image.width * image.height


def inspect(path: Path) -> ImageFacts:
    """Decode an image completely and say what it is.

    Raises RejectedError `empty_file`, `not_an_image`, `truncated_image`, `too_many_pixels`, `image_too_small`,
    `image_too_narrow` or `image_too_complex`.
    """
    with _opened(path) as image:
        facts = _facts(image, path)
        # A JPEG can be decoded at an eighth of its size: every byte is read, a sixty-fourth of the memory is used.
        image.draft(None, (image.width // 8, image.height // 8))
        image.load()
    return facts


def normalise(source: Path, target: Path) -> ImageFacts:
    """Write the image as RGB, upright, first frame, on white, without metadata, at most `MAX_PIXELS_KEPT`, as PNG."""
    image = open_rgb(source)
    image.save(target, format="PNG", compress_level=1)
    return ImageFacts(image.width, image.height, "PNG", normal=True)


def open_rgb(path: Path) -> Image.Image:
    """Open an image as `normalise` leaves it; raises what `inspect` raises."""
    with _opened(path) as image:
        turn = _orientation(image.info)
        size = _kept_size(image.width, image.height)
        image.draft(None, size)
        image.load()
        flat = _flatten(_scaled(_plain(image), size))
        flat = _in_srgb(flat, image.info.get("icc_profile"))
        upright = flat.transpose(TURNS[turn]) if turn in TURNS else flat
    clean = upright if upright is not image else upright.copy()
    clean.info = {}
    return clean


def fit(image: Image.Image, width: int, height: int, centre: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Resize and crop to cover exactly the size; `centre` says what stays (0, 0 is the top left corner)."""
    if image.size == (width, height):
        return image.copy()
    scale = min(image.width / width, image.height / height)
    crop_width, crop_height = width * scale, height * scale
    # Rounding may make the crop larger than the image by less than any pixel can tell.
    left, top = max(0.0, image.width - crop_width) * centre[0], max(0.0, image.height - crop_height) * centre[1]
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def subject_centre(image: Image.Image, width: int, height: int) -> tuple[float, float]:
    """Where `fit` should crop so that the subject stays in the picture: skin, detail, and rather the upper part."""
    small = image.resize((64, 64), Image.Resampling.BOX)
    luma, blue, red = (np.asarray(band, np.float32) / 255 for band in small.convert("YCbCr").split())
    detail = np.abs(np.gradient(luma, axis=0)) + np.abs(np.gradient(luma, axis=1))
    skin = np.exp(-(((blue - 0.43) / 0.05) ** 2 + ((red - 0.59) / 0.05) ** 2)) * (luma > 0.2)
    interest = detail + 0.5 * skin + 0.02
    interest *= np.linspace(1.3, 0.7, 64, dtype=np.float32)[:, None]
    interest *= 1.2 - 0.4 * np.abs(np.linspace(-1, 1, 64, dtype=np.float32))[None, :]
    scale = min(image.width / width, image.height / height)
    return (
        _best_window(interest.sum(axis=0), width * scale / image.width),
        _best_window(interest.sum(axis=1), height * scale / image.height),
    )


def write_png(image: Image.Image | Pixels, path: Path, metadata: Mapping[str, str], compress_level: int = 4) -> None:
    """Write an RGB image or array as PNG, with the metadata as text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        chunks.add_text(key, value)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(path, format="PNG", pnginfo=chunks, compress_level=compress_level)


def read_text(path: Path) -> dict[str, str]:
    """The metadata that `write_png` wrote; empty for what is not a PNG."""
    with _opened(path) as image:
        found = image.text if isinstance(image, PngImagePlugin.PngImageFile) else {}
        return {key: str(value) for key, value in found.items()}


def mark(image: Image.Image, text: str) -> None:
    """Write a small label into the bottom right corner, in its lowest `MARK_SHARE` (from 100 pixels on)."""
    label = _label(text, image.height)
    gap = max(1, round(image.height * 0.012))
    image.paste(label, (image.width - label.width - gap, image.height - label.height - gap), label)


@functools.lru_cache(maxsize=16)
def _label(text: str, height: int) -> Image.Image:
    size = max(8.0, height * 0.024)
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    pad_x, tall = round(size * 0.5), max(4, math.floor(height * 0.042))
    wide = math.ceil(right - left) + 2 * pad_x
    label = Image.new("RGBA", (wide, tall), (0, 0, 0, 0))
    draw = ImageDraw.Draw(label)
    draw.rounded_rectangle((0, 0, wide - 1, tall - 1), radius=tall / 3, fill=(0, 0, 0, 96))
    draw.text(
        (wide / 2 - (left + right) / 2, tall / 2 - (top + bottom) / 2), text, font=font, fill=(255, 255, 255, 215)
    )
    return label


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image with its header read and its limits checked; whatever goes wrong inside becomes a RejectedError."""
    with _File(io.FileIO(path)) as file:
        kind = _kind(file.read(64))
        file.seek(0)
        with _refusing(), contextlib.ExitStack() as stack:
            image: Image.Image = stack.enter_context(kind(file))
            _check_limits(image)
            if image.info.get("progressive"):
                _check_scans(path)
            yield image


def _kind(head: bytes) -> type[ImageFile.ImageFile]:
    """The decoder, by the first bytes.

    Not `Image.open`: it warns of large images through the process-wide warnings machinery before we can refuse them.
    """
    if not head:
        raise errors.RejectedError(f"the file is empty: send a {FORMATS} image", code="empty_file")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if head.startswith(b"\xff\xd8\xff"):
        return _Jpeg
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if head[4:8] == b"ftyp" and (b"avif" in head[8:] or b"avis" in head[8:]):
        return AvifImagePlugin.AvifImageFile
    raise errors.RejectedError(f"the file is not an image that can be read: send {FORMATS}", code="not_an_image")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (errors.VidgenError, MemoryError):
        raise
    except Image.DecompressionBombError as exc:
        raise _too_many_pixels() from exc
    except Exception as exc:  # decoders raise anything from SyntaxError to struct.error on broken data
        if isinstance(exc, OSError) and exc.errno is not None:
            raise  # the disk, not the image
        raise errors.RejectedError(
            "the image is damaged or cut short: send the whole file again", code="truncated_image"
        ) from exc


def _too_many_pixels() -> errors.RejectedError:
    limit = f"{MAX_PIXELS // 1_000_000} million"
    return errors.RejectedError(
        f"the image has more than {limit} pixels: scale it down, {MAX_PIXELS_KEPT // 1_000_000} million are used",
        code="too_many_pixels",
    )


def _check_limits(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_many_pixels()
    if min(width, height) < MIN_IMAGE_SIDE:
        raise errors.RejectedError(
            f"the image is {width} × {height} pixels: send one with at least {MIN_IMAGE_SIDE} on each side",
            code="image_too_small",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise errors.RejectedError(
            f"the image is {width} × {height} pixels, more than {MAX_ASPECT} times as long as wide: crop it",
            code="image_too_narrow",
        )


def _check_scans(path: Path) -> None:
    if path.read_bytes().count(b"\xff\xda") > MAX_SCANS:
        raise errors.RejectedError(
            f"the progressive JPEG has more than {MAX_SCANS} scans: save it again as a plain JPEG or PNG",
            code="image_too_complex",
        )


def _facts(image: Image.Image, path: Path) -> ImageFacts:
    kind = image.format or ""
    turned = _orientation(image.info) >= 5
    width, height = (image.height, image.width) if turned else image.size
    normal = (
        kind in ("PNG", "JPEG", "WEBP")
        and image.mode == "RGB"
        and not _deep(image)
        and width * height <= MAX_PIXELS_KEPT
        and _bare(path.read_bytes())
    )
    return ImageFacts(width, height, kind, normal)


def _bare(data: bytes) -> bool:
    """Whether a PNG, JPEG or WebP file holds pixels and nothing else, from its first byte to its last."""
    if data.startswith(b"\x89PNG"):
        return _bare_png(data)
    return _bare_jpeg(data) if data.startswith(b"\xff\xd8") else _bare_webp(data)


def _bare_png(data: bytes) -> bool:
    place, kind = 8, b""
    while place + 12 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind not in PNG_CHUNKS or (kind == b"IEND" and length):
            return False
        place += length + 12
    return kind == b"IEND" and place == len(data)


def _bare_webp(data: bytes) -> bool:
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        if kind not in WEBP_CHUNKS:
            return False
        place += 8 + length + length % 2
    (told,) = struct.unpack_from("<I", data, 4)
    return bool(place == len(data) == told + 8)


def _bare_jpeg(data: bytes) -> bool:
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, (length,) = data[place + 1], struct.unpack_from(">H", data, place + 2)
        body = data[place + 4 : place + 2 + length]
        jfif = marker == 0xE0 and length == 16 and body.startswith(b"JFIF\0")  # longer ones have a thumbnail
        adobe = marker == 0xEE and length == 14 and body.startswith(b"Adobe")
        if marker == 0xDA:
            following = JPEG_MARKER.search(data, place + 2 + length)
            if following is None:
                return False
            place = following.end() - 2
        elif marker in JPEG_TABLES or jfif or adobe:
            place += 2 + length
        else:
            return False
    return data[place:] == b"\xff\xd9"


def _deep(image: Image.Image) -> bool:
    """Whether a PNG has 16 bits a channel: Pillow calls it RGB all the same, only the raw mode tells."""
    tiles = getattr(image, "tile", [])
    return bool(tiles) and isinstance(tiles[0].args, str) and "16" in tiles[0].args


def _kept_size(width: int, height: int) -> tuple[int, int]:
    if width * height <= MAX_PIXELS_KEPT:
        return width, height
    scale = math.sqrt(MAX_PIXELS_KEPT / (width * height))
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def _plain(image: Image.Image) -> Image.Image:
    """One of the modes that can be scaled: L, RGB, RGBA, CMYK."""
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to white
        values = np.asarray(image).astype(np.uint32)  # in place from here on: of the largest image it is 200 MB
        values *= 255
        values += 32767
        values //= 65535
        return Image.fromarray(values.astype(np.uint8))
    if image.mode == "RGBA":
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _in_srgb(image: Image.Image, profile: object) -> Image.Image:
    """RGB with sRGB's meaning; a profile that is broken or of another kind of image is left out."""
    if isinstance(profile, bytes) and profile:
        with contextlib.suppress(OSError, ValueError, TypeError, ImageCms.PyCMSError):
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
    return image.convert("RGB")


def _orientation(info: Mapping[str | tuple[int, int], object]) -> int:
    """The EXIF orientation, 1 where there is none or the block cannot be read.

    Read here in few lines, because Pillow's reader warns of any other oddity in the block.
    """
    exif = info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    data = exif.removeprefix(b"Exif\x00\x00")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for entry in range(count):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, start + 2 + 12 * entry)
            if tag == 0x0112 and kind == 3:
                return int(value)
    except struct.error:
        pass
    return 1


def _best_window(weights: npt.NDArray[np.floating[Any]], share: float) -> float:
    """Where along an axis a window of that share holds most, as 0 (start) to 1 (end)."""
    free = len(weights) - min(len(weights), max(1, round(share * len(weights))))
    if free == 0:
        return 0.5
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    held = sums[len(weights) - free :] - sums[: free + 1]
    return float(np.argmax(held)) / free
