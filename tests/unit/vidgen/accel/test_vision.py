"""The vision tower with one attention call per layer sees what transformers' own does, on tiny models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vidgen.accel import streaming, vision

pytestmark = pytest.mark.timeout(600)  # importing transformers takes minutes on a machine that is busy

# Patches in each direction: a window is 8 x 8 of them.
GRIDS = {
    "one window": [(4, 6)],
    "one image of many windows": [(28, 28)],
    "windows that are cut off": [(10, 22)],
    "several images": [(8, 8), (28, 12), (2, 30)],
    "equal images": [(12, 12), (12, 12)],
}


@pytest.fixture(scope="module")
def stock(tiny_models: dict[str, Path]) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    found = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_models["qwen-edit"] / "text_encoder")
    return found.eval().requires_grad_(False)


@pytest.fixture
def fused(stock: Any) -> Any:
    made = copy.deepcopy(stock)
    assert vision.fuse_segments(made) == 2
    return made


@pytest.fixture
def reads(fused: Any) -> Iterator[list[int]]:
    """Grows with each run of the vision tower."""
    seen: list[int] = []
    hook = fused.model.visual.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    hook.remove()


def images(sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    patches = sum(height * width for height, width in sizes)
    grid = torch.tensor([(1, height, width) for height, width in sizes])
    return {"pixel_values": torch.randn(patches, 3 * 2 * 14 * 14), "image_grid_thw": grid}


def seen_by(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat(model.model.get_image_features(**given, return_dict=True).pooler_output)


def embedded(model: Any, given: dict[str, torch.Tensor], text: int = 5) -> torch.Tensor:
    """What the pipeline takes: the last hidden state of a text behind its images."""
    image = model.config.image_token_id
    tokens = int(given["image_grid_thw"].prod(-1).sum()) // 4
    ids = torch.tensor([[text, *[image] * tokens, text, text + 1]])
    out = model(**given, input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    found: torch.Tensor = out.hidden_states[-1]
    return found


@pytest.mark.parametrize("sizes", GRIDS.values(), ids=list(GRIDS))
def test_one_call_per_layer_sees_what_a_call_per_window_does(
    stock: Any, fused: Any, sizes: list[tuple[int, int]]
) -> None:
    given = images(sizes)
    torch.testing.assert_close(seen_by(fused, given), seen_by(stock, given), atol=1e-5, rtol=0)
    torch.testing.assert_close(embedded(fused, given), embedded(stock, given), atol=1e-5, rtol=0)


def test_windows_and_images_are_kept_apart(stock: Any, fused: Any) -> None:
    """Attention without the mask would be told from attention with it: the sizes above are no accident."""
    given = images(GRIDS["several images"])
    for block in fused.model.visual.blocks:
        block.attn._masks.of = lambda bounds, tokens: None
    assert (seen_by(fused, given) - seen_by(stock, given)).abs().max() > 1e-4


def test_a_mask_is_made_once_for_all_layers_and_gone_behind_them(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    bucketize = torch.bucketize

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        made.append(args[0])
        return bucketize(*args, **options)

    monkeypatch.setattr(torch, "bucketize", counted)
    blocks = fused.model.visual.blocks
    blocks.extend([copy.deepcopy(block) for block in blocks])
    for block in blocks:
        block.attn._masks = blocks[0].attn._masks
    seen_by(fused, images(GRIDS["several images"]))
    # Of the windows and of the images.
    assert len(made) == 2
    assert len(blocks[0].attn._masks) == 0


def test_one_segment_needs_no_mask() -> None:
    assert vision.Masks().of(torch.tensor([0, 12], dtype=torch.int32), 12) is None


def test_the_weights_stay_where_they_are(stock: Any, fused: Any) -> None:
    assert list(fused.state_dict()) == list(stock.state_dict())


def test_another_text_encoder_is_left_alone() -> None:
    block = nn.Module()
    block.attn = nn.Linear(2, 2)
    encoder = nn.Sequential(block)
    assert vision.fuse_segments(encoder) == 0
    assert type(block.attn) is nn.Linear
    with vision.reading_once(encoder):
        pass


def test_the_same_pixels_are_read_once_for_two_prompts(fused: Any, reads: list[int]) -> None:
    given = images(GRIDS["several images"])
    wanted = [embedded(fused, given, text) for text in (5, 9)]
    assert len(reads) == 2
    with vision.reading_once(fused):
        found = [embedded(fused, given, text) for text in (5, 9)]
    assert len(reads) == 3
    assert all(map(torch.equal, found, wanted))


def test_other_pixels_are_read_anew(fused: Any, reads: list[int]) -> None:
    given = images(GRIDS["one window"])
    others = given | {"pixel_values": given["pixel_values"] + 1}
    with vision.reading_once(fused):
        first, second = seen_by(fused, given), seen_by(fused, others)
    assert len(reads) == 2
    assert not torch.equal(first, second)


def test_nothing_is_kept_behind_a_task_also_if_it_fails(fused: Any, reads: list[int]) -> None:
    given = images(GRIDS["one window"])
    with pytest.raises(KeyError), vision.reading_once(fused):
        raise KeyError(seen_by(fused, given))
    assert "get_image_features" not in vars(fused.model)
    seen_by(fused, given)
    assert len(reads) == 2


def test_what_streams_reads_them_once_too(fused: Any, reads: list[int]) -> None:
    given = images(GRIDS["one window"])
    wanted = seen_by(fused, given)
    reads.clear()
    streaming.Stream(fused, torch.device("cpu"), stays=False)
    with vision.reading_once(fused):
        assert torch.equal(seen_by(fused, given), wanted)
        assert torch.equal(seen_by(fused, given), wanted)
    assert len(reads) == 1


def test_an_encoder_alone_goes_without_the_kernels_that_plan_for_each_size() -> None:
    class Encoder(nn.Module):
        def forward(self, tokens: torch.Tensor, *, fails: bool = False) -> bool:
            if fails:
                raise ValueError("of the encoder's own")
            return bool(torch.backends.cuda.cudnn_sdp_enabled())

    encoder = Encoder()
    vision.attend_without_plans(encoder)
    assert not encoder(torch.zeros(1))
    with pytest.raises(ValueError, match="own"):
        encoder(torch.zeros(1), fails=True)
    assert torch.backends.cuda.cudnn_sdp_enabled()
