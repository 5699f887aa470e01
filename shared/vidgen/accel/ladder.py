"""What a task does without where the device's memory does not hold it: one thing more with each try, then put back.

Nobody else pays for it: behind the task the pipeline is as it was before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import structlog
import torch
from torch import nn

from vidgen import diffusion
from vidgen.accel import loader, residency, resume, speed, streaming
from vidgen.engine import Generated, Rung
from vidgen.errors import FatalError, RetryableError, Suspended, VidgenError

log = structlog.get_logger(__name__)

ACTS: dict[Rung, str] = {
    "one_by_one": "the candidates one after another",
    "vae_tiling": "the VAE in tiles",
    "offload": "the weights streamed from the host's memory",
}


def descend(
    pipe: Any, device: torch.device, rungs: Sequence[Rung],
    attempt: Callable[[tuple[Rung, ...], bytes | None], Generated], state: bytes | None,
    begins_again: Callable[[], object],
) -> Generated:  # fmt: skip
    """Try a task, and where memory runs out once more, each time one rung further down.

    `attempt` takes the rungs that are taken by then, and the state to go on from: the one that is given, or what the
    try before it left. `one_by_one` is its own to do, the other rungs are done to the pipeline. Before each try but the
    first `begins_again` is called, which may raise to end it there. What is raised, too, says in its `rungs` which they
    were.
    """
    taken: tuple[Rung, ...] = ()
    with contextlib.ExitStack() as lowered:
        while True:
            try:
                if taken:
                    _say(begins_again, state)
                if taken and taken[-1] in LOWER:
                    lowered.enter_context(LOWER[taken[-1]](pipe, device))
                return replace(attempt(taken, state), rungs=taken)
            except VidgenError as exc:
                exc.rungs = taken
                if not isinstance(exc, RetryableError) or exc.code != "out_of_memory":
                    raise
                _forget(pipe, device)
                if len(taken) == len(rungs):
                    raise
                said, state = exc.message, exc.state or state
            diffusion.free(device)  # what the exception held
            rung = rungs[len(taken)]
            log.warning(f"{said}: once more, {ACTS[rung]}", _event="memory_rung", rung=rung)
            taken = (*taken, rung)


def _say(begins_again: Callable[[], object], state: bytes | None) -> None:
    """Before the next rung, which may take a minute: whoever asks for the state then has the one that there is."""
    try:
        begins_again()
    except Suspended as exc:
        if state is not None:
            exc.state, exc.step = state, resume.step_of(state)
            exc.steps = max(exc.steps, exc.step + 1)  # of candidates there may be others
        raise


@contextlib.contextmanager
def tiled(pipe: Any, device: torch.device) -> Iterator[None]:
    """Encode and decode in overlapping tiles: the pixels change a little where they meet."""
    vae = pipe.vae
    before = vae.use_tiling
    # Every shape of tile would be compiled, a minute each, to be used once.
    compiled = [(part, part._compiled_call_impl) for part in (vae.encoder, vae.decoder)]
    vae.enable_tiling()
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call
        vae.use_tiling = before


@contextlib.contextmanager
def streamed(pipe: Any, device: torch.device) -> Iterator[None]:
    """Keep the weights in host memory and let them stream through the device, uncompiled, then bring them back.

    Of those that stream already it has none stay. Raises RetryableError where the host has no room for them, and
    FatalError where they cannot be brought back.
    """
    models = speed.offloadable(pipe).values()
    staying = [stream for model in models if (stream := streaming.of(model)) is not None and stream.stays]
    if not staying and (said := residency.no_room_to_pin(models)) is not None:
        raise RetryableError(f"the device ran out of memory, and {said}", code="out_of_memory")
    try:
        try:
            for stream in staying:
                stream.hold(room=0)
            if not staying:
                speed.offload(pipe, device)
        except Exception as exc:
            fault = diffusion.as_error(exc)
            if fault is None or fault is exc:
                raise
            raise fault from exc
        # The compiler refuses blocks whose weights come and go.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        try:
            diffusion.free(device)
            for stream in staying:
                stream.hold()
            if not staying:
                _bring_back(models, device)
        except Exception as exc:
            raise FatalError(
                f"the weights could not be brought back to {device} behind a task without room for them: {exc}",
                code="weights_lost",
            ) from exc


LOWER: dict[Rung, Callable[[Any, torch.device], AbstractContextManager[None]]] = {
    "vae_tiling": tiled,
    "offload": streamed,
}


def _bring_back(models: Iterable[nn.Module], device: torch.device) -> None:
    for model in models:
        streaming.close(model)
    diffusion.free(device)
    for model in models:
        model.to(device)
    if device.type == "cuda":
        loader.give_back(device)


def _forget(pipe: Any, device: torch.device) -> None:
    """Let go of what a failed try left in the pipeline."""
    clear = getattr(pipe.vae, "clear_cache", None)
    if clear is not None:  # the frames that a broken decode kept for the next ones
        clear()
    diffusion.free(device)
