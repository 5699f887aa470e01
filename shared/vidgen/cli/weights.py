"""`vidgen weights`: fetches a model, makes a smaller one of it, checks its files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidgen.cli import options
from vidgen.cli.options import wrong
from vidgen.cli.output import FAILED, Output, WrongUsageError, speaking

if TYPE_CHECKING:
    from vidgen.weights import OnProgress, Weights

app = typer.Typer(no_args_is_help=True, help="Models: download them, make FP8 snapshots of them, check their files.")

LINE_EVERY_S = 1.0
GIB = 1 << 30
SAYS = {"download": "downloading", "check": "checking", "quantize": "quantizing"}

Revision = Annotated[
    str | None, typer.Option("--revision", metavar="COMMIT", help="Which of a model id's commits; 40 digits.")
]


@app.command("pull")
def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's id on the hub.")],
    revision: Annotated[
        str, typer.Option("--revision", metavar="COMMIT", help="The commit that you trust: 40 hexadecimal digits.")
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="A folder of its own, instead of the hub's cache.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Download a model at a pinned commit; what broke off goes on where it did."""
    with speaking(as_json) as out_put:
        from vidgen import manifest, weights

        if manifest.COMMIT.fullmatch(revision) is None:
            message = f"{revision!r} is no commit: write the 40 hexadecimal digits of the one that you trust"
            raise WrongUsageError([wrong("--revision", message)])
        with _progress(out_put) as on_progress:
            found = weights.pull(model, revision, to=to, on_progress=on_progress)
        _tell(out_put, found)


@app.command("quantize")
def quantize(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The model: its folder, or its id once it is here.")],
    to: Annotated[Path, typer.Argument(metavar="TO", help="The new folder.")],
    revision: Revision = None,
    lora: Annotated[
        str | None, typer.Option("--lora", metavar="FILE", help="A LoRA to fuse first; for Wan 2.2 the high noise's.")
    ] = None,
    lora_2: Annotated[
        str | None, typer.Option("--lora-2", metavar="FILE", help="The LoRA of Wan 2.2's low-noise expert.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write an FP8 snapshot of a model: half the bytes to load, and nothing to quantize at the start."""
    with speaking(as_json) as out_put:
        from vidgen import errors, weights

        found = weights.require(source, revision)
        missing = weights.not_installed()
        if missing is not None:
            raise errors.FatalError(missing, code="not_installed")
        from vidgen.accel import quantize as quantizing

        given = {"transformer": lora, "transformer_2": lora_2}
        loras = {name: path for name, path in given.items() if path is not None}
        with _progress(out_put) as on_progress:
            made = quantizing.quantize(found, to, loras=loras, on_progress=on_progress)
        _tell(out_put, made)


@app.command("verify")
def verify(
    model: Annotated[str, typer.Argument(metavar="FOLDER|MODEL", help="The model: its folder, or its id.")],
    revision: Revision = None,
    as_json: options.Json = False,
) -> None:
    """Compare every file of a model with its manifest, else with what the hub told of it."""
    with speaking(as_json) as out_put:
        from vidgen import weights

        found = weights.require(model, revision, check="structure")
        with _progress(out_put) as on_progress:
            faults = weights.damage(found, on_progress)
        for fault in faults:
            out_put.emit("fault", {"path": fault.path, "what": fault.what})
            out_put.say(str(fault))
        if not faults:
            _tell(out_put, found)
            return
        out_put.emit("verified", {"ok": False, "folder": str(found.folder), "faults": len(faults)})
        out_put.note(f"vidgen: {len(faults)} files of {found.folder} are not as they should be: download it again")
        raise typer.Exit(FAILED)


def _tell(out_put: Output, found: Weights) -> None:
    out_put.emit(
        "weights",
        {
            "folder": str(found.folder), "model": found.model, "revision": found.revision, "bytes": found.bytes,
            "profile": found.profile,
        },
    )  # fmt: skip
    out_put.note(f"{found.model}, {found.bytes / GIB:.1f} GiB, {found.profile}")
    out_put.say(str(found.folder))


@contextmanager
def _progress(out_put: Output) -> Iterator[OnProgress]:
    """A bar per phase for whoever watches, else lines at most once a second."""
    if out_put.live:
        with _bars(out_put) as on_progress:
            yield on_progress
        return
    said: dict[str, float] = {}

    def line(phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if done != total and now - said.get(phase, 0.0) < LINE_EVERY_S:
            return
        said[phase] = now
        out_put.emit("progress", {"phase": phase, "bytes": done, "total": total})
        of = f" of {total / GIB:.1f}" if total else ""
        out_put.note(f"{SAYS[phase]}: {done / GIB:.1f}{of} GiB")

    yield line


@contextmanager
def _bars(out_put: Output) -> Iterator[OnProgress]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description:<11}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, TimeRemainingColumn(), console=out_put.console()) as bars:

        def move(phase: str, done: int, total: int | None) -> None:
            task = tasks.get(phase)
            if task is None:
                task = tasks[phase] = bars.add_task(SAYS[phase], total=total)
            bars.update(task, completed=done, total=total)

        yield move
