"""A model that the device has no room for: in pinned host memory, and block by block on the device as it computes.

The blocks share a few places there, into which each is copied while the ones before it compute; with room to spare some
stay. The host waits for no copy, and on the device no tensor changes its address: only what is in it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from vidgen.accel.residency import rounded

PLACES = 2  # one that computes and one that is on its way
MARK = "_vidgen_streams"


class Stream:
    """Has the blocks of a model stream through a device, from where they are when it is made; one call at a time.

    What the model has outside its blocks is on the device, and so are as many blocks as `room` bytes take: for good, or
    unless it `stays` during each call alone. Only copies from pinned memory are made beside what computes.
    """

    def __init__(self, model: nn.Module, device: torch.device, room: int = 0, *, stays: bool = True) -> None:
        self.stays = stays
        self._model, self._device, self._room = model, device, room
        self._blocks = blocks_of(model)
        inside = {id(tensor) for block in self._blocks for tensor in _tensors(block)}
        # A tensor and its home: outside the blocks, and of each block.
        self._outside = [(tensor, tensor.data) for tensor in _tensors(model) if id(tensor) not in inside]
        self._homes = [[(tensor, tensor.data) for tensor in _tensors(block)] for block in self._blocks]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._hooks = [
            hook
            for number, block in enumerate(self._blocks)
            for hook in (
                block.register_forward_pre_hook(functools.partial(self._enter, number)),
                block.register_forward_hook(functools.partial(self._leave, number)),
            )
        ]
        self._places: list[_Place] = []
        self._place_of: dict[int, _Place] = {}
        setattr(model, MARK, self)
        if stays:
            self.hold()
            return
        self._hooks += [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(lambda *_: self.rest(), always_call=True),
        ]

    def hold(self, room: int | None = None) -> None:
        """Be on the device, with as many blocks as `room` bytes take, by default as many as at first."""
        self.rest()
        try:
            self._lay_out(self._room if room is None else room)
        except BaseException:
            self.rest()
            raise

    def _lay_out(self, room: int) -> None:
        for tensor, home in self._outside:
            tensor.data = home.to(self._device)
        sizes = [sum(rounded(home.nbytes) for _, home in homes) for homes in self._homes]
        streamed = _streamed(sizes, room)
        staying = set(range(len(sizes))) - set(streamed)
        for tensor, home in itertools.chain.from_iterable(self._homes[number] for number in sorted(staying)):
            tensor.data = home.to(self._device, copy=True)
        size = max((sizes[number] for number in streamed), default=0)
        self._places = [_Place(size, self._device) for _ in range(min(PLACES, len(streamed)))]
        for turn, number in enumerate(streamed):
            place = self._places[turn % len(self._places)]
            place.take(number, self._homes[number])
            self._place_of[number] = place
        for place in self._places:
            self._fetch(place, place.turns[0])

    def rest(self) -> None:
        """Leave the device: everything is at home."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for tensor, home in itertools.chain(self._outside, *self._homes):
            tensor.data = home
        self._places, self._place_of = [], {}

    @property
    def keeps(self) -> bool:
        """Whether there are blocks that stay, and would leave room to a task if they did not."""
        return len(self._place_of) < len(self._homes)

    def close(self) -> None:
        """Be as before, at home, for good."""
        self.rest()
        for hook in self._hooks:
            hook.remove()
        delattr(self._model, MARK)

    def _begin(self, model: nn.Module, args: Any, options: Any) -> tuple[Any, Any]:
        self.hold()
        # Who calls a model that is at home may have put its inputs there, too.
        return send_to_device(args, self._device), send_to_device(options, self._device)

    def _enter(self, number: int, block: nn.Module, given: Any) -> None:
        place = self._place_of.get(number)
        if place is None:
            return
        if place.holds != number:  # a run was left in the middle, or blocks are called in another order
            if self._copies is not None:
                self._copies.wait_stream(torch.cuda.current_stream(self._device))
            self._fetch(place, number)
        if place.arrived is not None:
            place.arrived.wait(torch.cuda.current_stream(self._device))

    def _leave(self, number: int, block: nn.Module, given: Any, made: Any) -> None:
        place = self._place_of.get(number)
        if place is None:
            return
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        self._fetch(place, place.behind(number))

    def _fetch(self, place: _Place, number: int) -> None:
        """Copy a block to its place, behind what `_copies` waits for."""
        if place.holds == number:
            return
        place.holds = number
        with torch.no_grad(), torch.cuda.stream(self._copies):
            for here, home in place.copies[number]:
                here.copy_(home, non_blocking=True)
            if self._copies is not None:
                place.arrived = self._copies.record_event()


class _Place:
    """Memory on the device that blocks take in turns."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.turns: list[int] = []
        self.copies: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.holds: int | None = None
        self.arrived: torch.cuda.Event | None = None

    def take(self, number: int, homes: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Have the tensors of a block lie here."""
        begin = 0
        copies = []
        for tensor, home in homes:
            here = self._memory[begin : begin + home.nbytes].view(home.dtype).as_strided(home.shape, home.stride())
            tensor.data = here
            copies.append((here, home))
            begin += rounded(home.nbytes)
        self.turns.append(number)
        self.copies[number] = copies

    def behind(self, number: int) -> int:
        """Whose turn it is next; behind the last one the first, of the next forward."""
        return self.turns[(self.turns.index(number) + 1) % len(self.turns)]


def of(model: nn.Module) -> Stream | None:
    """What has a model stream, if it does."""
    found: Stream | None = vars(model).get(MARK)
    return found


def close(model: nn.Module) -> None:
    """Have a model that streams, if it does, be at home for good."""
    if (stream := of(model)) is not None:
        stream.close()


@contextlib.contextmanager
def at_home(models: Iterable[nn.Module]) -> Iterator[None]:
    """Have each model's tensors hold what is its own: on the device blocks that share a place show one another's."""
    away = [stream for model in models if (stream := of(model)) is not None and stream.stays]
    for stream in away:
        stream.rest()
    try:
        yield
    finally:
        for stream in away:
            stream.hold()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats, in the order in which they are there."""
    lists = isinstance(model, nn.ModuleList)
    return list(itertools.chain.from_iterable([child] if lists else blocks_of(child) for child in model.children()))


def _streamed(sizes: Sequence[int], room: int) -> list[int]:
    """Which blocks of these sizes do not stay in `room` bytes, evenly among those that do; pure."""
    count = len(sizes) - min(len(sizes), max(0, room) // max([1, *sizes]))
    return [(2 * turn + 1) * len(sizes) // (2 * count) for turn in range(count)]


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
