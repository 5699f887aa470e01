"""`vidgen up`: the embedded stack until Ctrl-C."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Annotated

import typer

from vidgen.cli import options, output
from vidgen.cli.output import Output, WrongUsageError

DATA = Path("vidgen-data")


def up(
    data: Annotated[
        Path, typer.Option(envvar="VIDGEN_DATA", metavar="FOLDER", help="Where everything is kept.")
    ] = DATA,
    workers: Annotated[int, typer.Option(min=1, max=16, metavar="N", help="Workers per stage.")] = 1,
    as_json: options.Json = False,
) -> None:
    """Run NATS, S3, the gateway and both stages here until Ctrl-C; a second start finds the same jobs."""
    with output.speaking(as_json) as out_put:
        if data.exists() and not data.is_dir():
            raise WrongUsageError([options.wrong("--data", f"{data} is not a folder")])
        try:
            output.run_async(lambda: _up(out_put, data, workers))
        except (KeyboardInterrupt, asyncio.CancelledError):
            out_put.emit("stopped", {})
            out_put.say("Stopped.")


async def _up(out_put: Output, data: Path, workers: int) -> None:
    from vidgen.local import Stack

    stack = Stack(data, workers=workers)
    services = "one worker for both stages" if stack.one_gpu else "edit-service and i2v-service"
    out_put.say(f"Starting nats-server, the S3 server, gateway, {services} in {data} …")
    async with stack:
        urls = {"gateway": stack.gateway_url, "nats": stack.nats.url, "s3": stack.s3_endpoint}
        out_put.emit("up", {**urls, "data": str(stack.folder), "environment": str(stack.environment_file)})
        out_put.say(f"page     {stack.gateway_url}/   (open it in a browser)")
        for name, url in urls.items():
            out_put.say(f"{name:<8} {url}")
        out_put.say(f"logs     {stack.folder / 'services'}")
        environment = shlex.quote(str(stack.environment_file))
        out_put.say(f"\nTo use it from another shell, with its credentials:  set -a; . {environment}")
        out_put.say("Ctrl-C stops everything; the data stay.")
        lost = await stack.lost()
    out_put.fail(lost.code, lost.message)
