"""Forwards that graphs answer: what they compute on padded text, which share a graph, and when graphs go.

What only a GPU has, recording and replaying, is in tests/gpu/test_graphs.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vidgen.accel import blocks, fp8, graphs, speed
from vidgen.accel.kernels import flash3

PICTURES = ((1, 4, 6), (1, 4, 6))
Make = Callable[..., Any]


def inputs(tokens: int, pictures: graphs.Pictures = PICTURES, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(tokens)
    patches = sum(frames * height * width for frames, height, width in pictures)
    fields = {
        "hidden_states": torch.randn(1, patches, 16), "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": torch.randn(1, tokens, 16), "encoder_hidden_states_mask": None, "guidance": None,
        "img_shapes": [list(pictures)], "attention_kwargs": {}, "return_dict": False,
    }  # fmt: skip
    return fields | changes


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture
def make(tiny_models: dict[str, Path]) -> Make:
    from diffusers import QwenImageTransformer2DModel

    def made(*, zero_cond_t: bool = False, **options: Any) -> tuple[Any, graphs.Graphs]:
        torch.manual_seed(4)
        config = dict(QwenImageTransformer2DModel.load_config(tiny_models["qwen-edit"] / "transformer"))
        model: Any = QwenImageTransformer2DModel.from_config(config | {"zero_cond_t": zero_cond_t})
        blocks.fuse_projections(model.eval().requires_grad_(False))
        return model, graphs.Graphs(**options)

    return made


class Recorded:
    """Stands in for CUDA's graphs: the forwards' own arithmetic, and how often one was recorded and replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded = self.replayed = 0
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
        monkeypatch.setattr(graphs, "records_on", lambda device: True)
        monkeypatch.setattr(graphs.Forward, "record", lambda forward, pool, stream: self._record(forward))

    def _record(self, forward: Any) -> None:
        self.recorded += 1
        forward._made = torch.empty_like(forward.computed())
        forward._graph = types.SimpleNamespace(replay=lambda: self._replay(forward))

    def _replay(self, forward: Any) -> None:
        self.replayed += 1
        forward._made.copy_(forward.computed())


# ── what is computed ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65])
def test_padded_text_changes_nothing(make: Make, tokens: int, zero_cond_t: bool) -> None:
    model, found = make(zero_cond_t=zero_cond_t)
    wanted = model(**inputs(tokens))[0]
    graphs.predict(found, model)
    assert error(model(**inputs(tokens))[0], wanted) < 1e-6


@pytest.mark.parametrize(("rows", "graphed"), [(3 + 127, 0), (3 + 128, 1)])
def test_a_text_whose_pads_go_beyond_the_table_of_rotations_is_the_models_own(
    make: Make, rows: int, graphed: int
) -> None:
    """The table is cut short there, and a kernel would read behind it."""
    model, found = make()
    rotations = model.pos_embed
    rotations.pos_freqs, rotations.neg_freqs = rotations.pos_freqs[:rows], rotations.neg_freqs[-rows:]
    wanted = model(**inputs(66))[0]
    graphs.predict(found, model)
    assert error(model(**inputs(66))[0], wanted) < 1e-6
    assert len(found._forwards) == graphed


