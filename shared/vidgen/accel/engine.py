"""What the two diffusers engines are made of: from a verified folder to a pipeline that is laid out, fast and warm."""

from __future__ import annotations

import abc
import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import structlog
import torch

from vidgen import diffusion, profiles, weights
from vidgen.accel import ahead, blocks, fp8, graphs, ladder, loader, residency, speed, stepcache, streaming, trial
from vidgen.engine import EngineInfo, Generated, OnStep, Rung
from vidgen.errors import FatalError, RetryableError

if TYPE_CHECKING:
    from vidgen.accel.assemble import Instead

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Layout:
    """How an engine is laid into a device; each field is a setting of the same name.

    `dtype` auto is bfloat16 on a GPU and float32 on the CPU. `profile` auto follows the GPU's memory; on the CPU there
    is none. `attention` auto is FlashAttention 3 where it is installed and the GPU is a Hopper, else torch's own; an
    engine that can rehearse narrows with it what `vidgen.accel.trial` proves.
    `compile` auto compiles the transformer's blocks on a GPU that holds them all, but the edit's where our kernels
    leave nothing to fuse and graphs launch them; `blocks` compiles these too, `full` the VAE too, `off` nothing.
    `cuda_graphs` auto records the forwards of the edit's text encoder, and with FlashAttention 3 of its transformer
    (`vidgen.accel.graphs`) on a GPU that holds their weights, `off` none.
    `vae` auto lets the VAE do less for the same result (`vidgen.accel.autoencoder`) where it is not compiled, `stock`
    leaves it.
    What is compiled is kept in `compile_cache` for the next start. With `step_cache` over 1 one step in so many is
    computed in the middle of a run (`vidgen.accel.stepcache`). While another engine has the device the weights are
    in `sleep_in`: `memory`, `disk` (in `work_dir`), or auto.
    """

    device: str = "auto"
    dtype: str = "auto"
    profile: str = "auto"
    attention: str = "auto"
    compile: str = "auto"
    cuda_graphs: str = "auto"
    vae: str = "auto"
    compile_cache: Path | None = None
    step_cache: int = 1
    sleep_in: str = "auto"
    work_dir: Path | None = None


