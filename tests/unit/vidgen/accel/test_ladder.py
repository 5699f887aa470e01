"""A task for which memory runs out is done with less of it, and the next task does not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import nn

from vidgen import checkpoints
from vidgen.accel import ladder, residency, speed, streaming, trial
from vidgen.accel.engine import DiffusersEngine, Layout
from vidgen.contracts import EditWork, I2VWork, Work
from vidgen.errors import Cancelled, FatalError, RejectedError, RetryableError, Suspended, VidgenError

pytestmark = pytest.mark.timeout(600)  # importing diffusers takes minutes on a machine that is busy

QWEN, A14B = "qwen-edit", "wan2.2-a14b-i2v"
STEPS = 3
ALL = ("one_by_one", "vae_tiling", "offload")
Pixels = np.ndarray[Any, Any]


def work_of(kind: str, **changes: Any) -> Work:
    common: dict[str, Any] = {
        "prompt": "p", "negative_prompt": "n", "steps": STEPS, "seed": 7, "width": 64, "height": 64,
    }  # fmt: skip
    if kind == QWEN:
        edit: dict[str, Any] = {"user_prompt": "p", "true_cfg_scale": 4.0, "guidance_scale": 1.0, "candidates": 1}
        return EditWork(**common | edit | changes)
    return I2VWork(**common | {"guidance_scale": 3.0, "num_frames": 5, "fps": 16} | changes)


@pytest.fixture(scope="module")
def engines(tiny_models: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Both engines, laid out on the CPU as on a GPU that holds all of the model."""
    from edit_service.engine.qwen import QwenEditEngine
    from i2v_service.engine.wan import WanI2VEngine

    layout = Layout(device="cpu", dtype="float32", attention="torch", compile="off")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusersEngine, "_memory", lambda self: 200 << 30)
        patch.setattr(DiffusersEngine, "_free_memory", lambda self: 100 << 30)
        made: dict[str, Any] = {
            QWEN: QwenEditEngine(str(tiny_models[QWEN]), reference_area=64 * 64, condition_area=56 * 56, layout=layout),
            A14B: WanI2VEngine(str(tiny_models[A14B]), layout=layout),
        }
        for engine in made.values():
            engine.setup()
            assert engine.info.profile == "resident-bf16"
        yield made


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((64, 96)).save(path)
    return path


class Run:
    """One run of an engine, with the steps that it told of; `until` is the count of them after which it is stopped."""

    def __init__(
        self, engine: Any, work: Work, picture: Path, state: bytes | None = None, until: int = 0,
        stop: Callable[[int, int], Exception] = Suspended, again: Callable[[int, int], Exception] | None = None,
    ) -> None:  # fmt: skip
        self.again: list[bool] = []  # for each time that it began again, whether the VAE made tiles by then
        self.seen: list[tuple[int, int]] = []
        self.raised: Any = None
        self.logs: list[Any] = []

        def on_step(step: int, steps: int) -> None:
            if step == 0:
                self.again.append(engine._pipe.vae.use_tiling)
                if again is not None:
                    raise again(step, steps)
                return
            self.seen.append((step, steps))
            if len(self.seen) == until:
                raise stop(step, steps)

        with structlog.testing.capture_logs() as self.logs:
            try:
                made = engine.resume(engine.prepare(work, [picture]), on_step, state)
            except VidgenError as exc:
                self.raised, self.rungs = exc, exc.rungs
                return
        self.rungs = made.rungs
        self.pixels: Pixels = made.output.pixels if isinstance(work, EditWork) else made.output.frames

    def logged(self, event: str) -> list[Any]:
        return [entry for entry in self.logs if entry.get("_event") == event]


def counted(candidates: int = 1, done: int = 0) -> list[tuple[int, int]]:
    return [(step, STEPS * candidates) for step in range(candidates * done + 1, STEPS * candidates + 1)]


# ── where there is no room ───────────────────────────────────────────────────────────────────────────────────────


