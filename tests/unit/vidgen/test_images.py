"""What a reference image may be, and what becomes of it."""

from __future__ import annotations

import errno
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageSequence, PngImagePlugin
from tests import photographs

from vidgen import errors, images


def stripes(width: int = 48, height: int = 32) -> Image.Image:
    """Red on the left, blue on the right, so that every turn shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (220, 20, 20)
    pixels[:, width // 2 :] = (20, 20, 220)
    return Image.fromarray(pixels)


def code_of(path: Path) -> str:
    with pytest.raises(errors.RejectedError) as caught:
        images.inspect(path)
    with pytest.raises(errors.RejectedError) as again:
        images.normalise(path, path.with_suffix(".out"))
    assert again.value.code == caught.value.code
    assert not path.with_suffix(".out").exists()
    assert ": " in caught.value.message  # what is wrong, and after the colon what to do
    return caught.value.code


def normalised(path: Path) -> Image.Image:
    target = path.with_name("normal.png")
    facts = images.normalise(path, target)
    assert images.inspect(target) == facts
    assert facts.normal
    with Image.open(target) as image:
        image.load()
        assert (image.mode, image.size) == ("RGB", (facts.width, facts.height))
        assert not image.info
        return image.copy()


def huge_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_plain_picture_is_normal_as_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture"
    stripes().save(path, format=kind)
    assert images.inspect(path) == images.ImageFacts(48, 32, kind, normal=True)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    assert code_of(path) == "empty_file"


@pytest.mark.parametrize(
    "content", [b"%PDF-1.7 not an image at all", b"BM" + bytes(40), b"\xff", b"<svg/>", b"GIF89a" + bytes(40)]
)
def test_what_is_not_an_image_of_a_known_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.png"
    path.write_bytes(content)
    assert code_of(path) == "not_an_image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_found_wherever_it_ends(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, format=kind)
    path = tmp_path / "cut"
    path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
    assert code_of(path) == "truncated_image"


def test_a_broken_checksum_is_found(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    content = bytearray(huge_png(100, 100))
    content[20] ^= 0xFF
    path.write_bytes(content)
    assert code_of(path) == "truncated_image"


@pytest.mark.parametrize(("width", "height"), [(10_000, 5_001), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    # Its pixels are not even in the file: reading them would end in truncated_image.
    path = tmp_path / "bomb.png"
    path.write_bytes(huge_png(width, height))
    assert code_of(path) == "too_many_pixels"


def test_as_many_pixels_as_allowed_come_as_far_as_the_decoder(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(huge_png(10_000, 5_000))
    with pytest.raises(errors.RejectedError) as caught:
        images.inspect(path)
    assert caught.value.code == "truncated_image"


def test_a_chunk_that_claims_to_be_huge_is_not_given_the_memory(tmp_path: Path) -> None:
    # Fuzzing found it: Pillow reads the rest of a chunk at once, and a read of 2 GB asked for 2 GB first.
    whole = tmp_path / "whole.png"
    Image.effect_noise((24, 24), 80).convert("RGB").save(whole)
    start = whole.read_bytes().index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(whole.read_bytes()[:start] + b"\x7f\xff\xff\xffIDAT" + bytes(64))

    tracemalloc.start()
    try:
        assert code_of(tmp_path / "a.png") == "truncated_image"
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_progressive_jpeg_with_endless_scans_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scans.jpg"
    stripes().save(path, format="JPEG", progressive=True)
    assert images.inspect(path).normal
    path.write_bytes(path.read_bytes() + b"\xff\xda" * (images.MAX_SCANS + 1))
    assert code_of(path) == "image_too_complex"


def test_a_tiny_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.png"
    stripes(64, 15).save(path)
    assert code_of(path) == "image_too_small"


def test_a_thread_of_an_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "thread.png"
    stripes(16 * 100 + 1, 16).save(path)
    assert code_of(path) == "image_too_narrow"
    stripes(16 * 100, 16).save(path)
    assert images.inspect(path).normal


@pytest.mark.parametrize("fault", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_what_the_machine_lacks_is_not_the_images_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    path = tmp_path / "good.png"
    stripes().save(path)

    def load(image: Image.Image) -> None:
        raise fault

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    for read in (images.inspect, images.open_rgb):
        with pytest.raises(type(fault)):
            read(path)


def test_a_missing_file_is_not_the_images_fault(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        images.inspect(tmp_path / "gone.png")


def test_cmyk_becomes_rgb_of_the_same_colours(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    stripes().convert("CMYK").save(path, quality=95)
    assert not images.inspect(path).normal
    picture = normalised(path)
    assert np.allclose(picture.getpixel((6, 16)), (220, 20, 20), atol=12)
    assert np.allclose(picture.getpixel((42, 16)), (20, 20, 220), atol=12)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (32, 1))
    Image.fromarray(ramp).save(path)
    assert not images.inspect(path).normal
    row = np.asarray(normalised(path))[10, :, 0].astype(int)
    assert np.abs(row - np.arange(256)).max() <= 1


def test_16_bit_colour_is_made_8_bit(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    row = b"\x00" + struct.pack(">HHH", 0xFFFF, 0x8000, 0x0000) * 32
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(row * 32)), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    path.write_bytes(b"".join(parts))
    assert not images.inspect(path).normal
    assert normalised(path).getpixel((5, 5)) == (255, 128, 0)


def test_a_palette_becomes_rgb(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    stripes().quantize(4).save(path)
    assert not images.inspect(path).normal
    assert normalised(path).getpixel((6, 16)) == (220, 20, 20)


def test_a_transparent_palette_shows_white(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    stripes().quantize(2).save(path, transparency=bytes([0, 0]))
    assert normalised(path).getpixel((6, 16)) == (255, 255, 255)


def test_grey_becomes_rgb(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.new("L", (32, 32), 77).save(path)
    assert normalised(path).getpixel((5, 5)) == (77, 77, 77)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF"])
def test_alpha_is_laid_on_white(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "alpha"
    picture = stripes().convert("RGBA")
    picture.putalpha(Image.new("L", picture.size, 0))
    picture.save(path, format=kind)
    assert not images.inspect(path).normal
    assert normalised(path).getpixel((6, 16)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_turned_photo_stands_upright(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "turned.jpg"
    upright = stripes()
    back = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    stored = upright.transpose(images.TURNS[back]) if back in images.TURNS else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, quality=95, exif=exif)
    facts = images.inspect(path)
    assert (facts.width, facts.height, facts.normal) == (48, 32, False)
    picture = normalised(path)
    assert np.allclose(picture.getpixel((6, 16)), (220, 20, 20), atol=8)
    assert np.allclose(picture.getpixel((42, 16)), (20, 20, 220), atol=8)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0" + b"II*\0\x08\0\0\0\xff\xff"]
)
def test_a_broken_exif_block_does_no_harm(tmp_path: Path, exif: bytes) -> None:
    path = tmp_path / "photo.jpg"
    stripes().save(path, exif=exif)
    assert normalised(path).size == (48, 32)


def test_the_place_of_a_photo_does_not_travel_on(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    stripes().save(path, exif=exif, comment=b"at home")
    assert not images.inspect(path).normal
    normalised(path)
    assert b"at home" not in path.with_name("normal.png").read_bytes()


def test_a_colour_profile_is_applied_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "profile.png"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    stripes().save(path, icc_profile=profile)
    assert not images.inspect(path).normal
    assert np.allclose(normalised(path).getpixel((6, 16)), (220, 20, 20), atol=2)


def test_a_broken_colour_profile_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "profile.png"
    stripes().save(path, icc_profile=b"no profile")
    assert normalised(path).getpixel((6, 16)) == (220, 20, 20)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_used(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "moving"
    frames = [stripes(), Image.new("RGB", (48, 32), (0, 255, 0)), stripes().rotate(180)]
    frames[0].save(path, format=kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    with Image.open(path) as image:
        assert len(list(ImageSequence.Iterator(image))) == 3
    assert not images.inspect(path).normal
    assert normalised(path).getpixel((6, 16)) == (220, 20, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_photo_is_scaled_down_and_keeps_its_shape(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "large"
    stripes(3000, 2000).save(path, format=kind)
    facts = images.inspect(path)
    assert (facts.width, facts.height, facts.normal) == (3000, 2000, False)
    picture = normalised(path)
    assert picture.width * picture.height <= images.MAX_PIXELS_KEPT
    assert picture.width * picture.height > 0.99 * images.MAX_PIXELS_KEPT
    assert picture.width / picture.height == pytest.approx(1.5, abs=0.002)
    assert np.allclose(picture.getpixel((100, 100)), (220, 20, 20), atol=8)


def test_an_image_read_for_an_engine_carries_nothing_but_pixels(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    images.write_png(stripes(), path, {"prompt": "secret"})
    image = images.open_rgb(path)
    assert (image.mode, image.info) == ("RGB", {})


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (100, 20), (33, 77)])
def test_fit_covers_exactly_the_size(size: tuple[int, int]) -> None:
    assert images.fit(stripes(), *size).size == size


def test_fit_takes_the_whole_of_an_image_whose_crop_is_rounded_up() -> None:
    # 498 rows came out as a crop of 498.00000000000006, which Pillow refuses; the video of a 1344x768 edit failed.
    assert images.fit(Image.new("RGB", (864, 498)), 832, 480).size == (832, 480)


def test_fit_crops_around_the_middle_and_does_not_stretch() -> None:
    square = images.fit(stripes(64, 32), 32, 32)
    assert square.getpixel((2, 16)) == (220, 20, 20)
    assert square.getpixel((29, 16)) == (20, 20, 220)
    assert images.fit(stripes(64, 32), 32, 32, (0.0, 0.5)).getpixel((29, 16)) == (220, 20, 20)


def test_the_crop_follows_the_subject() -> None:
    pixels = np.full((300, 100, 3), 128, np.uint8)
    pixels[20:60, 30:70] = np.random.default_rng(1).integers(0, 255, (40, 40, 3), np.uint8)
    picture = Image.fromarray(pixels)
    assert images.subject_centre(picture, 100, 100)[1] < 0.2
    assert images.subject_centre(picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 100, 100)[1] > 0.8


def test_a_picture_is_written_with_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    images.write_png(np.asarray(stripes()), path, {"engine": "preview", "seed": "7"})
    with Image.open(path) as image:
        assert image.info == images.read_text(path) == {"engine": "preview", "seed": "7"}
        assert image.tobytes() == stripes().tobytes()


@pytest.mark.parametrize("size", [(128, 128), (832, 480), (1024, 1024)])
def test_a_mark_stays_in_its_strip(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (90, 90, 90))
    images.mark(picture, "preview")
    changed = np.argwhere((np.asarray(picture) != 90).any(axis=2))
    assert len(changed) > 20
    assert changed[:, 0].min() >= size[1] * (1 - images.MARK_SHARE) - 1
    assert changed[:, 1].min() >= size[0] * 0.4


@pytest.mark.parametrize("name", photographs.PLAIN)
def test_a_file_of_nothing_but_pixels_is_used_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(photographs.PLAIN[name]())

    assert images.inspect(path).normal


@pytest.mark.parametrize("name", photographs.TELLING)
def test_a_file_that_tells_more_than_its_pixels_is_encoded_anew(tmp_path: Path, name: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(photographs.TELLING[name]())

    assert not images.inspect(path).normal
    normalised(path)
    assert photographs.PLANTED not in path.with_name("normal.png").read_bytes()


@given(st.sampled_from(sorted(photographs.PLAIN)), st.binary(min_size=1, max_size=40))
def test_whatever_is_behind_the_end_of_a_file_does_not_stay(tmp_path_factory, name: str, more: bytes) -> None:
    path = tmp_path_factory.mktemp("more") / "picture"
    path.write_bytes(photographs.PLAIN[name]() + more)

    assert not images.inspect(path).normal


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "ICO", "PPM", "TGA", "JPEG2000", "PDF", "EPS"])
def test_other_kinds_of_images_are_never_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture"
    stripes().save(path, format=kind)

    assert code_of(path) == "not_an_image"
