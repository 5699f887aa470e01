"""When jobs come, in which lane, for which stages: drawn at random, or read from a file."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from vidgen.contracts import LANES, STAGES, FieldError, Lane, Stage

Kind = Literal["edit", "i2v", "both"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FIELDS = ("time", "lane", "kind")
MOST_ERRORS = 20  # told of one file


@dataclass(frozen=True)
class Arrival:
    """One job, `at` seconds after the beginning."""

    at: float
    lane: Lane = "interactive"
    kind: Kind = "both"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return STAGES if self.kind == "both" else (self.kind,)


def poisson(
    per_hour: float, hours: float, *, mix: Mapping[Kind, float], batch_share: float = 0.0, seed: int = 0
) -> list[Arrival]:
    """Jobs that come independently of each other, the same with the same seed; the shares of `mix` are weights."""
    draw = np.random.default_rng([seed, 0])
    count = int(draw.poisson(per_hour * hours))
    times = np.sort(draw.uniform(0.0, hours * 3600.0, count))
    weights = np.array([mix.get(kind, 0.0) for kind in KINDS])
    kinds = draw.choice(len(KINDS), count, p=weights / weights.sum())
    batch = draw.random(count) < batch_share
    return [
        Arrival(float(at), "batch" if late else "interactive", KINDS[kind])
        for at, kind, late in zip(times, kinds, batch, strict=True)
    ]


def read(path: Path) -> tuple[list[Arrival], list[FieldError]]:
    """The jobs of a CSV file with the columns time, lane and kind, in order of time; and what is wrong in it.

    Times are seconds, or dates and times (ISO 8601, UTC where they name no zone); the earliest is the beginning.
    """
    found: list[Arrival] = []
    wrong: list[FieldError] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in FIELDS if name not in (rows.fieldnames or ())]
            if missing:
                message = f"its first line must name the columns {','.join(FIELDS)}: {', '.join(missing)} is missing"
                return [], [FieldError(field=f"{path} line 1", message=message)]
            dated: list[bool] = []
            for row in rows:
                found += _arrival(row, f"{path} line {rows.line_num}", dated, wrong)
                if len(wrong) >= MOST_ERRORS:
                    break
    except OSError as exc:
        return [], [FieldError(field=str(path), message=f"it cannot be read: {exc.strerror}")]
    except (UnicodeDecodeError, csv.Error) as exc:
        return [], [FieldError(field=str(path), message=f"it is not CSV in UTF-8: {exc}")]
    if not found and not wrong:
        wrong.append(FieldError(field=str(path), message="there is no job in it"))
    begin = min((one.at for one in found), default=0.0)
    ordered = sorted(found, key=lambda one: one.at)
    return [Arrival(one.at - begin, one.lane, one.kind) for one in ordered], wrong


def _arrival(row: Mapping[str, str | None], line: str, dated: list[bool], wrong: list[FieldError]) -> Iterator[Arrival]:
    """The job of a line; nothing where the line is wrong. `dated` is how the lines before wrote their times."""
    told = {name: (row[name] or "").strip() for name in FIELDS}
    before = len(wrong)
    at = _seconds(told["time"])
    if at is None:
        message = f"{told['time']!r} is no time: write seconds, or a date and time such as 2026-11-23T08:00:00Z"
        wrong.append(FieldError(field=f"{line}, time", message=message))
    else:
        dated.append(not _is_number(told["time"]))
        if dated[-1] != dated[0]:
            message = "seconds and dates are mixed: write all times in one way"
            wrong.append(FieldError(field=f"{line}, time", message=message))
    lane = next((one for one in LANES if one == told["lane"]), None)
    if lane is None:
        wrong.append(FieldError(field=f"{line}, lane", message=f"{told['lane']!r} is none of {', '.join(LANES)}"))
    kind = next((one for one in KINDS if one == told["kind"]), None)
    if kind is None:
        wrong.append(FieldError(field=f"{line}, kind", message=f"{told['kind']!r} is none of {', '.join(KINDS)}"))
    if len(wrong) == before and at is not None and lane is not None and kind is not None:
        yield Arrival(at, lane, kind)


def _is_number(told: str) -> bool:
    try:
        return math.isfinite(float(told))
    except ValueError:
        return False


def _seconds(told: str) -> float | None:
    if _is_number(told):
        return float(told)
    try:
        moment = datetime.fromisoformat(told)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
