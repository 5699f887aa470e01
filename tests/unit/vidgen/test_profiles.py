"""The profile follows from the memory that is found and the sizes of the model's files."""

from __future__ import annotations

import pytest

from vidgen import profiles
from vidgen.errors import FatalError
from vidgen.profiles import GIB

# The released models' bytes in bfloat16.
QWEN = {"transformer": 40_861_031_488, "text_encoder": 16_584_333_312, "vae": 253_806_246}
WAN = {
    "transformer": 28_577_000_000,
    "transformer_2": 28_577_000_000,
    "text_encoder": 11_361_920_000,
    "vae": 253_000_000,
}
WORK = 6 * GIB


@pytest.mark.parametrize(
    ("parts", "gib", "chosen"),
    [
        (QWEN, 80, "resident-bf16"), (QWEN, 47.4, "resident-fp8"), (QWEN, 23.6, "offload-fp8"),
        (WAN, 139.8, "resident-bf16"), (WAN, 79.2, "resident-bf16"), (WAN, 47.4, "resident-fp8"),
        (WAN, 23.6, "offload-fp8"),
    ],
)  # fmt: skip
def test_each_card_gets_the_fastest_profile_that_fits(parts: dict[str, int], gib: float, chosen: str) -> None:
    assert profiles.choose("auto", int(gib * GIB), parts, WORK) == chosen


def test_less_memory_never_gives_a_larger_profile() -> None:
    order = {name: place for place, name in enumerate(profiles.NAMES)}
    chosen = [order[profiles.choose("auto", gib * GIB, QWEN, WORK)] for gib in range(140, 15, -1)]
    assert chosen == sorted(chosen)


def test_a_profile_can_be_asked_for_where_it_fits() -> None:
    assert profiles.choose("offload-fp8", 80 * GIB, QWEN, WORK) == "offload-fp8"


def test_one_that_does_not_fit_is_refused_with_one_that_does() -> None:
    with pytest.raises(FatalError, match="VIDGEN_PROFILE=resident-fp8 fits") as caught:
        profiles.choose("resident-bf16", 48 * GIB, QWEN, WORK)
    assert caught.value.code == "gpu_too_small"


def test_a_gpu_that_is_too_small_is_told_what_each_needs() -> None:
    with pytest.raises(
        FatalError, match=r"has 6 GiB, .*resident-bf16 \d+ GiB, .*offload-fp8 \d+ GiB. Use a larger GPU"
    ):
        profiles.choose("auto", 6 * GIB, QWEN, WORK)


def test_a_snapshot_in_fp8_is_not_widened() -> None:
    halved = QWEN | {"transformer": QWEN["transformer"] // 2}
    assert profiles.choose("auto", 140 * GIB, halved, WORK, stored_fp8=True) == "resident-fp8"
    with pytest.raises(FatalError):
        profiles.choose("resident-bf16", 140 * GIB, halved, WORK, stored_fp8=True)
