"""The file of a task's state, and each reason for which it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engines import safetensors
from tests.workbench import task_of

from vidgen import checkpoints, errors
from vidgen.checkpoints import UnusableError
from vidgen.contracts import Checkpoint
from vidgen.engine import EngineInfo
from vidgen.testing import MemoryStore

INFO = EngineInfo("qwen", "model", "revision", "bfloat16")
STATE = safetensors({"mine": "kept"}, b"tensors")
TASK = task_of(steps=8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "checkpoint", STATE, TASK, INFO, 3, 8)
    return tmp_path / "checkpoint"


def test_a_state_comes_back_with_its_step_its_tensors_and_its_own_metadata(path: Path) -> None:
    found = checkpoints.read(path, TASK, INFO)

    assert found.step == 3
    assert found.state.endswith(b"tensors")
    assert checkpoints.metadata_of(found.state)["mine"] == "kept"


@pytest.mark.parametrize("length", range(8))
def test_tensors_begin_where_every_kind_of_number_may(tmp_path: Path, length: int) -> None:
    state = safetensors({"mine": "x" * length}, b"tensors")
    checkpoints.write(tmp_path / "checkpoint", state, TASK, INFO, 3, 8)
    written = (tmp_path / "checkpoint").read_bytes()
    assert int.from_bytes(written[:8], "little") % 8 == 0
    assert checkpoints.read(tmp_path / "checkpoint", TASK, INFO).step == 3


def test_the_file_is_one_that_the_safetensors_library_reads(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save

    tensors = {"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b": torch.tensor(5)}
    checkpoints.write(tmp_path / "c.safetensors", save(tensors, {"mine": "kept"}), TASK, INFO, 3, 8)

    again = load_file(tmp_path / "c.safetensors")

    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert again["a"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("task", "info", "message"),
    [
        (TASK, replace(INFO, name="wan"), "of engine qwen, this worker has wan"),
        (TASK, replace(INFO, model="another"), "of model model, this worker has another"),
        (TASK, replace(INFO, revision=None), "of revision revision, this worker has None"),
        (TASK, replace(INFO, profile="resident-fp8"), "of profile bfloat16, this worker has resident-fp8"),
        (task_of(steps=8, seed=8), INFO, "another task"),
        (task_of("j2", steps=8), INFO, "another task"),
        (task_of(steps=8, inputs=("uploads/another.jpg",)), INFO, "another task"),
    ],
)
def test_what_was_made_by_or_for_something_else_is_refused(
    path: Path, task: Any, info: EngineInfo, message: str
) -> None:
    with pytest.raises(UnusableError, match=message):
        checkpoints.read(path, task, info)


def test_another_device_of_the_same_kind_or_another_run_may_go_on(path: Path) -> None:
    assert checkpoints.read(path, task_of(steps=8, run=2), replace(INFO, device="cuda:3")).step == 3


def of_the_future(data: bytes) -> bytes:
    return data.replace(b'schema_version\\":2', b'schema_version\\":3')


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda data: data[:-1], "damaged"),
        (lambda data: data[:40], "damaged"),
        (lambda data: data[:5], "damaged"),
        (lambda data: b"", "damaged"),
        (lambda data: data[:-3] + b"xyz", "damaged"),
        (lambda data: data.replace(b'"mine":"kept"', b'"mine":"kepu"'), "damaged"),
        (lambda data: b"\xff" * len(data), "damaged"),
        (lambda data: data[:8] + b"[" * (len(data) - 8), "damaged"),
        (lambda data: STATE, "another version"),
        (of_the_future, "another version"),
    ],
)
def test_what_is_damaged_or_of_another_version_is_refused(
    path: Path, broken: Callable[[bytes], bytes], message: str
) -> None:
    path.write_bytes(broken(path.read_bytes()))

    with pytest.raises(UnusableError, match=message):
        checkpoints.read(path, TASK, INFO)


@pytest.mark.parametrize(("step", "steps"), [(0, 8), (8, 8), (9, 8)])
def test_a_step_with_nothing_before_or_behind_it_is_refused(tmp_path: Path, step: int, steps: int) -> None:
    checkpoints.write(tmp_path / "checkpoint", STATE, TASK, INFO, step, steps)

    with pytest.raises(UnusableError, match=f"step {step} of {steps}"):
        checkpoints.read(tmp_path / "checkpoint", TASK, INFO)


def test_what_is_no_safetensors_file_or_too_large_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnusableError, match="no whole safetensors file"):
        checkpoints.write(tmp_path / "checkpoint", b"pickle", TASK, INFO, 3, 8)
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 100)
    with pytest.raises(UnusableError, match="more than 100"):
        checkpoints.write(tmp_path / "checkpoint", STATE, TASK, INFO, 3, 8)


def test_what_is_written_is_no_larger_than_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    checkpoints.write(path, STATE, TASK, INFO, 3, 8)
    monkeypatch.setattr(checkpoints, "MAX_BYTES", path.stat().st_size)
    checkpoints.write(path, STATE, TASK, INFO, 3, 8)
    monkeypatch.setattr(checkpoints, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(UnusableError, match="are not kept"):
        checkpoints.write(path, STATE, TASK, INFO, 3, 8)


# ── in the store ─────────────────────────────────────────────────────────────────────────────────────────────────


def suspended(state: bytes | None = STATE) -> errors.Suspended:
    made = errors.Suspended(3, 8)
    made.state = state
    return made


async def test_each_attempt_keeps_its_state_under_a_key_of_its_own(tmp_path: Path) -> None:
    store = MemoryStore()

    for attempt in (1, 2):
        kept = await checkpoints.keep(store, TASK, attempt, INFO, suspended(), tmp_path)
        assert kept == Checkpoint(attempt=attempt, step=3, steps=8)

    assert sorted(store.objects) == ["checkpoints/j1/edit-1-1.safetensors", "checkpoints/j1/edit-1-2.safetensors"]
    found = await checkpoints.fetch(store, TASK, Checkpoint(attempt=2, step=3, steps=8), INFO, tmp_path)
    assert found.step == 3


async def test_an_engine_that_left_nothing_has_nothing_to_be_kept(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match="left no state"):
        await checkpoints.keep(MemoryStore(), TASK, 1, INFO, suspended(None), tmp_path)


async def test_more_than_a_checkpoint_can_have_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    kept = await checkpoints.keep(store, TASK, 1, INFO, suspended(), tmp_path)
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 10)

    with pytest.raises(UnusableError, match="more than the 10 allowed"):
        await checkpoints.fetch(store, TASK, kept, INFO, tmp_path)


async def test_a_checkpoint_that_is_gone_is_not_called_unusable(tmp_path: Path) -> None:
    gone = Checkpoint(attempt=1, step=3, steps=8)
    with pytest.raises(errors.NotFoundError):
        await checkpoints.fetch(MemoryStore(), TASK, gone, INFO, tmp_path)
