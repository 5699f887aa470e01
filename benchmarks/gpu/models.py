"""The models at their true shape, with random weights made on the device: speed and memory do not depend on the values.

`tiny` makes the same pipelines small, to rehearse the benchmark on a CPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import checkpoints

# Qwen/Qwen-Image-Edit-2511, transformer/config.json
QWEN_TRANSFORMER = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False, "axes_dims_rope": (16, 56, 56),
    "zero_cond_t": True,
}  # fmt: skip
# Its text encoder is Qwen2.5-VL-7B.
QWEN_TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}, "rope_theta": 1e6,
}  # fmt: skip
QWEN_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
# Wan-AI/Wan2.2-I2V-A14B-Diffusers and Wan-AI/Wan2.2-TI2V-5B-Diffusers
WAN_A14B = {
    "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 36,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip
WAN_5B = WAN_A14B | {
    "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30,
}  # fmt: skip
UMT5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}

# As many tokens as the released tokenizers have: what they take to be loaded depends on it.
QWEN_MERGES = 151_387
UMT5_PIECES = 256_202

TEMPLATE_TOKENS = 64  # what the pipeline cuts off the front of the encoded prompt


@dataclass(frozen=True)
class Shape:
    """Tokens and floating-point operations of one forward (a multiply-add is two)."""

    tokens: int
    flop: float
    attention_flop: float


def qwen_shape(image_tokens: int, text_tokens: int) -> Shape:
    """One forward of the edit transformer over output and references."""
    width, layers, tokens = 24 * 128, 60, image_tokens + text_tokens
    attention = 4 * tokens**2 * width * layers
    linear = 2 * 12 * width * width * tokens * layers
    return Shape(tokens, linear + attention, attention)


def wan_shape(frames: int, height: int, width: int, text_tokens: int = 512) -> Shape:
    """One forward of an A14B expert."""
    tokens = ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
    dim, layers, inner = 40 * 128, 40, 13824
    attention = (4 * tokens**2 + 4 * tokens * text_tokens) * dim * layers
    linear = (2 * (6 * dim * dim + 2 * dim * inner) * tokens + 4 * dim * dim * text_tokens) * layers
    return Shape(tokens, linear + attention, attention)


@contextlib.contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def qwen(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Any:
    """Qwen-Image-Edit-2511 with random weights."""
    from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = checkpoints.qwen_tokenizer(0 if tiny else QWEN_MERGES)
    text, vision, transformer, vae = dict(QWEN_TEXT), dict(QWEN_VISION), dict(QWEN_TRANSFORMER), {}
    if tiny:
        text |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 2, "vocab_size": len(tokenizer),
                 "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}}  # fmt: skip
        vision |= {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
                   "fullatt_block_indexes": [1]}  # fmt: skip
        transformer |= {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
                        "axes_dims_rope": (8, 4, 4)}  # fmt: skip
        vae = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    config = checkpoints.qwen_config(tokenizer, text, vision)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with _made_on(device, dtype):
        parts = {
            "transformer": QwenImageTransformer2DModel(**transformer),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
            "vae": AutoencoderKLQwenImage(**vae),
        }
    pipe = QwenImageEditPlusPipeline(
        **{name: part.eval().requires_grad_(False) for name, part in parts.items()},
        tokenizer=tokenizer,
        processor=checkpoints.qwen_processor(tokenizer, Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()),
        scheduler=checkpoints.qwen_scheduler(),
    )
    # The tokenizer made here takes a token a letter: a template of as many tokens as the real one has.
    pipe.prompt_template_encode = "s" * TEMPLATE_TOKENS + "{}" + "eeeee"
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan(device: torch.device, dtype: torch.dtype, *, small: bool = False, tiny: bool = False) -> Any:
    """Wan2.2-I2V-A14B, or TI2V-5B where `small`, with random weights."""
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    shape, text = dict(WAN_5B if small else WAN_A14B), dict(UMT5)
    vae: dict[str, Any] = {}
    if small:
        vae = {
            "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12,
            "is_residual": True, "patch_size": 2, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
            "scale_factor_spatial": 16, "scale_factor_temporal": 4,
        }  # fmt: skip
    parts = checkpoints.wan_parts()
    if not tiny:
        parts["tokenizer"] = checkpoints.umt5_tokenizer(UMT5_PIECES)
    else:
        shape |= {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "ffn_dim": 32, "num_layers": 2}
        vae |= {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} | (
            {"decoder_base_dim": 3} if small else {}
        )
        text = {
            "vocab_size": len(parts["tokenizer"]),
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
        }
    torch.manual_seed(0)

    def expert() -> Any:
        model = WanTransformer3DModel(**shape).eval().requires_grad_(False)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:  # as from_pretrained keeps them
            if any(kept in name.split(".") for kept in model._keep_in_fp32_modules):
                tensor.data = tensor.data.float()
        return model

    with _made_on(device, dtype):
        config = UMT5Config(**text, feed_forward_proj="gated-gelu", dropout_rate=0.0)
        pipe = WanImageToVideoPipeline(
            transformer=expert(), transformer_2=None if small else expert(),
            text_encoder=UMT5EncoderModel(config).eval().requires_grad_(False),
            vae=AutoencoderKLWan(**vae).eval().requires_grad_(False),
            scheduler=parts["scheduler"], tokenizer=parts["tokenizer"], image_encoder=None, image_processor=None,
            boundary_ratio=None if small else 0.9, expand_timesteps=small,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
