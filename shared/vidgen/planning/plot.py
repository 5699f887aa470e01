"""One picture of a run: the queue, the replicas, and how long jobs waited, over time."""

from __future__ import annotations

from pathlib import Path

from vidgen.contracts import LANES, Lane, Stage
from vidgen.planning.simulation import Run

FORMATS = (".png", ".svg")
OF_STAGE: dict[Stage, str] = {"edit": "#0072b2", "i2v": "#d55e00"}  # told apart by the colour-blind, too
OF_LANE: dict[Lane, str] = {"interactive": "#009e73", "batch": "#999999"}


def draw(run: Run, path: Path) -> None:
    """Write the picture, PNG or SVG by the name's ending; raises OSError."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    hours = [sample.at / 3600 for sample in run.samples]
    figure = Figure(figsize=(10, 8), layout="constrained")
    queue, replicas, waiting = figure.subplots(3, 1, sharex=True)
    for stage in run.stages:
        colour = OF_STAGE[stage]
        queue.plot(hours, [sample.waiting[stage] for sample in run.samples], color=colour, label=stage)
        there = [sample.replicas[stage] for sample in run.samples]
        replicas.step(hours, there, where="post", color=colour, label=f"{stage}, there")
        busy = [sample.busy[stage] for sample in run.samples]
        replicas.step(hours, busy, where="post", color=colour, alpha=0.4, linewidth=0.8, label=f"{stage}, at work")
    for lane in LANES:
        jobs = [job for job in run.jobs if job.arrival.lane == lane]
        if jobs:
            at, seconds = [job.arrival.at / 3600 for job in jobs], [job.waiting_s for job in jobs]
            waiting.plot(at, seconds, ".", markersize=3, color=OF_LANE[lane], label=lane, rasterized=True)
    for axes, name in ((queue, "tasks waiting"), (replicas, "GPUs"), (waiting, "seconds waited")):
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", fontsize="small")
    waiting.set_xlabel("hours; a job stands where it came")
    # The same run is the same file: an SVG has no date in it and no ids made of chance.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with mpl.rc_context({"svg.hashsalt": "vidgen"}):
        figure.savefig(path, metadata=metadata, dpi=120)