@pytest.mark.parametrize("narrow", [False, True])
def test_nor_does_it_in_fp8_blocks_and_in_attention_of_8_bits(
    make: Make, monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    def in_float32(self: fp8.Fp8Linear, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight = self.weight.float() * self.weight_scale
        return torch.nn.functional.linear(rows.float() * scale, weight, self.bias).to(dtype)

    monkeypatch.setattr(fp8.Fp8Linear, "multiply", in_float32)
    model, found = make(zero_cond_t=True)
    fp8.quantise(model, arithmetic=True, least=16)
    blocks.fuse_feed_forwards(model)
    assert blocks.fuse_norms(model) == 2
    blocks.narrow_attention(model, narrow)
    wanted = model(**inputs(7))[0]
    graphs.predict(found, model)
    # The order of the sums differs, so a number here and there is rounded to its other neighbour.
    assert error(model(**inputs(7))[0], wanted) < 0.02


def test_what_the_pads_hold_is_seen_by_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = make()
    graphs.predict(found, model)
    wanted = model(**inputs(7))[0]
    filled = graphs.Prediction.fill

    def with_noise(self: Any, given: dict[str, Any]) -> None:
        filled(self, given)
        self._text[:, 7:].normal_(std=100)

    monkeypatch.setattr(graphs.Prediction, "fill", with_noise)
    assert torch.equal(model(**inputs(7))[0], wanted)


def test_a_shorter_text_finds_nothing_of_the_longer_one_before(make: Make) -> None:
    model, found = make()
    graphs.predict(found, model)
    wanted = model(**inputs(7))[0]
    model(**inputs(50))
    assert torch.equal(model(**inputs(7))[0], wanted)


@given(st.integers(1, 40), st.integers(0, 40))
def test_attention_sees_so_many_keys_as_it_is_told(seen: int, behind: int) -> None:
    torch.manual_seed(seen)
    query, key, value = (torch.randn(2, seen + behind, 3, 8) for _ in range(3))
    lengths = torch.tensor([seen, 1], dtype=torch.int32)
    found = flash3.attended_within(query, key, value, lengths)
    for index, length in enumerate(lengths):
        short = (part[index : index + 1, :length].transpose(1, 2) for part in (key, value))
        wanted = torch.nn.functional.scaled_dot_product_attention(query[index : index + 1].transpose(1, 2), *short)
        assert torch.allclose(found[index], wanted.transpose(1, 2)[0], atol=1e-5)


# ── which forwards share a graph ─────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_texts_share_a_graph_within_a_range_that_holds_them(tokens: int, other: int) -> None:
    one, two = (graphs.kind_of(inputs(count)) for count in (tokens, other))
    assert one is not None
    assert two is not None
    assert 0 <= one.text - tokens < graphs.RANGE
    assert (one == two) == ((tokens - 1) // graphs.RANGE == (other - 1) // graphs.RANGE)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_states": torch.zeros(2, 48, 16)},
        {"encoder_hidden_states_mask": torch.ones(1, 7)},
        {"guidance": torch.ones(1)},
        {"attention_kwargs": {"scale": 0.5}},
        {"additional_t_cond": None},
        {"controlnet_block_samples": []},
    ],
)
def test_what_a_graph_does_not_know_is_the_models_own(changes: dict[str, Any]) -> None:
    assert graphs.kind_of(inputs(7, **changes)) is None


def test_a_forward_that_is_the_models_own_gets_there(make: Make) -> None:
    model, found = make()
    given = inputs(7, encoder_hidden_states_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 0]]))
    wanted = model(**given)[0]
    graphs.predict(found, model)
    assert torch.equal(model(**given)[0], wanted)
    assert torch.equal(model(**given | {"return_dict": True}).sample, wanted)


# ── when graphs come, and when they go ───────────────────────────────────────────────────────────────────────────────


def test_a_graph_is_recorded_at_the_second_forward_and_answers_from_then_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = make()
    wanted = [model(**inputs(tokens))[0] for tokens in (7, 9, 11)]
    graphs.predict(found, model)
    recorded = Recorded(monkeypatch)
    made = [model(**inputs(tokens))[0] for tokens in (7, 9, 11)]
    assert (recorded.recorded, recorded.replayed, len(found)) == (1, 2, 1)
    # Each is kept: the next forward does not write over the one before.
    assert max(error(one, other) for one, other in zip(made, wanted, strict=True)) < 1e-6


def test_the_graph_unused_for_longest_goes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = make(kept=2)
    graphs.predict(found, model)
    recorded = Recorded(monkeypatch)
    for tokens in (7, 7, 70, 70, 7, 140, 140):  # the last one takes the place of 70
        model(**inputs(tokens))
    assert (recorded.recorded, len(found)) == (3, 2)
    model(**inputs(7))
    assert recorded.recorded == 3
    model(**inputs(70))
    model(**inputs(70))
    assert recorded.recorded == 4


def test_dropped_graphs_are_recorded_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = make()
    graphs.predict(found, model)
    recorded = Recorded(monkeypatch)
    for _ in range(2):
        for _ in range(3):
            model(**inputs(7))
        assert len(found) == 1
        found.drop()
        assert (len(found), found.held()) == (0, 0)
    assert recorded.recorded == 2


