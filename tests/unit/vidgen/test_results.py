"""A stage's result in the store: found again only where it is whole, readable, and of the very same task."""

from __future__ import annotations

import base64
import random
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests import engines
from tests.workbench import Journal, JournalStore, task_of

from vidgen import contracts, results
from vidgen.engine import EngineInfo, Finished

S3_USER_METADATA = 2048  # bytes: the names and values of all user metadata together
INFO = EngineInfo(
    name="qwen", model="Qwen/Qwen-Image-Edit-2511", revision="6f3ccc0b56e431dc6a0c2b2039706d7d26f22cb9", profile="bf16"
)


@pytest.fixture
def store() -> JournalStore:
    return JournalStore(Journal())


async def keep(
    store: JournalStore, task: contracts.Task, files: Sequence[Finished], info: EngineInfo
) -> results.Result:
    return await results.keep(store, task, results.made(task, files, info))


def files(folder: Path, count: int, seed: int = 0) -> list[Finished]:
    """Files of different contents: their hashes do not compress."""
    made = []
    for index in range(count):
        path = folder / f"edit-{index}.png"
        path.write_bytes(random.Random(f"{seed}:{index}").randbytes(2000))
        made.append(Finished(path, "image/png", 1328, 1328))
    return made


async def test_a_result_is_found_as_it_was_kept(store: JournalStore, tmp_path: Path) -> None:
    task = task_of(candidates=2)

    kept = await keep(store, task, files(tmp_path, 2), INFO)

    assert await results.find(store, task) == kept
    assert (kept.engine, kept.model, kept.revision, kept.seed, kept.steps) == (
        "qwen", INFO.model, INFO.revision, 7, 4,
    )  # fmt: skip
    assert [made.key for made in kept.artifacts] == ["jobs/j1/edit-0.png", "jobs/j1/edit-1.png"]


async def test_the_main_file_is_stored_last_and_alone_has_the_manifest(store: JournalStore, tmp_path: Path) -> None:
    await keep(store, task_of(candidates=4), files(tmp_path, 4), INFO)

    assert store.journal.entries[-1] == "put jobs/j1/edit-0.png"
    assert len(store.journal.entries) == 4
    for index in range(4):
        stat = await store.stat(f"jobs/j1/edit-{index}.png")
        assert stat is not None
        assert bool(stat.metadata) == (index == 0)


async def test_nothing_is_found_before_the_main_file_is_there(store: JournalStore, tmp_path: Path) -> None:
    store.fail_next("put", times=2)
    with pytest.raises(Exception, match="told to fail"):
        await keep(store, task_of(candidates=2), files(tmp_path, 2), INFO)

    assert await results.find(store, task_of(candidates=2)) is None


@pytest.mark.parametrize("stage", ["edit", "i2v"])
async def test_a_retry_asks_for_the_same_and_another_wish_does_not(
    store: JournalStore, tmp_path: Path, stage: contracts.Stage
) -> None:
    task = task_of(stage=stage)
    [finished] = engines.Instant().finish(task.work, tmp_path)
    await keep(store, task, [finished], INFO)

    same = task.model_copy(update={"run": 2, "lane": "batch", "queued_at": task.queued_at.replace(year=2000)})
    assert await results.find(store, same) is not None
    for other in (
        task_of(stage=stage, seed=8),
        task_of(stage=stage, prompt="another"),
        task_of(stage=stage, inputs=("uploads/other.jpg",)),
    ):
        assert await results.find(store, other) is None


async def test_what_a_job_of_another_tenant_left_under_the_same_id_is_no_result(
    store: JournalStore, tmp_path: Path
) -> None:
    left = task_of(tenant="acme", inputs=("jobs/j1/reference-0.png",))
    await keep(store, left, files(tmp_path, 1), INFO)

    assert await results.find(store, left) is not None
    for tenant in ("umbrella", contracts.DEFAULT_TENANT):
        assert await results.find(store, left.model_copy(update={"tenant": tenant})) is None


@pytest.mark.parametrize(
    "manifest",
    [
        "", "no base64 at all", "ü", "AAAA", base64.urlsafe_b64encode(b"not compressed").decode(),
        base64.urlsafe_b64encode(zlib.compress(b"not json")).decode(),
        base64.urlsafe_b64encode(zlib.compress(b'{"of": "the future"}')).decode(),
        base64.urlsafe_b64encode(zlib.compress(b"\xff\xfe")).decode(),
    ],
)  # fmt: skip
async def test_a_manifest_that_cannot_be_read_is_no_result(store: JournalStore, manifest: str) -> None:
    store.add("jobs/j1/edit-0.png", b"png", "image/png", manifest=manifest)

    assert await results.find(store, task_of()) is None


async def test_a_main_file_without_a_manifest_is_no_result(store: JournalStore) -> None:
    store.add("jobs/j1/edit-0.png", b"png", "image/png")

    assert await results.find(store, task_of()) is None


async def test_the_manifest_of_four_candidates_fits_into_the_metadata_of_an_s3_object(
    store: JournalStore, tmp_path: Path
) -> None:
    task = task_of("j" * 64, candidates=4)

    await keep(store, task, files(tmp_path, 4), INFO)

    stat = await store.stat(results.main_key(task))
    assert stat is not None
    assert stat.metadata is not None
    size = sum(len(f"x-amz-meta-{name}{value}") for name, value in stat.metadata.items())
    assert size <= S3_USER_METADATA / 2  # room for longer names of models
