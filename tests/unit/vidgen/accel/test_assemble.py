from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vidgen import weights
from vidgen.errors import FatalError

CPU = torch.device("cpu")
BF16 = {"default": torch.bfloat16, "vae": torch.float32, "image_encoder": torch.float32}
NAMES = ["qwen-edit", "wan2.1-i2v", "wan2.2-a14b-i2v", "wan2.2-ti2v-5b"]
PICTURE = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))


@pytest.fixture(autouse=True)
def small_references(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models, then what imports diffusers: torchvision needs the shim that building them installs."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 32 * 32)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 56 * 56)


def kind(folder: Path) -> Any:
    from diffusers import QwenImageEditPlusPipeline, WanImageToVideoPipeline

    return QwenImageEditPlusPipeline if "qwen" in folder.name else WanImageToVideoPipeline


def found(folder: Path) -> weights.Weights:
    return weights.require(str(folder))


def assembled(folder: Path, dtypes: dict[str, torch.dtype] | None = None, **options: Any) -> Any:
    from vidgen.accel import assemble

    dtypes = dtypes or {"default": torch.float32}
    return assemble.assemble(kind(folder), found(folder), CPU, dtypes, arithmetic=False, **options)


def picture(pipe: Any) -> torch.Tensor:
    """What a pipeline makes of one picture in two steps."""
    common: dict[str, Any] = {
        "image": PICTURE, "prompt": "a cat", "negative_prompt": "a dog", "num_inference_steps": 2, "width": 32,
        "height": 32, "generator": torch.Generator("cpu").manual_seed(3), "output_type": "pt",
    }  # fmt: skip
    if type(pipe).__name__ == "QwenImageEditPlusPipeline":
        made: torch.Tensor = pipe(**common, true_cfg_scale=2.0).images
    else:
        made = pipe(**common, num_frames=5).frames
    return made


def models_of(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def everything_in(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, persistent buffers and the others, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("dtypes", [{"default": torch.float32}, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_from_pretrained_makes_bit_for_bit(
    tiny_models: dict[str, Path], name: str, dtypes: dict[str, torch.dtype]
) -> None:
    folder = tiny_models[name]
    if name == "qwen-edit":
        dtypes = {"default": dtypes["default"]}  # its VAE takes no other
    wanted = kind(folder).from_pretrained(
        folder, dtype=dtypes, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    wanted.set_progress_bar_config(disable=True)
    made = assembled(folder, dtypes)

    assert models_of(made).keys() == models_of(wanted).keys()
    for part, model in models_of(wanted).items():
        ours, theirs = everything_in(models_of(made)[part]), everything_in(model)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key].dtype, ours[key].device) == (tensor.dtype, tensor.device), key
            assert torch.equal(ours[key], tensor), key
        assert models_of(made)[part].training == model.training
    assert made.config.keys() == wanted.config.keys()
    assert torch.equal(picture(made), picture(wanted))


def test_what_is_had_instead_is_not_loaded(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models["qwen-edit"], tmp_path / "qwen")
    wanted = picture(assembled(folder))
    for file in (folder / "tokenizer").iterdir():
        file.write_bytes(b"{}")
    with pytest.raises(FatalError):
        assembled(folder)
    made = assembled(folder, instead={"tokenizer": lambda others: others["processor"].tokenizer})
    assert made.tokenizer is made.processor.tokenizer
    assert torch.equal(picture(made), wanted)


def test_a_model_in_shards_is_read_from_all_of_them(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models["wan2.2-a14b-i2v"], tmp_path / "wan")
    wanted = picture(assembled(folder))
    for part, kind_of in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        into_shards(folder / part, kind_of)
    assert torch.equal(picture(assembled(folder)), wanted)


def into_shards(part: Path, stem: str) -> None:
    single = part / f"{stem}.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, part / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(some, shard)
    (part / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_tied_embeddings_of_the_text_encoder_are_one(tiny_models: dict[str, Path]) -> None:
    encoder = assembled(tiny_models["wan2.1-i2v"]).text_encoder
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_the_phases_are_told(tiny_models: dict[str, Path]) -> None:
    told: dict[str, float] = {}
    assembled(tiny_models["wan2.2-ti2v-5b"], on_phase=told.__setitem__)
    assert told.keys() == {"read", "build"}
    assert min(told.values()) > 0


@pytest.mark.parametrize(("part", "stem"), [("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_a_model_that_lacks_a_tensor_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path, part: str, stem: str
) -> None:
    folder = shutil.copytree(tiny_models["wan2.2-ti2v-5b"], tmp_path / "wan")
    file = folder / part / f"{stem}.safetensors"
    tensors = load_file(file)
    gone = next(name for name in sorted(tensors) if "norm" in name)
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FatalError, match="lacks 1 of the model's tensors") as caught:
        assembled(folder)
    assert caught.value.code == "weights_missing"
    assert gone in caught.value.message


def test_a_tensor_that_no_model_asks_for_is_left_out(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models["wan2.2-ti2v-5b"], tmp_path / "wan")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    assert torch.equal(picture(assembled(folder)), picture(assembled(tiny_models["wan2.2-ti2v-5b"])))


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model", "text_encoder/model"])
def test_a_file_that_is_cut_short_is_named(tiny_models: dict[str, Path], tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(tiny_models["wan2.2-ti2v-5b"], tmp_path / "wan")
    file = folder / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FatalError, match=r"\.safetensors is damaged") as caught:
        assembled(folder)
    assert caught.value.code == "weights_missing"


def test_a_model_of_another_shape_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models["wan2.2-ti2v-5b"], tmp_path / "wan")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ffn_dim": 64}))
    with pytest.raises(FatalError, match="cannot be loaded"):
        assembled(folder)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_fp8_of_another_kind_is_refused(tiny_models: dict[str, Path], tmp_path: Path, part: str) -> None:
    """Its scales have another name, and would be left out without a word: the picture is another one."""
    folder = shutil.copytree(tiny_models["qwen-edit"], tmp_path / "qwen")
    [file] = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}
    file.unlink()  # which may be mapped
    save_file(tensors, file)
    with pytest.raises(FatalError, match=f"{part} holds {name} in FP8 without the scales") as caught:
        assembled(folder)
    assert caught.value.code == "weights_refused"


def test_a_model_that_says_it_is_quantised_in_another_way_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_models["qwen-edit"], tmp_path / "qwen")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(
        FatalError, match=r"transformer holds weights that are quantised in another way .*'fp8'"
    ) as caught:
        assembled(folder)
    assert caught.value.code == "weights_refused"


def test_what_is_switched_off_in_transformers_is_still_called_so() -> None:
    import transformers.modeling_utils

    assert inspect.isfunction(transformers.modeling_utils.caching_allocator_warmup)
