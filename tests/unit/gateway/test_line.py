"""Room is given by turns of tenants, never more of it than there is, and to everybody in the end."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from gateway.line import Line

MOST = 10


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def size_of(pixels: int) -> int:
    await asyncio.sleep(0)
    return pixels


class Users:
    """Who asks for room, and has it until told to leave."""

    def __init__(self) -> None:
        self.line, self.has = Line(MOST), dict[asyncio.Task[None], int]()
        self.order: list[str] = []

    def come(self, tenant: str, size: int) -> asyncio.Task[None]:
        async def use() -> None:
            task = asyncio.current_task()
            assert task is not None
            async with self.line.room(tenant, size_of(size)):
                self.has[task] = min(size, MOST)
                self.order.append(tenant)
                try:
                    await asyncio.get_running_loop().create_future()
                finally:
                    del self.has[task]

        return asyncio.create_task(use())


async def test_tenants_take_turns_whoever_came_first() -> None:
    users = Users()
    asked = [users.come(tenant, MOST) for tenant in "aaaabbc"]
    for _ in asked:
        await settled()
        [holder] = users.has
        holder.cancel()
    await settled()
    assert "".join(users.order) == "abcabaa"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 2 * MOST), st.integers(0, 3)), max_size=30))
def test_there_is_never_more_in_use_than_there_is_and_whoever_leaves_gives_it_back(
    moves: list[tuple[str, int, int]],
) -> None:
    async def play() -> None:
        users, asked = Users(), list[asyncio.Task[None]]()
        for tenant, size, leave in moves:
            asked.append(users.come(tenant, size))
            if leave < 2:
                await settled()
            if leave:
                asked.pop(leave % len(asked)).cancel()  # who has room, or who waits for it
            assert sum(users.has.values()) <= MOST
            assert users.line.left >= 0
        while asked:
            await settled()
            assert users.has, "somebody waits, and nobody is there"
            for holder in list(users.has):
                holder.cancel()
                asked.remove(holder)
        await settled()
        assert users.line.left == MOST
        assert not users.line._waiting

    asyncio.run(play())
