"""The VAEs with less to do give what the stock ones do, on tiny ones: fused up to rounding, at rest to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vidgen.accel import autoencoder

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def wan(**changes: Any) -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(1)
    config = {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    return AutoencoderKLWan(**config | {"temperal_downsample": [False, True, True]} | changes).eval()


def wan_5b() -> Any:
    return wan(decoder_base_dim=16, in_channels=12, out_channels=12, is_residual=True, patch_size=2,
               scale_factor_spatial=16)  # fmt: skip


def qwen() -> Any:
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(1)
    return AutoencoderKLQwenImage(base_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval()


def clip(frames: int, batch: int = 1) -> torch.Tensor:
    """A picture, and then frames of zeros: what a video starts from."""
    torch.manual_seed(2)
    made = torch.zeros(batch, 3, frames, 16, 16)
    made[:, :, 0] = torch.rand(batch, 3, 16, 16) * 2 - 1
    return made


def encoded(vae: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = vae.encode(x).latent_dist.mode()
    return found


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("make", [wan, wan_5b, qwen])
@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (9, 2)])
def test_fused_blocks_encode_and_decode_what_the_stock_ones_do(make: Make, frames: int, batch: int) -> None:
    stock = make()
    fused = copy.deepcopy(stock)
    assert autoencoder.fuse_blocks(fused) == 16
    x = clip(frames, batch)
    latents = torch.randn(encoded(stock, x).shape)
    assert error(encoded(fused, x), encoded(stock, x)) < 1e-5
    assert error(fused.decode(latents).sample, stock.decode(latents).sample) < 1e-5


def test_a_block_whose_channels_do_not_suit_stays_as_it_is() -> None:
    vae = wan(base_dim=3, dim_mult=[1, 1, 1, 1])
    assert autoencoder.fuse_blocks(vae) == 0
    assert encoded(vae, clip(5)).isfinite().all()


@pytest.mark.parametrize("make", [wan, wan_5b])
@pytest.mark.parametrize("fuses", [False, True])
def test_frames_that_stand_still_are_encoded_to_the_last_bit_with_fewer_runs_of_the_layers(
    make: Make, fuses: bool
) -> None:
    stock = make()
    if fuses:
        autoencoder.fuse_blocks(stock)
    resting = make()
    if fuses:
        autoencoder.fuse_blocks(resting)
    runs = [0]
    layer = resting.encoder.down_blocks[0]
    forward = layer.forward

    def counted(*args: Any, **options: Any) -> Any:
        runs[0] += 1
        return forward(*args, **options)

    layer.forward = counted
    autoencoder.let_rest(resting)
    x = clip(81)
    assert torch.equal(encoded(resting, x), encoded(stock, x))
    assert 2 < runs[0] < 10  # of 21 chunks
    assert autoencoder.rests(resting)
    assert not autoencoder.rests(stock)


def test_frames_that_move_again_wake_the_layers() -> None:
    stock = wan()
    resting = copy.deepcopy(stock)
    autoencoder.let_rest(resting)
    x = clip(81)
    x[:, :, 60] = 0.5
    assert torch.equal(encoded(resting, x), encoded(stock, x))


def test_nothing_is_kept_behind_an_encode_and_the_next_clip_is_its_own() -> None:
    stock = wan()
    resting = copy.deepcopy(stock)
    autoencoder.let_rest(resting)
    first, second = clip(33), clip(33) * 0.5
    encoded(resting, first)
    layers = [resting.encoder.conv_in, *resting.encoder.down_blocks, resting.encoder.mid_block]
    keepers = [layer.forward.__self__ for layer in layers]
    assert all(keeper._made is None and keeper._given is None for keeper in keepers)
    assert torch.equal(encoded(resting, second), encoded(stock, second))


def test_tiles_are_encoded_as_the_stock_ones() -> None:
    stock = wan()
    resting = copy.deepcopy(stock)
    autoencoder.let_rest(resting)
    for vae in (stock, resting):
        vae.enable_tiling(8, 8, 8, 8)
    assert torch.equal(encoded(resting, clip(33)), encoded(stock, clip(33)))
