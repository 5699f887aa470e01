"""Which layers' attention is made in 8 bits: those that were tried on these very weights, and together lose little.

Attention in 8 bits is faster than in bf16 and loses more where it has peaks, which random weights have not. So a model
runs a few steps of a made-up task once. At each forward every layer's attention is made in both ways; then, from the
forwards' own inputs, the whole is predicted again with the layers that are to be narrow, and those that lose most are
left out until what is lost of the prediction is within `LIMIT`. All of it is the same in every process that has the
same weights, GPU and versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.accel import blocks
from vidgen.accel.kernels import flash3

# Of a prediction, against the same with attention in bf16. What else is in FP8 costs 2.1 % (docs/performance.md): even
# if both added up in full a forward stays within 5 %, over which nothing is on by default.
LIMIT = 0.028
# Of one layer's attention: what loses more is not narrowed, however little of it may come through.
LAYER_LIMIT = 0.10
ROUNDS = 5
MADE = 1  # the version of what is tried, and of the arithmetic


@dataclass(frozen=True)
class Verdict:
    """What a trial of one transformer came to.

    `narrow` are the layers whose attention is made in 8 bits, of `layers`. `error` is what a forward loses by it, the
    largest of those tried, and `layer_errors` what each layer's own attention loses.
    """

    layers: int
    narrow: tuple[int, ...]
    error: float
    layer_errors: tuple[float, ...]

    def apply(self, model: nn.Module) -> None:
        """Have the model do as was found."""
        for index, processor in enumerate(blocks.attentions(model)):
            processor.narrow = index in self.narrow


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Compile nothing: each forward is made once or twice."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


def tried(transformers: Sequence[nn.Module], rehearse: Callable[[], object]) -> tuple[Verdict, ...]:
    """Find for each transformer what `rehearse`, a run of their pipeline with attention in bf16, can do without."""
    watched = [_Watched(model) for model in transformers]
    with _eager(), contextlib.ExitStack() as stack:
        for one in watched:
            stack.enter_context(one)
        rehearse()
    with _eager():
        return tuple(one.verdict() for one in watched)


class _Watched(contextlib.AbstractContextManager["_Watched"]):
    """A transformer whose attentions are made in both ways, and whose forwards are kept, while the block runs."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._processors = blocks.attentions(model)
        self._forwards: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        self._errors: list[list[Tensor]] = [[] for _ in self._processors]

    def __enter__(self) -> _Watched:
        for processor, errors in zip(self._processors, self._errors, strict=True):
            processor.narrow = False
            processor._attend = _both_ways(processor._attend, errors)  # type: ignore[method-assign]
        self._hook = self._model.register_forward_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()
        for processor in self._processors:
            vars(processor).pop("_attend", None)

    def _keep(self, model: nn.Module, args: tuple[Any, ...], options: dict[str, Any], made: Any) -> None:
        self._forwards.append((args, options, made[0].clone()))

    def verdict(self) -> Verdict:
        """The most layers that keep within the limits."""
        # What is not a number is larger than any: it must not pass as nothing.
        local = tuple(max((_number(one) for one in errors), default=math.inf) for errors in self._errors)
        narrow = [index for index, error in enumerate(local) if error <= LAYER_LIMIT]
        found = math.inf
        for _ in range(ROUNDS):
            if not narrow or not self._forwards:
                break
            found = self._lost(narrow)
            if found <= LIMIT:
                self._narrow(())
                return Verdict(len(local), tuple(narrow), found, local)
            narrow = _least(narrow, local, (LIMIT / found) ** 2)
        self._narrow(())
        return Verdict(len(local), (), 0.0, local)

    def _lost(self, narrow: Sequence[int]) -> float:
        """The largest relative error of a prediction with these layers narrow."""
        self._narrow(narrow)
        return max(_number(_error(self._model(*args, **options)[0], made)) for args, options, made in self._forwards)

    def _narrow(self, layers: Sequence[int]) -> None:
        for index, processor in enumerate(self._processors):
            processor.narrow = index in layers


def _both_ways(stock: Callable[..., Tensor], errors: list[Tensor]) -> Callable[..., Tensor]:
    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        wide = stock(query, key, value, mask, lengths)
        errors.append(_error(flash3.attended(query, key, value, lengths).flatten(2, 3), wide))
        return wide

    return attend


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    return (found.float() - wanted.float()).norm() / wanted.float().norm()


def _number(error: Tensor) -> float:
    found = float(error)
    return found if math.isfinite(found) else math.inf


def _least(layers: Sequence[int], errors: Sequence[float], share: float) -> list[int]:
    """The layers that lose least, as many as together lose this share of what all do.

    As if they were independent: their squares add up. It is only what is tried next.
    """
    budget = 0.9 * share * sum(errors[index] ** 2 for index in layers)
    kept, spent = [], 0.0
    for index in sorted(layers, key=lambda index: errors[index]):
        spent += errors[index] ** 2
        if not spent <= budget:
            break
        kept.append(index)
    return sorted(kept)


# ── kept for the next start ──────────────────────────────────────────────────────────────────────────────────────────


def fingerprint(transformers: Sequence[nn.Module], *others: object) -> str:
    """A name for these weights, on this kind of GPU, with these versions: of a sample of every tensor."""
    said = hashlib.sha256(repr((MADE, LIMIT, LAYER_LIMIT, torch.__version__, *others)).encode())
    for model in transformers:
        for name, tensor in model.named_parameters():
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
            said.update(repr((name, tuple(tensor.shape))).encode())
            said.update(sample.numpy().tobytes())
    return said.hexdigest()[:32]


def kept(folder: Path, name: str) -> tuple[Verdict, ...] | None:
    """The verdicts that were kept under a name; None where there are none that can be read."""
    try:
        found = json.loads(_file(folder, name).read_bytes())
        return tuple(
            Verdict(one["layers"], tuple(one["narrow"]), one["error"], tuple(one["layer_errors"])) for one in found
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(folder: Path, name: str, verdicts: Sequence[Verdict]) -> None:
    """Keep verdicts for the next start; where the folder takes nothing, it tries again."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w") as file:
            json.dump([asdict(one) for one in verdicts], file)
        Path(temporary).replace(_file(folder, name))


def _file(folder: Path, name: str) -> Path:
    return folder / f"attention-{name}.json"
