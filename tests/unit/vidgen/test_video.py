"""MP4 files: exactly what was asked, playable everywhere, the same bytes again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from vidgen import errors, video

TAGS = {"engine": "preview", "seed": "7", "title": "Überblendung"}


def moving(count: int, width: int = 96, height: int = 64) -> list[video.Frame]:
    frames = []
    for index in range(count):
        frame = np.full((height, width, 3), (30, 60, 90), np.uint8)
        frame[:, index * 4 : index * 4 + 20] = (220, 30, 40)
        frames.append(frame)
    return frames


@pytest.mark.parametrize(("count", "fps"), [(1, 16), (5, 24), (17, 1), (9, 60)])
def test_a_video_has_exactly_the_frames_rate_and_size_it_was_given(tmp_path: Path, count: int, fps: int) -> None:
    path = tmp_path / "video.mp4"
    written = video.write_mp4(iter(moving(count)), path, fps=fps, metadata=TAGS)
    assert written == video.VideoFacts(count, fps, 96, 64, "h264", "yuv420p", TAGS, faststart=True)
    assert video.probe(path) == written
    with av.open(str(path)) as container:
        assert container.duration == pytest.approx(count / fps * 1_000_000, abs=1000)  # MP4 counts milliseconds


def test_colours_survive_and_are_tagged_bt709(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    video.write_mp4([np.full((64, 64, 3), (220, 30, 40), np.uint8)] * 3, path, fps=16, metadata={})
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
        assert np.allclose(frame.to_ndarray(format="rgb24")[32, 32], (220, 30, 40), atol=3)


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one.mp4", tmp_path / "other.mp4"
    video.write_mp4(moving(12), one, fps=16, metadata=TAGS)
    video.write_mp4(moving(12), other, fps=16, metadata=TAGS)
    assert one.read_bytes() == other.read_bytes()


def test_frames_are_taken_one_after_another(tmp_path: Path) -> None:
    alive = 0

    def frames() -> Iterator[video.Frame]:
        nonlocal alive
        for frame in moving(5):
            alive += 1
            yield frame

    assert video.write_mp4(frames(), tmp_path / "video.mp4", fps=16, metadata={}).frames == 5
    assert alive == 5


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one frame"),
        (moving(2, 95, 64), "even sides"),
        (moving(2, 96, 63), "even sides"),
        ([*moving(2), moving(1, 64, 64)[0]], "size of the first"),
        ([np.zeros((64, 64, 4), np.uint8)], "uint8"),
        ([np.zeros((64, 64, 3), np.float32)], "uint8"),
    ],
)
def test_wrong_frames_are_refused_and_leave_no_file(tmp_path: Path, frames: list[video.Frame], message: str) -> None:
    path = tmp_path / "video.mp4"
    with pytest.raises(ValueError, match=message):
        video.write_mp4(frames, path, fps=16, metadata={})
    assert not path.exists()


def test_an_error_of_the_source_passes_through_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"

    def frames() -> Iterator[video.Frame]:
        yield from moving(3)
        raise errors.Cancelled

    with pytest.raises(errors.Cancelled):
        video.write_mp4(frames(), path, fps=16, metadata={})
    assert not path.exists()


def test_a_video_with_its_index_at_the_end_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "late.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in moving(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert not video.probe(path).faststart


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0\0\0\x18ftypisom" + bytes(12)])
def test_what_is_not_a_video_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.mp4"
    path.write_bytes(content)
    with pytest.raises(errors.RejectedError) as caught:
        video.probe(path)
    assert caught.value.code == "not_a_video"
