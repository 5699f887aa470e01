"""`vidgen plan`: how many GPUs, what they cost, how long people wait."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vidgen.cli import options, output, scenario
from vidgen.cli.output import Output, WrongUsageError

if TYPE_CHECKING:
    from vidgen.contracts import FieldError, Stage
    from vidgen.planning.arrivals import Arrival
    from vidgen.planning.report import Report, Serving, Spread
    from vidgen.planning.simulation import Run

PER_STAGE = "edit=…,i2v=…"


def plan(
    rate: Annotated[float | None, typer.Option(metavar="JOBS", help="Jobs an hour, at random times.")] = None,
    arrivals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead of --rate: a CSV of jobs with time, lane and kind.")
    ] = None,
    hours: Annotated[float, typer.Option(metavar="H", help="With --rate: for how long jobs come.")] = 24.0,
    mix: Annotated[
        str, typer.Option(metavar="KIND=SHARE,…", help="With --rate: the shares of edit, i2v and both.")
    ] = "both=1",
    batch: Annotated[float, typer.Option(min=0, max=1, help="With --rate: the share of the batch lane.")] = 0.0,
    gpu: Annotated[str, typer.Option(metavar=PER_STAGE, help="The kind of GPU, of the table.")] = scenario.GPU,
    gpus: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A table (TOML) that adds to the one of --print-gpus.")
    ] = None,
    print_gpus: Annotated[bool, typer.Option("--print-gpus", help="Print the table that is used, and leave.")] = False,
    seconds: Annotated[
        str | None, typer.Option(metavar=PER_STAGE, help="Seconds a task has the GPU; else those of the table.")
    ] = None,
    price: Annotated[
        str | None, typer.Option(metavar=PER_STAGE, help="Dollars for an hour of the GPU; else those of the table.")
    ] = None,
    vary: Annotated[
        str, typer.Option(metavar="constant|exponential", help="How the seconds of tasks are spread.")
    ] = "constant",
    candidates: Annotated[int, typer.Option(min=1, max=4, help="Candidates an edit makes.")] = 1,
    added: Annotated[
        str, typer.Option(metavar=PER_STAGE, help="Seconds a task takes beside the GPU: fetch, encode, store.")
    ] = scenario.ADDED,
    floor: Annotated[
        str, typer.Option("--min", metavar=PER_STAGE, help="GPUs that are always there.")
    ] = scenario.FLOOR,
    most: Annotated[
        str, typer.Option("--max", metavar=PER_STAGE, help="The most GPUs; the same as --min: a fixed number.")
    ] = scenario.MOST,
    lag: Annotated[str, typer.Option(metavar=PER_STAGE, help="KEDA's lagThreshold.")] = scenario.LAG,
    cold_start: Annotated[
        str | None, typer.Option(metavar=PER_STAGE, help="Seconds from a pod's beginning to its first task.")
    ] = None,
    polling: Annotated[float, typer.Option(metavar="S", help="KEDA's pollingInterval.")] = 5.0,
    cooldown: Annotated[float, typer.Option(metavar="S", help="KEDA's cooldownPeriod.")] = 900.0,
    no_look_ahead: Annotated[
        bool, typer.Option("--no-look-ahead", help="Start no GPU for a video while its edit waits.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same plan.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the run, as .png or .svg.")] = None,
    as_json: options.Json = False,
) -> None:
    """Simulate a day of jobs: waiting and total time, GPU hours and dollars."""
    with output.speaking(as_json) as out_put:
        if print_gpus:
            _print_gpus()
            return
        _need("simpy")
        if plot is not None:
            _need("matplotlib")
        from vidgen.planning import simulation

        found: list[FieldError] = []
        jobs, horizon_s = scenario.jobs_of(scenario.Coming(rate, arrivals, hours, mix, batch, seed), found)
        fleet = scenario.Fleet(
            gpu, gpus, seconds, price, floor, most, lag, cold_start, added, polling, cooldown, candidates
        )
        served, serving = scenario.served(fleet, _needed(jobs), found)
        policy = simulation.Policy(vary=scenario.vary(vary, found), look_ahead=not no_look_ahead)
        if plot is not None:
            scenario.check_plot(plot, found)
        if found:
            raise WrongUsageError(found)
        run = simulation.simulate(jobs, served, policy, horizon_s=horizon_s, seed=seed)
        _tell(out_put, run, serving, horizon_s)
        if plot is not None:
            _draw(out_put, run, plot)


def _need(package: Literal["simpy", "matplotlib"]) -> None:
    import importlib.util

    from vidgen import errors, extras

    if importlib.util.find_spec(package) is None:
        raise errors.VidgenError(f"planning needs {package}: {extras.install('plan')}", code="not_installed")


def _print_gpus() -> None:
    from vidgen.planning import gpus

    sys.stdout.write(gpus.TABLE.read_text(encoding="utf-8"))


def _needed(jobs: list[Arrival]) -> list[Stage]:
    """The stages that any job asks for; all of them where there is no job."""
    from vidgen.contracts import STAGES

    return [stage for stage in STAGES if not jobs or any(stage in job.stages for job in jobs)]


def _tell(out_put: Output, run: Run, serving: Mapping[Stage, Serving], horizon_s: float) -> None:
    from vidgen.planning.report import report

    told = report(run, serving, horizon_s)
    out_put.emit("plan", asdict(told))
    out_put.say(f"{len(run.jobs):,} jobs in {_span(horizon_s)}; the last one was done after {_span(told.lasted_s)}\n")
    _tell_lanes(out_put, told)
    out_put.say()
    _tell_stages(out_put, told)
    for stage, one in told.stages.items():
        if one.load >= 1:
            most = serving[stage].most
            out_put.note(f"\n{stage}: the queue grows, {most} GPUs do 1 task while {one.load:.2f} come: raise --max")


def _tell_lanes(out_put: Output, told: Report) -> None:
    rows = []
    for lane, one in told.lanes.items():
        rows.append((lane, f"{one.jobs:,}", "waits", *_cells(one.waiting_s)))
        rows.append(("", "", "takes in all", *_cells(one.total_s)))
    out_put.table(("lane", "jobs", "", "mean", "p50", "p95", "p99"), rows)


def _cells(spread: Spread) -> tuple[str, ...]:
    return tuple(_span(one) for one in (spread.mean, spread.p50, spread.p95, spread.p99))


def _tell_stages(out_put: Output, told: Report) -> None:
    columns = ("stage", "GPU", "tasks", "s each", "GPU h", "at work", "most", "dollars", "per 1,000")
    rows = []
    for stage, one in told.stages.items():
        unit = "edits" if stage == "edit" else "clips"
        cost = ("no price", f"? {unit}")
        if one.dollars is not None and one.dollars_per_1000 is not None:
            cost = (f"{one.dollars:,.2f}", f"{one.dollars_per_1000:,.2f} {unit}")
        figures = (f"{one.gpu_hours:,.1f}", f"{one.utilisation:.1%}", f"{one.most_replicas}")
        rows.append((stage, one.gpu, f"{one.tasks:,}", f"{one.task_s:.2f}", *figures, *cost))
    out_put.table(columns, rows)
    if any(one.dollars is None for one in told.stages.values()):
        out_put.note("a GPU without a price: give --price, or dollars_per_hour in --gpus FILE")


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _draw(out_put: Output, run: Run, path: Path) -> None:
    from vidgen.planning import plot

    try:
        plot.draw(run, path)
    except OSError as exc:
        raise WrongUsageError([options.wrong("--plot", f"{path} cannot be written: {exc.strerror}")]) from exc
    out_put.emit("plot", {"path": str(path)})
    out_put.say(f"\n{path}")
