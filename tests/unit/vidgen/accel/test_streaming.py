"""Blocks take turns in a few places of the device, and compute what they would if they were all there."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vidgen.accel import residency, streaming
from vidgen.accel.streaming import PLACES, Stream

CPU = torch.device("cpu")
BLOCK = sum(residency.rounded(size) for size in (16 * 16 * 4, 16 * 4, 3 * 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("table", torch.randn(3))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.tanh(self.linear(x)) + self.table.sum()
        return made


class Model(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.before = nn.Linear(4, 16).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.order = list(range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        for number in self.order:
            x = self.blocks[number](x)
        return x


@pytest.fixture(params=[1, 2, 3, 7])
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    return Model(request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4)


def places(model: nn.Module) -> set[int]:
    """The memory in which the blocks' tensors lie."""
    return {
        tensor.untyped_storage().data_ptr() for block in streaming.blocks_of(model) for tensor in block.parameters()
    }


@pytest.fixture(params=[0, 1, 2, 100])
def stream(model: Model, request: pytest.FixtureRequest) -> Iterator[Stream]:
    made = Stream(model, CPU, request.param * BLOCK)
    yield made
    if streaming.of(model) is not None:
        made.close()


def test_what_streams_computes_the_same_to_the_last_bit(model: Model, x: torch.Tensor) -> None:
    wanted = model(x)
    for room in (0, BLOCK, 2 * BLOCK, 3 * BLOCK + 5, 100 * BLOCK):
        stream = Stream(model, CPU, room)
        for _ in range(3):  # the next forward finds its first blocks on their way
            assert torch.equal(model(x), wanted)
        stream.close()


def test_few_places_serve_all_blocks_and_their_addresses_never_change(model: Model, x: torch.Tensor) -> None:
    Stream(model, CPU)
    seen = places(model)
    assert len(seen) == min(PLACES, len(model.blocks))
    model(x)
    assert places(model) == seen


def test_a_block_is_on_its_way_before_its_turn_comes(x: torch.Tensor) -> None:
    model = Model(5)
    stream = Stream(model, CPU)
    missed = []
    enter = stream._fetch
    entering = [False]
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: entering.__setitem__(0, False))
        block.register_forward_pre_hook(lambda *_: entering.__setitem__(0, True), prepend=True)

    def fetch(place: streaming._Place, number: int) -> None:
        if entering[0] and place.holds != number:
            missed.append(number)
        enter(place, number)

    stream._fetch = fetch  # type: ignore[method-assign]
    model(x)
    model(x)
    assert missed == []


def test_what_there_is_room_for_stays_and_is_never_copied_again(x: torch.Tensor) -> None:
    model = Model(6)
    wanted = model(x)
    Stream(model, CPU, 4 * BLOCK)
    streamed = [number for number, block in enumerate(model.blocks) if _shares(block, model)]
    assert len(streamed) == 2
    assert streamed == [1, 4]  # evenly, so that each has the others' time to come
    assert torch.equal(model(x), wanted)


def _shares(block: nn.Module, model: nn.Module) -> bool:
    stream = streaming.of(model)
    assert stream is not None
    memory = {place._memory.untyped_storage().data_ptr() for place in stream._places}
    return any(tensor.untyped_storage().data_ptr() in memory for tensor in block.parameters())


def test_a_run_that_is_left_in_the_middle_harms_no_later_one(model: Model, stream: Stream, x: torch.Tensor) -> None:
    wanted = model(x)
    for number in range(len(model.blocks)):

        def fail(*given: object) -> None:
            raise RuntimeError("left")

        hook = model.blocks[number].linear.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="left"):
            model(x)
        hook.remove()
        assert torch.equal(model(x), wanted)


def test_blocks_may_be_called_in_any_order(x: torch.Tensor) -> None:
    model = Model(6)
    shuffled = random.Random(0)
    orders = [shuffled.sample(range(6), shuffled.randint(1, 6)) for _ in range(20)]
    wanted = []
    for order in orders:
        model.order = order
        wanted.append(model(x))
    Stream(model, CPU, BLOCK)
    for order, expected in zip(orders, wanted, strict=True):
        model.order = order
        assert torch.equal(model(x), expected)


