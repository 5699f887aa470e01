"""`vidgen worker`: serves stages in this process, until it is told to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vidgen.cli import options, output
from vidgen.cli.output import WrongUsageError

if TYPE_CHECKING:
    from vidgen.contracts import Stage
    from vidgen.service import MakeEngine


def worker(
    stages: Annotated[
        str, typer.Option("--stages", metavar="STAGES", help="The stages to serve, such as edit,i2v or only edit.")
    ] = "edit,i2v",
    as_json: options.Json = False,
) -> None:
    """Serve one stage, or several on one GPU; where their models do not fit together they take turns."""
    with output.speaking(as_json):
        wanted = _stages(stages)
    from vidgen import native

    native.load_ahead()
    from vidgen import service  # what takes long to import comes behind that

    raise typer.Exit(service.run_stages({stage: _maker(stage) for stage in wanted}, "worker"))


def _stages(told: str) -> list[Stage]:
    """The stages that are named, each once; raises WrongUsageError."""
    from vidgen.contracts import STAGES

    names = [name.strip() for name in told.split(",")]
    found = [stage for name in dict.fromkeys(names) for stage in STAGES if stage == name]
    if len(found) != len(names):
        known = ", ".join(STAGES)
        raise WrongUsageError([options.wrong("--stages", f"{told!r} is not a list of stages: name {known}, each once")])
    return found


def _maker(stage: Stage) -> MakeEngine:
    # Inside the command: the core knows of no service.
    import importlib

    make: MakeEngine = importlib.import_module(f"{stage}_service.main").make_engine
    return make
