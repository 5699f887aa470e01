"""Which light and colour a prompt asks for: words and presets become one `Look`, a sum of what each of them does."""

from __future__ import annotations

import colorsys
import functools
import re
import zlib
from dataclasses import dataclass, replace
from typing import Literal

from vidgen.contracts import EditWork

Colour = tuple[float, float, float]
Medium = Literal["photo", "watercolor", "pencil"]

NONE: Colour = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Light:
    """A coloured light that falls in from a side: degrees, 0 from the right, 90 from above."""

    colour: Colour
    strength: float
    angle: float


@dataclass(frozen=True)
class Look:
    """A grade. Zero is the photograph as it is; amounts are about 0 to 1, exposure is in stops."""

    exposure: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    warmth: float = 0.0
    tint: float = 0.0
    mono: float = 0.0
    fade: float = 0.0
    shadows: Colour = NONE
    highlights: Colour = NONE
    lights: tuple[Light, ...] = ()
    ambient: float = 0.0
    haze: float = 0.0
    haze_colour: Colour = (0.86, 0.89, 0.92)
    bloom: float = 0.0
    vignette: float = 0.0
    grain: float = 0.0
    snow: float = 0.0
    rain: float = 0.0
    stars: float = 0.0
    medium: Medium = "photo"

    def __add__(self, other: Look) -> Look:
        """Both looks at once: amounts add up, of colours and media the later one wins."""
        summed = (
            "exposure", "contrast", "saturation", "warmth", "tint", "mono", "fade", "ambient", "haze", "bloom",
            "vignette", "grain", "snow", "rain", "stars",
        )  # fmt: skip
        values = {name: getattr(self, name) + getattr(other, name) for name in summed}
        return Look(
            **values,
            shadows=_add(self.shadows, other.shadows),
            highlights=_add(self.highlights, other.highlights),
            lights=self.lights + other.lights,
            haze_colour=other.haze_colour if other.haze else self.haze_colour,
            medium=other.medium if other.medium != "photo" else self.medium,
        )


def _add(one: Colour, other: Colour) -> Colour:
    return (one[0] + other[0], one[1] + other[1], one[2] + other[2])


