"""MP4 files that every player opens: H.264, yuv420p, BT.709, the index in front, exactly the frames that were given."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

from vidgen import errors

# x264's AVX-512 code for its macroblock tree reads past what it wrote: with it the same frames give other bytes now and
# then. Without the tree files are 2 % larger.
EXACT = {"x264-params": "mbtree=0"}
THREADS = 4  # the same number everywhere: x264 gives other bytes for another number
CONTAINER_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})

Frame = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class VideoFacts:
    """What is in a video file; `faststart`: a player can begin before the whole file is there."""

    frames: int
    fps: float
    width: int
    height: int
    codec: str
    pix_fmt: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    faststart: bool = True


def write_mp4(
    frames: Iterable[Frame],
    path: Path,
    *,
    fps: int,
    metadata: Mapping[str, str],
    crf: int = 18,
    preset: str = "veryfast",
) -> VideoFacts:
    """Encode H×W×3 uint8 RGB frames, one after another: the same frames give the same bytes.

    Raises ValueError where there is no frame, a side is odd, or a frame differs from the first in size or type. What
    was written until then is removed.
    """
    source = iter(frames)
    first = next(source, None)
    if first is None:
        raise ValueError("a video needs at least one frame")
    height, width = _checked(first, first.shape).shape[:2]
    if width % 2 or height % 2:
        raise ValueError(f"yuv420p needs even sides, not {width} × {height}")
    count = 0
    try:
        options = {"movflags": "+faststart+use_metadata_tags"}
        with av.open(str(path), "w", format="mp4", options=options) as container:
            container.metadata.update(metadata)
            stream = _stream(
                container.add_stream("libx264", rate=fps), width, height, {"crf": str(crf), "preset": preset} | EXACT
            )
            tick = Fraction(1, fps)
            for count, pixels in enumerate(itertools.chain([first], source), start=1):
                picture = av.VideoFrame.from_ndarray(_checked(pixels, first.shape), format="rgb24")
                picture = picture.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                picture.pts = count - 1
                picture.time_base = tick
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return VideoFacts(count, float(fps), width, height, "h264", "yuv420p", dict(metadata))


def probe(path: Path) -> VideoFacts:
    """Decode a video and say what is in it; RejectedError `not_a_video` where that cannot be done."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
            context = stream.codec_context
            tags = {key: value for key, value in container.metadata.items() if key not in CONTAINER_TAGS}
            return VideoFacts(
                frames, float(stream.average_rate or 0), context.width, context.height, context.codec.name,
                context.pix_fmt or "", tags, _faststart(path),
            )  # fmt: skip
    except (av.error.FFmpegError, IndexError) as exc:
        raise errors.RejectedError(
            "the file is not a video that can be decoded: make it again", code="not_a_video"
        ) from exc


def _stream(stream: VideoStream, width: int, height: int, options: dict[str, str]) -> VideoStream:
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.thread_count = THREADS
    context.options = options
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    return stream


def _checked(pixels: Frame, shape: tuple[int, ...]) -> Frame:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a frame is H × W × 3 of uint8, not {pixels.shape} of {pixels.dtype}")
    if pixels.shape != shape:
        raise ValueError(f"every frame has the size of the first: {shape}, not {pixels.shape}")
    return cast(Frame, np.ascontiguousarray(pixels))


def _faststart(path: Path) -> bool:
    """Whether the index (`moov`) stands before the data (`mdat`)."""
    with path.open("rb") as file:
        while len(head := file.read(16)) >= 8:
            size, name = struct.unpack_from(">I4s", head)
            if name in (b"moov", b"mdat"):
                return bool(name == b"moov")
            if size == 1 and len(head) == 16:
                (size,) = struct.unpack_from(">Q", head, 8)
            if size < 8:
                return False
            file.seek(size - len(head), 1)
    return False
