"""The profile follows from the memory that is found and the sizes of the model's files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize("number", range(3))
def test_a_profile_fits_where_its_last_byte_does(number: int) -> None:
    need = profiles.needs(WAN, WORK)[number]
    assert profiles.choose("auto", need.bytes, WAN, WORK) == need.name
    if number < 2:
        assert profiles.choose("auto", need.bytes - 1, WAN, WORK) == profiles.NAMES[number + 1]
    else:
        with pytest.raises(FatalError):
            profiles.choose("auto", need.bytes - 1, WAN, WORK)


def test_weights_that_stream_take_a_part_of_their_largest_component() -> None:
    streams = profiles.needs(QWEN, WORK)[-1]
    assert streams.bytes == QWEN["transformer"] // 16 + QWEN["vae"] + WORK + profiles.RESERVE


def test_where_weights_stream_there_is_room_for_the_vae_which_stays() -> None:
    """That of TI2V-5B, in float32, is four times what was counted for the whole model."""
    block, outside, vae = int(0.153 * GIB), int(0.168 * GIB), int(2.625 * GIB)
    parts = {"transformer": 9_999_000_000, "text_encoder": WAN["text_encoder"], "vae": vae}
    streams = profiles.needs(parts, WORK)[-1]
    assert streams.bytes >= 2 * block + outside + vae + WORK + profiles.RESERVE


def test_two_models_share_what_the_one_that_sees_less_sees() -> None:
    large, small = demands(139.8), demands(79.2)
    for mixed in ([large[0], small[1]], [small[0], large[1]]):
        assert profiles.share("auto", mixed) == profiles.share("auto", small)


def test_a_profile_can_be_asked_for_where_it_fits() -> None:
    assert profiles.choose("offload-fp8", 80 * GIB, QWEN, WORK) == "offload-fp8"


def test_one_that_does_not_fit_is_refused_with_one_that_does() -> None:
    with pytest.raises(FatalError, match="VIDGEN_PROFILE=resident-fp8 fits") as caught:
        profiles.choose("resident-bf16", 48 * GIB, QWEN, WORK)
    assert caught.value.code == "gpu_too_small"


def test_a_snapshot_in_fp8_has_no_wide_profile_however_large_the_gpu_is() -> None:
    with pytest.raises(FatalError, match=r"VIDGEN_PROFILE=resident-bf16 cannot be had .* stored in FP8") as caught:
        profiles.choose("resident-bf16", 140 * GIB, QWEN, WORK, stored_fp8=True)
    assert caught.value.code == "settings"


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


# ── two models on one GPU ────────────────────────────────────────────────────────────────────────────────────────


def demands(gib: float, *, stored_fp8: bool = False, bound_by_bus: bool = False) -> list[profiles.Demand]:
    return [
        profiles.Demand("qwen", int(gib * GIB), QWEN, 5 * GIB, stored_fp8, bound_by_bus),
        profiles.Demand("wan", int(gib * GIB), WAN, 6 * GIB),
    ]


def test_what_a_model_that_streams_leaves_is_for_weights_that_better_stay() -> None:
    qwen, wan = demands(23.6, bound_by_bus=True)
    assert qwen.room("resident-fp8") == 0
    left = qwen.room("offload-fp8")
    assert left == qwen.total - profiles.needs(QWEN, qwen.work)[-1].bytes - qwen.work // 2
    assert wan.room("offload-fp8") == 0  # its weights are there in time
    smaller = profiles.Demand("qwen", 7 * GIB, QWEN, 5 * GIB, bound_by_bus=True)
    assert smaller.room("offload-fp8") == 0

    plan = profiles.share("auto", [qwen, wan])
    assert (plan.profiles, plan.takes_turns) == (("offload-fp8",) * 2, False)
    assert 0 < plan.room < left  # Wan has its places there too, and the larger task counts
    held = sum(one.held()["offload-fp8"] for one in (qwen, wan))
    assert plan.room + held + wan.work * 3 // 2 + profiles.RESERVE == qwen.total


def test_models_that_take_turns_and_stream_have_the_room_that_each_has_alone() -> None:
    # Of which two blocks alone are 10 GiB.
    edit, video = (
        profiles.Demand(name, 22 * GIB, {"transformer": 160 * GIB}, 5 * GIB, stored_fp8=True, bound_by_bus=bound)
        for name, bound in (("edit", True), ("video", False))
    )
    plan = profiles.share("auto", [edit, video])
    assert plan == profiles.Plan(("offload-fp8",) * 2, takes_turns=True, room=edit.room("offload-fp8"))
    assert plan.room == 3 * GIB


@pytest.mark.parametrize(
    ("gib", "chosen", "takes_turns"),
    [
        (139.8, ("resident-bf16", "resident-bf16"), False), (94, ("resident-fp8", "resident-fp8"), False),
        (79.2, ("resident-bf16", "resident-bf16"), True), (47.4, ("resident-fp8", "resident-fp8"), True),
        (23.6, ("offload-fp8", "offload-fp8"), False),
    ],
)  # fmt: skip
def test_two_models_stay_where_they_fit_and_else_take_turns(
    gib: float, chosen: tuple[str, ...], takes_turns: bool
) -> None:
    assert profiles.share("auto", demands(gib)) == profiles.Plan(chosen, takes_turns)


def test_a_snapshot_in_fp8_stays_beside_a_model_in_bfloat16() -> None:
    plan = profiles.share("auto", demands(139.8, stored_fp8=True))
    assert plan == profiles.Plan(("resident-fp8", "resident-bf16"), takes_turns=False)


def test_the_profile_that_is_asked_for_is_that_of_all_models() -> None:
    assert profiles.share("resident-bf16", demands(79.2)) == profiles.Plan(("resident-bf16",) * 2, takes_turns=True)
    assert profiles.share("offload-fp8", demands(139.8)) == profiles.Plan(("offload-fp8",) * 2, takes_turns=False)


def test_a_gpu_that_is_too_small_for_one_of_them_is_told_what_they_need_together() -> None:
    with pytest.raises(FatalError, match=r"qwen: this GPU has 6 GiB, .*qwen and wan need 1\d\d GiB") as caught:
        profiles.share("auto", demands(6))
    assert caught.value.code == "gpu_too_small"


sizes = st.integers(min_value=0, max_value=60 * GIB)
models = st.builds(
    lambda transformer, others, work, stored_fp8: ({"transformer": transformer, "vae": others}, work, stored_fp8),
    sizes, st.integers(0, 20 * GIB), st.integers(GIB, 8 * GIB), st.booleans(),
)  # fmt: skip


@given(st.lists(models, min_size=2, max_size=3), st.integers(10 * GIB, 200 * GIB))
def test_every_plan_fits_and_nothing_faster_does(drawn: list[Any], total: int) -> None:
    asked = [profiles.Demand("m", total, parts, work, stored_fp8) for parts, work, stored_fp8 in drawn]
    try:
        plan = profiles.share("auto", asked)
    except FatalError:
        # Then one of them does not even fit alone.
        assert any(min(each.held().values()) + each.work + profiles.RESERVE > total for each in asked)
        return
    work = max(each.work for each in asked) + profiles.RESERVE
    held = [each.held()[name] for each, name in zip(asked, plan.profiles, strict=True)]
    alone = [profiles.choose("auto", total, each.parts, each.work, stored_fp8=each.stored_fp8) for each in asked]
    if plan.takes_turns:
        assert list(plan.profiles) == alone
        assert sum(held) + work > total
        assert sum(each.held()["resident-fp8"] for each in asked) + work > total
    else:
        assert sum(held) + work <= total


@given(st.lists(models, min_size=2, max_size=2), st.integers(10 * GIB, 200 * GIB), st.integers(0, 100 * GIB))
def test_models_that_stay_on_a_gpu_stay_on_a_larger_one_unless_they_are_faster_there(
    drawn: list[Any], total: int, more: int
) -> None:
    def plan(of: int) -> profiles.Plan | None:
        try:
            return profiles.share("auto", [profiles.Demand("m", of, *each) for each in drawn])
        except FatalError:
            return None

    small, large = plan(total), plan(total + more)
    if small is not None:
        assert large is not None
        order = profiles.NAMES.index
        if small.profiles[0].startswith("resident") and small.profiles[1].startswith("resident"):
            assert not (large.takes_turns and not small.takes_turns)
        if small.takes_turns == large.takes_turns:
            # Of one that streams beside one in bfloat16, both may come to stay in FP8: the slowest is what counts.
            assert max(map(order, large.profiles)) <= max(map(order, small.profiles))