def test_at_rest_and_closed_everything_is_at_home(model: Model, stream: Stream, x: torch.Tensor) -> None:
    wanted, tensors = model(x), [*model.parameters(), *model.buffers()]
    homes = {id(tensor): home.data_ptr() for each in (stream._outside, *stream._homes) for tensor, home in each}
    stream.rest()
    assert [tensor.data_ptr() for tensor in tensors] == [homes[id(tensor)] for tensor in tensors]
    stream.hold()
    assert torch.equal(model(x), wanted)
    stream.hold(room=0)
    assert torch.equal(model(x), wanted)
    stream.close()
    assert streaming.of(model) is None
    assert [tensor.data_ptr() for tensor in tensors] == [homes[id(tensor)] for tensor in tensors]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(x), wanted)


def test_what_does_not_stay_is_at_home_between_its_calls_also_if_one_fails(model: Model, x: torch.Tensor) -> None:
    wanted = model(x)
    stream = Stream(model, CPU, stays=False)
    homes = [home.data_ptr() for homes in stream._homes for _, home in homes]
    seen: list[int] = []
    hook = model.before.register_forward_hook(lambda *_: seen.append(len(places(model))))

    def at_home() -> bool:
        here = [tensor.data_ptr() for homes in stream._homes for tensor, _ in homes]
        return here == homes and stream._places == []

    assert at_home()
    assert torch.equal(model(x), wanted)
    assert at_home()
    with pytest.raises(RuntimeError):
        model(x[:, :1])
    assert at_home()
    assert torch.equal(model(x), wanted)
    assert seen == [min(PLACES, len(model.blocks))] * 2
    hook.remove()
    streaming.close(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_what_does_not_stay_takes_inputs_from_where_it_was(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's pipeline puts the text where its encoder is, which is at home then."""
    model = Model(3)
    wanted = model(x + 1)
    moved: list[torch.device] = []

    def move(given: Any, device: torch.device) -> Any:
        moved.append(device)
        return send_to_device(
            tuple(one + 1 for one in given)
            if isinstance(given, tuple)
            else {name: one + 1 for name, one in given.items()},
            device,
        )

    monkeypatch.setattr(streaming, "send_to_device", move)
    Stream(model, CPU, stays=False)
    assert torch.equal(model(x), wanted)
    assert torch.equal(model(x=x), wanted)
    assert set(moved) == {CPU}


def test_blocks_are_found_wherever_a_model_has_them_but_not_in_one_another() -> None:
    inner = Model(2)
    inner.blocks[0].lists = nn.ModuleList([nn.Linear(2, 2)])
    outer = nn.Module()
    outer.tower, outer.text = Model(1), inner
    assert streaming.blocks_of(outer) == [*outer.tower.blocks, *inner.blocks]
    assert streaming.blocks_of(nn.Linear(2, 2)) == []


def test_blocks_that_hold_nothing_are_no_obstacle() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Tanh(), nn.Tanh()]))
    stream = Stream(model, CPU, stays=False)
    stream.hold()
    stream.hold(room=10)


def test_a_model_without_blocks_comes_as_a_whole(x: torch.Tensor) -> None:
    model = nn.Linear(4, 4)
    wanted = model(x)
    Stream(model, CPU, stays=False)
    assert torch.equal(model(x), wanted)


def test_at_home_each_tensor_holds_its_own(x: torch.Tensor) -> None:
    """A sample of weights that share places was one of whatever had come there last."""
    model, still = Model(5), Model(1)
    own = [tensor.clone() for tensor in model.parameters()]
    wanted = model(x)
    Stream(model, CPU)
    assert not all(torch.equal(tensor, mine) for tensor, mine in zip(model.parameters(), own, strict=True))
    with streaming.at_home([model, still]):
        assert all(torch.equal(tensor, mine) for tensor, mine in zip(model.parameters(), own, strict=True))
    assert len(places(model)) == PLACES
    assert torch.equal(model(x), wanted)


def test_without_room_for_its_places_it_is_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(3)
    stream = Stream(model, CPU, BLOCK)
    homes = [home.data_ptr() for homes in stream._homes for _, home in homes]

    def refuse(self: object, *given: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(streaming._Place, "__init__", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        stream.hold()
    assert [tensor.data_ptr() for homes in stream._homes for tensor, _ in homes] == homes


@given(count=st.integers(1, 80), size=st.integers(1, 1000), room=st.integers(-5, 100_000))
def test_as_many_stay_as_there_is_room_for_and_the_others_are_spread(count: int, size: int, room: int) -> None:
    streamed = streaming._streamed([size] * count, room)
    assert len(streamed) == max(0, count - max(0, room) // size)
    assert streamed == sorted(set(streamed))
    assert all(0 <= number < count for number in streamed)
    gaps = [after - before for before, after in itertools.pairwise(streamed)]
    assert not gaps or max(gaps) - min(gaps) <= 1
