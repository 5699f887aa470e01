"""A store that is away is waited for; what it refuses is not asked again."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidgen import errors
from vidgen.patience import PatientStore
from vidgen.testing import FakeClock, MemoryStore


class Waiting:
    """A patient store over the double; its pauses take no time."""

    def __init__(self, patience_s: float = 60.0) -> None:
        self.clock, self.under, self.pauses = FakeClock(), MemoryStore(), list[float]()
        self.store = PatientStore(self.under, patience_s, sleep=self._sleep, clock=self.clock.time)

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.clock.advance(seconds)


async def test_every_call_outlasts_an_outage(tmp_path: Path) -> None:
    waiting, source, target = Waiting(), tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"pixels")
    for method in ("put", "fetch", "stat", "page", "remove"):
        waiting.under.fail_next(method, times=3)

    await waiting.store.put("uploads/a", source, "image/png")
    await waiting.store.fetch("uploads/a", target)
    stat = await waiting.store.stat("uploads/a")
    page = await waiting.store.page("uploads/")
    await waiting.store.remove(["uploads/a"])

    assert target.read_bytes() == b"pixels"
    assert stat is not None
    assert [one.key for one in page] == ["uploads/a"]
    assert waiting.under.objects == {}
    assert waiting.pauses == [0.1, 0.2, 0.4] * 5


async def test_an_upload_whose_answer_was_lost_is_made_again(tmp_path: Path) -> None:
    waiting, source = Waiting(), tmp_path / "a"
    source.write_bytes(b"pixels")
    waiting.under.fail_next("put", after=True)

    await waiting.store.put("uploads/a", source, "image/png")

    assert waiting.under.objects == {"uploads/a": b"pixels"}


async def test_a_clock_that_is_wrong_is_waited_for() -> None:
    waiting = Waiting()
    waiting.under.fail_next("stat", errors.StoreError("20 minutes", code="store_clock"), times=2)

    assert await waiting.store.stat("uploads/a") is None

    assert waiting.pauses == [0.1, 0.2]


async def test_patience_ends() -> None:
    waiting = Waiting(patience_s=60.0)
    waiting.under.down = True

    with pytest.raises(errors.StoreError):
        await waiting.store.stat("uploads/a")

    assert 55 <= sum(waiting.pauses) <= 60


@pytest.mark.parametrize("error", [errors.StoreRefusedError("no"), errors.NotFoundError()])
async def test_what_is_refused_is_not_asked_again(error: errors.VidgenError) -> None:
    waiting = Waiting()
    waiting.under.fail_next("stat", error)

    with pytest.raises(type(error)):
        await waiting.store.stat("uploads/a")

    assert waiting.pauses == []
