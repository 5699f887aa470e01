"""The bus's disk is full: refused at the edge with 503 and Retry-After, nothing half accepted; it goes on with room."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fault import test_bus_full
from tests.fault.ledger import Ledger
from tests.fault.system import Asked, Lab

from vidgen.local import NatsServer

SIZE = 64 << 20


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own, which only root can have."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=False, capture_output=True
    )  # fmt: skip
    if made.returncode:
        pytest.skip("nobody lets us mount a file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(os.urandom(1 << 16))
            file.flush()
    return ballast


async def campaign(lab: Lab, *, fills: int) -> str:
    with small_disk(lab.folder / "disk") as disk:
        nats = NatsServer(disk / "nats", sync_always=False)
        await nats.start()
        try:
            async with lab.system(workers=1, nats=nats) as system:
                refused = seed = 0
                for _ in range(fills):
                    ballast = fill(disk)
                    for seed in range(seed + 1, seed + 200):  # noqa: B020  what has room in open files is taken
                        answer = await test_bus_full.ask(system, seed)
                        if answer.status_code != 202:
                            break
                        job_id = answer.json()["id"]
                        system.asked[job_id] = Asked(job_id, seed, 2, ("edit",), "work")
                    assert answer.status_code == 503, answer.text
                    assert int(answer.headers["retry-after"]) > 0
                    refused += 1
                    ballast.unlink()
                    await nats.kill()  # nats-server turns JetStream off where its disk is full, until it starts again
                    await nats.start()
                    again = await test_bus_full.ask(system, seed)
                    assert again.status_code in (200, 202), again.text
                    job_id = again.json()["id"]
                    system.asked[job_id] = Asked(job_id, seed, 2, ("edit",), "work")
                ends = await Ledger(system).audit()
                assert ends.keys() == {"completed"}
                return f"filled {fills} times, {refused} refused with 503: {dict(ends)}"
        finally:
            await nats.kill()


async def test_a_full_disk_is_told_at_the_edge_and_what_was_taken_is_done(lab: Lab) -> None:
    await campaign(lab, fills=1)
