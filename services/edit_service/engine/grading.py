"""A `Look` put onto a photograph: colour through a 3D table, light, weather and paper as maps over the picture.

Everything follows from the picture, the look and the generator, so the same seed gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from edit_service.engine.looks import Colour, Look

Floats = npt.NDArray[np.float32]

TABLE = 33  # points on each axis of the colour table
BYTE = np.float32(1 / 255)
PAPER = np.array([0.97, 0.96, 0.935], np.float32)
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
TO_LMS = np.array(
    [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]], np.float32
)  # Oklab: distances in it are distances to the eye
TO_LAB = np.array(
    [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]], np.float32
)  # fmt: skip
FROM_LMS, FROM_LAB = np.linalg.inv(TO_LMS), np.linalg.inv(TO_LAB)


def grade(image: Image.Image, look: Look, palette: Sequence[Image.Image], rng: np.random.Generator) -> Image.Image:
    """Give an RGB image a look; `palette` are pictures whose colours it takes on. Its geometry stays."""
    picture = _painted(image) if look.medium == "watercolor" else image
    picture = picture.filter(_colour_table(look, image, palette))
    if look.medium == "pencil":
        picture = _pencilled(picture, rng)
    pixels = np.asarray(picture).astype(np.float32)
    pixels *= BYTE
    _light(pixels, look, rng)
    if look.bloom > 0:
        _bloom(pixels, look.bloom)
    _weather(pixels, look, rng)
    if look.medium != "photo":
        _onto_paper(pixels, rng)
    elif look.grain > 0:
        pixels += _grain(pixels.shape[:2], look.grain, rng)[..., None]
    np.clip(pixels, 0, 1, out=pixels)
    pixels *= 255
    pixels += 0.5
    return Image.fromarray(pixels.astype(np.uint8))


# ── colour ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _colour_table(look: Look, image: Image.Image, palette: Sequence[Image.Image]) -> ImageFilter.Color3DLUT:
    """Everything that happens to a colour by itself, worked out for 33³ colours instead of for a million pixels."""
    axis = np.linspace(0, 1, TABLE, dtype=np.float32)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")
    colours: Floats = np.stack([red, green, blue], axis=-1).reshape(-1, 3)
    if palette:
        colours = _transfer(colours, image, palette)
    colours = _expose(colours, look)
    colours = _tone(colours, look)
    return ImageFilter.Color3DLUT(TABLE, cast("list[float]", np.ascontiguousarray(colours, np.float32)))


def _expose(colours: Floats, look: Look) -> Floats:
    """Exposure and white balance in linear light, with a shoulder where film would run out of silver."""
    linear = np.power(np.clip(colours, 0, 1), 2.2)
    warm, tint = look.warmth, look.tint
    balance = np.array([1 + 0.42 * warm + 0.1 * tint, 1 + 0.04 * warm - 0.25 * tint, 1 - 0.5 * warm + 0.1 * tint])
    balance = np.maximum(balance, 0.15)
    balance /= balance @ LUMA
    linear = linear * (balance * 2.0**look.exposure).astype(np.float32)
    knee = 0.5
    over = np.maximum(linear - knee, 0) / (1 - knee)
    white = max(0.0, float((balance * 2.0**look.exposure).max()) - knee) / (1 - knee)  # what white became
    white = max(1.0, white)
    linear = np.minimum(linear, knee) + (1 - knee) * over * (1 + over / white**2) / (1 + over)
    return cast(Floats, np.power(np.clip(linear, 0, 1), 1 / 2.2).astype(np.float32))


def _tone(colours: npt.NDArray[np.floating[Any]], look: Look) -> Floats:
    """Contrast, saturation, monochrome, split toning and lifted blacks, as the eye sees them."""
    contrast = float(np.clip(look.contrast, -0.9, 0.95))
    colours = colours - contrast / (2 * math.pi) * np.sin(2 * math.pi * colours)
    luma = (colours @ LUMA)[:, None]
    spread = colours.max(axis=1, keepdims=True) - colours.min(axis=1, keepdims=True)
    amount = max(-1.0, look.saturation)
    gained = amount * (1 - 0.6 * spread) if amount > 0 else amount  # what is vivid already gets less
    colours = luma + (colours - luma) * (1 + gained)
    if look.mono > 0:
        colours = colours + (luma - colours) * min(1.0, look.mono)
    dark, bright = np.square(1 - luma), np.square(luma)
    middle = 4 * luma * (1 - luma)
    colours = colours + np.array(look.shadows, np.float32) * (0.6 * dark + 0.7 * middle)
    colours = colours + np.array(look.highlights, np.float32) * (0.7 * bright + 0.7 * middle)
    fade = min(0.4, max(0.0, look.fade))
    return cast(Floats, np.clip(fade + colours * (1 - 1.3 * fade), 0, 1).astype(np.float32))


def _transfer(colours: Floats, image: Image.Image, palette: Sequence[Image.Image]) -> Floats:
    """Move colours so that the image's mean and spread become those of the palette's pictures."""
    own = _statistics([image])
    wanted = _statistics(palette)
    lab = _to_lab(colours)
    ratio = np.clip(wanted[1] / np.maximum(own[1], 1e-3), 0.5, 1.8)
    moved = (lab - own[0]) * ratio + wanted[0]
    share = np.array([0.45, 0.8, 0.8], np.float32)  # less of its brightness than of its colours
    return _from_lab((lab + (moved - lab) * share).astype(np.float32))


def _statistics(pictures: Sequence[Image.Image]) -> tuple[Floats, Floats]:
    thumbs = [np.asarray(picture.resize((64, 64), Image.Resampling.BOX)).reshape(-1, 3) for picture in pictures]
    lab = _to_lab(np.concatenate(thumbs).astype(np.float32) * BYTE)
    return lab.mean(axis=0), lab.std(axis=0)


def _to_lab(colours: Floats) -> Floats:
    return cast(Floats, (np.cbrt(np.power(colours, 2.2) @ TO_LMS.T) @ TO_LAB.T).astype(np.float32))


def _from_lab(lab: Floats) -> Floats:
    linear = np.power(lab @ FROM_LAB.T, 3) @ FROM_LMS.T
    return cast(Floats, np.power(np.clip(linear, 0, 1), 1 / 2.2).astype(np.float32))


# ── light ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _light(pixels: Floats, look: Look, rng: np.random.Generator) -> None:
    """Lights, ambient, haze and vignette, as one gain and one veil: worked out small, they are smooth."""
    height, width = pixels.shape[:2]
    rows, columns = max(8, height // 16), max(8, width // 16)
    aspect = width / height
    y, x = np.mgrid[1 : -1 : rows * 1j, -aspect : aspect : columns * 1j].astype(np.float32)
    gain: Floats = np.full((rows, columns, 3), 1 + max(-0.6, look.ambient), np.float32)
    veil: Floats = np.zeros((rows, columns, 3), np.float32)
    for light in look.lights:
        colour = np.array(light.colour, np.float32)
        turn = math.radians(light.angle + rng.uniform(-12, 12))
        reach = math.hypot(aspect * math.cos(turn), math.sin(turn)) * 1.25
        away = np.hypot(x - reach * math.cos(turn), y - reach * math.sin(turn))
        fall = np.exp(-np.square(away / (0.85 * (aspect + 0.4))))[..., None] * light.strength
        gain += fall * colour * 0.95
        veil += np.power(fall, 2) * colour * 0.16
    if look.haze > 0:
        cover = min(0.9, look.haze) * (0.72 + 0.4 * _clouds(rows, columns, rng) - 0.22 * np.exp(-(x**2 + y**2) / 0.5))
        cover = np.clip(cover, 0, 0.92)[..., None].astype(np.float32)
        gain *= 1 - cover
        veil += np.array(look.haze_colour, np.float32) * cover
    if look.vignette > 0:
        corner = (np.square(x / aspect) + np.square(y)) / 2
        gain *= (1 - min(0.85, look.vignette) * np.power(corner, 1.3))[..., None]
    for channel in range(3):
        pixels[..., channel] *= _enlarged(gain[..., channel], width, height)
        if veil.any():
            pixels[..., channel] += _enlarged(veil[..., channel], width, height)
    if look.lights:
        over = np.maximum(pixels - 0.82, 0)  # lamps must not burn holes
        np.minimum(pixels, 0.82, out=pixels)
        pixels += over / (1 + over / 0.18)


def _enlarged(values: Floats, width: int, height: int) -> Floats:
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))


def _clouds(rows: int, columns: int, rng: np.random.Generator) -> Floats:
    """Soft noise around 0.5, in three sizes."""
    field = np.zeros((rows, columns), np.float32)
    for size, weight in ((3, 0.5), (6, 0.3), (12, 0.2)):
        noise = Image.fromarray(rng.random((size, size), np.float32))
        field += weight * np.asarray(noise.resize((columns, rows), Image.Resampling.BICUBIC))
    return field


def _bloom(pixels: Floats, amount: float) -> None:
    """Let what is bright glow over its edges."""
    height, width = pixels.shape[:2]
    small = pixels[::4, ::4]
    luma = np.clip((small @ LUMA - 0.55) / 0.45, 0, 1)[..., None]
    bright = Image.fromarray((np.clip(small * luma, 0, 1) * 255).astype(np.uint8))
    near = np.asarray(bright.filter(ImageFilter.GaussianBlur(height / 160)), np.float32)
    far = np.asarray(bright.filter(ImageFilter.GaussianBlur(height / 45)), np.float32)
    glow = Image.fromarray(np.clip((near + far) * 0.5, 0, 255).astype(np.uint8))
    glowing = np.asarray(glow.resize((width, height), Image.Resampling.BILINEAR)).astype(np.float32)
    glowing *= min(1.0, amount) / 255
    # screen: 1 − (1 − a)(1 − b), which never clips
    glowing *= 1 - np.minimum(pixels, 1)
    pixels += glowing


# ── weather ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _weather(pixels: Floats, look: Look, rng: np.random.Generator) -> None:
    if look.stars > 0:
        _lay(pixels, _stars(pixels, rng), (0.88, 0.92, 1.0), min(1.0, look.stars))
    if look.rain > 0:
        _lay(pixels, _rain(pixels.shape[1], pixels.shape[0], rng), (0.8, 0.86, 0.92), 0.5 * min(1.0, look.rain))
    if look.snow > 0:
        _lay(pixels, _snow(pixels.shape[1], pixels.shape[0], rng), (0.97, 0.98, 1.0), 0.92 * min(1.0, look.snow))


def _lay(pixels: Floats, cover: Image.Image, colour: Colour, amount: float) -> None:
    veil = np.asarray(cover).astype(np.float32)[..., None]
    veil *= amount / 255
    pixels += (np.array(colour, np.float32) - pixels) * veil


def _snow(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Three depths of flakes: the near ones large and out of focus."""
    layer = Image.new("L", (width, height))
    for count, size, blur in ((260, 0.0018, 0.0007), (110, 0.0036, 0.0013), (26, 0.0085, 0.004)):
        flakes = Image.new("L", (width, height))
        draw = ImageDraw.Draw(flakes)
        for x, y, scale in rng.random((round(count * width / height), 3)):
            radius = height * size * (0.6 + 0.8 * scale)
            place = (x * width, y * height)
            box = (place[0] - radius, place[1] - radius, place[0] + radius, place[1] + radius)
            draw.ellipse(box, fill=round(150 + 90 * scale))
        soft = flakes.filter(ImageFilter.GaussianBlur(max(0.5, height * blur)))
        layer = Image.fromarray(np.maximum(np.asarray(layer), np.asarray(soft)))
    return layer


