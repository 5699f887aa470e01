"""Forwards as CUDA graphs: thousands of kernels for the launch of one, where the processor could not keep the GPU busy.

A graph is of one kind of forward: its shapes. Text is padded to the end of a range of lengths, behind everything else,
where nothing that is read sees it. The first forward of a kind runs without a graph, the second one records it, so that
a kind that comes but once costs nothing.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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
KEPT = 64  # graphs: the one unused for longest goes
# What a prediction may be given; with anything else it is the model's own.
GIVEN = frozenset({
    "hidden_states", "encoder_hidden_states", "timestep", "img_shapes", "encoder_hidden_states_mask", "guidance",
    "attention_kwargs", "return_dict",
})  # fmt: skip

Pictures = tuple[tuple[int, int, int], ...]


def records_on(device: torch.device) -> bool:
    """Whether graphs can be recorded on a device."""
    return str(device.type) == "cuda"


class Forward(abc.ABC):
    """The forwards of one kind, with inputs at addresses that stay."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ran = False
        self._graph: Any = None
        self._made: Tensor | None = None

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def record(self, pool: Any, stream: Any) -> None:
        """Record the graph, once the same kernels have run without."""
        graph = torch.cuda.CUDAGraph()
        # On this device, which need not be the thread's current one; other threads may use theirs meanwhile.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self._made = self.computed()
        self._graph = graph

    def run(self) -> Tensor:
        """What is computed of the inputs that were filled in."""
        self.ran = True
        if self._graph is None:
            return self.computed()
        assert self._made is not None
        self._graph.replay()
        return self._made.clone()  # the next replay writes there

    @abc.abstractmethod
    def fill(self, given: Any) -> None:
        """Take the inputs of a forward."""

    @abc.abstractmethod
    def computed(self) -> Tensor:
        """The result, by kernels alone: nothing in it waits for the device, or depends on what it finds there."""


