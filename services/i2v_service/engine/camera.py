"""How a prompt moves the camera: words become a `Move`, a move becomes where each point of the frame is looked up.

Pure numbers. Every move starts at rest on the whole picture, except those that end there (a zoom out, a pull back).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt

Grid = npt.NDArray[np.float64]  # frames × rows × columns × 2: x and y in the picture, each from -1 to 1

FOCAL = 1.9  # distance of the picture plane, in half widths: a short tele lens
RAMP = 0.4  # share of the clip within which the frame tightens to leave room for moving


@dataclass(frozen=True)
class Move:
    """How far the camera goes from the first frame to the last.

    `zoom` and `dolly` are how much smaller the visible part gets (negative: larger), a dolly with parallax; `pan` and
    `tilt` go to the right and down, in half frames; `orbit` is in degrees around the subject, to the right; `roll` in
    degrees; `shake` is a hand-held camera's unrest, 1 is a steady hand.
    """

    zoom: float = 0.0
    dolly: float = 0.0
    pan: float = 0.0
    tilt: float = 0.0
    orbit: float = 0.0
    roll: float = 0.0
    shake: float = 0.0


STILL = Move()
PUSH_IN = Move(dolly=0.14)
MOVES: tuple[tuple[str, Move], ...] = (
    (r"dolly[- ]zoom|vertigo", Move(dolly=0.3, zoom=-0.2)),
    (
        r"dolly(?:ing)? (?:out|back|away)|pull(?:s|ing)? (?:back|out|away)|(?:move|moves|moving) (?:back|away)",
        Move(dolly=-0.24),
    ),
    (r"zoom(?:s|ing)?[ -]out", Move(zoom=-0.26)),
    (r"zoom(?:s|ing)?(?:[ -]in)?|close[ -]up", Move(zoom=0.26)),
    (
        r"dolly(?:ing)?(?: in| forward)?|(?:push|track)(?:es|s|ing)?[ -]in|moves? closer|approach\w*",
        Move(dolly=0.24),
    ),
    (r"pan(?:s|ning)?(?: to the| slowly)* left|(?:slide|truck|track)s?(?: to the)? left", Move(pan=-0.2)),
    (r"pan(?:s|ning)?(?: to the| slowly)*(?: right)?|(?:slide|truck|track)s?(?: to the)? right", Move(pan=0.2)),
    (r"(?:tilt|pedestal|crane|boom|rise)\w*(?: slowly)? down|pan\w* down", Move(tilt=0.18)),
    (r"(?:tilt|pedestal|crane|boom|rise)\w*(?:(?: slowly)? up)?|pan\w* up", Move(tilt=-0.18)),
    (
        r"(?:orbit|circle|arc|rotate)\w*(?: around| slowly| the subject| to the)* left|counter-?clockwise",
        Move(orbit=-10.0, dolly=0.06),
    ),
    (r"(?:orbit|circl|arc(?!h)|rotat)\w*|clockwise|turn\w* around|360", Move(orbit=10.0, dolly=0.06)),
    (r"hand[- ]?held|shak(?:y|ing|es?)|documentary|tremble\w*", Move(shake=1.0)),
    (r"roll(?:s|ing)?|dutch", Move(roll=5.0)),
    (r"static|locked[- ]off|tripod|(?:camera )?stands still|no camera (?:motion|movement)", STILL),
)
SLOW = r"\b(?:slow|slowly|gentle|gently|subtle|subtly|slight|slightly|softly|calm|calmly)\b"
FAST = r"\b(?:fast|quick|quickly|rapid|rapidly|dramatic|dramatically|strong|strongly|sudden|suddenly)\b"


def move_of(prompt: str) -> Move:
    """The sum of the moves that a prompt names; a gentle push-in where it names none."""
    prompt = prompt.lower()
    found = [MOVES[(hit.lastindex or 1) - 1][1] for hit in _words().finditer(prompt)]
    if not found:
        return PUSH_IN
    move = functools.reduce(_together, dict.fromkeys(found))
    if move.shake and replace(move, shake=0.0) == STILL:
        move = replace(move, dolly=0.05)
    pace = (0.6 if re.search(SLOW, prompt) else 1.0) * (1.45 if re.search(FAST, prompt) else 1.0)
    return Move(
        move.zoom * pace, move.dolly * pace, move.pan * pace, move.tilt * pace, move.orbit * pace, move.roll * pace,
        move.shake,
    )  # fmt: skip


@functools.cache
def _words() -> re.Pattern[str]:
    anyone = "|".join(f"({pattern})" for pattern, _ in MOVES)
    return re.compile(rf"\b(?:{anyone})\b")


def _together(one: Move, other: Move) -> Move:
    return Move(
        one.zoom + other.zoom, one.dolly + other.dolly, one.pan + other.pan, one.tilt + other.tilt,
        one.orbit + other.orbit, one.roll + other.roll, one.shake + other.shake,
    )  # fmt: skip


def ease(time: Grid) -> Grid:
    """Smoothstep: from 0 to 1, at rest at both ends."""
    time = np.clip(time, 0, 1)
    return time * time * (3 - 2 * time)


def path(move: Move, frames: int, fps: int, depth: Grid, aspect: float, rng: np.random.Generator) -> Grid:
    """Where the vertices of each frame's grid lie in the picture, always within it.

    `depth` is rows × columns, 0 far to 1 near: near points move more when the camera itself moves.
    """
    time = np.linspace(0, 1, frames)
    rows, columns = depth.shape
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    looked_at = np.stack([
        _looked_at(move, shift, eased, x, y, depth, aspect)
        for shift, eased in zip(_unrest(move.shake, frames, fps, rng), ease(time), strict=True)
    ])  # fmt: skip
    return _kept_inside(looked_at, time)


def _looked_at(move: Move, shift: Grid, eased: float, x: Grid, y: Grid, depth: Grid, aspect: float) -> Grid:
    """One frame's vertices in the picture before they are kept inside."""
    nearness = 0.55 * (depth - 0.35)
    zoomed = _progress(move.zoom, eased)
    pushed = _progress(move.dolly, eased)
    scale = (1 - zoomed) * (1 - pushed * (1 + nearness))
    turn = np.radians(move.orbit * eased)
    roll = np.radians(move.roll * eased + shift[2])
    across, up = x * aspect, y
    across, up = across * np.cos(roll) - up * np.sin(roll), across * np.sin(roll) + up * np.cos(roll)
    across, up = across * scale, up * scale
    # An orbit: the plane turns about its middle, what is near slides against what is far.
    far = FOCAL * aspect
    away = far / (far - across * np.sin(turn))
    across, up = across * np.cos(turn) * away, up * away
    across = across + np.sin(turn) * aspect * 0.75 * nearness
    across = across + aspect * (move.pan * eased * (1 + 0.25 * nearness) + shift[0])
    up = up + move.tilt * eased * (1 + 0.25 * nearness) + shift[1]
    return np.stack([across / aspect, up], axis=-1)