class DiffusersEngine(abc.ABC):
    """The part of an engine that does not depend on the model: load, lay out, speed up, warm up."""

    NAME: ClassVar[str]
    PIPELINE: ClassVar[Any]
    PIPELINES: ClassVar[frozenset[str]]
    WORK: ClassVar[int]  # bytes that one task takes beside the weights
    BOUND_BY_BUS: ClassVar[bool] = False  # where weights stream
    # What `assemble` need not load, and what there is of the rest that serves for it.
    INSTEAD: ClassVar[Instead] = {}

    def __init__(self, model: str, revision: str | None, loras: Mapping[str, str | None], layout: Layout) -> None:
        self.model = model
        self.revision = revision
        self.layout = layout
        self.info = EngineInfo(
            self.NAME, Path(model).name if Path(model).is_dir() else model, revision, device=layout.device
        )
        self.load_seconds: dict[str, float] = {}
        self._loras = {component: path for component, path in loras.items() if path is not None}
        self._content: dict[str, str] = {}  # names for what was loaded
        self.verdicts: tuple[trial.Verdict, ...] = ()
        self._attention = "torch"
        self._pipe: Any
        self._begun: loader.Reading | None = None
        self._streams = False  # as it is stored
        self._room: int | None = None  # of the device, for weights that would stream
        self._residency: residency.Residency | None = None
        self._graphs: graphs.Graphs | None = None
        self._in_doubt = False  # whether it runs to see if it still can
        self._rungs: tuple[Rung, ...] = ()  # none before the end of the warm-up: what has no room for that has none

    def go_on_with(self, reading: loader.Reading | None) -> None:
        """Take the weights in `setup` from a reading that was begun before this class could be imported."""
        self._begun = reading

    def setup(self) -> Mapping[str, float]:
        """Load the weights, fuse the LoRAs and, on a GPU, run once; raises FatalError with the remedy."""
        found = self._timed("verify", self._find)
        self._device = self._timed("device", self._open_device)
        dtype = self._dtype
        profile = self._profile(found)
        resident = profile is None or profile.startswith("resident")
        quantises = profile is not None and profile.endswith("fp8") and found.profile != "fp8"
        if resident and profile is not None and self._compiles(profile):
            self._timed("compiler", speed.import_compiler)
        # What is quantised or offloaded must never be on the device as a whole.
        place = self._device if resident and not quantises else torch.device("cpu")
        self._streams = not resident and not quantises
        self._pipe = self._timed("weights", lambda: self._load(found, place, self._dtypes(found, dtype)))
        for component, path in self._loras.items():
            self._timed("lora", functools.partial(diffusion.fuse, self._pipe, path, component))
            self._content[f"lora of {component}"] = weights.sampled([weights.lora_file(path)])
        with diffusion.loading("the model", "see the log of this worker"):
            self._timed("layout", lambda: self._lay_out(profile))
        self.info = replace(
            self.info, model=found.model, revision=found.revision, device=str(self._device),
            profile=str(dtype).removeprefix("torch.") if profile is None else self._told(profile),
        )  # fmt: skip
        self._prove()
        self._adopt()
        self._step_cache = stepcache.StepCache(self.layout.step_cache)
        if self.layout.step_cache > 1:
            self._step_cache.attach(self.transformers())
        if self._device.type == "cuda":
            with diffusion.loading("the model", "see the log of this worker"):
                self._timed("warm_up", self._warm_up)
        on_device = profile is not None and (resident or any(stream.keeps for stream in self._streamed()))
        self._rungs = ("vae_tiling", "offload") if on_device else ("vae_tiling",)
        return self.load_seconds

    def demand(self) -> profiles.Demand | None:
        """What the model asks of its GPU, None on the CPU: found before `setup`, without loading anything."""
        self._device = self._open_device()
        return self._demand(self._find())

    def settle_for(self, profile: profiles.Name, room: int) -> None:
        """Take this profile in `setup`, and `room` bytes of the GPU for weights that would stream."""
        self.layout = replace(self.layout, profile=profile)
        self._room = room if self.BOUND_BY_BUS else 0

    def sleep(self) -> None:
        """Leave the device to another engine: the weights go home, and all else stays as it is."""
        if self._residency is None:
            # What streams is on the host already.
            parts = [self._pipe.vae] if self._streamed() else self._pipe.components.values()
            modules = [part for part in parts if isinstance(part, torch.nn.Module)]
            layout = self.layout
            self._residency = residency.Residency(modules, self._device, layout.sleep_in, layout.work_dir)
        if self._graphs is not None:
            self._graphs.drop()
        with diffusion.moving(f"{self.info.model} could not be put to sleep", self._device):
            self._residency.sleep()
            for stream in self._streamed():
                stream.rest()
        diffusion.free(self._device)

    def wake(self) -> None:
        """Come back to the device, for results that are the same to the last bit."""
        if self._residency is not None:
            what = f"{self.info.model} could not be woken"
            with diffusion.moving(what, self._device), contextlib.ExitStack() as undo:
                for stream in self._streamed():
                    undo.callback(stream.rest)
                    stream.hold()
                self._residency.wake()
                undo.pop_all()

    def transformers(self) -> list[Any]:
        """The pipeline's transformers, where a model has two the one for the first steps first."""
        found = (getattr(self._pipe, name, None) for name in profiles.TRANSFORMERS)
        return [model for model in found if model is not None]

    def _streamed(self) -> list[streaming.Stream]:
        """What has the transformers stream, where they do."""
        return [stream for model in self.transformers() if (stream := streaming.of(model)) is not None]

    def _find(self) -> weights.Weights:
        return weights.require(self.model, self.revision, pipelines=self.PIPELINES)

    def _sizes(self, found: weights.Weights) -> Mapping[str, int]:
        return weights.component_sizes(found.folder, self._dtype.itemsize)

    @property
    def _dtype(self) -> torch.dtype:
        """The precision of what has no other."""
        return diffusion.dtype_of(self.layout.dtype, self._device)

    def _open_device(self) -> torch.device:
        device = diffusion.device_of(self.layout.device)
        if device.type == "cuda":
            # Of this thread, in which all is computed: Triton and graphs launch on the current device, wherever the
            # tensors are.
            torch.cuda.set_device(device)
            ahead.open_device(device)  # so that its time is its own
            if (taken := ahead.taken_by_others(device)) > profiles.GIB:
                log.warning(
                    f"other processes have about {taken / profiles.GIB:.1f} GiB of this GPU: the profile is chosen "
                    "from what they leave", _event="gpu_taken_by_others",
                )  # fmt: skip
        return device

    def _load(self, found: weights.Weights, place: torch.device, dtypes: Mapping[str, torch.dtype]) -> Any:
        if found.profile == "fp8" and self._loras:
            raise FatalError(
                f"{found.folder} is an FP8 snapshot, into which no LoRA can be fused any more: "
                "fuse it when quantising (vidgen weights quantize --lora) and leave the setting out",
                code="settings",
            )
        from vidgen.accel.assemble import assemble

        reading, self._begun = self._begun, None
        if reading is not None and reading.device != place:
            reading.close()  # the device is shared, and this engine's part of it is another
            reading = None
        if reading is None and self._streams:
            reading = ahead.begin(found, place, dtypes, streams=True)
        arithmetic = fp8.has_arithmetic(self._device)
        pipe = assemble(
            self.PIPELINE, found, place, dtypes, arithmetic=arithmetic, instead=self.INSTEAD, reading=reading,
            on_phase=self._add,
        )  # fmt: skip
        # Of what was read this moment. A folder's name says little of it, and a commit nothing of what was fused.
        self._content["weights"] = weights.sampled(weights.in_reading_order(found.folder))
        return pipe

    def _dtypes(self, found: weights.Weights, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The precision of each component, with a `default`."""
        return {"default": dtype}

    @abc.abstractmethod
    def _adopt(self) -> None:
        """Look at the pipeline that was loaded, before the warm-up."""

    def _compiles(self, profile: profiles.Name) -> bool:
        """Whether the transformer's blocks are compiled in a profile that keeps them on the GPU."""
        return self.layout.compile != "off"

    def _made_with(self) -> dict[str, object]:
        """What decides over the numbers besides model, profile and task: of a checkpoint, too, it must be the same."""
        names = ("dtype", "compile", "cuda_graphs", "vae", "step_cache")
        # Of attention auto says nothing: what that comes to depends on the GPU, and on what is installed.
        attention = {"attention": self._attention, "narrow": [one.narrow for one in self.verdicts]}
        return self._content | attention | {name: getattr(self.layout, name) for name in names}

    def _rehearsal(self) -> Callable[[], object] | None:
        """A run of the pipeline that stands for its tasks, on which attention in 8 bits can be tried; None: never."""
        return None

    def _prove(self) -> None:
        """Narrow the attention of the layers of which that was proven; on these weights, now or at an earlier start."""
        rehearse = self._rehearsal()
        if self.layout.attention != "auto" or self._attention != "flash3" or rehearse is None:
            return
        if not speed.has_eight_bits():
            return
        try:
            self.verdicts = self._timed("trial", functools.partial(self._tried, rehearse))
        except Exception as exc:
            traceback.clear_frames(exc.__traceback__)  # they hold what there may be no room for
            fault = diffusion.as_error(exc)
            if isinstance(fault, FatalError):
                raise fault from (exc if fault is not exc else None)
            log.warning(
                f"the trial of attention in 8 bits failed, it stays in 16: {type(exc).__name__}: {exc}"[:500],
                _event="attention_trial_failed",
            )
            diffusion.free(self._device)
            for model in self.transformers():
                blocks.narrow_attention(model, False)
            return
        for model, verdict in zip(self.transformers(), self.verdicts, strict=True):
            verdict.apply(model)
        log.info(
            "attention is made in 8 bits in the layers where a trial on these weights allows it",
            _event="attention_tried", layers=sum(one.layers for one in self.verdicts),
            narrow=sum(len(one.narrow) for one in self.verdicts),
            forward_error=round(max(one.error for one in self.verdicts), 4),
        )  # fmt: skip

    def _tried(self, rehearse: Callable[[], object]) -> tuple[trial.Verdict, ...]:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        folder = self.layout.compile_cache or Path(cache_dir())  # with what is compiled
        with streaming.at_home(self.transformers()):
            name = trial.fingerprint(self.transformers(), self.info.profile, torch.cuda.get_device_name(self._device))
        found = trial.kept(folder, name)
        if found is None:
            found = trial.tried(self.transformers(), rehearse)
            trial.keep(folder, name, found)
            diffusion.free(self._device)
        return found

    @abc.abstractmethod
    def _warm_up(self) -> None:
        """Run once, so that the first task finds everything compiled and allocated."""

    def _profile(self, found: weights.Weights) -> profiles.Name | None:
        """The profile on a GPU, None on the CPU; and what room there is, unless that was settled."""
        asked = self._demand(found)
        if asked is None:
            return None
        wanted = self.layout.profile
        profile = profiles.choose(wanted, asked.total, asked.parts, asked.work, stored_fp8=asked.stored_fp8)
        if self._room is None:
            self._room = asked.room(profile)
        return profile

    def _demand(self, found: weights.Weights) -> profiles.Demand | None:
        total = self._memory()
        if total is None:
            return None
        return profiles.Demand(
            found.model, total, self._sizes(found), self.WORK, found.profile == "fp8", self.BOUND_BY_BUS
        )

    def _memory(self) -> int | None:
        """The bytes of GPU memory that this process may use, None on the CPU."""
        if self._device.type != "cuda":
            return None
        return ahead.memory(self._device)

    def _free_memory(self) -> int | None:
        """The bytes of it that a task would find, None on the CPU."""
        total = self._memory()
        if total is None:
            return None
        taken: int = torch.cuda.memory_allocated(self._device)
        idle: int = torch.cuda.memory_reserved(self._device) - taken
        free: int = torch.cuda.mem_get_info(self._device)[0]
        recorded = 0 if self._graphs is None else self._graphs.held()
        return min(total - taken, free + idle) - recorded

    def _told(self, profile: profiles.Name) -> str:
        """The profile as others hear of it."""
        if not profile.endswith("fp8") or fp8.has_arithmetic(self._device):
            return profile
        log.warning(
            "this GPU does not multiply FP8: its weights are stored so, which saves memory, and widened for each "
            "product, which costs time", _event="fp8_storage_only", profile=profile,
        )  # fmt: skip
        return f"{profile}-storage"

    def _within_memory(
        self, attempt: Callable[[bool, bytes | None], Generated], state: bytes | None, on_step: OnStep, steps: int,
        *, at_once: bool = False,
    ) -> Generated:  # fmt: skip
        """Run a task, and where memory runs out once more with less of it: see `vidgen.accel.ladder`.

        `attempt` takes whether the candidates are to be made one after another, and the state to go on from; `at_once`
        says that they would not. `on_step` hears of step 0 of `steps` where it begins again. Raises FatalError where
        its numbers are none, and those of any task are.
        """
        rungs = ("one_by_one", *self._rungs) if at_once and self._rungs else self._rungs

        def tried(taken: tuple[Rung, ...], left: bytes | None) -> Generated:
            with contextlib.ExitStack() as without:
                if taken and self._graphs is not None:
                    without.enter_context(self._graphs.paused())
                return attempt(not at_once or "one_by_one" in taken, left)

        try:
            return ladder.descend(self._pipe, self._device, rungs, tried, state, lambda: on_step(0, steps))
        except RetryableError as exc:
            if exc.code == "not_finite" and not self._in_doubt:
                on_step(0, steps)  # it is silent for a while now, as one that begins again
                self._doubt(exc)
            raise

    def _doubt(self, fault: RetryableError) -> None:
        """Find out whether it was the task: raises FatalError where what worked before gives no numbers, either.

        Else a sick device would take one task after another, fast, and use up the tries of all of them.
        """
        self._in_doubt = True
        try:
            self._run_what_works()
        except RetryableError as exc:
            if exc.code == "not_finite":
                raise FatalError(
                    f"{self.info.model} on {self.info.device} makes no finite numbers of any task: check its weights "
                    "and LoRAs, the profile, and the GPU's memory", code="not_finite",
                ) from fault  # fmt: skip
        finally:
            self._in_doubt = False

    def _run_what_works(self) -> None:
        """Run a task of which finite numbers come, if of any."""
        self._warm_up()

    def _lay_out(self, profile: profiles.Name | None) -> None:
        if profile is None:
            return
        speed.take_torchs_assembler()
        if self.layout.compile_cache is not None:
            speed.keep_compiled(self.layout.compile_cache)  # Triton's kernels, too, which serve what streams as well
        transformers = self.transformers()
        for model in transformers:
            blocks.fuse_projections(model)
        if profile.endswith("fp8"):
            arithmetic = fp8.has_arithmetic(self._device)
            for model in transformers:
                fp8.quantise(model, arithmetic=arithmetic, through=self._device, keep_there=profile == "resident-fp8")
                blocks.fuse_feed_forwards(model)
                blocks.fuse_norms(model)
        diffusion.free(self._device)  # the projections that were put side by side left gaps
        self._attention = speed.choose_attention(transformers, self.layout.attention, self._device, self._dtype)
        streams = profile == "offload-fp8"
        if streams:
            if (said := residency.no_room_to_pin(speed.offloadable(self._pipe).values())) is not None:
                raise FatalError(f"{said}, or a GPU that holds them all", code="host_memory")
            speed.offload(self._pipe, self._device, self._room or 0)
        else:
            self._pipe.to(self._device)
        speed.channels_last(self._pipe.vae)
        if self.layout.vae == "auto" and (streams or self.layout.compile != "full"):
            speed.fuse_vae(self._pipe.vae, self._device)
        if streams:
            return
        if self._compiles(profile):
            speed.compile_blocks(transformers)
        if self.layout.compile == "full":
            speed.compile_vae(self._pipe.vae)
        self._graphs = graphs.Graphs() if self.layout.cuda_graphs != "off" else None
        speed.graph_predictions(transformers, self._attention, self._graphs)

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        try:
            return work()
        finally:
            self._add(phase, time.perf_counter() - begun)

    def _add(self, phase: str, seconds: float) -> None:
        self.load_seconds[phase] = self.load_seconds.get(phase, 0.0) + seconds
