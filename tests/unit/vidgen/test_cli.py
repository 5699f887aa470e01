"""The command line with a gateway that is made up: usage, lines, JSON, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from PIL import Image
from tests.nvml import FakeNvml
from typer.testing import CliRunner, Result

from vidgen import client, contracts, extras, profiles, webhooks, weights
from vidgen.cli import app
from vidgen.cli.doctor import Check, _engines, _profile
from vidgen.cli.output import Output
from vidgen.cli.progress import PlainView
from vidgen.cli.run import _followed
from vidgen.client import DeadEntry, DeadPage, GatewayError, JobPage, Problem, Update
from vidgen.contracts import (
    Artifact,
    EditWork,
    FieldError,
    GpuFigures,
    Job,
    JobError,
    JobStatus,
    Progress,
    StageCompleted,
    StageRecord,
    StageStarted,
    StageState,
    VideoRequest,
    WorkerInfo,
)
from vidgen.settings import WorkerSettings

AT = datetime(2026, 11, 1, tzinfo=UTC)
GATEWAY = ["--gateway", "http://gateway"]
REAL_CLIENT = client.AsyncClient
WORK = EditWork(
    prompt="x", user_prompt="x", negative_prompt=" ", steps=4, true_cfg_scale=1, guidance_scale=1, seed=5, width=64,
    height=64, candidates=1,
)  # fmt: skip


def artifact(name: str, content_type: str, **measures: int) -> Artifact:
    return Artifact(
        name=name, key=f"jobs/j1/{name}", content_type=content_type, size=1_800_000, sha256="0" * 64, width=832,
        height=480, **measures,
    )  # fmt: skip


def made_job(status: JobStatus = JobStatus.COMPLETED, *, engine: str = "preview", error: JobError | None = None) -> Job:
    return Job(
        id="j1", status=status, created_at=AT, updated_at=AT, error=error,
        stages=(StageRecord(stage="edit", state=StageState.COMPLETED, work=WORK, engine=engine, seed=5),),
        artifacts=(artifact("edit-0.png", "image/png"), artifact("video.mp4", "video/mp4", frames=81, fps=16)),
    )  # fmt: skip


STARTED = StageStarted(job_id="j1", at=AT, stage="edit", attempt=1, tries=0, worker="w1", engine="preview", model="m")
ENDED = StageCompleted(
    job_id="j1", at=AT, stage="edit", attempt=1, tries=0, worker="w1", engine="preview", model="m", seed=5, artifacts=()
)  # fmt: skip


def step(number: int, steps: int = 4) -> Progress:
    return Progress(job_id="j1", stage="edit", step=number, steps=steps, seconds_per_step=0.5, eta_s=12.0, at=AT)


class FakeClient:
    """Stands in for AsyncClient; what it answers is set by the test."""

    sent: ClassVar[list[Any]]
    updates: ClassVar[Sequence[Update]]
    answer: ClassVar[Job | Exception]

    api_keys: ClassVar[list[str | None]]

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        assert base_url == "http://gateway"
        self.api_keys.append(api_key)

    async def __aenter__(self) -> FakeClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def submit(self, request: VideoRequest, *, images: Sequence[Path] = ()) -> Job:
        self.sent.append((request, list(images)))
        return self._answer()

    async def get(self, job_id: str) -> Job:
        self.sent.append(("get", job_id))
        return self._answer()

    async def cancel(self, job_id: str) -> Job:
        self.sent.append(("cancel", job_id))
        return self._answer()

    async def approve(self, job_id: str, candidate: int) -> Job:
        self.sent.append(("approve", job_id, candidate))
        return self._answer()

    async def watch(self, job_id: str) -> AsyncIterator[Update]:
        for update in self.updates:
            yield update

    async def download(self, job_id: str, name: str, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        return path

    async def list(self, **query: Any) -> JobPage:
        self.sent.append(query)
        return JobPage(jobs=(made_job(), made_job(JobStatus.FAILED)), next_cursor="17")

    async def workers(self) -> tuple[WorkerInfo, ...]:
        return (
            WorkerInfo(
                id="w1", stage="edit", state="ready", engine="preview", model="m", device="cpu", version="0", host="h",
                started_at=AT, at=AT,
            ),
        )  # fmt: skip

    async def dead_list(self, **_: Any) -> DeadPage:
        return DeadPage(dead=(dead_letter(),))

    async def dead_show(self, seq: int) -> DeadEntry:
        assert seq == 3
        return dead_letter()

    async def dead_drop(self, seq: int) -> None:
        self.sent.append(("drop", seq))

    def _answer(self) -> Job:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def dead_letter() -> DeadEntry:
    error = JobError(code="invalid_request", message="not JSON")
    # base64 of an escape sequence that clears a screen, and a word
    return DeadEntry(seq=3, subject="vidgen.requests", error=error, payload="G1sySmhlbGxv", at=AT)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.delenv("VIDGEN_GATEWAY_URL", raising=False)
    monkeypatch.setattr(client, "AsyncClient", FakeClient)
    monkeypatch.delenv("VIDGEN_API_KEY", raising=False)
    FakeClient.api_keys = []
    FakeClient.sent, FakeClient.answer = [], made_job(JobStatus.QUEUED)
    FakeClient.updates = (STARTED, step(1), step(4), ENDED, made_job())
    return FakeClient


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (64, 48), "teal").save(path)
    return path


def vidgen(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


# ── run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_run_makes_both_stages_saves_both_files_and_names_the_preview_engines(
    photo: Path, tmp_path: Path, fake: type[FakeClient]
) -> None:
    out, frame = tmp_path / "new" / "video.mp4", tmp_path / "frame.png"
    result = vidgen("run", photo, "--edit", "a hat", "--motion", "zoom in", "-o", out, "--frame", frame, *GATEWAY)
    assert result.exit_code == 0, result.output
    assert (out.read_bytes(), frame.read_bytes()) == (b"video.mp4", b"edit-0.png")
    assert str(out) in result.stdout
    assert "81 frames at 16 fps" in result.stdout
    assert "seed   5" in result.stdout
    assert "preview engines" in result.stdout
    assert extras.install("gpu") in result.stdout


def test_run_says_nothing_of_previews_when_a_real_engine_worked(
    photo: Path, tmp_path: Path, fake: type[FakeClient]
) -> None:
    fake.updates = (made_job(engine="qwen"),)
    result = vidgen("run", photo, "--edit", "a hat", "-o", tmp_path / "a.png", *GATEWAY)
    assert result.exit_code == 0
    assert "preview" not in result.stdout


def test_run_passes_every_option_on(photo: Path, tmp_path: Path, fake: type[FakeClient]) -> None:
    options = (
        "--seed 7 --quality draft --size 640x384 --frames 33 --fps 24 --style neon --background city --viewpoint left"
    )
    arguments = ["run", photo, "--edit", "a hat", "--motion", "pan", "-o", tmp_path / "a.mp4", *options.split()]
    assert vidgen(*arguments, *GATEWAY).exit_code == 0
    request, images = fake.sent[0]
    assert images == [photo]
    assert (request.edit.seed, request.edit.quality, request.edit.width) == (7, "draft", None)
    assert (request.edit.style, request.edit.background, request.edit.viewpoint) == ("neon", "city", "left")
    assert (request.i2v.width, request.i2v.height, request.i2v.num_frames, request.i2v.fps) == (640, 384, 33, 24)
    assert (request.i2v.seed, request.i2v.quality) == (7, "draft")


def test_an_edit_alone_takes_the_size_and_writes_a_png(photo: Path, tmp_path: Path, fake: type[FakeClient]) -> None:
    assert vidgen("run", photo, "--edit", "x", "-o", tmp_path / "a.png", "--size", "256x128", *GATEWAY).exit_code == 0
    request, _ = fake.sent[0]
    assert (request.edit.width, request.edit.height, request.i2v) == (256, 128, None)
    assert (tmp_path / "a.png").read_bytes() == b"edit-0.png"


def test_a_motion_alone_may_have_no_words(photo: Path, tmp_path: Path, fake: type[FakeClient]) -> None:
    assert vidgen("run", photo, "--motion", "", "-o", tmp_path / "a.mp4", *GATEWAY).exit_code == 0
    assert fake.sent[0][0].edit is None


def test_run_in_json_prints_progress_and_files_as_lines(photo: Path, tmp_path: Path) -> None:
    result = vidgen("run", photo, "--edit", "a hat", "-o", tmp_path / "a.png", "--json", *GATEWAY)
    lines = lines_of(result)
    kinds = [line["type"] for line in lines]
    assert kinds == ["stage_started", "progress", "progress", "stage_completed", "job", "file", "note"]
    assert lines[1]["step"] == 1
    assert lines[-2] == {"type": "file", "name": "edit-0.png", "path": str(tmp_path / "a.png")}


@pytest.mark.parametrize("read", [0, 1, 3])
async def test_a_job_that_nobody_reads_of_any_more_is_cancelled(
    read: int, fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vidgen run … | head -1`: it went on, on the GPU, for a result that nobody fetched."""
    lines: list[str] = []

    def line(text: str) -> None:
        if len(lines) == read:
            raise BrokenPipeError
        lines.append(text)

    monkeypatch.setattr(Output, "_line", staticmethod(line))
    with pytest.raises(BrokenPipeError):
        await _followed(FakeClient("http://gateway"), "j1", ("edit",), PlainView(Output(False)))  # type: ignore[arg-type]
    assert fake.sent == [("cancel", "j1")]


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.REJECTED])
def test_a_job_that_does_not_complete_is_exit_code_1(
    status: JobStatus, photo: Path, tmp_path: Path, fake: type[FakeClient]
) -> None:
    fake.updates = (made_job(status, error=JobError(code="oom", message="out of memory", stage="edit")),)
    result = vidgen("run", photo, "--edit", "a hat", "-o", tmp_path / "a.png", *GATEWAY)
    assert result.exit_code == 1
    assert f"{status} in edit: out of memory" in result.stderr
    assert not (tmp_path / "a.png").exists()


