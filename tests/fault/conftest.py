"""Where the fault suite builds its systems. A server that is not installed skips at home and fails in CI."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fault.nursery import Nursery
from tests.fault.system import Lab
from tests.servers import skipped_at_home

from vidgen.local import S3Server
from vidgen.local.servers import program


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def lab(nursery: Nursery, s3_server: S3Server, tmp_path: Path) -> Lab:
    with skipped_at_home():
        program("nats-server")
    made = Lab(nursery, s3_server, tmp_path)
    print(f"seed {made.seed}")  # noqa: T201  shown with a failure
    return made
