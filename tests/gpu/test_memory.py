"""A GPU's memory is taken in pages: what is let go of in pieces makes room for what is large."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vidgen import native
from vidgen.accel import ahead

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

DEVICE = torch.device("cuda", 0)
MIB = 1 << 20


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Half a GiB more than this process has."""
    for name in native.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    ahead.open_device(DEVICE)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + 512 * MIB) / total, DEVICE)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("cramped")
def test_what_was_let_go_of_in_pieces_makes_room_for_what_is_large() -> None:
    """By pieces of what the driver gives at once there was none, and tasks did without something for it."""
    whole = torch.empty(500 * MIB, dtype=torch.uint8, device=DEVICE)
    del whole
    pieces = [torch.empty(100 * MIB, dtype=torch.uint8, device=DEVICE) for _ in range(5)]
    kept = pieces[1::2]
    del pieces

    large = torch.empty(240 * MIB, dtype=torch.uint8, device=DEVICE)

    assert len(kept) == 2
    assert large.numel() == 240 * MIB
