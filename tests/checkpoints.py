"""Builds tiny checkpoints with random weights, of the same architectures as the released models, without any network.

`python tests/checkpoints.py FOLDER` writes one folder per model of `MODELS`, about a megabyte each. Their pictures are
noise; all else is real: the same pipelines load and run them, in a fraction of a second on a CPU, at any size.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHIM = Path(__file__).parent / "shim"

QWEN_SPECIAL = (
    "endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)  # fmt: skip


def install_shim() -> None:
    """Let the Qwen processor find torchvision in this process too; see tests/shim."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("vidgen_torchvision_shim", SHIM / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    shim.install()


def qwen_edit(folder: Path) -> None:
    """Qwen-Image-Edit-2511: a byte-level tokenizer, a two-layer vision-language encoder, a two-block transformer."""
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = qwen_tokenizer()
    torch.manual_seed(0)
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    config = qwen_config(
        tokenizer,
        text={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1e6,
        },
        vision={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "fullatt_block_indexes": [1],
        },
    )
    pipe = QwenImageEditPlusPipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
            zero_cond_t=True,  # as in 2511
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        processor=qwen_processor(
            tokenizer,
            Qwen2VLImageProcessor(size={"shortest_edge": 28**2, "longest_edge": 56**2}, **patches),
            Qwen2VLVideoProcessor(**patches),
        ),
        scheduler=qwen_scheduler(),
    )
    pipe.save_pretrained(folder)


def wan21_i2v(folder: Path) -> None:
    """Wan 2.1: one transformer, which also reads a CLIP image encoder."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    parts = wan_parts()
    vision = CLIPVisionConfig(
        hidden_size=4, num_hidden_layers=2, num_attention_heads=2, image_size=32, intermediate_size=16, patch_size=8
    )
    WanImageToVideoPipeline(
        **parts,
        vae=_wan_vae(),
        transformer=_wan_transformer(36, 16, image_dim=4, added_kv_proj_dim=24),
        image_encoder=CLIPVisionModel(vision),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
    ).save_pretrained(folder)


def wan22_a14b(folder: Path) -> None:
    """Wan 2.2 A14B: two experts, one above and one below a boundary of noise."""
    from diffusers import WanImageToVideoPipeline

    parts = wan_parts()
    WanImageToVideoPipeline(
        **parts,
        vae=_wan_vae(),
        transformer=_wan_transformer(36, 16),
        transformer_2=_wan_transformer(36, 16),
        boundary_ratio=0.9,
    ).save_pretrained(folder)


def wan22_ti2v(folder: Path) -> None:
    """Wan 2.2 TI2V-5B: a VAE of 16 × 16 pixels, no image channels, and published as a `WanPipeline`."""
    from diffusers import WanPipeline

    parts = wan_parts()
    vae = _wan_vae(
        z_dim=48,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )
    WanPipeline(**parts, vae=vae, transformer=_wan_transformer(48, 48), expand_timesteps=True).save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "qwen-edit": qwen_edit,
    "wan2.1-i2v": wan21_i2v,
    "wan2.2-a14b-i2v": wan22_a14b,
    "wan2.2-ti2v-5b": wan22_ti2v,
}


def build(folder: Path, *names: str) -> dict[str, Path]:
    """Write the named models (all by default) into `folder`, one folder each."""
    install_shim()
    built = {}
    for name in names or MODELS:
        built[name] = folder / name
        MODELS[name](built[name])
    return built


def lora(folder: Path, pipe: Any, component: str = "transformer") -> Path:
    """Write a LoRA for a pipeline's transformer, strong enough to be seen in the pixels."""
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = getattr(pipe, component)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]))
    torch.manual_seed(1)
    state = {key: torch.randn_like(value) for key, value in get_peft_model_state_dict(transformer).items()}
    type(pipe).save_lora_weights(folder, transformer_lora_layers=state, weight_name="lora.safetensors")
    return folder / "lora.safetensors"


def qwen_tokenizer(merges: int = 0) -> Any:
    """A token for each byte, and Qwen's special tokens; and so many of merged bytes, of which no ASCII has any."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rare = [letter for letter in alphabet if 0xA0 < ord(letter) < 0x100]
    pairs = list(itertools.product(rare, rare))
    merged = list(itertools.islice(
        itertools.chain(pairs, itertools.product(map("".join, pairs), rare)), merges
    ))  # fmt: skip
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([*alphabet, *map("".join, merged)])},
        merges=merged,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[f"<|{token}|>" for token in QWEN_SPECIAL],
    )
    tokenizer.padding_side = "left"
    return tokenizer


def qwen_config(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """The vision-language encoder of these sizes, with the tokenizer's special tokens."""
    from transformers import Qwen2_5_VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for token in QWEN_SPECIAL}
    ends = {"pad_token_id": ids["endoftext"], "bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"]}
    return Qwen2_5_VLConfig(
        text_config=text | ends,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        vision_token_id=ids["vision_pad"],
    )


def qwen_processor(tokenizer: Any, images: Any, videos: Any) -> Any:
    from transformers import Qwen2VLProcessor

    return Qwen2VLProcessor(image_processor=images, video_processor=videos, tokenizer=tokenizer)


def qwen_scheduler() -> Any:
    """The released scheduler_config.json."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def umt5_tokenizer(pieces: int = 0) -> Any:
    """A token for each letter of ASCII; and so many of two Chinese ones."""
    from transformers import T5Tokenizer

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    words += [(chr(code), -3.0) for code in range(33, 127)]
    rare = [chr(code) for code in range(0x4E00, 0x9000)]
    words += [("".join(pair), -9.0) for pair in itertools.islice(itertools.product(rare, rare), pieces)]
    return T5Tokenizer(vocab=words, extra_ids=0)


def wan_parts() -> dict[str, Any]:
    """Tokenizer, text encoder and scheduler: alike in every Wan."""
    import torch
    from diffusers import UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = umt5_tokenizer()
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(config),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    }


def _wan_vae(**more: Any) -> Any:
    from diffusers import AutoencoderKLWan

    settings = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    return AutoencoderKLWan(**settings | more)


def _wan_transformer(in_channels: int, out_channels: int, **more: Any) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
        **more,
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/checkpoints.py FOLDER")
    for path in build(Path(sys.argv[1])).values():
        sys.stdout.write(f"{path}\n")