def _progress(amount: float, eased: float) -> float:
    """How much tighter than the whole picture a frame is; moves away from the subject end on the whole picture."""
    return amount * eased if amount >= 0 else -amount * (1 - eased)


def _unrest(shake: float, frames: int, fps: int, rng: np.random.Generator) -> Grid:
    """A hand's slow sway and fast tremor, per frame: x, y in half frames, roll in degrees; still at the start."""
    seconds = np.arange(frames) / fps
    moved = np.zeros((frames, 3))
    for hertz, amount in ((0.35, 1.0), (0.8, 0.6), (1.7, 0.3), (3.1, 0.12)):
        speed = hertz * rng.uniform(0.8, 1.25, 3)
        phase = rng.uniform(0, 2 * np.pi, 3)
        moved += amount * np.sin(2 * np.pi * seconds[:, None] * speed + phase)
    start = ease(seconds / 0.6)[:, None]
    return cast(Grid, moved * start * shake * np.array([0.011, 0.014, 0.28]))


def _kept_inside(looked_at: Grid, time: Grid) -> Grid:
    """Tighten the frame, gradually, by just as much as keeps every vertex inside the picture."""
    extent = np.abs(looked_at).max(axis=(1, 2, 3))
    needed = np.maximum(1 - 1 / np.maximum(extent, 1e-9), 0)
    ramp = ease(time / RAMP)
    tighter = needed[1:] / np.maximum(ramp[1:], 1e-6)
    amount = min(0.6, float(tighter.max(initial=0.0)))
    held = looked_at * (1 - amount * ramp)[:, None, None, None]
    return np.asarray(np.clip(held, -1, 1), np.float64)
