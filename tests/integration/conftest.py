"""A client of whatever system a test module started as `stack`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from vidgen.client import AsyncClient
from vidgen.local import Stack


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(stack.gateway_url) as client:
        yield client