def test_a_gateway_out_of_reach_is_exit_code_1(photo: Path, tmp_path: Path, fake: type[FakeClient]) -> None:
    fake.answer = GatewayError(Problem(detail="http://gateway does not answer", code="gateway_unreachable"))
    result = vidgen("run", photo, "--edit", "a hat", "-o", tmp_path / "a.png", *GATEWAY)
    assert result.exit_code == 1
    assert "http://gateway does not answer" in result.stderr


@pytest.mark.parametrize("lost", ["watch", "download"])
def test_a_gateway_that_is_lost_leaves_the_job_by_its_name(
    lost: str, photo: Path, tmp_path: Path, fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job went on there, at its price, and nobody was told which one it was."""
    away = GatewayError(Problem(detail="http://gateway does not answer", code="gateway_unreachable"))

    async def watch(self: FakeClient, job_id: str) -> AsyncIterator[Update]:
        yield step(1)
        raise away

    async def download(self: FakeClient, job_id: str, name: str, path: Path) -> Path:
        raise away

    monkeypatch.setattr(fake, lost, {"watch": watch, "download": download}[lost])
    result = vidgen("run", photo, "--edit", "a hat", "-o", tmp_path / "a.png", *GATEWAY)
    assert result.exit_code == 1
    assert f"http://gateway does not answer (job {made_job().id} is there still" in result.stderr
    assert f"vidgen watch {made_job().id}" in result.stderr


@pytest.mark.parametrize("as_json", [False, True])
async def test_a_cancel_that_does_not_reach_the_gateway_is_said(
    as_json: bool, fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the gateway was away: the job went on, and "interrupted" was all that was said."""

    async def watch(self: FakeClient, job_id: str) -> AsyncIterator[Update]:
        raise asyncio.CancelledError
        yield

    monkeypatch.setattr(fake, "watch", watch)
    fake.answer = GatewayError(Problem(detail="http://gateway does not answer", code="gateway_unreachable"))
    out_put = Output(as_json)
    with pytest.raises(asyncio.CancelledError):
        await _followed(FakeClient("http://gateway"), "j1", ("edit",), PlainView(Output(False)), out_put)  # type: ignore[arg-type]
    assert fake.sent == [("cancel", "j1")]
    told = capsys.readouterr()
    assert "vidgen cancel j1" in (told.out if as_json else told.err)


def test_no_stage_of_a_job_that_was_cancelled_is_said_to_run(fake: type[FakeClient]) -> None:
    """Its record keeps the state in which the cancel found it."""
    record = StageRecord(stage="edit", state=StageState.RUNNING, work=WORK, engine="preview")
    fake.answer = made_job(JobStatus.CANCELLED).model_copy(update={"stages": (record,)})
    assert "edit: cancelled  preview\n" in vidgen("status", "j1", *GATEWAY).stdout
    fake.answer = made_job(JobStatus.IN_PROGRESS).model_copy(update={"stages": (record,)})
    assert "edit: running  preview\n" in vidgen("status", "j1", *GATEWAY).stdout


def test_a_gateway_that_wants_a_key_is_told_by_how_a_command_is_given_one(fake: type[FakeClient]) -> None:
    fake.answer = GatewayError(Problem(status=401, detail="send an API key: Authorization: Bearer vg_…", code="no_key"))
    result = vidgen("status", "j1", *GATEWAY)
    assert result.exit_code == 1
    assert "set VIDGEN_API_KEY" in result.stderr
    assert "Bearer" not in result.stderr


def test_what_the_gateway_finds_wrong_is_exit_code_2(photo: Path, tmp_path: Path, fake: type[FakeClient]) -> None:
    errors = (FieldError(field="image.0", message="truncated: send it again"),)
    fake.answer = GatewayError(Problem(status=422, detail="invalid", code="invalid_request", errors=errors))
    result = vidgen("run", photo, "--edit", "a hat", "-o", tmp_path / "a.png", *GATEWAY)
    assert result.exit_code == 2
    assert "IMAGE (image.0): truncated: send it again" in result.stderr


@pytest.mark.parametrize(
    ("command", "detail", "field", "said"),
    [
        (("list", "--cursor", "foo"), "use the next_cursor", "cursor", "--cursor (cursor): use the next_cursor"),
        (
            ("approve", "j1", "7"),
            "choose one from 0 to 1",
            "candidate",
            "CANDIDATE (candidate): choose one from 0 to 1",
        ),
        (("status", "j1"), "webhook_url: no secret", "webhook_url", "--webhook (webhook_url): no secret"),
        (("workers",), "seq: less than 9", "seq", "NUMBER (seq): less than 9"),
        (("workers",), "request: too large", "request", "request: too large"),
    ],
)
def test_a_field_that_the_gateway_refuses_is_named_by_its_option(
    command: tuple[str, ...],
    detail: str,
    field: str,
    said: str,
    fake: type[FakeClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One field alone was not named at all, and others by the name that only the API knows."""
    fields = (FieldError(field=field, message=detail.removeprefix(f"{field}: ")),)
    fake.answer = GatewayError(Problem(status=422, detail=detail, code="invalid_request", errors=fields))

    async def refuse(self: FakeClient, **_: object) -> Any:
        return self._answer()

    monkeypatch.setattr(fake, "list", refuse)
    monkeypatch.setattr(fake, "workers", refuse)
    result = vidgen(*command, *GATEWAY)
    assert result.exit_code == 2
    assert result.stderr == f"vidgen: {said}\n"
    line = lines_of(vidgen(*command, *GATEWAY, "--json"))[0]
    assert line["message"] == f"{line['errors'][0]['field']}: {line['errors'][0]['message']}" == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{photo} -o a.mp4", "--edit PROMPT, --motion PROMPT, or both"),
        ("missing.png --motion x -o a.mp4", "IMAGE missing.png: there is no such file"),
        ("{text} --motion x -o a.mp4", "note.txt: "),
        ("{folder} --motion x -o a.mp4", "it is a folder: name a file"),
        ("/dev/null --motion x -o a.mp4", "IMAGE /dev/null: it is no file"),
        ("{photo} --motion x -o a.mp4 --frames 80", "--frames (i2v.num_frames): "),
        ("{photo} --motion x -o a.mp4 --size 832by480", "--size: '832by480' is no size"),
        ("{photo} --motion x -o a.mp4 --size 833x480", "--size (i2v.width): must be a multiple of 16"),
        ("{photo} --motion x -o a.mp4 --seed -1", "--seed (i2v.seed)"),
        ("{photo} --motion x -o a.mp4 --fps 0", "--fps (i2v.fps)"),
        ("{photo} --motion x -o a.mp4 --quality best", "--quality (i2v.quality)"),
        ("{photo} --edit x --style baroque -o a.png", "--style (edit.style)"),
        ("{photo} --edit  -o a.png", "--edit (edit.prompt)"),
        ("{photo} --motion x -o a.png", "-o: a video is written as .mp4, not .png"),
        ("{photo} --edit x -o a.mp4", "-o: an edited image is written as .png, not .mp4"),
        ("{photo} --edit x -o a.png --frame f.png", "--frame: it keeps the edited frame beside the video"),
        ("{photo} --edit x -o a.png --frames 81", "--frames: it is about a video"),
        ("{photo} --motion x -o a.mp4 --style neon", "--style: it is about an edit"),
        ("{photo} {photo} --motion x -o a.mp4", "exactly one image"),
        ("{photo} {photo} {photo} {photo} --edit x -o a.png", "IMAGE (references): at most 3 images"),
        ("{photo} --edit x -o {folder}", "is a folder: name a file"),
        ("{photo} --edit x -o {photo}/a.png", "no folder"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_names_the_field_before_anything_starts(
    arguments: str, said: str, photo: Path, tmp_path: Path, fake: type[FakeClient]
) -> None:
    text = tmp_path / "note.txt"
    text.write_text("not an image")
    given = [part.format(photo=photo, text=text, folder=tmp_path) for part in arguments.split(" ")]
    result = vidgen("run", *given, *GATEWAY)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert fake.sent == []


def test_everything_wrong_is_named_at_once_and_what_is_shared_once(photo: Path) -> None:
    result = vidgen("run", photo, "--edit", "", "--motion", "x", "-o", "a", "--seed", "-1", "--json", *GATEWAY)
    assert result.exit_code == 2
    (line,) = lines_of(result)
    assert line["code"] == "usage"
    assert [error["field"].split(" ")[0] for error in line["errors"]] == ["--edit", "--seed", "-o"]


@pytest.mark.parametrize(
    "arguments", [["--edit", "\udcff"], ["--edit", "x", "--label", "\udcff=1"], ["--edit", "x", "--job-id", "\udcff"]]
)
def test_words_that_are_no_text_are_wrong_usage(arguments: list[str], photo: Path, fake: type[FakeClient]) -> None:
    result = vidgen("submit", photo, *arguments, *GATEWAY)
    assert result.exit_code == 2, result.output
    assert "not UTF-8" in result.stderr
    assert fake.sent == []


def test_a_page_of_what_is_no_text_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "AsyncClient", REAL_CLIENT)
    result = vidgen("list", "--tenant", "\udcff", "--gateway", "http://127.0.0.1:1")
    assert result.exit_code == 2, result.output
    assert "not UTF-8" in result.stderr


@pytest.mark.parametrize("part", ["--edit", "--motion"])
def test_a_review_of_what_no_video_follows_is_refused(part: str, photo: Path, fake: type[FakeClient]) -> None:
    """It was passed over without a word, and the job completed."""
    result = vidgen("submit", photo, part, "x", "--review", *GATEWAY)
    assert result.exit_code == 2
    assert "--review: it stands between an edit and its video" in result.stderr
    assert fake.sent == []


def test_a_key_that_can_be_none_is_wrong_usage(photo: Path, fake: type[FakeClient]) -> None:
    for command in (("list",), ("run", photo, "--edit", "x", "-o", "a.png")):
        result = vidgen("--api-key", "ü", *command, *GATEWAY)
        assert result.exit_code == 2
        assert result.stderr == "vidgen: --api-key: the API key has characters that no key has: copy it anew\n"
    assert vidgen("--api-key", "vg_1\n", "list", *GATEWAY).exit_code == 0


def test_a_label_that_is_none_does_not_hide_what_else_is_wrong(photo: Path) -> None:
    result = vidgen("submit", photo, "--edit", "", "--label", "team", "--lane", "fast", "--json", *GATEWAY)
    assert result.exit_code == 2
    assert [error["field"].split(" ")[0] for error in lines_of(result)[0]["errors"]] == ["--edit", "--lane", "--label"]


def test_a_place_that_cannot_be_written_to_is_found_before_anything_starts(
    photo: Path, tmp_path: Path, fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, _mode: path != tmp_path)  # root may write anywhere
    result = vidgen("run", photo, "--edit", "x", "-o", tmp_path / "new" / "a.png", *GATEWAY)
    assert result.exit_code == 2
    assert f"-o: {tmp_path} cannot be written to" in result.stderr
    assert fake.sent == []


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a disk that is full when the job is done."""
    written = FakeClient.download

    async def download(self: FakeClient, job_id: str, name: str, path: Path) -> Path:
        if path.is_relative_to(tmp_path / "full"):
            raise OSError(28, "No space left on device", str(path))
        return await written(self, job_id, name, path)

    monkeypatch.setattr(FakeClient, "download", download)
    return tmp_path / "full"


def test_a_file_that_cannot_be_written_is_named_with_its_job_and_how_to_fetch_it(
    photo: Path, tmp_path: Path, full: Path, fake: type[FakeClient]
) -> None:
    wanted = [photo, "--edit", "x", "--motion", "y", "-o", full / "a.mp4", "--frame", tmp_path / "frame.png"]
    result = vidgen("--api-key", "vg_1", "run", *wanted, *GATEWAY)
    assert result.exit_code == 1
    where = "http://gateway/v1/jobs/j1/artifacts/video.mp4"
    assert result.stderr.endswith(
        f"vidgen: -o: {full / 'a.mp4'}: No space left on device; job j1 is done: fetch its video.mp4 with "
        f'`curl -L -H "Authorization: Bearer $VIDGEN_API_KEY" -o FILE {where}`\n'
    )
    assert f"frame  {tmp_path / 'frame.png'}" in result.stdout
    assert "video " not in result.stdout

    wanted = [photo, "--edit", "x", "--motion", "y", "-o", tmp_path / "a.mp4", "--frame", full / "frame.png"]
    lines = lines_of(vidgen("run", *wanted, *GATEWAY, "--json"))
    assert [error["field"] for error in lines[-1]["errors"]] == ["--frame"]
    assert "`curl -L -o FILE" in lines[-1]["message"]


def test_what_an_embedded_stack_made_is_kept_where_it_cannot_be_written(
    photo: Path, tmp_path: Path, full: Path, fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result was gone with the stack, after minutes on a GPU."""

    @contextlib.asynccontextmanager
    async def stack(*_: object) -> AsyncIterator[tuple[str, None]]:
        yield "http://gateway", None

    monkeypatch.setattr("vidgen.cli.run._gateway", stack)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    result = vidgen("run", photo, "--edit", "x", "-o", full / "a.png")
    assert result.exit_code == 1
    (kept,) = (tmp_path / "tmp").glob("*/edit-0.png")
    assert (
        f"-o: {full / 'a.png'}: No space left on device; job j1 is done: its edit-0.png is kept in {kept}\n"
        in result.stderr
    )
    assert kept.read_bytes() == b"edit-0.png"

    monkeypatch.setattr(tempfile, "tempdir", str(full))
    result = vidgen("run", photo, "--edit", "x", "-o", full / "a.png")
    assert f"its edit-0.png is lost, for it cannot be kept in {full} either" in result.stderr


@pytest.mark.parametrize(
    "url", ["gateway:8080", "http://", "http://h:99999", "ftp://h", "nats://u:secret@h:1", "http://[1", "http://h:0"]
)
def test_an_address_that_is_none_is_wrong_usage_and_is_not_repeated(url: str, photo: Path) -> None:
    for command in (("list",), ("run", photo, "--edit", "x", "-o", "a.png")):
        result = vidgen(*command, "--gateway", url)
        assert result.exit_code == 2
        assert "--gateway: it is no address: write http://HOST:PORT" in result.stderr
        assert "secret" not in result.output


@pytest.mark.parametrize("command", [("run", "--help"), ("submit", "nöne.png", "--edit", "→")])
def test_what_an_encoding_does_not_know_is_escaped(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vidgen.cli", *command], capture_output=True, check=False, timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "VIDGEN_GATEWAY_URL": "http://gateway"},
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    assert rb"\u2026" in done.stdout or rb"n\xf6ne.png" in done.stderr


def test_a_missing_argument_is_exit_code_2() -> None:
    assert vidgen("status").exit_code == 2


# ── the other commands ───────────────────────────────────────────────────────────────────────────────────────────


def test_submit_prints_the_job_id(photo: Path, fake: type[FakeClient]) -> None:
    asked = ["--edit", "x", "--motion", "y", "--lane", "batch", "--label", "team=a", "--review"]
    result = vidgen("submit", photo, *asked, *GATEWAY)
    assert (result.exit_code, result.stdout) == (0, "j1\n")
    request, _ = fake.sent[0]
    assert (request.lane, request.labels, request.review) == ("batch", {"team": "a"}, True)


def test_submit_names_a_receiver_and_says_what_is_wrong_with_one(photo: Path, fake: type[FakeClient]) -> None:
    url = "https://hooks.example.com/vidgen"
    assert vidgen("submit", photo, "--edit", "x", "--webhook", url, *GATEWAY).exit_code == 0
    assert fake.sent[0][0].webhook_url == url

    result = vidgen("submit", photo, "--edit", "x", "--webhook", "http://hooks.example.com/", *GATEWAY)
    assert result.exit_code == 2
    assert "--webhook (webhook_url): must begin with https://" in result.stderr


def test_the_secret_of_a_tenant_follows_from_the_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "VIDGEN_WEBHOOK_SECRET" in vidgen("webhooks", "secret").stderr
    monkeypatch.setenv("VIDGEN_WEBHOOK_SECRET", f"whsec_{'a' * 44}")
    acme, again, other = (vidgen("webhooks", "secret", "--tenant", name) for name in ("acme", "acme", "other"))

    assert acme.exit_code == 0
    assert acme.stdout.strip() == webhooks.Secret.parse(f"whsec_{'a' * 44}").of_tenant("acme").reveal()
    assert acme.stdout == again.stdout != other.stdout
    assert vidgen("webhooks", "secret", "--tenant", "Acme!").exit_code == 2
    monkeypatch.setenv("VIDGEN_WEBHOOK_SECRET", "foo")
    none = vidgen("webhooks", "secret")
    assert none.exit_code == 2
    assert none.stderr.startswith("vidgen: VIDGEN_WEBHOOK_SECRET: whsec_ and 24 to 64 random bytes")


def test_submit_refuses_a_lane_and_a_label_that_are_none(photo: Path) -> None:
    assert "--lane (lane)" in vidgen("submit", photo, "--edit", "x", "--lane", "fast", *GATEWAY).stderr
    assert "--label: 'team' is no label" in vidgen("submit", photo, "--edit", "x", "--label", "team", *GATEWAY).stderr


def test_a_command_without_a_gateway_says_how_to_name_one() -> None:
    result = vidgen("status", "j1")
    assert result.exit_code == 2
    assert "VIDGEN_GATEWAY_URL" in result.stderr


def test_the_gateway_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDGEN_GATEWAY_URL", "http://gateway")
    assert vidgen("status", "j1").stdout.startswith("j1  queued")


def test_watch_follows_to_the_end_and_its_exit_code_tells_which(fake: type[FakeClient]) -> None:
    result = vidgen("watch", "j1", *GATEWAY)
    assert result.exit_code == 0
    assert "edit: step 4/4, 0.50 s/step, 12 s left" in result.stdout
    fake.updates = (made_job(JobStatus.CANCELLED),)
    assert vidgen("watch", "j1", *GATEWAY).exit_code == 1


def reviewed() -> Job:
    wish = {"references": ["uploads/a"], "edit": {"prompt": "a hat"}, "i2v": {"prompt": "zoom"}, "review": True}
    return made_job(JobStatus.QUEUED).model_copy(update={"request": VideoRequest.model_validate(wish)})


APPROVED = contracts.Approved(job_id="j1", at=AT, candidate=1)
RETRIED = contracts.RetryRequested(job_id="j1", at=AT, run=2)
WAIT = "waits for: vidgen approve j1 [CANDIDATE]"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("updates", "times"),
    [
        ((STARTED, ENDED), 1),
        ((STARTED, ENDED, RETRIED), 2),  # it was cancelled as it waited: it waits again
        ((STARTED, ENDED, APPROVED, RETRIED), 1),  # a choice is for good
        ((STARTED, RETRIED), 0),
    ],
)
def test_watch_tells_that_a_job_waits_for_its_review(
    updates: Sequence[Update], times: int, terminal: bool, fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood at "edit: done", and nothing said that it was somebody's turn."""
    monkeypatch.setattr(Output, "live", property(lambda _: terminal))
    fake.answer, fake.updates = reviewed(), (*updates, made_job())
    assert vidgen("watch", "j1", *GATEWAY).stdout.count(WAIT) == times


@pytest.mark.parametrize("wish", [{}, {"review": True, "i2v": None}, {"review": False}])
def test_watch_names_no_review_where_none_comes(wish: dict[str, Any], fake: type[FakeClient]) -> None:
    request = reviewed().request
    assert request is not None
    asked = request.model_copy(update=wish) if wish else None
    fake.answer = reviewed().model_copy(update={"request": asked})
    fake.updates = (STARTED, ENDED, made_job())
    assert "approve" not in vidgen("watch", "j1", *GATEWAY).stdout


def test_cancel_and_approve_reach_the_gateway(fake: type[FakeClient]) -> None:
    fake.answer = made_job(JobStatus.CANCELLED)
    assert vidgen("cancel", "j1", *GATEWAY).exit_code == 0
    assert vidgen("approve", "j1", "2", *GATEWAY).exit_code == 0
    assert fake.sent == [("cancel", "j1"), ("approve", "j1", 2)]


def test_list_shows_a_page_and_how_to_get_the_next(fake: type[FakeClient]) -> None:
    result = vidgen("list", "--status", "failed", "--tenant", "acme", *GATEWAY)
    assert result.exit_code == 0
    assert "j1" in result.stdout
    assert "--cursor 17" in result.stderr
    assert fake.sent == [{"status": "failed", "cursor": None, "limit": 20, "tenant": "acme"}]
    lines = lines_of(vidgen("list", "--json", *GATEWAY))
    assert [line["type"] for line in lines] == ["job", "job", "page"]


def test_list_refuses_a_status_that_is_none() -> None:
    result = vidgen("list", "--status", "lost", *GATEWAY)
    assert result.exit_code == 2
    assert "--status: 'lost' is none: use queued" in result.stderr


def test_workers_are_listed() -> None:
    assert "preview" in vidgen("workers", *GATEWAY).stdout
    assert lines_of(vidgen("workers", "--json", *GATEWAY))[0]["type"] == "worker"


def test_dead_letters_are_listed_shown_and_dropped(fake: type[FakeClient]) -> None:
    assert "not JSON" in vidgen("dead", "list", *GATEWAY).stdout
    assert lines_of(vidgen("dead", "show", "3", "--json", *GATEWAY))[0]["seq"] == 3
    assert vidgen("dead", "drop", "3", *GATEWAY).exit_code == 0
    assert fake.sent == [("drop", 3)]


def test_a_payload_cannot_play_with_the_terminal() -> None:
    shown = vidgen("dead", "show", "3", *GATEWAY).stdout
    assert "\x1b" not in shown
    assert "hello" in shown


def test_a_prompt_cannot_play_with_the_terminal_either(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = VideoRequest.model_validate(
        {"references": ["uploads/a"], "edit": {"prompt": "a\x1b[2J\x9b1m\nhat\u202etxet"}}
    )
    named = made_job(error=JobError(code="x", message="\x1b]0;title\x07")).model_copy(update={"request": evil})

    async def listed(*_: Any, **__: Any) -> JobPage:
        return JobPage(jobs=(named,), next_cursor="17")

    async def found(*_: Any) -> Job:
        return named

    monkeypatch.setattr(FakeClient, "list", listed)
    monkeypatch.setattr(FakeClient, "get", found)
    for command in (("list",), ("status", "j1")):
        result = vidgen(*command, *GATEWAY)
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*result.output}
    assert r"a\x1b[2J\x9b1m hat\u202etxet" in vidgen("list", *GATEWAY).stdout


def test_nothing_of_a_list_is_cut_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    long = made_job().model_copy(update={"id": "j" * 64})
    wish = VideoRequest.model_validate({"references": ["uploads/a"], "edit": {"prompt": "a hat, " * 20}})

    async def listed(*_: Any, **__: Any) -> JobPage:
        return JobPage(jobs=(long.model_copy(update={"request": wish}),))

    monkeypatch.setattr(FakeClient, "list", listed)
    _, line = vidgen("list", *GATEWAY).stdout.splitlines()
    assert line.split()[0] == "j" * 64


def test_on_a_narrow_terminal_the_names_of_rows_stay_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vidgen.cli.output import Output

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    Output(as_json=False).table(("job", "status", "what"), [("j" * 36, "in_progress", "a hat, " * 9)])
    assert "j" * 36 in capsys.readouterr().out


# ── what is said of a job ────────────────────────────────────────────────────────────────────────────────────────


def test_plain_lines_about_steps_come_once_a_second_and_the_last_step_always(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from vidgen.cli.output import Output

    now = [0.0]
    view = PlainView(Output(as_json=False), clock=lambda: now[0])
    for number in range(1, 9):
        view.show(step(number, 8))
        now[0] += 0.3
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "edit: step 1/8", "edit: step 5/8", "edit: step 8/8",
    ]  # fmt: skip


@pytest.mark.parametrize(("final", "said"), [(None, "queued"), (False, "queued"), (True, "failed")])
def test_a_bar_whose_worker_left_it_names_no_time_left(
    final: bool | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`12 s left` stood there for as long as the task waited for another worker, or for its next try."""
    from vidgen.cli.progress import LiveView

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    view = LiveView(Output(as_json=False))
    told: dict[str, Any] = {"job_id": "j1", "at": AT, "stage": "edit", "attempt": 1, "tries": 1, "worker": "w"}
    left = (
        contracts.StageReleased(**told)
        if final is None
        else contracts.StageFailed(**told, final=final, error=JobError(code="oom", message="out of memory"))
    )
    with view:
        view.begin(("edit",))
        view.show(contracts.StageStarted(**told, engine="preview", model="m"))
        view.show(step(2).model_copy(update={"seconds_per_step": 6.0, "eta_s": 12.0}))
        view.show(left)
    shown = capsys.readouterr().out
    last = shown[shown.rindex("edit ") :]
    assert said in last
    assert "left" not in last


def test_an_attempt_that_failed_is_told_with_what_follows() -> None:
    from vidgen.cli.progress import news_of

    failed = contracts.StageFailed(
        job_id="j1", at=AT, stage="i2v", attempt=2, tries=2, worker="w", final=False, retry_in_s=4.0,
        error=JobError(code="store", message="the store did not answer"),
    )  # fmt: skip
    assert news_of(failed) == ("i2v", "attempt 2 failed, again in 4.0 s: the store did not answer")


# ── doctor ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_doctor_has_a_remedy_for_every_no_and_exit_code_0_where_the_previews_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VIDGEN_NATS_URL", "nats://127.0.0.1:1")
    monkeypatch.setenv("VIDGEN_S3_ENDPOINT", "http://127.0.0.1:1")
    result = vidgen("doctor", "--json")
    lines = lines_of(result)
    checks = {line["name"]: line for line in lines if line["type"] == "check"}
    assert {"python", "nats-server", "S3 server", "torch", "edit profile", "edit engine", "bus", "gateway"} <= set(
        checks
    )
    assert [check["name"] for check in checks.values() if not check["ok"] and not check["remedy"]] == []
    assert not checks["bus"]["ok"]
    assert lines[-1] == {"type": "doctor", "ok": True}
    assert result.exit_code == 0


def test_doctor_without_the_embedded_servers_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidgen.local import process

    monkeypatch.setenv("VIDGEN_NATS_URL", "nats://127.0.0.1:1")
    monkeypatch.setattr(process, "find_program", lambda _: None)
    result = vidgen("doctor")
    assert result.exit_code == 1
    assert extras.install("local") in result.stdout


def test_doctor_says_which_settings_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDGEN_ENGINE", "warp")
    result = vidgen("doctor", "--json")
    assert "VIDGEN_ENGINE" in result.stdout
    assert result.exit_code == 1


@pytest.mark.parametrize(("multiplies", "said"), [(True, False), (None, False), (False, True)])
def test_doctor_says_of_a_gpu_that_it_does_not_multiply_fp8(
    monkeypatch: pytest.MonkeyPatch, multiplies: bool | None, said: bool
) -> None:
    from vidgen import gpu

    monkeypatch.setattr(gpu, "visible", lambda: (GpuFigures(index=0, uuid="u", name="A6000", memory_total=48 << 30),))
    monkeypatch.setattr(gpu, "multiplies_fp8", lambda figures: multiplies)
    [found] = [check for check in _engines(WorkerSettings()) if check.name == "GPU 0"]
    assert found.detail.startswith("A6000, 48 GiB")
    assert ("does not multiply FP8" in found.detail) is said


GIB = 1 << 30


def demand_of(stage: contracts.Stage, gib: float) -> profiles.Demand:
    """What a model of 40 GiB with a text encoder of 12 GiB asks of a GPU of `gib`."""
    parts = {"transformer": 40 * GIB, "text_encoder": 12 * GIB}
    return profiles.Demand(stage, int(gib * GIB), parts, profiles.WORK[stage])


def profile_check(gib: float, stages: Sequence[contracts.Stage] = ("edit",), **settings: Any) -> Check:
    return _profile("edit", WorkerSettings(**settings), {stage: demand_of(stage, gib) for stage in stages})


@pytest.mark.parametrize(
    ("gib", "profile"), [(79.6, "resident-bf16"), (59, "resident-bf16"), (58, "resident-fp8"), (24, "offload-fp8")]
)
def test_doctor_names_the_profile_that_follows_from_the_gpu_and_the_models_own_files(gib: float, profile: str) -> None:
    assert profile_check(gib) == Check("edit profile", True, profile, needed=True)


@pytest.mark.parametrize(
    ("gib", "told"),
    [
        (139, "resident-bf16; with both models on one GPU resident-bf16, and both stay"),
        (79.6, "resident-bf16; with both models on one GPU resident-fp8, and both stay"),
        (59.5, "resident-bf16; with both models on one GPU resident-bf16, and they take turns"),
    ],
)
def test_doctor_says_how_both_models_lie_on_one_gpu(gib: float, told: str) -> None:
    assert profile_check(gib, ("edit", "i2v")).detail == told


@pytest.mark.parametrize(
    ("gib", "settings", "remedy"),
    [
        (7, {}, "Use a larger GPU or a smaller model"),
        (24, {"profile": "resident-bf16"}, "VIDGEN_PROFILE=offload-fp8 fits"),
    ],
)
def test_doctor_says_of_a_gpu_that_is_too_small_what_each_profile_needs(
    gib: float, settings: dict[str, Any], remedy: str
) -> None:
    found = profile_check(gib, **settings)
    assert (found.ok, found.needed, found.remedy) == (False, True, remedy)
    assert "resident-bf16 58 GiB, resident-fp8 39 GiB, offload-fp8 9 GiB" in found.detail


def test_doctor_takes_the_gpu_of_the_worker_and_the_sizes_of_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "transformer").mkdir()
    with (tmp_path / "transformer" / "model.safetensors").open("wb") as file:
        file.truncate(100 * GIB)  # a hole: it takes no room
    nvml = FakeNvml()
    memory = {"GPU-aaaa-1": 8 * GIB, "GPU-bbbb-2": 80 * GIB}
    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=0, total=memory[handle]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        weights, "why_not", lambda model, *given, **named: None if model == str(tmp_path) else "not here"
    )
    checks = {check.name: check for check in _engines(WorkerSettings(device="cuda:1", i2v_model=str(tmp_path)))}
    assert (checks["i2v profile"].detail, checks["i2v profile"].ok) == ("resident-fp8", True)
    assert checks["edit profile"].detail.startswith("none")
    assert [check.name for check in checks.values() if check.needed and not check.ok] == []


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (f"torch and diffusers are not installed: {extras.install('gpu')}", "torch and diffusers are not installed"),
        ("the weights of m are not on this machine: download them", "the weights of m are not on this machine"),
    ],
)
def test_doctor_says_what_a_model_lacks_that_was_asked_for_by_name(
    reason: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said that "the preview has no model", where VIDGEN_ENGINE=real runs none."""
    monkeypatch.setattr(weights, "why_not", lambda *_, **__: reason)
    for engine, why in (("real", told), ("preview", "the preview has no model")):
        checks = {check.name: check for check in _engines(WorkerSettings(engine=engine))}
        assert {checks[f"{stage} profile"].detail for stage in contracts.STAGES} == {f"none: {why}"}


def test_doctor_is_exit_code_1_where_the_real_engine_that_is_asked_for_has_no_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VIDGEN_NATS_URL", "nats://127.0.0.1:1")
    monkeypatch.setenv("VIDGEN_S3_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("VIDGEN_ENGINE", "real")
    result = vidgen("doctor", "--json")
    assert (lines_of(result)[-1], result.exit_code) == ({"type": "doctor", "ok": False}, 1)


# ── starting ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "PIL", "httpx", "pydantic", "nats", "minio", "fastapi", "av")
    code = (
        "import sys\nfrom vidgen.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        f"sys.exit(','.join(name for name in {heavy!r} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


@pytest.mark.parametrize(("before", "waits", "code"), [("SIG_DFL", 60.0, 143), ("SIG_IGN", 0.0, 0)])
def test_a_terminal_that_is_closed_ends_a_command_in_order_unless_it_is_to_go_on(
    before: str, waits: float, code: int
) -> None:
    """It died at once: of `vidgen run` a folder with the whole stack stayed, and a job at its gateway went on."""
    program = f"""
import asyncio, os, signal, sys, typer
from vidgen.cli import output
signal.signal(signal.SIGHUP, signal.{before})
async def main():
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep({waits})
    finally:
        print("tidied", flush=True)
try:
    with output.speaking(False):
        output.run_async(main)
except typer.Exit as exc:
    sys.exit(exc.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (code, "tidied\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_that_was_started_without_outputs_does_its_work(closed: str) -> None:
    command = f'exec "$0" -P -m vidgen.cli webhooks secret {closed}'
    env = {**os.environ, "VIDGEN_WEBHOOK_SECRET": f"whsec_{'a' * 44}"}
    done = subprocess.run(["sh", "-c", command, sys.executable], env=env, capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")


# ── worker ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stages", [["edit", "i2v"], ["i2v", "edit"], ["edit"]])
def test_worker_serves_the_stages_in_their_order_with_the_engines_of_the_services(
    stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edit_service.main import make_engine as make_edit
    from i2v_service.main import make_engine as make_i2v
    from vidgen import service

    served: list[tuple[dict[str, Any], str]] = []

    def run_stages(makers: dict[str, Any], name: str) -> int:
        served.append((makers, name))
        return 1

    monkeypatch.setattr(service, "run_stages", run_stages)

    assert vidgen("worker", "--stages", ", ".join(stages)).exit_code == 1
    [(makers, name)] = served
    assert (list(makers), name) == (stages, "worker")
    assert all(made is {"edit": make_edit, "i2v": make_i2v}[stage] for stage, made in makers.items())


@pytest.mark.parametrize("stages", ["", "video", "edit,edit", "edit,,i2v"])
def test_worker_refuses_what_is_no_list_of_stages(stages: str) -> None:
    refused = vidgen("worker", "--stages", stages)

    assert refused.exit_code == 2
    assert "--stages: " in refused.stderr
    assert "name edit, i2v, each once" in refused.stderr


def test_the_key_is_taken_from_the_variable_or_before_the_command(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vidgen("status", "j1", *GATEWAY).exit_code == 0
    assert vidgen("--api-key", "vg_1_x", "status", "j1", *GATEWAY).exit_code == 0
    monkeypatch.setenv("VIDGEN_API_KEY", "vg_2_y")
    assert vidgen("status", "j1", *GATEWAY).exit_code == 0
    assert fake.api_keys == [None, "vg_1_x", "vg_2_y"]
    assert "vg_2_y" not in vidgen("--help").output
