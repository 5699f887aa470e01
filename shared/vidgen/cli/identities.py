"""`vidgen identities`: who may come to the bus and the store, with the keys of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidgen.cli import options
from vidgen.cli.options import wrong
from vidgen.cli.output import Output, WrongUsageError, speaking

if TYPE_CHECKING:
    from vidgen.identities import Identities

app = typer.Typer(no_args_is_help=True, help="Identities for the bus and the store: make them, and change their keys.")

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where they are kept; only its owner can look into it.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="gateway, worker.acme, publisher.acme, admin, …")]
RELOAD = "have nats-server read users.conf anew (SIGHUP), and start the S3 server again"


@app.command("init")
def init(
    folder: Folder,
    tenant: Annotated[list[str] | None, typer.Option("--tenant", help="With a publisher for this tenant.")] = None,
    bucket: Annotated[
        str | None, typer.Option(help="The bucket that all keys of the store are good for. [that of before, or vidgen]")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Make an identity for each service, and what nats-server and SeaweedFS read. Again: what is missing."""

    def act(out_put: Output, identities: Identities) -> None:
        added = identities.complete()
        there = {one.name for one in identities}
        for name in (f"publisher.{one}" for one in tenant or ()):
            if name not in there:
                identities.add(name)
                added.append(name)
        for name in added:
            _tell(out_put, "added", name, identities)
        out_put.say(f"users.conf and s3.json are written. If servers run: {RELOAD}")

    with speaking(as_json) as out_put:
        from vidgen.identities import Identities

        _check_folder(folder)
        act(out_put, Identities(folder, _checked(bucket)))


@app.command("add")
def add(folder: Folder, name: Name, as_json: options.Json = False) -> None:
    """Add one: a second one of a role, a tenant's publisher, or an admin, who may do everything."""

    def act(out_put: Output, identities: Identities) -> None:
        from vidgen import errors

        try:
            identities.add(name)
        except errors.RejectedError as exc:
            raise WrongUsageError([wrong("NAME", exc.message)]) from None
        _tell(out_put, "added", name, identities)
        out_put.say(RELOAD)

    _act(folder, as_json, act)


@app.command("rotate")
def rotate(folder: Folder, name: Name, as_json: options.Json = False) -> None:
    """Give one new keys; the old ones are good until `retire`."""

    def act(out_put: Output, identities: Identities) -> None:
        identities.rotate(name)
        _tell(out_put, "rotated", name, identities)
        out_put.say(f"{RELOAD}; give the process its new variables; then `retire`")

    _act(folder, as_json, act)


@app.command("retire")
def retire(folder: Folder, name: Name, as_json: options.Json = False) -> None:
    """Forget all keys of one but the newest."""

    def act(out_put: Output, identities: Identities) -> None:
        count = identities.retire(name)
        out_put.emit("retired", {"name": name, "keys": count})
        out_put.say(f"{name}: {count} forgotten; {RELOAD}")

    _act(folder, as_json, act)


@app.command("remove")
def remove(folder: Folder, name: Name, as_json: options.Json = False) -> None:
    """Shut one out."""

    def act(out_put: Output, identities: Identities) -> None:
        identities.remove(name)
        out_put.emit("removed", {"name": name})
        out_put.say(f"{name} removed; {RELOAD}")

    _act(folder, as_json, act)


@app.command("list")
def list_identities(folder: Folder, as_json: options.Json = False) -> None:
    """Who there is, with public keys."""

    def act(out_put: Output, identities: Identities) -> None:
        for one in identities:
            keys = [pair.access_key for pair in one.store_keys]
            out_put.emit("identity", {"name": one.name, "nkeys": one.nkeys, "access_keys": keys})
        rows = [(one.name, " ".join(one.nkeys), " ".join(k.access_key for k in one.store_keys)) for one in identities]
        out_put.table(("name", "bus", "store"), rows)

    _act(folder, as_json, act)


def _tell(out_put: Output, what: str, name: str, identities: Identities) -> None:
    path = identities.env_file(name)
    out_put.emit(what, {"name": name, "file": str(path)})
    out_put.say(f"{name}: its variables are in {path}")


def _check_folder(folder: Path) -> None:
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not place.is_dir():
        raise WrongUsageError([wrong("FOLDER", f"{place} is no folder: name another place")])


def _checked(bucket: str | None) -> str | None:
    """The bucket, where it is one: its name becomes part of the patterns of keys that the store lets through."""
    from vidgen.settings import BUCKET, NO_BUCKET

    if bucket and BUCKET.fullmatch(bucket) is None:
        raise WrongUsageError([wrong("--bucket", NO_BUCKET)])
    return bucket


def _act(folder: Path, as_json: bool, act: Callable[[Output, Identities], None]) -> None:
    with speaking(as_json) as out_put:
        from vidgen import identities

        _check_folder(folder)
        identities.require(folder)
        act(out_put, identities.Identities(folder))