class Cramped:
    """Lets parts of an engine's pipeline run out of memory."""

    def __init__(self, engine: Any, patch: pytest.MonkeyPatch) -> None:
        self.pipe, self.patch = engine._pipe, patch

    def _refuse(self, part: Any, name: str, where: Callable[..., bool]) -> None:
        call = getattr(part, name)

        def cramped(*args: Any, **options: Any) -> Any:
            if where(*args, **options):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return call(*args, **options)

        self.patch.setattr(part, name, cramped)

    def batches(self) -> None:
        """For more than one image at once."""
        transformer = self.pipe.transformer
        self._refuse(transformer.transformer_blocks[-1], "forward", lambda *args, **given: len(_states(given)) > 1)

    def whole_frames(self) -> None:
        """For a decode that is not in tiles."""
        self._refuse(self.pipe.vae, "decode", lambda *args, **given: not self.pipe.vae.use_tiling)

    def steps(self) -> None:
        """For a step beside all weights of a model of two experts."""
        self._refuse(self.pipe.transformer.blocks[-1], "forward", lambda *args: not streams(self.pipe.transformer))

    def weights(self) -> None:
        """For all weights at once."""
        self._refuse(self.pipe.vae, "decode", lambda *args, **given: not streams(self.pipe.transformer))

    def everything(self) -> None:
        self._refuse(self.pipe.vae, "decode", lambda *args, **given: True)


def _states(given: dict[str, Any]) -> torch.Tensor:
    states: torch.Tensor = given["hidden_states"]
    return states


def streams(model: nn.Module) -> bool:
    return streaming.of(model) is not None


