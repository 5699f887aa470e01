"""Guidance on two devices: a step's two predictions do not depend on each other, so a partner computes one of them.

The partner is a process of its own with the same model on another device. It knows nothing of runs: it is given the
inputs of one forward and gives back the prediction. So steps, resuming and cancelling are those of one device.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from safetensors.torch import load, save

from vidgen import checkpoints, diffusion
from vidgen.engine import EngineInfo
from vidgen.errors import FatalError, RejectedError, RetryableError, VidgenError

FAULTS: dict[str, type[VidgenError]] = {kind.__name__: kind for kind in (RejectedError, RetryableError, FatalError)}
HOOK = "vidgen_guidance"
PREDICTION = "prediction"
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG

Make = Callable[[], Any]


class Partner:
    """Another process that computes the first prediction of each guided step, while this one computes the second.

    `make` makes its engine, not set up, for the other device; it must be picklable. Calls come from one thread.
    """

    def __init__(self, make: Make, device: str) -> None:
        self._make, self._device = make, device
        self._guided = False
        self._awaited: torch.Tensor | None = None

    def start(self) -> None:
        """Let it begin to set up its engine."""
        ours, theirs = socket.socketpair()
        with theirs:
            # In a session of its own: a Ctrl-C is for the worker. It ends when this end of the socket is closed,
            # whatever ends this process.
            self._process = subprocess.Popen(  # noqa: S603  our own command line, no shell
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        self._connection = Connection(ours.detach())
        with self._noticed():
            self._connection.send_bytes(pickle.dumps(self._make))

    def ready(self, info: EngineInfo, narrow: Sequence[Sequence[int]] = ()) -> None:
        """Wait until its engine is set up as the one of `info`; raises FatalError.

        `narrow` are the layers of its transformers whose attention is made in 8 bits.
        """
        _, told = self._answer()
        if told["profile"] != str(info.profile):
            raise FatalError(
                f"guidance on two devices needs one profile: {info.device} has {info.profile}, {self._device} has "
                f"{told['profile']}: set VIDGEN_PROFILE to what both can hold",
                code="settings",
            )
        if told["narrow"] != str([tuple(layers) for layers in narrow]):
            raise FatalError(
                f"guidance on two devices needs the same attention on both: on {self._device} a trial found other "
                "layers for 8 bits: set VIDGEN_ATTENTION to flash3",
                code="settings",
            )

    def attach(self, transformers: Sequence[Any]) -> None:
        """Take part in the forwards of a pipeline's transformers; what foretells steps is attached afterwards."""
        for index, model in enumerate(transformers):
            registry = HookRegistry.check_if_exists_or_initialize(model)
            registry.remove_hook(HOOK, recurse=False)
            registry.register_hook(_SideBySide(self, index), HOOK)

    def begin(self, *, guided: bool) -> None:
        """Another run begins: with guidance its forwards come in pairs, without it one by one."""
        if self._awaited is not None:  # the run before broke off in the middle of a step
            self._awaited = None
            with contextlib.suppress(RejectedError, RetryableError):
                self._answer()
        self._guided = guided

    def close(self) -> None:
        """Let the partner end; waits until it has."""
        self._connection.close()
        self._process.wait()

    def predicts(self, index: int, given: Mapping[str, Any], channels: int) -> torch.Tensor | None:
        """The prediction to be, where this forward is the partner's: it holds nothing before `complete`."""
        if not self._guided or self._awaited is not None:
            return None
        latents = given["hidden_states"]
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in given.items()
                   if torch.is_tensor(value)}  # fmt: skip
        with self._noticed():
            self._connection.send_bytes(_packed(tensors, index=index))
        self._awaited = latents.new_empty((latents.shape[0], channels, *latents.shape[2:]))
        return self._awaited

    def complete(self) -> None:
        """Fill in the prediction that the partner was asked for; raises FatalError where the partner is gone."""
        awaited, self._awaited = self._awaited, None
        if awaited is None:
            return
        tensors, _ = self._answer()
        found = tensors[PREDICTION]
        if (found.shape, found.dtype) != (awaited.shape, awaited.dtype):
            raise FatalError(
                f"the other device predicts {found.dtype} of {tuple(found.shape)}, not {awaited.dtype} of "
                f"{tuple(awaited.shape)}", code="partner_lost",
            )  # fmt: skip
        awaited.copy_(found)

    def _answer(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What comes next from the partner: every question has one answer, and nothing is asked before it was read."""
        with self._noticed():
            packed = self._connection.recv_bytes()
        told = checkpoints.metadata_of(packed)
        if "fault" in told:
            message = f"{self._device}: {told['message']}"
            if told["code"] == "out_of_memory":  # of which there is no more there where this device does without
                raise RetryableError(message, code="partner_out_of_memory")
            raise FAULTS.get(told["fault"], FatalError)(message, code=told["code"])
        return load(packed), told

    @contextlib.contextmanager
    def _noticed(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as exc:
            raise FatalError(
                f"the process that computes guidance on {self._device} is gone: what it said last is in this worker's "
                "output", code="partner_lost",
            ) from exc  # fmt: skip


class _SideBySide(ModelHook):
    """Gives the first forward of a guided step away, and lets the second one wait for both."""

    def __init__(self, partner: Partner, index: int) -> None:
        super().__init__()
        self._partner, self._index = partner, index

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The pipeline reads it only behind the second forward, which fills it in.
        awaited = self._partner.predicts(self._index, kwargs, module.config.out_channels)
        if awaited is not None:
            return (awaited,)
        made = self.fn_ref.original_forward(*args, **kwargs)
        self._partner.complete()
        return made


def _packed(tensors: dict[str, torch.Tensor], **told: object) -> bytes:
    return save(tensors, {name: str(value) for name, value in told.items()})


def serve(connection: Connection) -> None:
    """The partner: set up the engine that is asked for, then answer until the other end is closed."""
    make: Make = pickle.loads(connection.recv_bytes())  # noqa: S301  from the process that started this one
    engine = make()
    try:
        engine.setup()
    except VidgenError as exc:
        connection.send_bytes(_fault(exc))
        return
    connection.send_bytes(_packed({}, profile=engine.info.profile, narrow=[one.narrow for one in engine.verdicts]))
    models, device = engine.transformers(), torch.device(engine.info.device)
    while True:
        packed = connection.recv_bytes()
        index = int(checkpoints.metadata_of(packed)["index"])
        try:
            given = {name: value.to(device) for name, value in load(packed).items()}
            with torch.no_grad(), models[index].cache_context("cond"):
                [prediction] = models[index](**given, return_dict=False)
            answer = _packed({PREDICTION: prediction.to("cpu", copy=True).contiguous()})
        except Exception as exc:
            fault = diffusion.as_error(exc)
            if fault is None:
                raise
            diffusion.free(device)
            answer = _fault(fault)
        connection.send_bytes(answer)


def _fault(exc: VidgenError) -> bytes:
    return _packed({}, fault=type(exc).__name__, code=exc.code, message=exc.message)


def _on_a_leash(parent: int) -> None:
    """Leave with the worker, and not before it: even from a kernel that hangs, where no closed socket is noticed.

    A manager of services tells all of its processes to end; the worker then still wants the step that it is at.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # Linux alone
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    _on_a_leash(int(sys.argv[2]))
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(int(sys.argv[1])))
