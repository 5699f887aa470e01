from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vidgen import choice, jetstream, manifest, service
from vidgen.engine import Engine
from vidgen.errors import FatalError
from vidgen.settings import WorkerSettings


async def test_weights_that_are_to_be_verified_in_full_are_before_the_engine_is_made(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_models["qwen-edit"], tmp_path / "model"))
    made = manifest.Manifest(model="x", created_by="a test", files=tuple(manifest.describe(folder)))
    manifest.write(folder, made)
    shard = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))

    def make_engine(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
        raise AssertionError("the engine is not to be made of these weights")

    settings = WorkerSettings(engine="real", device="cpu", edit_model=str(folder), verify_weights="full")
    with (
        ThreadPoolExecutor(1) as device_thread,
        pytest.raises(FatalError, match=r"vae/diffusion_pytorch_model\.safetensors: wrong checksum"),
    ):
        await service._Service("edit", settings, make_engine)._load(device_thread)


async def test_a_gpu_too_small_for_any_profile_is_told_what_each_needs_and_no_task_is_looked_at(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edit_service.main import make_engine
    from vidgen.accel.engine import DiffusersEngine

    def connect(*given: object, **options: object) -> None:
        raise AssertionError("a worker without a model is not to ask for tasks")

    monkeypatch.setattr(DiffusersEngine, "_memory", lambda self: 4 << 30)
    monkeypatch.setattr(jetstream, "connect", connect)
    settings = WorkerSettings(engine="real", device="cpu", edit_model=str(tiny_models["qwen-edit"]), metrics_port=0)
    needs = "this GPU has 4 GiB, and this model needs: resident-bf16 7 GiB, resident-fp8 7 GiB, offload-fp8 7 GiB"
    with pytest.raises(FatalError, match=needs) as caught:
        await service._Service("edit", settings, make_engine).run()
    assert caught.value.code == "gpu_too_small"