def test_candidates_that_have_no_room_together_are_made_one_after_another(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, work = engines[QWEN], work_of(QWEN, candidates=3)
    whole = Run(engine, work, picture)
    assert (whole.rungs, whole.seen) == ((), counted())

    encoded: list[object] = []
    hook = engine._pipe.text_encoder.register_forward_hook(lambda *given: encoded.append(1))
    with monkeypatch.context() as patch:
        Cramped(engine, patch).batches()
        run = Run(engine, work, picture)
    hook.remove()

    assert run.rungs == ("one_by_one",)
    assert len(encoded) == 2 * 2  # both prompts: for all at once, and once for those behind one another
    assert "encode_prompt" not in vars(engine._pipe)
    assert run.seen == counted(candidates=3)
    assert np.abs(run.pixels.astype(int) - whole.pixels).max() <= 1
    [said] = run.logged("memory_rung")
    assert (said["rung"], said["log_level"]) == ("one_by_one", "warning")
    again = Run(engine, work, picture)
    assert (again.rungs, again.seen) == ((), counted())
    assert np.array_equal(again.pixels, whole.pixels)


@pytest.mark.parametrize("kind", [QWEN, A14B])
def test_a_decode_that_has_no_room_is_made_in_tiles_and_the_next_one_as_before(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine, work = engines[kind], work_of(kind)
    whole = Run(engine, work, picture)
    vae = engine._pipe.vae

    with monkeypatch.context() as patch:
        Cramped(engine, patch).whole_frames()
        for side in ("height", "width"):
            patch.setattr(vae, f"tile_sample_min_{side}", 48)
            patch.setattr(vae, f"tile_sample_stride_{side}", 32)
        run = Run(engine, work, picture)

    assert run.rungs == ("vae_tiling",)
    assert run.seen == counted() + counted(done=STEPS - 1)
    assert run.pixels.shape == whole.pixels.shape
    assert not np.array_equal(run.pixels, whole.pixels)  # a little else, where tiles meet
    assert vae.use_tiling is False
    assert vae._feat_map == [None] * len(vae._feat_map)
    again = Run(engine, work, picture)
    assert again.rungs == ()
    assert np.array_equal(again.pixels, whole.pixels)


@pytest.mark.parametrize("kind", [QWEN, A14B])
def test_weights_that_leave_no_room_stream_through_the_device_and_are_back_for_the_next_task(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine, work = engines[kind], work_of(kind)
    whole = Run(engine, work, picture)
    parts = list(speed.offloadable(engine._pipe).values())
    before = [(name, id(value), value.clone()) for part in parts for name, value in part.named_parameters()]
    marks = [set(vars(module)) for part in parts for module in part.modules()]

    with monkeypatch.context() as patch:
        Cramped(engine, patch).weights()
        run = Run(engine, work, picture)

    assert run.rungs == ("vae_tiling", "offload")
    assert run.seen == counted() + 2 * counted(done=STEPS - 1)
    assert np.array_equal(run.pixels, whole.pixels)  # no tile is smaller than this picture
    assert not any(streams(part) for part in parts)
    assert [set(vars(module)) for part in parts for module in part.modules()] == marks
    after = [(name, id(value), value) for part in parts for name, value in part.named_parameters()]
    for (name, was, old), (_, now, new) in zip(before, after, strict=True):
        assert (name, was, new.device) == (name, now, old.device)
        assert torch.equal(old, new)
    again = Run(engine, work, picture)
    assert again.rungs == ()
    assert np.array_equal(again.pixels, whole.pixels)


def test_a_transformer_streams_by_its_blocks_because_fused_kernels_do_not_call_its_layers(
    engines: dict[str, Any],
) -> None:
    pipe = engines[QWEN]._pipe
    with ladder.streamed(pipe, torch.device("cpu")):
        owners = {name for name, module in pipe.transformer.named_modules() if module._forward_pre_hooks}
        assert streams(pipe.transformer)
        assert streams(pipe.text_encoder)
        assert not streams(pipe.vae)
    assert owners == {"transformer_blocks.0", "transformer_blocks.1"}


def test_compiled_blocks_stream_uncompiled_and_are_not_compiled_again(engines: dict[str, Any], picture: Path) -> None:
    engine, work = engines[QWEN], work_of(QWEN)
    compiled: list[int] = []
    ran: list[int] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        compiled.append(1)

        def call(*args: Any) -> Any:
            ran.append(1)
            return graph.forward(*args)

        return call

    blocks = engine._pipe.transformer.transformer_blocks
    torch._dynamo.reset()
    try:
        for block in blocks:
            block.compile(fullgraph=True, backend=backend)
        whole = Run(engine, work, picture)
        Run(engine, work, picture)
        calls, made = len(ran), len(compiled)
        assert made > 0

        with ladder.streamed(engine._pipe, torch.device("cpu")):
            Run(engine, work, picture)
        assert (len(ran), len(compiled)) == (calls, made)

        again = Run(engine, work, picture)
        assert len(ran) > calls
        assert len(compiled) == made
        assert np.array_equal(again.pixels, whole.pixels)
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()


def test_a_compiled_vae_makes_tiles_uncompiled(engines: dict[str, Any]) -> None:
    pipe = engines[QWEN]._pipe
    vae = pipe.vae
    vae.decoder.compile(backend="eager")
    call = vae.decoder._compiled_call_impl
    try:
        with ladder.tiled(pipe, torch.device("cpu")):
            assert vae.use_tiling
            assert vae.decoder._compiled_call_impl is None
        assert vae.decoder._compiled_call_impl is call
    finally:
        vae.decoder._compiled_call_impl = None


# ── where nothing helps ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_task_that_has_no_room_on_the_last_rung_may_be_tried_again_and_the_engine_is_as_good_as_new(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, work = engines[QWEN], work_of(QWEN, candidates=2)
    whole = Run(engine, work, picture)

    with monkeypatch.context() as patch:
        Cramped(engine, patch).everything()
        run = Run(engine, work, picture)

    assert isinstance(run.raised, RetryableError)
    assert (run.raised.code, run.rungs) == ("out_of_memory", ALL)
    assert [entry["rung"] for entry in run.logged("memory_rung")] == list(ALL)
    again = Run(engine, work, picture)
    assert again.rungs == ()
    assert np.array_equal(again.pixels, whole.pixels)


def streaming_engine(model: Path, room: int | None, patch: pytest.MonkeyPatch) -> Any:
    """One whose weights stream, with so many bytes of its GPU left for those that stay; None: as it finds itself."""
    from edit_service.engine.qwen import QwenEditEngine

    patch.setattr(DiffusersEngine, "_memory", lambda self: 200 << 30)
    layout = Layout(device="cpu", dtype="float32", attention="torch", compile="off", profile="offload-fp8")
    engine: Any = QwenEditEngine(str(model), reference_area=64 * 64, condition_area=56 * 56, layout=layout)
    if room is not None:
        engine.settle_for("offload-fp8", room)
    engine.setup()
    return engine


def test_a_model_that_has_no_room_where_it_is_laid_out_is_told_so_with_what_to_do(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch said of it was all that the log told."""

    def refuse(self: object, *given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(streaming._Place, "__init__", refuse)
    with pytest.raises(FatalError, match="use a larger device or a smaller model") as caught:
        streaming_engine(tiny_models[QWEN], 0, monkeypatch)
    assert caught.value.code == "out_of_memory"


@pytest.mark.parametrize("room", [0, 1 << 10])  # less than a block
def test_an_engine_of_which_nothing_stays_has_no_profile_further_down(
    tiny_models: dict[str, Path], picture: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    engine = streaming_engine(tiny_models[QWEN], room, monkeypatch)
    assert engine.info.profile == "offload-fp8-storage"
    assert streams(engine._pipe.transformer)

    Cramped(engine, monkeypatch).everything()
    assert Run(engine, work_of(QWEN), picture).rungs == ("vae_tiling",)
    assert streams(engine._pipe.transformer)


def test_the_room_is_shared_by_a_models_transformers(engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[int, int] = {}
    monkeypatch.setattr(
        streaming, "Stream", lambda model, device, room=0, *, stays=True: made.update({id(model): room})
    )
    pipe = engines[A14B]._pipe
    speed.offload(pipe, torch.device("cpu"), 10)
    assert made == {id(pipe.transformer): 5, id(pipe.transformer_2): 5, id(pipe.text_encoder): 0}


def test_a_clip_leaves_the_room_to_larger_clips(tiny_models: dict[str, Path]) -> None:
    """It had filled the half of a GPU with blocks that come in time anyway, and the edit beside it found none."""
    from i2v_service.engine.wan import WanI2VEngine

    engine = WanI2VEngine(str(tiny_models[A14B]))
    engine.settle_for("offload-fp8", 10 << 30)
    assert engine._room == 0


def test_weights_are_told_apart_by_what_is_their_own(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = streaming_engine(tiny_models[QWEN], 0, monkeypatch)
    stream = streaming.of(engine._pipe.transformer)
    assert stream is not None
    seen: list[bool] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(trial, "fingerprint", lambda *given: seen.append(stream._places == []) or "name")
    monkeypatch.setattr(trial, "kept", lambda folder, name: ())
    assert engine._tried(lambda: None) == ()
    assert seen == [True]
    assert stream._places != []


def staying(engine: Any) -> int:
    """How many blocks stay on the device."""
    stream = streaming.of(engine._pipe.transformer)
    assert stream is not None
    return len(stream._homes) - len(stream._place_of)


@pytest.mark.parametrize("room", [1 << 30, None])
def test_blocks_that_stay_make_room_for_a_task_and_are_back_for_the_next(
    tiny_models: dict[str, Path], picture: Path, monkeypatch: pytest.MonkeyPatch, room: int | None
) -> None:
    engine = streaming_engine(tiny_models[QWEN], room, monkeypatch)
    assert staying(engine) == 2
    whole = Run(engine, work_of(QWEN), picture)
    assert whole.rungs == ()

    with monkeypatch.context() as patch:
        cramped = Cramped(engine, patch)
        cramped._refuse(engine._pipe.vae, "decode", lambda *args, **given: staying(engine) > 0)
        run = Run(engine, work_of(QWEN), picture)
    assert run.rungs == ("vae_tiling", "offload")
    assert np.array_equal(run.pixels, whole.pixels)
    assert staying(engine) == 2


def test_blocks_that_do_not_come_back_are_the_end_of_the_worker(
    tiny_models: dict[str, Path], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = streaming_engine(tiny_models[QWEN], 1 << 30, monkeypatch)
    hold = streaming.Stream.hold

    def refuse(self: streaming.Stream, room: int | None = None) -> None:
        if room is None and self.stays:
            raise RuntimeError("no")
        hold(self, room)

    monkeypatch.setattr(streaming.Stream, "hold", refuse)
    Cramped(engine, monkeypatch).everything()
    run = Run(engine, work_of(QWEN), picture)
    assert (run.raised.code, type(run.raised)) == ("weights_lost", FatalError)


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_what_streams_leaves_the_device_and_comes_back(
    tiny_models: dict[str, Path], picture: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    engine = streaming_engine(tiny_models[QWEN], room, monkeypatch)
    whole, stays = Run(engine, work_of(QWEN), picture), staying(engine)
    for _ in range(2):
        engine.sleep()
        stream = streaming.of(engine._pipe.transformer)
        assert stream is not None
        assert all(tensor.data_ptr() == home.data_ptr() for homes in stream._homes for tensor, home in homes)
        assert stream._places == []
        engine.wake()
        assert staying(engine) == stays
        assert np.array_equal(Run(engine, work_of(QWEN), picture).pixels, whole.pixels)


def test_weights_that_the_host_has_no_room_for_do_not_stream(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines[QWEN]
    Cramped(engine, monkeypatch).weights()
    monkeypatch.setattr(residency, "host_memory", lambda: 1 << 30)
    run = Run(engine, work_of(QWEN), picture)
    assert (run.raised.code, run.rungs) == ("out_of_memory", ("vae_tiling", "offload"))
    assert "the host has 1 GiB for weights that stream" in run.raised.message
    assert not streams(engine._pipe.transformer)


def test_weights_that_do_not_come_back_are_the_end_of_the_worker(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines[QWEN]
    with monkeypatch.context() as patch:
        Cramped(engine, patch).weights()

        def full(device: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        patch.setattr(engine._pipe.transformer, "to", full)
        run = Run(engine, work_of(QWEN), picture)
    assert isinstance(run.raised, FatalError)
    assert run.raised.code == "weights_lost"


def test_what_may_be_tried_again_for_another_reason_takes_no_rung(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*args: Any, **options: Any) -> Any:
        raise RetryableError("a moment, please", code="busy")

    monkeypatch.setattr(engines[QWEN]._pipe.vae, "decode", lost)
    run = Run(engines[QWEN], work_of(QWEN), picture)
    assert (run.raised.code, run.rungs, run.again) == ("busy", (), [])


def test_another_fault_takes_no_rung(engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise ValueError("odd")

    monkeypatch.setattr(engines[A14B]._pipe.vae, "decode", broken)
    run = Run(engines[A14B], work_of(A14B), picture)
    assert isinstance(run.raised, RejectedError)
    assert (run.rungs, run.seen) == ((), counted())


@pytest.mark.parametrize("rung", range(4))
def test_a_cancel_gets_through_on_each_rung_and_leaves_the_engine_as_it_was(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch, rung: int
) -> None:
    engine, work = engines[QWEN], work_of(QWEN, candidates=2)
    whole = Run(engine, work, picture)
    until = STEPS + rung if rung else 1  # each try but the first has the last step left to do

    with monkeypatch.context() as patch:
        Cramped(engine, patch).everything()
        run = Run(engine, work, picture, until=until, stop=lambda step, steps: Cancelled())

    assert isinstance(run.raised, Cancelled)
    assert run.rungs == ALL[:rung]
    assert len(run.seen) == until
    assert not streams(engine._pipe.transformer)
    assert engine._pipe.vae.use_tiling is False
    assert np.array_equal(Run(engine, work, picture).pixels, whole.pixels)


def test_that_it_begins_again_is_said_before_what_that_takes(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To pin the weights may take longer than an engine may be silent: the worker took it for one that hangs."""
    Cramped(engines[A14B], monkeypatch).steps()
    offload = speed.offload

    def pinned(*given: Any) -> None:
        assert run_again() == 2
        offload(*given)

    heard: list[int] = []

    def run_again() -> int:
        return len(heard)

    monkeypatch.setattr(speed, "offload", pinned)
    engine, work = engines[A14B], work_of(A14B)
    made = engine.resume(
        engine.prepare(work, [picture]), lambda step, steps: heard.append(step) if step == 0 else None, None
    )
    assert made.rungs == ("vae_tiling", "offload")


@pytest.mark.parametrize(("candidates", "step"), [(1, 2), (2, 2)])
def test_what_is_wanted_back_while_it_begins_again_is_handed_back_with_the_state_that_there_is(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch, candidates: int, step: int
) -> None:
    engine, work = engines[QWEN], work_of(QWEN, candidates=candidates)
    whole = Run(engine, work, picture)
    with monkeypatch.context() as patch:
        Cramped(engine, patch).everything()
        run = Run(engine, work, picture, again=Suspended)
    assert isinstance(run.raised, Suspended)
    assert (run.raised.step, run.raised.steps) == (step, STEPS)
    assert run.rungs == ALL[-3 + (candidates == 1) :][:1]
    assert not engine._pipe.vae.use_tiling
    gone_on = Run(engine, work, picture, run.raised.state)
    assert gone_on.seen == counted(done=step)
    assert np.array_equal(gone_on.pixels, whole.pixels)


def test_what_is_wanted_back_behind_the_last_step_of_a_candidate_has_something_left_to_do(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own steps the first candidate is done, and a checkpoint of which nothing is left is refused."""
    engine, work = engines[QWEN], work_of(QWEN, candidates=2)
    monkeypatch.setattr(DiffusersEngine, "_free_memory", lambda self: 1 << 20)
    left = Run(engine, work, picture, until=STEPS).raised.state
    with monkeypatch.context() as patch:
        Cramped(engine, patch).everything()
        run = Run(engine, work, picture, left, again=Suspended)
    assert run.raised.state == left
    assert 0 < run.raised.step < run.raised.steps


def test_a_decode_that_breaks_off_leaves_no_frames_in_the_vae(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would take of the room that the next rung is about to make."""
    engine = engines[A14B]
    vae, kept = engine._pipe.vae, []

    def breaks_off(*args: Any, feat_cache: list[Any], **more: Any) -> Any:
        feat_cache[0] = torch.zeros(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def on_step(step: int, steps: int) -> None:
        if step == 0:
            kept.extend(vae._feat_map)

    monkeypatch.setattr(vae.decoder, "forward", breaks_off)
    with pytest.raises(RetryableError):
        engine.resume(engine.prepare(work_of(A14B), [picture]), on_step, None)
    assert kept
    assert not any(torch.is_tensor(one) for one in kept)


def test_what_is_wanted_back_before_there_is_any_state_is_handed_back_without(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cramped(engines[A14B], monkeypatch).steps()
    run = Run(engines[A14B], work_of(A14B), picture, again=Suspended)
    assert isinstance(run.raised, Suspended)
    assert (run.raised.state, run.raised.step) == (None, 0)


# ── in the middle ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [QWEN, A14B])
def test_a_run_that_was_gone_on_with_begins_again_behind_the_step_that_it_had(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine, work = engines[kind], work_of(kind)
    whole = Run(engine, work, picture)
    left = Run(engine, work, picture, until=2).raised.state
    assert left is not None

    Cramped(engine, monkeypatch).weights()
    run = Run(engine, work, picture, left)

    assert run.rungs == ("vae_tiling", "offload")
    assert run.seen == counted(done=2) * 3
    assert np.array_equal(run.pixels, whole.pixels)


@pytest.mark.parametrize("kind", [QWEN, A14B])
def test_what_fails_behind_the_last_step_goes_on_from_what_the_scheduler_had_gathered_before_it(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine, work = engines[kind], work_of(kind)
    whole = Run(engine, work, picture)
    Cramped(engine, monkeypatch).weights()
    run = Run(engine, work, picture)
    assert run.seen == [*counted(), *counted(done=2) * 2]  # the last step changes in place what it finds
    assert np.array_equal(run.pixels, whole.pixels)


def test_a_run_on_a_lower_rung_can_be_gone_on_with_on_the_highest(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, work = engines[A14B], work_of(A14B)
    whole = Run(engine, work, picture)
    with monkeypatch.context() as patch:
        Cramped(engine, patch).steps()
        stopped = Run(engine, work, picture, until=1)
    assert stopped.rungs == ("vae_tiling", "offload")
    run = Run(engine, work, picture, stopped.raised.state)
    assert run.seen == counted(done=1)
    assert np.array_equal(run.pixels, whole.pixels)


# ── candidates ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_candidates_that_would_not_fit_at_once_are_made_one_after_another_without_trying(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, work = engines[QWEN], work_of(QWEN, candidates=3)
    whole = Run(engine, work, picture)
    monkeypatch.setattr(DiffusersEngine, "_free_memory", lambda self: 1 << 20)
    run = Run(engine, work, picture)
    assert run.rungs == ()
    assert run.seen == counted(candidates=3)
    assert len(run.logged("candidates_one_by_one")) == 1
    assert np.abs(run.pixels.astype(int) - whole.pixels).max() <= 1


@pytest.mark.parametrize(("free_gib", "at_once"), [(21, True), (19, False)])
def test_the_room_for_candidates_is_measured_by_their_pixels_and_those_of_the_references(
    engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch, free_gib: int, at_once: bool
) -> None:
    from edit_service.engine.qwen import Inputs

    engine = engines[QWEN]
    monkeypatch.setattr(engine, "reference_area", None)
    monkeypatch.setattr(DiffusersEngine, "_free_memory", lambda self: free_gib << 30)
    reference = Image.new("RGB", (64, 64))
    work: Any = work_of(QWEN, candidates=4, width=1024, height=1024)
    assert engine._has_room(Inputs(work, (reference,))) is at_once


def test_a_candidate_made_alone_is_bit_for_bit_the_task_with_its_seed(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines[QWEN]
    monkeypatch.setattr(DiffusersEngine, "_free_memory", lambda self: 1 << 20)
    run = Run(engine, work_of(QWEN, candidates=3), picture)
    for index in range(3):
        alone = Run(engine, work_of(QWEN, seed=7 + index), picture)
        assert np.array_equal(alone.pixels[0], run.pixels[index])


@pytest.mark.parametrize("until", range(1, 3 * STEPS))
@pytest.mark.parametrize("room", [1 << 20, 100 << 30])
def test_candidates_one_after_another_go_on_from_any_step_and_none_is_made_twice(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch, until: int, room: int
) -> None:
    engine, work = engines[QWEN], work_of(QWEN, candidates=3)
    monkeypatch.setattr(DiffusersEngine, "_free_memory", lambda self: 1 << 20)
    whole = Run(engine, work, picture)
    left = Run(engine, work, picture, until=until)
    assert isinstance(left.raised, Suspended)
    assert (left.raised.step, left.raised.steps) == (until, 3 * STEPS)

    monkeypatch.setattr(DiffusersEngine, "_free_memory", lambda self: room)  # elsewhere there may be more
    run = Run(engine, work, picture, left.raised.state)

    assert run.seen == counted(candidates=3)[until:]
    assert np.array_equal(run.pixels, whole.pixels)


def test_candidates_that_go_on_one_after_another_have_no_rung_that_says_so(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same was tried once more, and all its steps made again, where there would have been room for all at once."""
    engine, work = engines[QWEN], work_of(QWEN, candidates=2)
    with monkeypatch.context() as patch:
        patch.setattr(DiffusersEngine, "_free_memory", lambda self: 1 << 20)
        left = Run(engine, work, picture, until=1).raised.state
    Cramped(engine, monkeypatch).everything()
    assert Run(engine, work, picture, left).rungs == ("vae_tiling", "offload")


def test_they_may_be_left_again_and_again(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, work = engines[QWEN], work_of(QWEN, candidates=2)
    monkeypatch.setattr(DiffusersEngine, "_free_memory", lambda self: 1 << 20)
    whole, state = Run(engine, work, picture), None
    for step in range(1, 2 * STEPS):
        run = Run(engine, work, picture, state, until=1)
        assert run.seen == [(step, 2 * STEPS)]
        state = run.raised.state
    assert np.array_equal(Run(engine, work, picture, state).pixels, whole.pixels)


def test_a_state_of_candidates_that_lacks_one_is_refused(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusersEngine, "_free_memory", lambda self: 1 << 20)
    left = Run(engines[QWEN], work_of(QWEN, candidates=2), picture, until=STEPS + 1).raised.state
    tensors = {name: one for name, one in load(left).items() if name != "made.0"}
    broken = save(tensors, checkpoints.metadata_of(left))
    refused = Run(engines[QWEN], work_of(QWEN, candidates=2), picture, broken)
    assert isinstance(refused.raised, checkpoints.UnusableError)
    assert refused.seen == []
    another = Run(engines[QWEN], work_of(QWEN, candidates=3), picture, left)
    assert isinstance(another.raised, checkpoints.UnusableError)


def test_each_candidate_goes_on_from_its_share_of_a_state_of_all_of_them(
    engines: dict[str, Any], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, work = engines[QWEN], work_of(QWEN, candidates=2)
    whole = Run(engine, work, picture)
    left = Run(engine, work, picture, until=1).raised.state

    monkeypatch.setattr(DiffusersEngine, "_free_memory", lambda self: 1 << 20)
    run = Run(engine, work, picture, left)

    assert run.seen == counted(candidates=2, done=1)
    assert np.abs(run.pixels.astype(int) - whole.pixels).max() <= 1
