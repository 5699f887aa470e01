"""Forwards of Qwen-Image's transformer as CUDA graphs: thousands of kernels for the launch of one.

A graph is of one layout of pictures and of a range of text lengths. The text is padded to the end of its range, behind
everything else, and attention is told on the device how many tokens to see: what the pads compute nobody reads. The
first forward of a kind runs without a graph, the second one records it, so that a kind that comes but once costs nothing.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

from vidgen.accel.blocks import JointAttention
from vidgen.diffusion import round_up

log = structlog.get_logger(__name__)

HOOK = "vidgen_graphs"
RANGE = 64  # text lengths that share a graph: half of them, on average, are pads, 0.4 % of an edit's tokens
KEPT = 16  # graphs: the one unused for longest goes
# What a forward may be given; with anything else it is the model's own.
GIVEN = frozenset({
    "hidden_states", "encoder_hidden_states", "timestep", "img_shapes", "encoder_hidden_states_mask", "guidance",
    "attention_kwargs", "return_dict",
})  # fmt: skip

Pictures = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Kind:
    """What the forwards of a graph have in common: the pictures' sizes in patches, and how far the text is padded."""

    pictures: Pictures
    text: int


def kind_of(given: Mapping[str, Any]) -> Kind | None:
    """The kind of a forward by its arguments, None for one that is the model's own. Pure."""
    if not given.keys() <= GIVEN or given.get("guidance") is not None or given.get("attention_kwargs"):
        return None
    # Several at once keep the device busy by themselves, and may differ in the lengths of their texts.
    if given["hidden_states"].shape[0] != 1 or given.get("encoder_hidden_states_mask") is not None:
        return None
    [pictures] = given["img_shapes"]
    tokens: int = given["encoder_hidden_states"].shape[1]
    return Kind(tuple(pictures), round_up(tokens, RANGE))


def records_on(device: torch.device) -> bool:
    """Whether graphs can be recorded on a device."""
    return device.type == "cuda"


class Graphs:
    """The graphs of one transformer, whose attentions must be fused and see so many keys as they are told.

    One call at a time. They hold the addresses of the weights: `drop` them before those move.
    """

    def __init__(self, model: Any, kept: int = KEPT) -> None:
        self._model, self._kept = model, kept
        self._forwards: OrderedDict[Kind, _Forward] = OrderedDict()
        self._pool: Any = None
        self._paused = False

    def __len__(self) -> int:
        return sum(forward.recorded for forward in self._forwards.values())

    def attach(self) -> None:
        """Answer the model's forwards from now on; what foretells steps is attached afterwards."""
        registry = HookRegistry.check_if_exists_or_initialize(self._model)
        hook = registry.get_hook(HOOK)
        if hook is None:
            hook = _Replayed()
            registry.register_hook(hook, HOOK)
        hook.graphs = self

    def drop(self) -> None:
        """Let go of all graphs and of their memory; the next forwards record them anew."""
        self._forwards.clear()
        self._pool = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the forwards within it to the model, and no memory to graphs."""
        self.drop()
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def held(self) -> int:
        """The bytes of the device's memory that only graphs can use."""
        if self._pool is None:
            return 0
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self._pool))

    def answer(self, given: Mapping[str, Any]) -> Tensor | None:
        """The prediction of a forward, None for one that is the model's own."""
        kind = None if self._paused else kind_of(given)
        if kind is None:
            return None
        forward = self._forwards.get(kind)
        if forward is None:
            while len(self._forwards) >= self._kept:
                self._forwards.popitem(last=False)
            forward = self._forwards[kind] = _Forward(self._model, kind, given)
        self._forwards.move_to_end(kind)
        forward.fill(given)
        if forward.ran and not forward.recorded and records_on(forward.device):
            self._record(forward)
        return forward.run()

    def _record(self, forward: _Forward) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            forward.record(self._pool)
        except RuntimeError as exc:  # memory ran out, mostly; what the device itself lacks the next forward says
            log.warning(f"no CUDA graph can be recorded, this worker goes on without: {exc}", _event="graphs_off")
            self.drop()
            self._paused = True


