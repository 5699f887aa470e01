"""A guided step on two devices, here two processes: the same clip to the last bit, and no other way to end."""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from tests import partners

from vidgen.accel import guidance
from vidgen.contracts import I2VWork
from vidgen.errors import Cancelled, FatalError, RejectedError, RetryableError, Suspended

pytestmark = pytest.mark.timeout(600)  # importing diffusers takes minutes on a machine that is busy

STEPS = 4
ROOT = Path(__file__).parents[4]
SHIM = ROOT / "tests" / "shim"


def work(**changes: Any) -> I2VWork:
    fields: dict[str, Any] = {
        "prompt": "p", "negative_prompt": "n", "steps": STEPS, "seed": 7, "width": 64, "height": 64,
        "guidance_scale": 3.0, "num_frames": 5, "fps": 16,
    }  # fmt: skip
    return I2VWork(**fields | changes)


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """What a partner finds: the tests' modules, and as many threads as here, since sums depend on their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SHIM), str(ROOT), *sys.path]))
        yield


@pytest.fixture(scope="module")
def pair(tiny_models: dict[str, Path], environment: None) -> Iterator[Any]:
    engine = engine_of(tiny_models, guidance_device="cpu")
    yield engine
    engine._partner.close()
    assert engine._partner._process.returncode == 0


@pytest.fixture(scope="module")
def alone(tiny_models: dict[str, Path]) -> Any:
    return engine_of(tiny_models)


def engine_of(models: dict[str, Path], **more: Any) -> Any:
    from i2v_service.engine.wan import WanI2VEngine
    from vidgen.accel.engine import Layout

    # Of four steps all are computed, of twelve some are foretold.
    engine = WanI2VEngine(str(models["wan2.2-a14b-i2v"]), layout=Layout(device="cpu", step_cache=2), **more)
    engine.setup()
    return engine


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(path)
    return path


def ignore(step: int, steps: int) -> None:
    pass


def frames(engine: Any, wanted: I2VWork, picture: Path, on_step: Any = ignore, state: bytes | None = None) -> Any:
    return engine.resume(engine.prepare(wanted, [picture]), on_step, state).output.frames


@pytest.fixture
def forwards(pair: Any) -> Iterator[list[str]]:
    """Gets the name of the transformer at each forward that this process computes."""
    seen: list[str] = []
    hooks = [
        model.blocks[0].register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name, model in zip(("high", "low"), pair.transformers(), strict=True)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def test_a_guided_clip_is_the_same_to_the_last_bit_and_half_is_computed_here(
    alone: Any, pair: Any, picture: Path, forwards: list[str]
) -> None:
    assert np.array_equal(frames(pair, work(), picture), frames(alone, work(), picture))
    assert len(forwards) == STEPS
    assert set(forwards) == {"high", "low"}


def test_without_guidance_all_is_computed_here(alone: Any, pair: Any, picture: Path, forwards: list[str]) -> None:
    plain = work(guidance_scale=1.0)
    assert np.array_equal(frames(pair, plain, picture), frames(alone, plain, picture))
    assert len(forwards) == STEPS


def test_guidance_of_the_second_expert_alone_is_guidance(alone: Any, pair: Any, picture: Path) -> None:
    late = work(guidance_scale=1.0, guidance_scale_2=3.0)
    assert np.array_equal(frames(pair, late, picture), frames(alone, late, picture))


def test_foretold_steps_are_the_same_on_two_devices(alone: Any, pair: Any, picture: Path, forwards: list[str]) -> None:
    long = work(steps=12)
    assert np.array_equal(frames(pair, long, picture), frames(alone, long, picture))
    assert len(forwards) < 12


def test_a_run_that_is_left_with_a_partner_is_gone_on_with_alone(alone: Any, pair: Any, picture: Path) -> None:
    def leave(step: int, steps: int) -> None:
        if step == 2:
            raise Suspended(step, steps)

    with pytest.raises(Suspended) as left:
        frames(pair, work(), picture, leave)
    state = left.value.state
    assert state is not None
    assert load(state)["latents"].abs().sum() > 0

    whole = frames(alone, work(), picture)
    assert np.array_equal(frames(alone, work(), picture, state=state), whole)
    assert np.array_equal(frames(pair, work(), picture, state=state), whole)


def test_a_cancel_leaves_the_partner_usable(alone: Any, pair: Any, picture: Path) -> None:
    def cancel(step: int, steps: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        frames(pair, work(), picture, cancel)
    assert np.array_equal(frames(pair, work(), picture), frames(alone, work(), picture))


def test_an_answer_to_a_step_that_broke_off_is_not_taken_for_another(
    alone: Any, pair: Any, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(pair, "_rungs", ())
        hook = pair.transformers()[0].blocks[0].register_forward_pre_hook(no_room)
        with pytest.raises(RetryableError, match="out of memory"):
            frames(pair, work(), picture)  # while the partner computes its half of the step
        hook.remove()
    assert np.array_equal(frames(pair, work(seed=8), picture), frames(alone, work(seed=8), picture))


def test_a_partner_without_room_costs_this_device_no_rung(
    alone: Any, pair: Any, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles and streaming here give no room there: the task was made three times, slower each time, for nothing."""
    begun: list[object] = []

    def no_room() -> Any:
        begun.append(None)
        answer = guidance._fault(RetryableError("the device ran out of memory", code="out_of_memory"))
        recv()
        return answer

    recv = pair._partner._connection.recv_bytes
    with monkeypatch.context() as patch:
        patch.setattr(pair, "_rungs", ("vae_tiling", "offload"))
        patch.setattr(pair._partner._connection, "recv_bytes", no_room)
        with pytest.raises(RetryableError, match="cpu: the device ran out of memory") as caught:
            frames(pair, work(), picture)
    assert (caught.value.code, caught.value.rungs, len(begun)) == ("partner_out_of_memory", (), 1)
    assert np.array_equal(frames(pair, work(), picture), frames(alone, work(), picture))


