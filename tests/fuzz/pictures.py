"""A corpus of broken images, and the reading of them in a process that may use only so much memory."""

from __future__ import annotations

import io
import random
import resource
import struct
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tests.photographs import chunk

from vidgen import errors, images

LIMIT_BYTES = (
    1536 << 20
)  # of address space: the interpreter, numpy and Pillow map a third of that before the first image
KINDS = {"PNG": {}, "JPEG": {}, "WEBP": {"lossless": True}}
HUGE = 65_000


def small(kind: str, side: int = 24, **options: object) -> bytes:
    """A valid image of a few hundred bytes, of noise, so that every byte of it means something."""
    out = io.BytesIO()
    Image.effect_noise((side, side), 80).convert("RGB").save(out, kind, **(KINDS.get(kind, {}) | options))
    return out.getvalue()


def png(width: int, height: int, *chunks: bytes, data: bytes | None = None) -> bytes:
    """A PNG that says of itself what it likes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    packed = zlib.compress(bytes(3 * width + 1) * height) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def truncations() -> Iterator[tuple[str, bytes]]:
    """Every beginning of a PNG, a JPEG, a progressive JPEG, a WebP and an animated WebP."""
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue")]
    moving = io.BytesIO()
    frames[0].save(moving, "WEBP", save_all=True, append_images=frames[1:])
    whole = {
        "png": small("PNG"), "jpeg": small("JPEG"), "progressive": small("JPEG", progressive=True),
        "webp": small("WEBP"), "lossy webp": small("WEBP", lossless=False), "moving webp": moving.getvalue(),
    }  # fmt: skip
    for name, body in whole.items():
        for length in range(len(body)):
            yield f"{name} cut at {length}", body[:length]


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that want to be large."""
    zeros = zlib.compress(bytes(200 << 20), 9)
    yield "png of huge sides", png(HUGE, HUGE, data=zeros)
    yield "png at the limit of its header", png(2**31 - 1, 2**31 - 1, data=zeros)
    yield "png of 50 million pixels and no data", png(7000, 7142, data=zlib.compress(b""))
    yield "png with more data than pixels", png(64, 64, data=zeros)
    yield "png with a text that inflates", png(64, 64, chunk(b"zTXt", b"Comment\0\0" + zeros))
    yield "png with an international text that inflates", png(64, 64, chunk(b"iTXt", b"k\0\1\0\0\0" + zeros))
    yield "png with a profile that inflates", png(64, 64, chunk(b"iCCP", b"icc\0\0" + zeros))
    yield "png with many texts", png(64, 64, *[chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20)))] * 100)
    yield "png with a chunk that says 2 GB", png(64, 64)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT" + bytes(64)
    jpeg = bytearray(small("JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", HUGE, HUGE)
    yield "jpeg of huge sides", bytes(jpeg)
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 7000, 7142)
    yield "jpeg of 50 million pixels and little data", bytes(jpeg)
    scanned = small("JPEG", progressive=True)
    scan = scanned[scanned.index(b"\xff\xda") : -2]
    yield "jpeg of a thousand scans", scanned[:-2] + scan * 1000 + b"\xff\xd9"
    webp = bytearray(small("WEBP"))
    webp[21:25] = struct.pack("<I", 0x3FFF | 0x3FFF << 14)  # VP8L: both sides 16,384
    yield "webp of huge sides", bytes(webp)
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff" * 6
    yield "extended webp of 2^24 sides", b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended
    yield "avif that is a header alone", b"\0\0\0\x20ftypavif" + bytes(4) + b"avifmif1miaf" + bytes(200)


def polyglots() -> Iterator[tuple[str, bytes]]:
    """Files that are two things at once, and things that are no image."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("evil.html", "<script>alert(1)</script>")
    script = b"<html><script>alert(1)</script></html>"
    jpeg = small("JPEG")
    yield "png and zip", small("PNG") + archive.getvalue()
    yield "jpeg and html", jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(script) + 2) + script + jpeg[2:]
    yield "jpeg and html behind it", jpeg + script
    yield "webp and zip", small("WEBP") + archive.getvalue()
    yield "gif that is javascript", b"GIF89a/*" + bytes(20) + b"*/=alert(1)//"
    yield "gif", _saved("GIF")
    for kind in ("BMP", "TIFF", "ICO", "PPM", "PDF", "TGA", "PCX", "DDS"):
        yield kind.lower(), _saved(kind)
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    yield "zip", archive.getvalue()
    yield "nothing", b""
    for name, magic in (
        ("png", b"\x89PNG\r\n\x1a\n"),
        ("jpeg", b"\xff\xd8\xff"),
        ("webp", b"RIFF\xff\xff\xff\xffWEBP"),
    ):
        yield f"{name} magic and noise", magic + random.Random(1).randbytes(2000)


def _saved(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(out, kind)
    return out.getvalue()


def mutations(chance: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Valid images with a few bits, bytes or pieces changed."""
    seeds = [
        small("PNG"), small("JPEG"), small("JPEG", progressive=True), small("WEBP"), small("WEBP", lossless=False),
        png(24, 24, chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"profile" * 20)), chunk(b"eXIf", b"MM\0*" + bytes(30))),
        _saved("AVIF"),
    ]  # fmt: skip
    for number in range(count):
        body = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 6)):
            mutate(body, chance)
        yield f"mutation {number}", bytes(body)


def mutate(body: bytearray, chance: random.Random) -> None:
    """Change a bit, a byte, a length, or take out or put in a piece."""
    at = chance.randrange(len(body)) if body else 0
    match chance.randrange(5):
        case 0 if body:
            body[at] ^= 1 << chance.randrange(8)
        case 1 if body:
            body[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        case 2:
            body[at:at] = chance.randbytes(chance.randint(1, 16))
        case 3:
            del body[at : at + chance.randint(1, 16)]
        case 4 if len(body) >= 4:
            at = min(at, len(body) - 4)
            body[at : at + 4] = struct.pack(">I", chance.choice((0, 1, 0xFFFF, 2**31 - 1, 2**32 - 1)))


def read(body: bytes, folder: Path) -> str:
    """What becomes of a file: `normal`, `normalised`, or the code with which it is rejected; anything else raises."""
    source, target = folder / "source", folder / "target.png"
    source.write_bytes(body)
    try:
        facts = images.inspect(source)
        if not facts.normal:
            images.normalise(source, target)
            facts = images.inspect(target)
            assert facts.normal, facts
        with images.open_rgb(source) as opened:
            assert opened.mode == "RGB"
            assert opened.width * opened.height <= images.MAX_PIXELS_KEPT
            assert not opened.info
    except errors.RejectedError as exc:
        assert exc.message
        return exc.code
    return "normal" if not target.exists() else "normalised"


def bound_memory() -> None:
    """From here on this process cannot have more: what wants more gets a MemoryError, which nothing turns away."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))


def main(count: int, seed: int) -> None:
    """Read the whole corpus and `count` mutations; prints how many became what."""
    found: Counter[str] = Counter()
    corpus = [*truncations(), *bombs(), *polyglots()]
    bound_memory()
    for group in (corpus, mutations(random.Random(seed), count)):
        for name, body in group:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found[read(body, Path(folder))] += 1
                except BaseException:
                    sys.stderr.write(f"{name}: {body[:200].hex()}\n")
                    raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{sum(found.values())} images, peak {peak} MB: {dict(sorted(found.items()))}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