class _Forward:
    """The forwards of one kind, with the inputs that a graph reads, at addresses that stay."""

    def __init__(self, model: Any, kind: Kind, given: Mapping[str, Any]) -> None:
        self._model = model
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        self.device = latents.device
        self._latents, self._timestep = torch.empty_like(latents), torch.empty_like(given["timestep"])
        self._text = text.new_zeros((1, kind.text, text.shape[2]))
        self._lengths = torch.zeros(1, dtype=torch.int32, device=self.device)
        # Both are made on the host, and the same for all forwards of the kind.
        self._freqs = model.pos_embed([list(kind.pictures)], max_txt_seq_len=kind.text, device=self.device)
        self._references = _references(kind.pictures, self.device) if model.zero_cond_t else None
        self._graph: Any = None
        self._made: Tensor | None = None
        self.ran = False

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def fill(self, given: Mapping[str, Any]) -> None:
        """Take the inputs of a forward."""
        text = given["encoder_hidden_states"]
        tokens = text.shape[1]
        self._latents.copy_(given["hidden_states"])
        self._timestep.copy_(given["timestep"])
        self._text[:, :tokens].copy_(text)
        self._text[:, tokens:].zero_()  # any number would do, a NaN would not
        self._lengths.fill_(self._latents.shape[1] + tokens)

    def record(self, pool: Any) -> None:
        """Record the graph, once the same kernels have run without."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._made = self._computed()
        self._graph = graph

    def run(self) -> Tensor:
        """The prediction for what was filled in."""
        self.ran = True
        if self._graph is None:
            return self._computed()
        assert self._made is not None
        self._graph.replay()
        return self._made.clone()  # the next replay writes there

    def _computed(self) -> Tensor:
        """`QwenImageTransformer2DModel.forward`, without what it makes on the host."""
        model = self._model
        hidden, text = model.img_in(self._latents), model.txt_in(model.txt_norm(self._text))
        timestep = self._timestep.to(hidden.dtype)
        if model.zero_cond_t:
            timestep = torch.cat([timestep, timestep * 0])
        temb = model.time_text_embed(timestep, hidden)
        for block in model.transformer_blocks:
            text, hidden = block(
                hidden_states=hidden, encoder_hidden_states=text, encoder_hidden_states_mask=None, temb=temb,
                image_rotary_emb=self._freqs, joint_attention_kwargs={"lengths": self._lengths},
                modulate_index=self._references,
            )  # fmt: skip
        if model.zero_cond_t:
            temb = temb.chunk(2)[0]
        made: Tensor = model.proj_out(model.norm_out(hidden, temb))
        return made


class _Replayed(ModelHook):
    """Has a transformer's forwards answered by graphs, where it has some and they can."""

    graphs: Graphs | None = None

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.graphs is not None and not args and not kwargs.get("return_dict", True):
            made = self.graphs.answer(kwargs)
            if made is not None:
                return (made,)
        return self.fn_ref.original_forward(*args, **kwargs)


def detach(model: Any) -> None:
    """Leave a model's forwards to itself again."""
    registry = getattr(model, "_diffusers_hook", None)
    hook = registry.get_hook(HOOK) if registry is not None else None
    if hook is not None:
        hook.graphs = None


def suits(model: Any) -> bool:
    """Whether a model is a transformer of Qwen-Image with fused attentions."""
    if type(model).__name__ != "QwenImageTransformer2DModel" or model.config.use_additional_t_cond:
        return False
    return all(isinstance(block.attn.processor, JointAttention) for block in model.transformer_blocks)


def _references(pictures: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """(1, image tokens) int32: 0 for those of the picture that is denoised, which comes first, 1 for the others."""
    sizes = torch.tensor([frames * height * width for frames, height, width in pictures])
    return (torch.arange(len(pictures)) > 0).int().repeat_interleave(sizes)[None].to(device)