def test_a_partner_that_predicts_no_numbers_makes_the_worker_unfit(
    pair: Any, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*asked: Any) -> Any:
        tensors, told = answer()
        return {name: one.fill_(float("nan")) for name, one in tensors.items()}, told

    answer = pair._partner._answer
    monkeypatch.setattr(pair._partner, "_answer", spoilt)
    with pytest.raises(FatalError) as caught:
        frames(pair, work(), picture)
    assert caught.value.code == "not_finite"


# ── the partner by itself ────────────────────────────────────────────────────────────────────────────────────────────

INFO = partners.Small().info


def partner_of(engine: partners.Small) -> guidance.Partner:
    partner = guidance.Partner(functools.partial(partners.Small, engine.fails), "cuda:1")
    partner.start()
    return partner


def predicted(partner: guidance.Partner, value: float) -> torch.Tensor:
    """What it makes of latents that are all `value`."""
    partner.begin(guided=True)
    prediction = partner.predicts(0, {"hidden_states": torch.full((1, 2, 1, 4, 4), value), "scale": 1.0}, 1)
    assert prediction is not None
    partner.complete()
    return prediction


def test_what_goes_wrong_there_is_told_with_its_device_and_its_end_makes_the_worker_unfit(
    environment: None, capfd: pytest.CaptureFixture[str]
) -> None:
    partner = partner_of(partners.Small())
    partner.ready(INFO)
    with pytest.raises(RetryableError, match="cuda:1: the device ran out of memory") as no_room:
        predicted(partner, partners.NO_ROOM)
    assert no_room.value.code == "partner_out_of_memory"
    with pytest.raises(RejectedError, match="cuda:1: the model refuses these inputs"):
        predicted(partner, partners.UNUSABLE)
    assert torch.equal(predicted(partner, 3.0), torch.full((1, 1, 1, 4, 4), 6.0))

    large = {"hidden_states": torch.ones(1, 1, 1, 1024, 1024)}  # more than fits on the way: nobody may wait to be read
    for _ in range(2):
        partner.begin(guided=True)
        assert partner.predicts(0, large, 1) is not None
    partner.complete()

    with pytest.raises(FatalError, match="on cuda:1 is gone") as gone:
        predicted(partner, partners.BROKEN)
    assert gone.value.code == "partner_lost"
    assert "nobody foresaw this" in capfd.readouterr().err
    with pytest.raises(FatalError, match="is gone"):
        predicted(partner, 1.0)
    partner.close()


def test_it_ends_with_its_worker_even_where_it_hangs(environment: None) -> None:
    """It kept its GPU: the worker that was started next found no room there."""
    program = (
        "import os; from tests import partners; from vidgen.accel import guidance; "
        "partner = guidance.Partner(partners.Stuck, 'cuda:1'); partner.start(); "
        "print(partner._process.pid, flush=True); input(); os._exit(1)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        assert worker.stdout.readline() == "stuck\n"
        partner = os.pidfd_open(pid)
        worker.stdin.write("\n")
    ended, _, _ = select.select([partner], [], [], 120)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    os.close(partner)
    assert ended


def test_who_tells_all_processes_to_end_does_not_end_it_before_its_worker(environment: None) -> None:
    partner = partner_of(partners.Small())
    partner.ready(INFO)
    partner._process.terminate()
    assert torch.equal(predicted(partner, 3.0), torch.full((1, 1, 1, 4, 4), 6.0))
    partner.close()
    assert partner._process.returncode == 0


def test_both_devices_take_the_profile_that_is_settled_for(tiny_models: dict[str, Path]) -> None:
    """In one process with the edit, this one's followed from both models, and the partner's from its own alone."""
    from i2v_service.engine.wan import WanI2VEngine
    from vidgen.accel.engine import Layout

    layout = Layout(device="cuda:0", step_cache=2)
    engine: Any = WanI2VEngine(str(tiny_models["wan2.2-a14b-i2v"]), guidance_device="cuda:1", layout=layout)
    engine.settle_for("resident-fp8", 0)
    twin = engine._partner._make()
    assert (engine.layout.profile, twin.layout.profile) == ("resident-fp8", "resident-fp8")
    assert (twin.layout.device, twin.layout.step_cache, twin._partner) == ("cuda:1", 1, None)


def test_one_that_laid_its_model_out_otherwise_is_refused(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair._partner, "_answer", lambda: ({}, {"profile": "resident-fp8", "narrow": "[]"}))
    with pytest.raises(FatalError, match="cpu has resident-fp8: set VIDGEN_PROFILE") as otherwise:
        pair._partner.ready(pair.info)
    assert otherwise.value.code == "settings"


def test_one_whose_trial_came_out_otherwise_is_refused(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"profile": str(pair.info.profile), "narrow": "[(0, 1), (0,)]"}
    monkeypatch.setattr(pair._partner, "_answer", lambda: ({}, told))
    pair._partner.ready(pair.info, [(0, 1), (0,)])
    with pytest.raises(FatalError, match="set VIDGEN_ATTENTION to flash3") as otherwise:
        pair._partner.ready(pair.info, [(0, 1), (0, 1)])
    assert otherwise.value.code == "settings"


def test_one_that_cannot_be_set_up_says_why(environment: None) -> None:
    partner = partner_of(partners.Small(fails=True))
    with pytest.raises(FatalError, match="cuda:1: there is no such device") as told:
        partner.ready(INFO)
    assert told.value.code == "cuda_error"
    partner.close()
    assert partner._process.returncode == 0
