"""What the options of `vidgen plan` tell: jobs, GPUs, prices, scaling. What is wrong with them goes into `found`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vidgen.cli import options

if TYPE_CHECKING:
    from vidgen.contracts import FieldError, Stage
    from vidgen.planning.arrivals import Arrival, Kind
    from vidgen.planning.gpus import Gpu
    from vidgen.planning.report import Serving
    from vidgen.planning.scaling import Scaling
    from vidgen.planning.simulation import Served

MOST_JOBS = 2_000_000
# Of a stage that an option does not name.
GPU, FLOOR, MOST, LAG, ADDED = "H200", "0", "edit=8,i2v=16", "edit=15,i2v=2", "0"


@dataclass(frozen=True)
class Coming:
    """The options about jobs, as they were typed."""

    rate: float | None
    arrivals: Path | None
    hours: float
    mix: str
    batch: float
    seed: int


@dataclass(frozen=True)
class Fleet:
    """The options about GPUs, as they were typed."""

    gpu: str
    gpus: Path | None
    seconds: str | None
    price: str | None
    floor: str
    most: str
    lag: str
    cold_start: str | None
    added: str
    polling: float
    cooldown: float
    candidates: int


def jobs_of(coming: Coming, found: list[FieldError]) -> tuple[list[Arrival], float]:
    """The jobs, and for how many seconds they come."""
    from vidgen.planning import arrivals

    if coming.arrivals is not None and coming.rate is None:
        jobs, wrong = arrivals.read(coming.arrivals)
        found += (options.wrong(f"--arrivals {one.field}", one.message) for one in wrong)
        return jobs, jobs[-1].at if jobs else 0.0
    if coming.rate is None or coming.arrivals is not None:
        found.append(options.wrong("--rate", "say how many jobs come: either --rate JOBS an hour or --arrivals FILE"))
        return [], 0.0
    before = len(found)
    for name, value in (("--rate", coming.rate), ("--hours", coming.hours)):
        _check(name, value, found)
    shares = _shares(coming.mix, found)
    if len(found) == before and coming.rate * coming.hours > MOST_JOBS:
        message = f"that is {coming.rate * coming.hours:,.0f} jobs: plan at most {MOST_JOBS:,} at a time"
        found.append(options.wrong("--hours", message))
    if len(found) > before:
        return [], 0.0
    jobs = arrivals.poisson(coming.rate, coming.hours, mix=shares, batch_share=coming.batch, seed=coming.seed)
    return jobs, coming.hours * 3600


def served(
    fleet: Fleet, needed: list[Stage], found: list[FieldError]
) -> tuple[dict[Stage, Served], dict[Stage, Serving]]:
    """How each stage that is needed is served, for the simulation and for the report."""
    from vidgen.planning import gpus

    before = len(found)
    table, wrong = gpus.table(fleet.gpus)
    found += (options.wrong(f"--gpus {one.field}", one.message) for one in wrong)
    if wrong:
        return {}, {}
    kinds = _kinds(fleet, table, needed, found)
    seconds = _seconds(fleet, kinds, table, found)
    scalings = _scalings(fleet, needed, found)
    prices = dict(_numbers("--price", fleet.price, found))
    added = dict(_numbers("--added", ADDED, found)) | dict(_numbers("--added", fleet.added, found))
    if len(found) > before:
        return {}, {}
    from vidgen.planning.report import Serving
    from vidgen.planning.simulation import Served

    return (
        {stage: Served(seconds[stage], scalings[stage], added[stage]) for stage in needed},
        {
            stage: Serving(kind, prices.get(stage, table[kind].dollars_per_hour), scalings[stage].most)
            for stage, kind in kinds.items()
        },
    )


def vary(told: str, found: list[FieldError]) -> Literal["constant", "exponential"]:
    if told == "exponential":
        return "exponential"
    if told != "constant":
        found.append(options.wrong("--vary", f"{told!r} is none of constant, exponential"))
    return "constant"


def check_plot(path: Path, found: list[FieldError]) -> None:
    from vidgen.planning.plot import FORMATS

    if path.suffix.lower() not in FORMATS:
        found.append(options.wrong("--plot", f"{path} is no picture: end its name in {' or '.join(FORMATS)}"))
    elif not path.absolute().parent.is_dir():
        found.append(options.wrong("--plot", f"there is no folder {path.parent}: make it first"))


# ── the parts ────────────────────────────────────────────────────────────────────────────────────────────────────


def _shares(mix: str, found: list[FieldError]) -> dict[Kind, float]:
    from vidgen.planning.arrivals import KINDS

    shares: dict[Kind, float] = {}
    for part in mix.split(","):
        name, _, told = part.partition("=")
        kind = next((one for one in KINDS if one == name.strip()), None)
        share = _number(told)
        if kind is None or share is None or share < 0:
            found.append(options.wrong("--mix", f"{part!r} is no share: write such as edit=0.3,i2v=0.2,both=0.5"))
        else:
            shares[kind] = share
    if shares and not sum(shares.values()) > 0:
        found.append(options.wrong("--mix", "all its shares are 0"))
    return shares


def _kinds(
    fleet: Fleet, table: Mapping[str, Gpu], needed: list[Stage], found: list[FieldError]
) -> dict[Stage, str]:  # fmt: skip
    """The GPU of each stage that is needed."""
    told = {**_per_stage("--gpu", GPU, found), **_per_stage("--gpu", fleet.gpu, found)}
    for kind in dict.fromkeys(told[stage] for stage in needed):
        if kind not in table:
            message = f"{kind!r} is not in the table: name one of {', '.join(table)}, or add it by --gpus FILE"
            found.append(options.wrong("--gpu", message))
    return {stage: told[stage] for stage in needed if told[stage] in table}


def _seconds(
    fleet: Fleet, kinds: Mapping[Stage, str], table: Mapping[str, Gpu], found: list[FieldError]
) -> dict[Stage, float]:
    given = dict(_numbers("--seconds", fleet.seconds, found, zero=False))
    values: dict[Stage, float] = {}
    for stage, kind in kinds.items():
        value = given.get(stage, table[kind].seconds(stage))
        if value is None:
            message = (
                f"how long a task of {stage} takes on a GPU of the kind {kind} was not measured: "
                f"give --seconds {stage}=S, or {stage}_s in --gpus FILE"
            )
            found.append(options.wrong("--seconds", message))
        else:
            values[stage] = value * (fleet.candidates if stage == "edit" else 1)
    return values


def _scalings(fleet: Fleet, needed: list[Stage], found: list[FieldError]) -> dict[Stage, Scaling]:
    from vidgen.planning.scaling import Scaling

    before = len(found)
    floor = _whole("--min", FLOOR, fleet.floor, found, least=0)
    most = _whole("--max", MOST, fleet.most, found, least=1)
    lag = _whole("--lag", LAG, fleet.lag, found, least=1)
    cold = dict(_numbers("--cold-start", fleet.cold_start, found))
    for name, value in (("--polling", fleet.polling), ("--cooldown", fleet.cooldown)):
        _check(name, value, found)
    if len(found) > before:
        return {}
    values: dict[Stage, Scaling] = {}
    for stage in needed:
        values[stage] = one = Scaling(
            floor=floor[stage], most=most[stage], lag_threshold=lag[stage], cold_start_s=cold.get(stage, 0.0),
            polling_s=fleet.polling, cooldown_s=fleet.cooldown,
        )  # fmt: skip
        if one.floor > one.most:
            found.append(options.wrong("--min", f"{stage} has at least {one.floor} GPUs and at most {one.most}"))
        elif not one.fixed and stage not in cold:
            message = (
                f"how long a pod of {stage} takes to start was not measured: give --cold-start {stage}=S, "
                "or a fixed number of GPUs by the same --min and --max"
            )
            found.append(options.wrong("--cold-start", message))
    return values


def _per_stage(option: str, told: str, found: list[FieldError]) -> dict[Stage, str]:
    """`3` is for both stages, `edit=1,i2v=2` for each."""
    from vidgen.contracts import STAGES

    if "=" not in told:
        return dict.fromkeys(STAGES, told.strip())
    values: dict[Stage, str] = {}
    for part in told.split(","):
        name, equals, value = part.partition("=")
        stage = next((one for one in STAGES if one == name.strip()), None)
        if stage is None or not equals:
            message = f"{part!r} is for no stage: write one value for both, or such as edit=1,i2v=2"
            found.append(options.wrong(option, message))
        else:
            values[stage] = value.strip()
    return values


def _numbers(
    option: str, told: str | None, found: list[FieldError], *, zero: bool = True
) -> Iterator[tuple[Stage, float]]:
    """The stages with their numbers, 0 among them or not."""
    if told is None:
        return
    for stage, text in _per_stage(option, told, found).items():
        number = _number(text)
        if number is None or number < 0 or (number == 0 and not zero):
            found.append(options.wrong(option, f"{text!r} is no number {'from' if zero else 'over'} 0"))
        else:
            yield stage, number


def _whole(option: str, default: str, told: str, found: list[FieldError], *, least: int) -> dict[Stage, int]:
    values = {stage: int(text) for stage, text in _per_stage(option, default, found).items()}
    for stage, number in _numbers(option, told, found):
        if number != int(number) or number < least:
            found.append(options.wrong(option, f"{number:g} is no whole number from {least}"))
        else:
            values[stage] = int(number)
    return values


def _number(told: str) -> float | None:
    try:
        number = float(told)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _check(option: str, value: float, found: list[FieldError]) -> None:
    if not 0 < value < math.inf:
        found.append(options.wrong(option, f"{value:g} is no number over 0"))
