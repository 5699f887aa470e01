from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests import checkpoints

from vidgen import diffusion, manifest, weights
from vidgen.accel import fp8
from vidgen.accel.kernels import e4m3
from vidgen.errors import FatalError

CPU = torch.device("cpu")
F32 = {"default": torch.float32}
LEAST = 16  # the tiny models' layers are small
PICTURE = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))


@pytest.fixture(autouse=True)
def small_references(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models, then what imports diffusers: torchvision needs the shim that building them installs."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 32 * 32)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 56 * 56)


@pytest.fixture
def qwen(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["qwen-edit"]


@pytest.fixture
def wan(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """Wan 2.2 A14B with layers of which some suit FP8, stored in bfloat16 but for what is kept in float32."""
    from diffusers import WanTransformer3DModel

    folder = shutil.copytree(tiny_models["wan2.2-a14b-i2v"], tmp_path / "wan")
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {"attention_head_dim": 16}
    for seed, part in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(seed)
        model = WanTransformer3DModel.from_config(config)
        model.save_pretrained(folder / part)
        WanTransformer3DModel.from_pretrained(folder / part, torch_dtype=torch.bfloat16).save_pretrained(folder / part)
    return folder


def assembled(folder: Path) -> Any:
    from diffusers import QwenImageEditPlusPipeline, WanImageToVideoPipeline

    from vidgen.accel import assemble

    qwen = "Qwen" in (folder / "model_index.json").read_text()
    kind: Any = QwenImageEditPlusPipeline if qwen else WanImageToVideoPipeline
    return assemble.assemble(kind, weights.require(str(folder)), CPU, F32, arithmetic=False)


def quantized(folder: Path, to: Path, **options: Any) -> weights.Weights:
    from vidgen.accel import quantize

    return quantize.quantize(weights.require(str(folder)), to, least=LEAST, **options)


def picture(pipe: Any) -> torch.Tensor:
    made = pipe(
        image=PICTURE, prompt="a cat", num_inference_steps=2, width=32, height=32, output_type="pt",
        generator=torch.Generator("cpu").manual_seed(3),
        **({"true_cfg_scale": 1.0} if "Qwen" in type(pipe).__name__ else {"num_frames": 5, "guidance_scale": 1.0}),
    )  # fmt: skip
    pixels: torch.Tensor = made[0]
    return pixels


def tensors_of(folder: Path, part: str = "transformer") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in (folder / part).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def test_a_snapshot_gives_the_pixels_of_a_model_quantised_in_memory(qwen: Path, tmp_path: Path) -> None:
    pipe = assembled(qwen)
    assert fp8.quantise(pipe.transformer, arithmetic=False, least=LEAST) > 0
    snapshot = quantized(qwen, tmp_path / "fp8").folder
    loaded = assembled(snapshot)

    assert torch.equal(picture(loaded), picture(pipe))
    assert sum(isinstance(module, fp8.Fp8Linear) for module in loaded.transformer.modules()) > 0
    assert not torch.equal(picture(loaded), picture(assembled(qwen)))


def test_both_experts_are_quantised_and_what_is_kept_in_float32_stays(wan: Path, tmp_path: Path) -> None:
    snapshot = quantized(wan, tmp_path / "fp8").folder
    for part in ("transformer", "transformer_2"):
        before, after = tensors_of(wan, part), tensors_of(snapshot, part)
        scaled = {name.removesuffix("_scale") for name in after if name.endswith(".weight_scale")}
        assert "blocks.0.attn1.to_q.weight" in scaled
        assert not any("time_embedder" in name for name in scaled)
        assert {name for name in after if not name.endswith("_scale")} == before.keys()
        for name, tensor in before.items():
            if name in scaled:
                weight, scale = e4m3.rows_in_e4m3(tensor)
                assert torch.equal(after[name].view(torch.uint8), weight.view(torch.uint8))
                assert torch.equal(after[f"{name}_scale"], scale)
            else:
                assert after[name].dtype == tensor.dtype
                assert torch.equal(after[name], tensor)
    assert picture(assembled(snapshot)).isfinite().all()


def test_the_rest_of_the_folder_is_linked_and_the_manifest_is_right(qwen: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(qwen, tmp_path / "source"))
    made = manifest.Manifest(
        model="Qwen/x", revision="a" * 40, created_by="a test", files=tuple(manifest.describe(source))
    )
    manifest.write(source, made)
    heard: list[tuple[str, int, int | None]] = []
    found = quantized(source, tmp_path / "fp8", on_progress=lambda *told: heard.append(told))

    assert (found.model, found.revision, found.profile) == ("Qwen/x", "a" * 40, "fp8")
    assert weights.damage(found) == []
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (found.folder / vae).samefile(source / vae)
    ours = {path.removeprefix("transformer/") for path in manifest.paths(found.folder)}
    assert ours == {path.removeprefix("transformer/") for path in manifest.paths(source)}
    told = manifest.read(found.folder)
    assert told is not None
    assert (told.profile, told.model) == ("fp8", "Qwen/x")
    assert [phase for phase, done, total in heard if done == total] == ["quantize", "check"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8", "source"]


def test_large_models_are_written_in_shards(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidgen.accel import quantize

    one = quantized(qwen, tmp_path / "one").folder
    monkeypatch.setattr(quantize, "LARGEST_SHARD", 4000)
    many = quantized(qwen, tmp_path / "many").folder

    index = json.loads((many / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted((many / "transformer").glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(many).values())
    for name, file in index["weight_map"].items():
        if name.endswith(".weight_scale"):
            assert index["weight_map"][name.removesuffix("_scale")] == file
    assert weights.damage(weights.require(str(many))) == []
    assert torch.equal(picture(assembled(many)), picture(assembled(one)))


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_a_lora_is_fused_before_the_weights_are_quantised(wan: Path, tmp_path: Path, component: str) -> None:
    lora = checkpoints.lora(tmp_path / "lora", assembled(wan), component)
    pipe = assembled(wan)
    diffusion.fuse(pipe, str(lora), component)
    fused = getattr(pipe, component).blocks[1].attn2.to_q
    found = quantized(wan, tmp_path / "fp8", loras={component: str(lora)})

    after = tensors_of(found.folder, component)
    weight, scale = e4m3.rows_in_e4m3(fused.weight)
    assert torch.equal(after["blocks.1.attn2.to_q.weight"].view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(after["blocks.1.attn2.to_q.weight_scale"], scale)
    assert torch.equal(after["blocks.1.attn2.to_q.bias"].float(), fused.bias)
    told = manifest.read(found.folder)
    assert told is not None
    assert f"lora.safetensors fused into its {component}" in told.created_by


def test_diffusers_alone_refuses_a_snapshot_instead_of_leaving_out_the_scales(qwen: Path, tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    snapshot = quantized(qwen, tmp_path / "fp8").folder
    with pytest.raises(ValueError, match="Unknown quantization type"):
        QwenImageTransformer2DModel.from_pretrained(snapshot / "transformer")


def test_what_cannot_be_quantised_is_said_before_anything_is_written(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FatalError, match="there already"):
        quantized(qwen, tmp_path / "there")
    with pytest.raises(FatalError, match="no transformer_2 for a LoRA"):
        quantized(qwen, tmp_path / "fp8", loras={"transformer_2": "x.safetensors"})
    with pytest.raises(FatalError, match="there is no LoRA"):
        quantized(qwen, tmp_path / "fp8", loras={"transformer": str(tmp_path / "none")})
    snapshot = quantized(qwen, tmp_path / "fp8").folder
    with pytest.raises(FatalError, match="in FP8 already"):
        quantized(snapshot, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8", "there"]


def test_what_breaks_half_way_leaves_nothing(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(e4m3, "rows_in_e4m3", full)
    with pytest.raises(FatalError, match="No space left on device") as caught:
        quantized(qwen, tmp_path / "fp8")
    assert caught.value.code == "not_written"
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_one_left_goes_when_the_next_one_begins(qwen: Path, tmp_path: Path) -> None:
    """Half a model, twenty gigabytes, lay hidden beside the snapshots for ever."""
    program = (
        "import os, signal, sys; from pathlib import Path; from vidgen import weights; "
        "from vidgen.accel import quantize as q; "
        "q.quantize(weights.require(sys.argv[1]), Path(sys.argv[2]), "
        f"least={LEAST}, on_progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    )
    path = os.pathsep.join([str(checkpoints.SHIM), *sys.path])
    killed = subprocess.run(
        [sys.executable, "-c", program, str(qwen), str(tmp_path / "fp8")], env=os.environ | {"PYTHONPATH": path},
        timeout=300, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.rglob("*.safetensors")] != []

    quantized(qwen, tmp_path / "fp8")
    assert [found.name for found in tmp_path.iterdir()] == ["fp8"]


def test_a_snapshot_of_another_making_is_refused(qwen: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    snapshot = quantized(qwen, tmp_path / "fp8").folder
    (snapshot / manifest.NAME).unlink()
    file = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".weight_scale"))
    save_file(tensors | {name: tensors[name][0, 0].reshape(())}, file)
    with pytest.raises(FatalError, match="another FP8") as caught:
        assembled(snapshot)
    assert caught.value.code == "weights_refused"