class Graphs:
    """The graphs of an engine, which share their memory: one forward at a time.

    They hold the addresses of the weights: `drop` them before those move.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._forwards: OrderedDict[Hashable, Forward] = OrderedDict()
        self._pool: Any = None
        self._stream: Any = None  # one for all: cuBLAS keeps memory for each that it is used on
        self._refused = set[Hashable]()  # kinds of which no graph could be recorded
        self._paused = False

    def __len__(self) -> int:
        return sum(forward.recorded for forward in self._forwards.values())

    def answer(self, kind: Hashable, make: Callable[[], Forward], given: Any) -> Tensor | None:
        """The result of a forward of this kind, which `make` makes where it is the first; None where it is refused."""
        if self._paused or kind in self._refused:
            return None
        forward = self._forwards.get(kind)
        if forward is None:
            while len(self._forwards) >= self._kept:
                self._forwards.popitem(last=False)
            forward = self._forwards[kind] = make()
        self._forwards.move_to_end(kind)
        forward.fill(given)
        if forward.ran and not forward.recorded and records_on(forward.device) and not self._record(forward):
            self._refuse(kind)
            return None
        return forward.run()

    def drop(self) -> None:
        """Let go of all graphs and of their memory; the next forwards record them anew."""
        self._let_go()
        self._refused.clear()

    def _let_go(self) -> None:
        self._forwards.clear()
        self._pool = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it forwards are the models' own, and no memory is kept for graphs."""
        self._let_go()
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

    def _record(self, forward: Forward) -> bool:
        if self._stream is None:
            self._stream = torch.cuda.Stream(forward.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            forward.record(self._pool, self._stream)
        except RuntimeError as exc:  # memory ran out, mostly; what the device itself lacks the next forward says
            log.warning(f"a size of picture or text goes on without a CUDA graph: {exc}", _event="graph_refused")
            return False
        return True

    def _refuse(self, kind: Hashable) -> None:
        # Its forwards want the memory that the others' graphs hold. Those are recorded anew; this one is not tried
        # again, or each of its tasks would cost them theirs.
        self._let_go()
        if len(self._refused) >= self._kept:
            self._refused.clear()
        self._refused.add(kind)


# ── the transformer of Qwen-Image ────────────────────────────────────────────────────────────────────────────────────


def predict(graphs: Graphs | None, model: Any) -> None:
    """Have the predictions of a transformer answered by graphs, or by the model alone.

    What foretells steps is attached afterwards. Its attentions must be told on the device how many tokens they see.
    """
    registry = HookRegistry.check_if_exists_or_initialize(model)
    hook = registry.get_hook(HOOK)
    if hook is None and graphs is not None:
        hook = _Answered()
        registry.register_hook(hook, HOOK)
    if hook is not None:
        hook.graphs = graphs


def predicts(model: Any) -> bool:
    """Whether a model is a transformer of Qwen-Image with fused attentions."""
    if type(model).__name__ != "QwenImageTransformer2DModel" or model.config.use_additional_t_cond:
        return False
    return all(isinstance(block.attn.processor, JointAttention) for block in model.transformer_blocks)


@dataclass(frozen=True)
class Kind:
    """What predictions of one graph have in common: the pictures' sizes in patches, and how far the text is padded."""

    pictures: Pictures
    text: int


def kind_of(given: Mapping[str, Any]) -> Kind | None:
    """The kind of a prediction by its arguments, None for one that is the model's own. Pure."""
    if not given.keys() <= GIVEN or given.get("guidance") is not None or given.get("attention_kwargs"):
        return None
    # Several at once keep the device busy by themselves, and may differ in the lengths of their texts.
    if given["hidden_states"].shape[0] != 1 or given.get("encoder_hidden_states_mask") is not None:
        return None
    [pictures] = given["img_shapes"]
    return Kind(tuple(pictures), round_up(given["encoder_hidden_states"].shape[1], RANGE))


class _Answered(ModelHook):
    """Has a transformer's forwards answered by graphs, where there are some and they can."""

    graphs: Graphs | None = None

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.graphs is not None and not args and not kwargs.get("return_dict", True):
            kind = kind_of(kwargs)
            if kind is not None and _holds_pads(module.pos_embed, kind):
                made = self.graphs.answer(kind, lambda: Prediction(module, kind, kwargs), kwargs)
                if made is not None:
                    return (made,)
        return self.fn_ref.original_forward(*args, **kwargs)


def _holds_pads(rotations: Any, kind: Kind) -> bool:
    """Whether a table of rotations, in which a text comes behind the largest picture, goes to the end of its pads."""
    longest = max(max(height, width) for _, height, width in kind.pictures)
    return (longest // 2 if rotations.scale_rope else longest) + kind.text <= len(rotations.pos_freqs)


class Prediction(Forward):
    """`QwenImageTransformer2DModel.forward`, without what it makes on the host."""

    def __init__(self, model: Any, kind: Kind, given: Mapping[str, Any]) -> None:
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        super().__init__(latents.device)
        self._model = model
        self._latents, self._timestep = torch.empty_like(latents), torch.empty_like(given["timestep"])
        self._text = text.new_zeros((1, kind.text, text.shape[2]))
        self._lengths = torch.zeros(1, dtype=torch.int32, device=self.device)
        # The same for all predictions of the kind.
        self._freqs = model.pos_embed([list(kind.pictures)], max_txt_seq_len=kind.text, device=self.device)
        self._references = _references(kind.pictures, self.device) if model.zero_cond_t else None

    def fill(self, given: Mapping[str, Any]) -> None:
        text: Tensor = given["encoder_hidden_states"]
        self._latents.copy_(given["hidden_states"])
        self._timestep.copy_(given["timestep"])
        _fill(self._text, text)
        self._lengths.fill_(self._latents.shape[1] + text.shape[1])

    def computed(self) -> Tensor:
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


def _references(pictures: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """(1, image tokens) int32: 0 for those of the picture that is denoised, which comes first, 1 for the others."""
    sizes = torch.tensor([frames * height * width for frames, height, width in pictures])
    return (torch.arange(len(pictures)) > 0).int().repeat_interleave(sizes)[None].to(device)


# ── the text encoder, Qwen2.5-VL ─────────────────────────────────────────────────────────────────────────────────────


def encode(graphs: Graphs | None, text_encoder: Any) -> None:
    """Have the layers of a Qwen2.5-VL answered by graphs, or by the layers alone; another encoder stays as it is.

    Nothing is kept for a text that is to be gone on with, word by word: an encoder's is read once.
    """
    model: Any = getattr(text_encoder, "model", None)
    if type(model).__name__ != "Qwen2_5_VLModel":
        return
    vision, language = model.visual, model.language_model
    whole = set(vision.fullatt_block_indexes)
    for _, run in itertools.groupby(enumerate(vision.blocks), lambda one: one[0] in whole):
        _Run([block for _, block in run], graphs, _vision_kind, Vision)
    _Run(list(language.layers), graphs, _language_kind, Language)


class _Run:
    """Layers that follow one another: a graph answers for all of them where the first one is called."""

    def __init__(
        self, layers: Sequence[Any], graphs: Graphs | None,
        kind_of: Callable[[Tensor, Mapping[str, Any]], tuple[int, ...] | None], make: Callable[..., Forward],
    ) -> None:  # fmt: skip
        for layer in layers:
            forward = vars(layer).get("forward")
            if isinstance(getattr(getattr(forward, "func", None), "__self__", None), _Run):  # of a layout before
                del layer.forward
        if graphs is None:
            return
        self._graphs, self._kind_of, self._make = graphs, kind_of, make
        self._own = [layer.forward for layer in layers]
        self._answered = False
        for index, layer in enumerate(layers):
            layer.forward = functools.partial(self._forward, index)

    def _forward(self, index: int, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        if index == 0:
            kind = None if args else self._kind_of(hidden_states, given)
            made = None
            if kind is not None:
                make = functools.partial(self._make, self._own, kind, hidden_states, given)
                made = self._graphs.answer((id(self), *kind), make, (hidden_states, given))
            self._answered = made is not None
            if made is not None:
                return made
        elif self._answered:
            return hidden_states
        own: Tensor = self._own[index](hidden_states, *args, **given)
        return own


class Language(Forward):
    """Layers of a language model over one text from its beginning: a token sees none behind it, so none sees a pad."""

    def __init__(
        self, layers: Sequence[Callable[..., Tensor]], kind: tuple[int, ...], hidden: Tensor, given: Mapping[str, Any]
    ) -> None:
        super().__init__(hidden.device)
        self._layers = layers
        self._hidden = hidden.new_zeros((1, kind[0], hidden.shape[2]))
        self._turns = tuple(turn.new_zeros((1, kind[0], turn.shape[2])) for turn in given["position_embeddings"])
        self._tokens = 0

    def fill(self, given: tuple[Tensor, Mapping[str, Any]]) -> None:
        hidden, more = given
        self._tokens = hidden.shape[1]
        for room, part in zip((self._hidden, *self._turns), (hidden, *more["position_embeddings"]), strict=True):
            _fill(room, part)

    def run(self) -> Tensor:
        return super().run()[:, : self._tokens]

    def computed(self) -> Tensor:
        hidden = self._hidden
        for layer in self._layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=self._turns, use_cache=False)
        return hidden


def _language_kind(hidden: Tensor, given: Mapping[str, Any]) -> tuple[int, ...] | None:
    turns, past = given.get("position_embeddings"), given.get("past_key_values")
    if hidden.shape[0] != 1 or given.get("attention_mask") is not None or turns is None or turns[0].ndim != 3:
        return None
    if past is not None and past.get_seq_length():
        return None
    return (round_up(hidden.shape[1], RANGE),)


class Vision(Forward):
    """Layers of a vision tower whose attention has the same segments."""

    def __init__(
        self, layers: Sequence[Callable[..., Tensor]], kind: tuple[int, ...], hidden: Tensor, given: Mapping[str, Any]
    ) -> None:
        super().__init__(hidden.device)
        self._layers = layers
        self._hidden, self._bounds = torch.empty_like(hidden), torch.empty_like(given["cu_seqlens"])
        self._turns = tuple(torch.empty_like(turn) for turn in given["position_embeddings"])

    def fill(self, given: tuple[Tensor, Mapping[str, Any]]) -> None:
        hidden, more = given
        self._hidden.copy_(hidden)
        self._bounds.copy_(more["cu_seqlens"])
        for room, turn in zip(self._turns, more["position_embeddings"], strict=True):
            room.copy_(turn)

    def computed(self) -> Tensor:
        hidden, bounds = self._hidden, self._bounds.clone()  # masks are kept by the tensor that they were made of
        for layer in self._layers:
            hidden = layer(hidden, cu_seqlens=bounds, position_embeddings=self._turns)
        return hidden


def _vision_kind(hidden: Tensor, given: Mapping[str, Any]) -> tuple[int, ...] | None:
    bounds, turns = given.get("cu_seqlens"), given.get("position_embeddings")
    return None if bounds is None or turns is None else (hidden.shape[0], bounds.shape[0])


def _fill(room: Tensor, part: Tensor) -> None:
    """Put a (1, tokens, any) tensor at the beginning of a longer one; behind it any number would do, but a NaN."""
    room[:, : part.shape[1]].copy_(part)
    room[:, part.shape[1] :].zero_()