def test_paused_the_forwards_are_the_models_own_and_no_memory_is_held(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = make()
    graphs.predict(found, model)
    recorded = Recorded(monkeypatch)
    model(**inputs(7))
    model(**inputs(7))
    with found.paused():
        assert len(found) == 0
        for _ in range(3):
            model(**inputs(7))
        assert recorded.recorded == 1
    model(**inputs(7))
    model(**inputs(7))
    assert recorded.recorded == 2


def test_a_kind_of_which_no_graph_can_be_recorded_goes_on_without_and_the_others_with(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = make(kept=2)
    wanted = {tokens: model(**inputs(tokens))[0] for tokens in (7, 70, 170, 250)}
    graphs.predict(found, model)
    recorded = Recorded(monkeypatch)
    record = graphs.Forward.record
    tried: list[int] = []

    def fails(self: Any, pool: object, stream: object) -> None:
        tried.append(self._text.shape[1])
        if self._text.shape[1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        record(self, pool, stream)

    monkeypatch.setattr(graphs.Forward, "record", fails)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            for tokens in (7, 70):
                made = [model(**inputs(tokens))[0] for _ in range(4)]
                assert max(error(one, wanted[tokens]) for one in made) < 1e-6
    assert tried == [64, 128, 64], "the larger one was not tried again, and the other one was recorded anew"
    assert recorded.replayed == 3 + 3 + 4
    assert [entry["_event"] for entry in logs] == ["graph_refused"]
    with found.paused():  # as where memory runs out
        pass
    model(**inputs(70))
    model(**inputs(70))
    assert tried == [64, 128, 64]
    found.drop()  # as where its weights have moved: then there may be room
    model(**inputs(70))
    model(**inputs(70))
    assert tried == [64, 128, 64, 128]
    for tokens, refused in ((170, 2), (250, 1), (7, 1)):  # as many are remembered as graphs are kept
        model(**inputs(tokens))
        model(**inputs(tokens))
        assert len(found._refused) == refused


# ── who gets graphs ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("attention", "flags", "gets"),
    [
        ("flash3", {"VIDGEN_LENGTHS", "FLASHATTENTION_DISABLE_VARLEN"}, True),
        ("flash3-8bit", {"VIDGEN_LENGTHS", "FLASHATTENTION_DISABLE_VARLEN"}, True),
        ("flash3", {"FLASHATTENTION_DISABLE_VARLEN"}, False),  # built as it was before
        ("flash3", set(), True),  # built by its own setup.py
        ("torch", {"VIDGEN_LENGTHS"}, False),
        ("sage", {"VIDGEN_LENGTHS"}, False),
    ],
)
def test_predictions_get_graphs_where_attention_is_told_lengths_on_the_device(
    make: Make, monkeypatch: pytest.MonkeyPatch, attention: str, flags: set[str], gets: bool
) -> None:
    model, found = make()
    monkeypatch.setattr(speed, "_flag", lambda name: name in flags)
    recorded = Recorded(monkeypatch)
    speed.graph_predictions([model], attention, found)
    for _ in range(2):
        model(**inputs(7))
    assert recorded.recorded == gets


def test_a_stock_transformer_and_one_of_wan_get_none(tiny_models: dict[str, Path]) -> None:
    from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

    assert not graphs.predicts(QwenImageTransformer2DModel.from_pretrained(tiny_models["qwen-edit"] / "transformer"))
    wan = WanTransformer3DModel.from_pretrained(tiny_models["wan2.2-a14b-i2v"] / "transformer")
    blocks.fuse_projections(wan)
    assert not graphs.predicts(wan)


def test_another_layout_of_a_model_takes_over_or_does_without(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, first = make()
    second = graphs.Graphs()
    recorded = Recorded(monkeypatch)
    for found in (first, second):
        graphs.predict(found, model)
    for _ in range(2):
        model(**inputs(7))
    assert (len(first), len(second), recorded.recorded) == (0, 1, 1)
    graphs.predict(None, model)
    for _ in range(2):
        model(**inputs(70))
    assert recorded.recorded == 1


def test_the_step_cache_answers_before_graphs_do(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidgen.accel.stepcache import StepCache, computed

    model, found = make()
    graphs.predict(found, model)
    cache = StepCache(2)
    cache.attach([model])
    recorded = Recorded(monkeypatch)
    steps = 12
    cache.begin(steps)
    for index in range(steps):
        with model.cache_context("cond"):
            model(**inputs(7, timestep=torch.tensor([1 - index / steps])))
    assert recorded.replayed == sum(computed(steps, 2)) - 1
    assert sum(computed(steps, 2)) < steps


# ── the text encoder ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pipe(tiny_models: dict[str, Path]) -> Any:
    from diffusers import QwenImageEditPlusPipeline

    from vidgen.accel import vision

    pipe = QwenImageEditPlusPipeline.from_pretrained(tiny_models["qwen-edit"], trust_remote_code=False)
    vision.fuse_segments(pipe.text_encoder)
    return pipe


def encoded(pipe: Any, prompt: str = "a red car", sides: tuple[int, ...] = (56,)) -> torch.Tensor:
    pictures = [Image.radial_gradient("L").convert("RGB").resize((side, 56)) for side in sides]
    with torch.no_grad():
        found: torch.Tensor = pipe.encode_prompt(image=pictures, prompt=prompt)[0]
    return found


CASES = [("a red car", (56,)), ("a blue car in the rain, " * 12, (56,)), ("a red car", (56, 112)), ("car", (112,))]


def test_an_encoded_text_is_what_it_was(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [encoded(pipe, *case) for case in CASES]
    found = graphs.Graphs()
    graphs.encode(found, pipe.text_encoder)
    recorded = Recorded(monkeypatch)
    for _ in range(3):
        for case, one in zip(CASES, wanted, strict=True):
            made = encoded(pipe, *case)
            assert made.shape == one.shape
            assert error(made, one) < 1e-6
    assert recorded.recorded == len(found) > 0
    assert recorded.replayed >= 2 * recorded.recorded
    graphs.encode(None, pipe.text_encoder)
    before = recorded.replayed
    assert torch.equal(encoded(pipe), wanted[0])
    assert recorded.replayed == before


def test_paused_and_for_several_texts_the_encoder_is_its_own(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = encoded(pipe)
    found = graphs.Graphs()
    graphs.encode(found, pipe.text_encoder)
    recorded = Recorded(monkeypatch)
    with found.paused():
        for _ in range(2):
            assert torch.equal(encoded(pipe), wanted)
    assert recorded.recorded == 0
    language = pipe.text_encoder.model.language_model
    several = torch.randn(2, 9, language.config.hidden_size)
    with torch.no_grad():
        for _ in range(2):
            language(inputs_embeds=several)
    assert recorded.recorded == 0


def test_the_last_hidden_state_is_the_normalised_one(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers gathers hidden states by hooks on the layers, of which only the first does anything here."""
    graphs.encode(graphs.Graphs(), pipe.text_encoder)
    Recorded(monkeypatch)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        for _ in range(3):
            told = pipe.text_encoder.model.language_model(input_ids=ids, output_hidden_states=True)
            assert torch.equal(told.hidden_states[-1], told.last_hidden_state)


# ── the engine ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sleep_lets_go_of_graphs_and_the_memory_ladder_does_without(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edit_service.engine.qwen import QwenEditEngine
    from vidgen.engine import Generated
    from vidgen.errors import RetryableError

    engine = QwenEditEngine(str(tiny_models["qwen-edit"]), reference_area=64 * 64, condition_area=56 * 56)
    engine.setup()
    told: list[str] = []

    class Told:
        def drop(self) -> None:
            told.append("drop")

        @contextlib.contextmanager
        def paused(self) -> Any:
            told.append("paused")
            yield
            told.append("on")

    engine._graphs = Told()  # type: ignore[assignment]
    engine.sleep()
    assert told == ["drop"]
    engine.wake()

    told.clear()

    def attempt(one_by_one: bool, left: bytes | None) -> Generated:
        if not told:
            raise RetryableError("memory ran out", code="out_of_memory")
        return Generated("made", denoise_s=0.0, decode_s=0.0)

    assert engine._within_memory(attempt, None, lambda step, steps: None, 2).rungs == ("vae_tiling",)
    assert told == ["paused", "on"]


def test_flash_attention_3_is_changed_where_it_was_looked_at_and_nowhere_else(tmp_path: Path) -> None:
    path = Path(__file__).parents[4] / "deploy" / "flash-attention-3" / "build.py"
    spec = importlib.util.spec_from_file_location("build", path)
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for name, patches in build.PATCHES.items():
        lines = (f"{found}behind\n" for found, times, _ in patches for _ in range(times))
        (tmp_path / name).write_text("before\n" + "".join(lines))
    build.patch(tmp_path)
    for name, patches in build.PATCHES.items():
        lines = (f"{instead}behind\n" for _, times, instead in patches for _ in range(times))
        assert (tmp_path / name).read_text() == "before\n" + "".join(lines)
    with pytest.raises(SystemExit, match="another version"):
        build.patch(tmp_path)
