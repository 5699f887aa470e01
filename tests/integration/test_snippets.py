"""What README and `docs/requests.md` show works: each example, run as a stranger would, makes a video."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from tests.servers import skipped_at_home

from vidgen.client import AsyncClient
from vidgen.local import Stack

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PORTRAIT = EXAMPLES / "portrait.jpg"
FRAMES = 33  # as the examples ask for
PATIENCE_S = 240.0

pytestmark = pytest.mark.timeout(600)  # npm fetches some forty packages, once


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"), env={"VIDGEN_ENGINE": "preview"}, ephemeral=True)
    with asyncio.Runner() as runner:
        with skipped_at_home():
            runner.run(stack.start(wait_for_workers=False))
        try:
            yield stack
        finally:
            runner.run(stack.stop())


@pytest.fixture(scope="module")
def node_folder(request: pytest.FixtureRequest) -> Path:
    """A folder, kept between runs, that holds the Node example beside the packages that it names."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        _missing("node and npm are not installed")
    wanted = (EXAMPLES / "package.json").read_bytes()
    folder = request.config.cache.mkdir(f"node-{hashlib.sha256(wanted).hexdigest()[:12]}")
    installed = folder / "installed"
    if not installed.exists():
        (folder / "package.json").write_bytes(wanted)
        command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            _missing(f"npm could not install the packages of the example: {done.stderr[-1000:]}")
        installed.touch()
    shutil.copy(EXAMPLES / "publish.mjs", folder)
    return folder


def _missing(why: str) -> None:
    """Skip at home, fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


async def run(stack: Stack, *command: str, folder: Path = ROOT) -> list[str]:
    """Run an example against the stack; the lines that it printed."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env={**os.environ, **stack.environment()}, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return out.decode().splitlines()


async def check(stack: Stack, lines: list[str], made: Path) -> None:
    """The example told of its job from start to end, and wrote the very video that the job made."""
    job_id = lines[0].removeprefix("job ")
    assert re.fullmatch(r"[0-9a-f-]{36}", job_id)
    assert [line.split()[0] for line in lines[1:]] == [
        "accepted", "stage_started", "stage_completed", "stage_started", "stage_completed", "completed",
    ]  # fmt: skip
    async with AsyncClient(stack.gateway_url) as client:
        job = await client.get(job_id)
    (stored,) = [artifact for artifact in job.artifacts if artifact.name == "video.mp4"]
    assert hashlib.sha256(made.read_bytes()).hexdigest() == stored.sha256
    assert frames_of(made) == FRAMES


def frames_of(made: Path) -> int:
    with av.open(made) as video:
        return sum(1 for _ in video.decode(video=0))


async def test_the_python_example_makes_a_video(stack: Stack, tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"

    lines = await run(stack, sys.executable, str(EXAMPLES / "publish.py"), str(PORTRAIT), str(video))

    await check(stack, lines, video)


async def test_the_node_example_makes_a_video(stack: Stack, node_folder: Path, tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"

    lines = await run(stack, "node", str(node_folder / "publish.mjs"), str(PORTRAIT), str(video))

    await check(stack, lines, video)


async def test_the_readmes_client_makes_a_video(stack: Stack, tmp_path: Path) -> None:
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Python")[1].split("```")[1]
    (tmp_path / "examples").symlink_to(EXAMPLES)

    lines = await run(stack, sys.executable, "-c", code.removeprefix("python"), folder=tmp_path)

    assert {line.split()[0] for line in lines} <= {"edit", "i2v"}  # of what is soon done nothing is told
    assert frames_of(tmp_path / "video.mp4") == FRAMES
