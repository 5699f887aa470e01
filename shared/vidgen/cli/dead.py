"""`vidgen dead`: what was given up, and what to do with it."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated

import typer

from vidgen.cli import options
from vidgen.cli.jobs import ask, say_more
from vidgen.cli.output import Output

if TYPE_CHECKING:
    from vidgen.client import AsyncClient, DeadEntry

app = typer.Typer(no_args_is_help=True, help="The dead letters: what was given up, with its original payload.")

Seq = Annotated[int, typer.Argument(min=1, metavar="NUMBER", help="The number that `dead list` shows.")]


@app.command("list")
def list_letters(
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Letters on the page.")] = 20,
    gateway: options.Gateway = None,
    as_json: options.Json = False,
) -> None:
    """List the dead letters."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        page = await client.dead_list(cursor=cursor, limit=limit)
        for letter in page.dead:
            out_put.emit_model("dead_letter", letter)
        rows = [
            (str(one.seq), one.stage or _kind(one), one.job_id or "", one.error.code, one.error.message)
            for one in page.dead
        ]
        if not rows:
            out_put.note("no dead letters")
            return
        out_put.table(("number", "stage", "job", "code", "why"), rows)
        say_more(out_put, page.next_cursor)

    ask(gateway, as_json, act)


def _kind(letter: DeadEntry) -> str:
    from vidgen import topology

    return "webhook" if topology.is_of_webhook(letter.subject, letter.job_id or "") else "request"


@app.command("show")
def show(seq: Seq, gateway: options.Gateway = None, as_json: options.Json = False) -> None:
    """Show one, with its payload."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        letter = await client.dead_show(seq)
        out_put.emit_model("dead_letter", letter)
        out_put.say(f"{letter.seq}  {letter.subject}  {letter.at.isoformat()}")
        if letter.job_id:
            out_put.say(f"  job {letter.job_id}" + (f", stage {letter.stage}" if letter.stage else ""))
        out_put.say(f"  {letter.error.code}: {letter.error.message}")
        for wrong in letter.error.fields:
            out_put.say(f"  {wrong.field}: {wrong.message}")
        out_put.say(base64.b64decode(letter.payload).decode(errors="backslashreplace"))

    ask(gateway, as_json, act)


@app.command("replay")
def replay(seq: Seq, gateway: options.Gateway = None, as_json: options.Json = False) -> None:
    """Send its payload again, and print the job."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        job = await client.dead_replay(seq)
        out_put.emit_model("job", job)
        out_put.say(f"{job.id}  {job.status}")

    ask(gateway, as_json, act)


@app.command("drop")
def drop(seq: Seq, gateway: options.Gateway = None, as_json: options.Json = False) -> None:
    """Delete it."""

    async def act(out_put: Output, client: AsyncClient) -> None:
        await client.dead_drop(seq)
        out_put.emit("dropped", {"seq": seq})
        out_put.say(f"{seq} dropped")

    ask(gateway, as_json, act)
