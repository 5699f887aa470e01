from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.engines import Instant

from vidgen import choice, manifest, service
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


async def test_what_each_phase_of_the_start_took_is_in_the_metrics() -> None:
    def make_engine(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
        return Instant()

    serving = service._Service("edit", WorkerSettings(engine="preview"), make_engine)
    with ThreadPoolExecutor(1) as device_thread:
        _, seconds = await serving._load(device_thread)
    shown = serving._metrics.render()[0].decode()
    assert 'vidgen_worker_model_load_seconds{phase="weights",stage="edit"} 0.5' in shown
    assert f'vidgen_worker_model_load_seconds{{phase="total",stage="edit"}} {seconds}' in shown
    assert 'vidgen_worker_model_load_seconds{phase="imports",stage="edit"}' in shown
