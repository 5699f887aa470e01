"""How a service comes to its engines: weights are checked first, and two models share one GPU as far as they fit."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from structlog.testing import capture_logs
from tests import checkpoints, engines
from tests.workbench import BOUND

from vidgen import choice, errors, extras, frames, imports, jetstream, manifest, profiles, service, weights
from vidgen.contracts import Stage
from vidgen.engine import Engine, in_thread
from vidgen.errors import FatalError
from vidgen.profiles import GIB
from vidgen.settings import WorkerSettings


async def test_weights_that_are_to_be_verified_in_full_are_before_the_engine_is_made(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_models["qwen-edit"], tmp_path / "model"))
    made = manifest.Manifest(model="x", created_by="a test", files=tuple(manifest.describe(folder)))
    manifest.write(folder, made)
    shard = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))

    def make_engine(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
        raise AssertionError("the engine is not to be made of these weights")

    settings = WorkerSettings(engine="real", device="cpu", edit_model=str(folder), verify_weights="full")
    with (
        ThreadPoolExecutor(1) as device_thread,
        pytest.raises(FatalError, match=r"vae/diffusion_pytorch_model\.safetensors: wrong checksum"),
    ):
        await service._Service({"edit": make_engine}, settings)._load(device_thread)


async def test_what_each_phase_of_the_start_took_is_in_the_metrics() -> None:
    serving = service._Service({"edit": lambda settings, chosen: engines.Instant()}, WorkerSettings(engine="preview"))
    with ThreadPoolExecutor(1) as device_thread:
        loaded, _ = await serving._load(device_thread)
    shown = serving._metrics["edit"].render()[0].decode()
    assert 'vidgen_worker_model_load_seconds{phase="weights",stage="edit"} 0.5' in shown
    assert f'vidgen_worker_model_load_seconds{{phase="total",stage="edit"}} {loaded["edit"].seconds}' in shown
    assert 'vidgen_worker_model_load_seconds{phase="imports",stage="edit"}' in shown


class Model(engines.Instant):
    """Asks for a GPU, and writes down what it is told."""

    def __init__(self, gib: int, total_gib: int, journal: list[str]) -> None:
        super().__init__()
        self.gib, self.total_gib, self.journal = gib, total_gib, journal

    def demand(self) -> profiles.Demand | None:
        parts = {"text_encoder": self.gib * GIB}
        return profiles.Demand(f"{self.gib} GiB", self.total_gib * GIB, parts, GIB, bound_by_bus=True)

    def settle_for(self, profile: profiles.Name, room: int) -> None:
        self.journal.append(f"{self.gib}: {profile}" + (f", room for {room / GIB:.0f}" if room else ""))

    def setup(self) -> dict[str, float]:
        self.journal.append(f"{self.gib} is set up")
        return {}

    def sleep(self) -> None:
        self.journal.append(f"{self.gib} sleeps")

    def wake(self) -> None:
        raise AssertionError("nobody waits for it")


async def load(total_gib: int, *stages: Stage) -> tuple[list[str], bool]:
    """What happens while services load a model of 30 GiB for edit and one of 40 GiB for i2v."""
    journal: list[str] = []

    def maker(stage: Stage) -> service.MakeEngine:
        return lambda settings, chosen: Model(30 if stage == "edit" else 40, total_gib, journal)

    made = service._Service({stage: maker(stage) for stage in stages}, WorkerSettings(engine="preview", device="cpu"))
    with ThreadPoolExecutor(1) as device_thread:
        _, takes_turns = await made._load(device_thread)
    return journal, takes_turns


async def test_models_that_fit_together_are_set_up_and_stay() -> None:
    assert await load(80, "edit", "i2v") == (
        ["30: resident-bf16", "40: resident-bf16", "40 is set up", "30 is set up"], False,
    )  # fmt: skip


async def test_of_models_that_take_turns_the_first_stages_is_awake_at_the_start() -> None:
    assert await load(48, "i2v", "edit") == (
        ["40: resident-bf16", "30: resident-bf16", "30 is set up", "30 sleeps", "40 is set up"], True,
    )  # fmt: skip


async def test_models_that_stream_are_told_what_room_there_is_for_weights_that_stay() -> None:
    journal, takes_turns = await load(20, "edit", "i2v")
    assert journal[:2] == ["30: offload-fp8, room for 6", "40: offload-fp8, room for 6"]
    assert not takes_turns


async def test_one_stage_alone_chooses_its_profile_itself() -> None:
    assert await load(48, "i2v") == (["40 is set up"], False)


async def test_a_model_that_does_not_fit_ends_the_start_before_anything_is_loaded() -> None:
    with pytest.raises(FatalError, match="3 GiB"):
        await load(3, "edit", "i2v")


async def test_a_gpu_too_small_for_any_profile_is_told_what_each_needs_and_no_task_is_looked_at(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edit_service.main import make_engine
    from vidgen.accel.engine import DiffusersEngine

    def connect(*given: object, **options: object) -> None:
        raise AssertionError("a worker without a model is not to ask for tasks")

    monkeypatch.setattr(DiffusersEngine, "_memory", lambda self: 4 << 30)
    monkeypatch.setattr(jetstream, "connect", connect)
    settings = WorkerSettings(engine="real", device="cpu", edit_model=str(tiny_models["qwen-edit"]), metrics_port=0)
    needs = "this GPU has 4 GiB, and this model needs: resident-bf16 7 GiB, resident-fp8 7 GiB, offload-fp8 7 GiB"
    with pytest.raises(FatalError, match=needs) as caught:
        await service._Service({"edit": make_engine}, settings).run()
    assert caught.value.code == "gpu_too_small"


async def test_a_work_dir_that_takes_nothing_ends_the_start_before_the_model_is_loaded(tmp_path: Path) -> None:
    """It was found out behind that, minutes later, and by a message that named no setting."""

    def make_engine(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
        raise AssertionError("nothing is to be loaded")

    (tmp_path / "file").write_text("")
    settings = WorkerSettings(engine="preview", work_dir=tmp_path / "file" / "scratch", metrics_port=0)
    with pytest.raises(FatalError, match=r"VIDGEN_WORK_DIR=.*/file/scratch cannot be used") as caught:
        await service._Service({"edit": make_engine}, settings).run()
    assert caught.value.code == "settings"


async def test_a_real_engine_that_is_asked_for_where_its_packages_are_not_is_told_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make_engine(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(weights, "PACKAGES", ("no_such_torch",))
    with pytest.raises(FatalError, match=re.escape(f"no_such_torch not installed: {extras.install('gpu')}")) as caught:
        await service._Service({"edit": make_engine}, WorkerSettings(engine="real", device="cpu", metrics_port=0)).run()
    assert caught.value.code == "not_installed"


@pytest.mark.parametrize("stages", [("edit",), ("edit", "i2v")])
async def test_an_engine_is_told_whether_it_is_alone_and_is_made_where_nothing_waits_for_it(
    stages: tuple[Stage, ...],
) -> None:
    told: list[bool] = []

    def make(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
        told.append(chosen.alone)
        assert threading.current_thread() is not threading.main_thread()
        return engines.Instant()

    made = service._Service(dict.fromkeys(stages, make), WorkerSettings(engine="preview", device="cpu"))
    with ThreadPoolExecutor(1) as device_thread:
        await made._load(device_thread)
    assert told == [len(stages) == 1] * len(stages)


@pytest.mark.parametrize("stages", [("edit",), ("edit", "i2v")])
async def test_what_imports_work_out_is_kept_beside_what_is_compiled(
    stages: tuple[Stage, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither read nor written where the probes are answered: a volume may be slow."""
    threads = list[threading.Thread]()

    class Seen(imports.Store):
        def __init__(self, file: Path) -> None:
            threads.append(threading.current_thread())
            super().__init__(file)

        def close(self) -> None:
            threads.append(threading.current_thread())
            super().close()

    def make(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
        make_dataclass("Made", ["a"])
        return engines.Instant()

    monkeypatch.setattr(imports, "Store", Seen)
    settings = WorkerSettings(engine="preview", device="cpu", compile_cache=tmp_path)
    for user, events in ((os.geteuid(), 0), (os.geteuid() + 1, 1)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        with ThreadPoolExecutor(1) as device_thread, capture_logs() as logs:
            await service._Service(dict.fromkeys(stages, make), settings)._load(device_thread)
        [file] = tmp_path.iterdir()
        assert file.name.startswith(f"imports-{'-'.join(stages)}-")
        assert [entry["_event"] for entry in logs].count("imports_not_kept") == events
    assert len(threads) == 4
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("work", [sum, lambda given: sum(given)])
def test_an_engine_has_room_for_all_that_it_calls(work: Callable[[list[int]], int]) -> None:
    done = in_thread(work)
    assert done([1, 2]) == 3
    assert done.__code__.co_stacksize >= frames.OWN  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine", ["real", "preview"])
async def test_the_disk_reads_a_real_model_while_its_engine_is_made(
    engine: Literal["real", "preview"], tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[list[Path]] = []

    @contextlib.contextmanager
    def filling(files: list[Path]) -> Iterator[None]:
        filled.append(files)
        yield

    monkeypatch.setattr(service.pagecache, "filling", filling)
    model = tiny_models["wan2.2-a14b-i2v"]
    settings = WorkerSettings(engine=engine, device="cpu", i2v_model=str(model))
    made = service._Service({"i2v": lambda settings, chosen: engines.Instant()}, settings)
    with ThreadPoolExecutor(1) as device_thread:
        await made._load(device_thread)
    assert [{file.parent.name for file in files} for files in filled] == [
        {"text_encoder", "transformer", "transformer_2", "vae"} if engine == "real" else set()
    ]


async def test_a_setup_that_looks_for_what_is_not_there_ends_the_start() -> None:
    """Python's futures take no StopIteration: the start was taken for one that hangs, a quarter of an hour later."""

    class Looks(engines.Instant):
        def setup(self) -> dict[str, float]:
            return next(iter(()))  # as of a model that has no parameters

    serving = service._Service({"edit": lambda settings, chosen: Looks()}, WorkerSettings(engine="preview"))
    with ThreadPoolExecutor(1) as device_thread, pytest.raises(FatalError, match="StopIteration"):
        async with asyncio.timeout(BOUND):
            await serving._load(device_thread)


@pytest.mark.parametrize("fault", [OSError("libcudart.so.13: no such file"), ImportError("cannot import name 'x'")])
async def test_what_an_engine_cannot_import_ends_the_start_with_a_sentence(fault: Exception) -> None:
    """Of packages that are there and do not fit it was a traceback."""

    def make(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
        raise fault

    serving = service._Service({"edit": make}, WorkerSettings(engine="preview"))
    with ThreadPoolExecutor(1) as device_thread, pytest.raises(FatalError, match=f"could not be set up: .*{fault}"):
        await serving._load(device_thread)


@pytest.mark.parametrize("hangs_in", ["make", "setup"])
async def test_a_start_that_hangs_is_told_by_the_probes_and_ends(
    hangs_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    reasons: list[str] = []

    class Stuck(engines.Instant):
        def setup(self) -> dict[str, float]:
            released.wait(60)
            return {}

    def make(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
        if hangs_in == "make":
            released.wait(60)
        return Stuck()

    @contextlib.asynccontextmanager
    async def probing(*given: Any, ready: Callable[[], tuple[bool, str]], **more: Any) -> AsyncIterator[str]:
        try:
            yield "http://probes"
        finally:
            reasons.append(ready()[1])

    monkeypatch.setattr(service.probes, "serve", probing)
    settings = WorkerSettings(engine="preview", device="cpu", hang_first_s=0.5)
    try:
        with pytest.raises(errors.HungError, match="VIDGEN_HANG_FIRST_S") as caught:
            await service._Service({"edit": make}, settings).run()
    finally:
        released.set()
    assert caught.value.code == "setup_hung"
    assert ("imported" if hangs_in == "make" else "warmed up") in reasons[0]


LEAVES = """
import asyncio, sys, threading
from tests import engines
from vidgen import errors, service

async def serve(self, loaded, takes_turns, device_thread, url):
    begun = threading.Event()
    def hang():
        begun.set()
        threading.Event().wait()
    asyncio.get_running_loop().run_in_executor(device_thread if sys.argv[1] == "device" else None, hang)
    await asyncio.to_thread(begun.wait)
    if sys.argv[2] == "fatal":
        raise errors.FatalError("the disk fails", code="disk_failed")
    if sys.argv[2] == "bug":
        raise ZeroDivisionError

service._Service._serve = serve
sys.exit(service.run("edit", lambda settings, chosen: engines.Instant()))
"""


@pytest.mark.parametrize("thread", ["device", "other"])
@pytest.mark.parametrize(("why", "code"), [("fatal", 1), ("bug", 1), ("drained", 0)])
def test_whatever_the_reason_is_to_leave_a_thread_that_hangs_keeps_no_process(thread: str, why: str, code: int) -> None:
    """Where the watchdog had not said so, the loop stood still at the end, its probes with it, for ever."""
    env = os.environ | {"VIDGEN_ENGINE": "preview", "VIDGEN_METRICS_PORT": "0", "VIDGEN_HANG_LEAST_S": "0.2"}
    command = [sys.executable, "-W", "ignore", "-c", LEAVES, thread, why]
    made = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=BOUND)
    assert made.returncode == code, made.stderr


async def test_the_probes_answer_while_a_step_that_takes_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    async def serve(serving: Any, loaded: Any, takes_turns: bool, device_thread: ThreadPoolExecutor, url: str) -> None:
        device_thread.submit(released.wait, BOUND)
        asyncio.get_running_loop().call_later(0.1, asking.set_result, url)
        raise FatalError("the disk fails", code="disk_failed")

    async def ask() -> int:
        async with httpx.AsyncClient(timeout=BOUND) as http:
            answer = await http.get(f"{await asking}/metrics")
        released.set()
        return answer.status_code

    monkeypatch.setattr(service._Service, "_serve", serve)
    asking = asyncio.get_running_loop().create_future()
    settings = WorkerSettings(engine="preview", device="cpu", metrics_port=0)
    asked = asyncio.create_task(ask())
    serving = service._Service({"edit": lambda settings, chosen: engines.Instant()}, settings)
    with pytest.raises(FatalError, match="the disk fails"):
        await serving.run()
    assert await asked == 200
    assert not serving.hangs


def test_garbage_is_not_collected_while_a_model_is_loaded_and_is_again_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    def make(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
        seen.append(gc.isenabled())
        raise FatalError("it cannot be made", code="setup_failed")

    monkeypatch.setenv("VIDGEN_ENGINE", "preview")
    monkeypatch.setenv("VIDGEN_METRICS_PORT", "0")
    monkeypatch.setattr(service.telemetry, "configure", lambda *given: None)
    assert service.run("edit", make) == 1
    assert seen == [False]
    assert gc.isenabled()


PEFT = """
import asyncio
import sys
from tests import checkpoints
checkpoints.install_shim()
from edit_service.main import make_engine
from vidgen import choice, service
from vidgen.settings import WorkerSettings

model, lora = sys.argv[1], sys.argv[2] or None
settings = WorkerSettings(engine="real", device="cpu", edit_model=model, edit_lora=lora, metrics_port=0)
with service.without_peft(settings, ["edit"]):
    engine = make_engine(settings, choice.Choice("real", "asked for"))
    engine.setup()
print("peft" in sys.modules)
import peft
"""


@pytest.mark.parametrize("has_lora", [False, True])
def test_peft_is_imported_where_there_is_a_lora_alone(
    tiny_models: dict[str, Path], tmp_path: Path, has_lora: bool
) -> None:
    """With the versions of the engines' packages that are installed: they import it wherever it is."""
    model, lora = tiny_models["qwen-edit"], ""
    if has_lora:
        from edit_service.engine.qwen import QwenEditEngine

        engine: Any = QwenEditEngine(str(model))
        engine.setup()
        lora = str(checkpoints.lora(tmp_path, engine._pipe))
    command = [sys.executable, "-W", "ignore", "-c", PEFT, str(model), lora]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{has_lora}\n"


def test_peft_is_there_again_when_a_service_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    with service.without_peft(WorkerSettings(), ["edit", "i2v"]):
        assert importlib.util.find_spec("peft") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("peft")
    assert importlib.util.find_spec("peft") is not None
    with service.without_peft(WorkerSettings(i2v_lora_2="one"), ["edit", "i2v"]):
        assert importlib.util.find_spec("peft") is not None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts both for each thread")
@pytest.mark.parametrize("refused", [False, True], ids=["plain", "in a sandbox"])
def test_what_gives_way_goes_behind_others_and_interrupts_nobody(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    def given(by: int) -> tuple[int, int]:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        service.give_way(by)
        return os.getpriority(os.PRIO_PROCESS, 0) - before, os.sched_getscheduler(0)

    if refused:
        monkeypatch.setattr(os, "sched_setscheduler", refuse)
    seen = []
    for by in (0, 3):  # each in a thread that ends: what gives way cannot take it back
        with ThreadPoolExecutor(1) as thread:
            seen.append(thread.submit(given, by).result())

    assert seen == [(0, os.SCHED_OTHER), (3, os.SCHED_OTHER if refused else os.SCHED_BATCH)]