def _rain(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    layer = Image.new("L", (width, height))
    draw = ImageDraw.Draw(layer)
    slant = rng.uniform(-0.18, 0.18)
    for x, y, scale in rng.random((round(420 * width / height), 3)) * (1.2, 1.2, 1.0) - (0.1, 0.1, 0.0):
        length = height * (0.02 + 0.05 * scale)
        start = (x * width, y * height)
        end = (start[0] + slant * length, start[1] + length)
        draw.line((start, end), fill=round(70 + 130 * scale), width=max(1, round(height * 0.0012 * (0.6 + scale))))
    return layer.filter(ImageFilter.GaussianBlur(max(0.4, height * 0.0007)))


def _stars(pixels: Floats, rng: np.random.Generator) -> Image.Image:
    """Stars where the picture is plain and rather high up, so that they stay off the subject."""
    height, width = pixels.shape[:2]
    layer = Image.new("L", (width, height))
    draw = ImageDraw.Draw(layer)
    for x, y, scale in rng.random((round(420 * width / height), 3)):
        radius = max(0.6, height * 0.0009) * (0.7 + 1.6 * scale**8)
        box = (x * width - radius, y * height - radius, x * width + radius, y * height + radius)
        draw.ellipse(box, fill=round(90 + 165 * scale))
    luma = Image.fromarray((np.clip(pixels[::8, ::8] @ LUMA, 0, 1) * 255).astype(np.uint8))
    rough = luma.filter(ImageFilter.FIND_EDGES).filter(ImageFilter.GaussianBlur(3))
    plain = np.exp(-np.square(np.asarray(rough, np.float32) / 30))
    plain *= np.linspace(1.15, -0.35, plain.shape[0], dtype=np.float32)[:, None]
    mask = _enlarged(np.clip(plain, 0, 1).astype(np.float32), width, height)
    return Image.fromarray((np.asarray(layer.filter(ImageFilter.GaussianBlur(0.5))) * mask).astype(np.uint8))


# ── film and paper ───────────────────────────────────────────────────────────────────────────────────────────────


def _grain(shape: tuple[int, ...], amount: float, rng: np.random.Generator) -> Floats:
    """Grain a little larger than a pixel."""
    noise = rng.standard_normal(shape, np.float32)
    noise[1:] += 0.6 * noise[:-1]
    noise[:, 1:] += 0.6 * noise[:, :-1]
    noise *= amount / 1.36
    return noise


def _onto_paper(pixels: Floats, rng: np.random.Generator) -> None:
    """Rough paper under the picture, and bare paper at its ragged edge."""
    height, width = pixels.shape[:2]
    rows, columns = max(12, height // 8), max(12, width // 8)
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j].astype(np.float32)
    border = np.minimum((1 - np.abs(x)) * width, (1 - np.abs(y)) * height) / (2 * min(height, width))
    painted = np.clip((border - 0.05 * _clouds(rows, columns, rng)) / 0.022, 0, 1).astype(np.float32)
    cover = _enlarged(painted, width, height)[..., None]
    pixels -= PAPER
    pixels *= cover
    pixels += PAPER
    rough = _grain((height, width), 1.0, rng)
    coarse = Image.fromarray(rng.standard_normal((height // 3 + 1, width // 3 + 1), np.float32))
    rough += 1.3 * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels *= (1 + 0.016 * np.clip(rough, -2.5, 2.5))[..., None]


def _painted(image: Image.Image) -> Image.Image:
    """Flat washes with crisp borders (Kuwahara's filter at a smaller size), pigment gathered along the edges."""
    scale = min(1.0, 640 / max(image.size))
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
    radius = max(2, round(max(small.size) / 240))
    washes = _kuwahara(np.asarray(small).astype(np.float32) * BYTE, radius)
    grey = Image.fromarray((np.clip(washes @ LUMA, 0, 1) * 255).astype(np.uint8))
    edges = np.asarray(grey.filter(ImageFilter.GaussianBlur(1)).filter(ImageFilter.FIND_EDGES), np.float32) / 255
    washes *= (1 - 0.75 * np.clip(edges * 2.0, 0, 0.5))[..., None]
    lifted = 1 - (1 - washes) * 0.88
    painted = Image.fromarray((np.clip(lifted, 0, 1) * 255).astype(np.uint8))
    full = painted.resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(full, image, 0.3)  # a little of the drawing under the paint


def _kuwahara(pixels: Floats, radius: int) -> Floats:
    """Each pixel becomes the mean of the calmest of the four squares that it is a corner of."""
    padded = np.pad(pixels, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    luma = padded @ LUMA
    stacked = np.concatenate([padded, luma[..., None], np.square(luma)[..., None]], axis=2).astype(np.float64)
    sums = np.pad(stacked.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0), (0, 0)))
    side = radius + 1
    means = (sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]) / side**2
    spread = means[..., 4] - np.square(means[..., 3])
    height, width = pixels.shape[:2]
    best, least = np.empty_like(pixels), np.full((height, width), np.inf)
    for down in (0, radius):
        for right in (0, radius):
            square = (slice(down, down + height), slice(right, right + width))
            calmer = spread[square] < least
            least = np.where(calmer, spread[square], least)
            best[calmer] = means[square][..., :3][calmer]
    return best


def _pencilled(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lines where the picture changes, hatching where it is dark, paper where it is bright."""
    grey = image.convert("L")
    tone = np.asarray(grey).astype(np.float32) / 255
    blurred = np.asarray(grey.filter(ImageFilter.GaussianBlur(max(1.5, image.height / 130)))).astype(np.float32) / 255
    lines = np.clip((tone + 0.12) / (blurred + 0.12), 0, 1.0)
    height, width = tone.shape
    strokes = Image.fromarray(rng.standard_normal((height // 2 + 1, width // 2 + 1), np.float32))
    # Noise drawn out along a diagonal is what a hand leaves behind.
    slanted = strokes.resize((width * 2, max(8, height // 12)), Image.Resampling.BILINEAR)
    turned = slanted.resize((width * 2, height * 2), Image.Resampling.BICUBIC).rotate(38, Image.Resampling.BILINEAR)
    left, top = width // 2, height // 2
    hatching = np.asarray(turned.crop((left, top, left + width, top + height)))
    shade = np.clip(1 - blurred, 0, 1) ** 1.4
    drawn = np.power(lines, 2.2) - shade * (0.42 + 0.26 * np.clip(hatching, -1.5, 1.5))
    drawn = 0.97 - 0.9 * (1 - np.clip(drawn, 0, 1))
    graphite = np.stack([drawn, drawn * 0.995, drawn * 0.98], axis=-1)
    return Image.fromarray((np.clip(graphite, 0, 1) * 255).astype(np.uint8))
