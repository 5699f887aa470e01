"""A decoder that images can harm: the first pixel of one says how. Run as `python -m tests.poison` by a `Decoder`."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

from PIL import Image

from gateway import decoder
from vidgen import images

CRASHES, ONCE, HANGS, FILLS, ABORTS = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)
inspect = images.inspect


def poisoned(path: Path) -> images.ImageFacts:
    with Image.open(path) as image:
        pixel = image.convert("RGB").getpixel((0, 0))
    if pixel == CRASHES:
        ctypes.string_at(0)
    elif pixel == ABORTS:
        os.abort()
    elif pixel == ONCE and not (mark := path.with_suffix(".once")).exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif pixel == HANGS:
        time.sleep(1000)
    elif pixel == FILLS:
        bytearray(2 * decoder.MEMORY_BYTES)
    return inspect(path)


if __name__ == "__main__":
    images.inspect = poisoned
    decoder.main()
