"""The tree of commands."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vidgen.cli import access, dead, doctor, identities, jobs, options, plan, run, up, webhooks, weights, worker

app = typer.Typer(
    name="vidgen",
    help="Reference image and prompt to edited frame to video.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from vidgen import __version__

        sys.stdout.write(f"vidgen {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="VIDGEN_API_KEY",
            metavar="KEY",
            help="For a gateway that asks for one. Others on this machine see a command line: better in the variable.",
        ),
    ] = None,
) -> None:
    """Reference image and prompt to edited frame to video."""
    options.API_KEY.set(api_key)


app.command("run")(run.run)
app.command("up")(up.up)
app.command("worker")(worker.worker)
app.command("submit")(jobs.submit)
app.command("status")(jobs.status)
app.command("watch")(jobs.watch)
app.command("cancel")(jobs.cancel)
app.command("retry")(jobs.retry)
app.command("approve")(jobs.approve)
app.command("list")(jobs.list_jobs)
app.command("workers")(jobs.workers)
app.add_typer(dead.app, name="dead")
app.add_typer(access.keys_app, name="keys")
app.add_typer(access.tenants_app, name="tenants")
app.add_typer(weights.app, name="weights")
app.add_typer(identities.app, name="identities")
app.add_typer(webhooks.app, name="webhooks")
app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """The console script."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal or a pipe that knows no arrow is no failure
    app()