def _toned(hue: float, amount: float) -> Look:
    """A split tone: shadows and highlights lean towards a hue (0 to 1)."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, 1.0, 1.0)
    grey = (red + green + blue) / 3
    lean = ((red - grey) * amount, (green - grey) * amount, (blue - grey) * amount)
    return Look(shadows=lean, highlights=(lean[0] * 0.7, lean[1] * 0.7, lean[2] * 0.7), saturation=0.05)


PLAIN = Look(contrast=0.1, vignette=0.14, grain=0.006)

WARM_SUN = Light((1.0, 0.55, 0.22), 0.7, 155)
LOOKS: dict[str, Look] = {
    "cinematic": Look(
        contrast=0.3, saturation=-0.05, shadows=(-0.11, 0.01, 0.095), highlights=(0.07, 0.005, -0.08), fade=0.03,
        vignette=0.32, bloom=0.2, grain=0.005, exposure=-0.2, ambient=-0.06,
        lights=(Light((1.0, 0.75, 0.45), 0.3, 160),),
    ),
    "film-noir": Look(
        mono=1.0, contrast=0.8, exposure=-0.3, vignette=0.5, grain=0.016, bloom=0.12, ambient=-0.38,
        lights=(Light((1.0, 1.0, 1.0), 0.75, 140),),
    ),
    "golden-hour": Look(
        warmth=0.26, exposure=-0.22, contrast=0.3, saturation=0.1, tint=0.05, shadows=(0.035, -0.012, 0.0),
        highlights=(0.05, 0.005, -0.05), lights=(WARM_SUN,), ambient=-0.2, bloom=0.35, vignette=0.15, haze=0.04,
        haze_colour=(1.0, 0.78, 0.48),
    ),
    "moonlight": Look(
        warmth=-0.5, exposure=-1.25, contrast=0.3, saturation=-0.5, shadows=(-0.02, 0.0, 0.07),
        highlights=(-0.02, 0.015, 0.04), lights=(Light((0.6, 0.75, 1.0), 0.85, 60),), ambient=-0.25, bloom=0.25,
        vignette=0.35, grain=0.006,
    ),
    "neon": Look(
        exposure=-0.95, contrast=0.35, saturation=0.1, warmth=-0.15, shadows=(0.03, -0.035, 0.07),
        lights=(Light((1.0, 0.1, 0.62), 1.25, 180), Light((0.05, 0.75, 1.0), 1.15, 0)), ambient=-0.25, bloom=0.55,
        vignette=0.3, grain=0.004,
    ),
    "pencil": Look(medium="pencil", mono=1.0, vignette=-0.14, grain=-0.006),
    "sepia": Look(
        mono=1.0, contrast=0.05, fade=0.09, shadows=(0.07, 0.02, -0.04), highlights=(0.05, 0.0, -0.11), vignette=0.3,
        grain=0.012, bloom=0.1,
    ),
    "vivid": Look(saturation=0.42, contrast=0.35, exposure=0.08, bloom=0.06),
    "watercolor": Look(
        medium="watercolor", saturation=0.22, exposure=0.2, contrast=-0.05, vignette=-0.14, grain=-0.006
    ),
    "studio": Look(
        contrast=0.22, saturation=0.04, vignette=0.45, lights=(Light((1.0, 0.98, 0.95), 0.6, 130),),
        ambient=-0.2,
    ),
    "beach": Look(
        warmth=0.14, exposure=0.12, saturation=0.25, shadows=(-0.08, 0.03, 0.06), highlights=(0.04, 0.01, -0.05),
        bloom=0.25, lights=(Light((1.0, 0.9, 0.68), 0.45, 75),), ambient=-0.08, vignette=-0.1,
    ),
    "city": Look(
        warmth=-0.2, contrast=0.35, saturation=-0.08, exposure=-0.45, shadows=(-0.07, 0.0, 0.08), vignette=0.25,
        highlights=(0.05, 0.0, -0.05), lights=(Light((1.0, 0.6, 0.25), 0.75, 10), Light((0.3, 0.6, 1.0), 0.65, 175)),
        ambient=-0.16, bloom=0.35,
    ),
    "forest": Look(
        tint=-0.22, warmth=0.06, exposure=-0.2, contrast=0.15, shadows=(-0.025, 0.035, -0.015),
        highlights=(0.02, 0.035, -0.04), lights=(Light((0.95, 1.0, 0.6), 0.55, 65),), ambient=-0.12, bloom=0.3,
        haze=0.08, haze_colour=(0.82, 0.93, 0.68), vignette=0.2,
    ),
    "mountains": Look(
        warmth=-0.4, contrast=0.35, saturation=0.08, shadows=(-0.05, 0.0, 0.06), highlights=(-0.02, 0.01, 0.03),
        haze=0.2, haze_colour=(0.74, 0.86, 1.0), lights=(Light((1.0, 0.97, 0.9), 0.35, 120),), vignette=0.1,
    ),
    "night-sky": Look(
        warmth=-0.42, exposure=-1.45, contrast=0.3, saturation=-0.2, shadows=(0.0, -0.01, 0.09),
        lights=(Light((0.55, 0.6, 1.0), 0.8, 90),), ambient=-0.25, stars=1.0, vignette=0.3, bloom=0.25,
    ),
    "office": Look(
        warmth=-0.16, tint=-0.12, exposure=0.12, contrast=-0.05, saturation=-0.18, fade=0.035, vignette=-0.1,
        lights=(Light((0.92, 1.0, 0.98), 0.35, 90),),
    ),
    "sunset": Look(
        warmth=0.5, tint=0.12, exposure=-0.3, contrast=0.28, saturation=0.15, shadows=(0.035, -0.02, 0.05),
        highlights=(0.07, 0.0, -0.07), lights=(Light((1.0, 0.42, 0.16), 0.95, 20),), ambient=-0.2, bloom=0.4,
        vignette=0.25, haze=0.08, haze_colour=(1.0, 0.55, 0.36),
    ),
    "warm": Look(warmth=0.38, highlights=(0.03, 0.01, -0.03)),
    "cold": Look(warmth=-0.4, shadows=(-0.02, 0.0, 0.03)),
    "night": Look(
        warmth=-0.6, exposure=-1.5, contrast=0.2, saturation=-0.35, shadows=(-0.04, 0.0, 0.1), vignette=0.35,
        lights=(Light((1.0, 0.55, 0.2), 1.1, 185), Light((0.4, 0.6, 1.0), 0.8, 50)), ambient=-0.25, bloom=0.3,
    ),
    "morning": Look(
        warmth=0.14, exposure=0.15, fade=0.05, saturation=-0.05, haze=0.16, haze_colour=(1.0, 0.92, 0.8), bloom=0.3,
        lights=(Light((1.0, 0.85, 0.6), 0.5, 165),),
    ),
    "day": Look(exposure=0.2, contrast=0.12, saturation=0.12, lights=(Light((1.0, 0.96, 0.88), 0.35, 80),)),
    "fog": Look(haze=0.62, contrast=-0.1, saturation=-0.25, bloom=0.2, warmth=-0.08, vignette=-0.1),
    "snow": Look(
        snow=1.0, warmth=-0.3, exposure=0.12, saturation=-0.15, haze=0.16, haze_colour=(0.9, 0.94, 1.0), bloom=0.15
    ),
    "rain": Look(
        rain=1.0, warmth=-0.26, exposure=-0.35, saturation=-0.25, contrast=0.15, haze=0.14,
        haze_colour=(0.62, 0.68, 0.74), vignette=0.2,
    ),
    "storm": Look(warmth=-0.25, exposure=-0.6, saturation=-0.3, contrast=0.4, ambient=-0.15, vignette=0.35),
    "fire": Look(
        warmth=0.5, exposure=-0.7, contrast=0.35, saturation=0.15, shadows=(0.04, -0.01, -0.03), ambient=-0.25,
        lights=(Light((1.0, 0.42, 0.1), 1.15, 265), Light((1.0, 0.6, 0.2), 0.5, 200)), bloom=0.45, vignette=0.35,
    ),
    "underwater": Look(
        warmth=-0.4, tint=-0.2, exposure=-0.35, saturation=-0.05, shadows=(-0.06, 0.02, 0.08), haze=0.25,
        haze_colour=(0.15, 0.6, 0.7), lights=(Light((0.5, 1.0, 1.0), 0.8, 90),), ambient=-0.15, bloom=0.3,
    ),
    "vintage": Look(
        fade=0.11, warmth=0.2, saturation=-0.22, contrast=-0.02, shadows=(0.0, 0.015, 0.04),
        highlights=(0.04, 0.015, -0.06), vignette=0.25, grain=0.012,
    ),
    "mono": Look(mono=1.0, contrast=0.3, grain=0.008),
    "dreamy": Look(bloom=0.65, fade=0.06, exposure=0.15, contrast=-0.1, saturation=-0.05, tint=0.08),
    "dark": Look(exposure=-0.75, contrast=0.2, vignette=0.35, ambient=-0.1),
    "bright": Look(exposure=0.4, bloom=0.12, vignette=-0.1),
    "dramatic": Look(contrast=0.45, vignette=0.3, ambient=-0.2, lights=(Light((1.0, 0.95, 0.88), 0.55, 145),)),
    "soft": Look(contrast=-0.22, fade=0.04, bloom=0.3),
    "muted": Look(saturation=-0.38, fade=0.04),
    "red": _toned(0.0, 0.27),
    "orange": _toned(0.075, 0.27),
    "yellow": _toned(0.15, 0.27),
    "green": _toned(0.36, 0.27),
    "teal": _toned(0.5, 0.27),
    "blue": _toned(0.61, 0.27),
    "purple": _toned(0.77, 0.27),
    "pink": _toned(0.91, 0.27),
}  # fmt: skip

SYNONYMS: dict[str, str] = {
    "cinematic": "cinematic|film still|movie|film look|teal and orange",
    "film-noir": "film[ -]?noir|noir",
    "golden-hour": "golden[ -]hour|golden light|golden sun(?:light)?|low sun|magic hour|golden",
    "moonlight": "moonlight|moonlit|moon|full moon",
    "neon": "neon|cyberpunk|synthwave|vaporwave|nightclub|neon signs?",
    "pencil": "pencil|sketch(?:ed)?|drawing|graphite",
    "sepia": "sepia|daguerreotype",
    "vivid": "vivid|vibrant|colou?rful|saturated|pop art",
    "watercolor": "water ?colou?r|painting|painted|painterly|aquarelle",
    "studio": "studio|softbox",
    "beach": "beach|seaside|tropical|ocean|sea",
    "city": "city|street|urban|downtown",
    "forest": "forest|woods|jungle",
    "mountains": "mountains?|alpine|glacier",
    "night-sky": "night sky|starry|stars|milky way|galaxy|outer space|space",
    "office": "office",
    "sunset": "sunset|sundown|dusk|sunrise|dawn|evening(?: light)?",
    "warm": "warm(?:er)?|cozy|cosy|autumn|candlelight",
    "cold": "cold|cool(?:er)?|icy|winter|frost(?:y)?",
    "night": "night|midnight|nocturnal",
    "morning": "morning",
    "day": "daylight|sunny|noon|midday|sunlight|sunshine|summer",
    "fog": "fog(?:gy)?|mist(?:y)?|haz[ey]|smok[ey]",
    "snow": "snowy?|snowing|snowfall|blizzard",
    "rain": "rainy?|raining|drizzle|wet",
    "storm": "storm(?:y)?|thunder|overcast|cloudy",
    "fire": "fire(?:light)?|flames?|lava|campfire|embers",
    "underwater": "underwater|deep sea|aquarium",
    "vintage": "vintage|retro|old photo(?:graph)?|polaroid|faded|analog(?:ue)?|1970s|seventies|kodachrome",
    "mono": "black[ -]and[ -]white|b&w|monochrome|gr[ae]yscale",
    "dreamy": "dreamy?|dreamlike|ethereal|glow(?:ing)?|magical",
    "dark": "dark(?:er)?|moody|gloomy|low[ -]key|shadowy",
    "bright": "bright(?:er)?|high[ -]key|airy",
    "dramatic": "dramatic|contrasty|epic",
    "soft": "soft(?:er)?|gentle",
    "muted": "muted|desaturated|pale|pastel",
    "red": "red|crimson|scarlet",
    "orange": "orange|amber|copper",
    "yellow": "yellow|gold",
    "green": "green|emerald",
    "teal": "teal|cyan|turquoise",
    "blue": "blue|azure",
    "purple": "purple|violet|lavender",
    "pink": "pink|magenta|rose",
}
NEGATIONS = r"(?:no|not|without|never|less|remove(?: the| any)?)\s+(?:any\s+)?"
DIRECTIONS = {
    "left": 170.0, "right": 10.0, "above": 90.0, "top": 90.0, "overhead": 90.0, "below": 270.0, "behind": 60.0,
}  # fmt: skip


def look_of(work: EditWork) -> Look:
    """The look that an edit asks for; a prompt without a known word gets a tone of its own from its letters."""
    prompt = (work.user_prompt or work.prompt).lower()
    names = [name for name in (work.background, work.style) if name is not None] + named_looks(prompt)
    look = PLAIN
    for name in dict.fromkeys(names):
        look += LOOKS[name]
    if not names:
        hue = (zlib.crc32(prompt.encode()) % 360) / 360
        lean = _toned(hue, 0.17)
        look += replace(lean, highlights=_toned(hue + 0.45, 0.12).highlights, contrast=0.2, vignette=0.12, bloom=0.15)
    return _from_side(look, prompt)


def named_looks(prompt: str) -> list[str]:
    """The names of the looks that a prompt asks for, in order, without those it says no to."""
    found = []
    for hit in _words().finditer(prompt.lower()):
        name = _patterns()[(hit.lastindex or 2) - 2][1]
        if hit["no"] is None and name not in found:
            found.append(name)
    return found


@functools.cache
def _patterns() -> list[tuple[str, str]]:
    """Each pattern with its look, the longest first: "night sky" is not also "night"."""
    pairs = [(pattern, look) for look, patterns in SYNONYMS.items() for pattern in patterns.split("|")]
    return sorted(pairs, key=lambda pair: -len(pair[0]))


@functools.cache
def _words() -> re.Pattern[str]:
    anyone = "|".join(f"({pattern})" for pattern, _ in _patterns())
    return re.compile(rf"(?<![\w-])(?P<no>{NEGATIONS})?(?:{anyone})(?!\w)")


def _from_side(look: Look, prompt: str) -> Look:
    """Where the prompt says from which side light comes, the first light comes from there."""
    side = re.search(r"\bfrom (?:the )?(left|right|above|top|overhead|below|behind)\b", prompt)
    if side is None:
        return look
    angle = DIRECTIONS[side[1]]
    if not look.lights:
        return replace(look, lights=(Light((1.0, 0.95, 0.88), 0.7, angle),), ambient=look.ambient - 0.15)
    return replace(look, lights=(replace(look.lights[0], angle=angle), *look.lights[1:]))
