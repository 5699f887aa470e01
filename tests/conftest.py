"""The real servers and the tiny models that tests ask for by name."""

from __future__ import annotations

import asyncio
import fcntl
import os
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tests import checkpoints
from tests.servers import running_nats, skipped_at_home

from vidgen.artifacts import S3Store
from vidgen.local import NatsServer, S3Server

# On some processors MKL adds up in another order where tensors lie otherwise in memory: what is compared to the last
# bit must not depend on that. Read when torch is imported, here and in the processes that tests start.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Tiny tensors are soonest done by one thread; more of them, in each process, would spin on cores that others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compute beside the stacks that others started: their workers are to have their share.
os.environ.setdefault("VIDGEN_NICE", "0")
checkpoints.install_shim()  # before any test imports transformers

# Nothing is asserted about time, and a busy machine is no failure. CI draws the same examples each time, so that
# what it refuses is the change and not the draw; `pytest --hypothesis-profile=thorough` draws many new ones.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("vidgen", untimed, derandomize="CI" in os.environ)
settings.register_profile("thorough", untimed, max_examples=2000, derandomize=False)
settings.load_profile("vidgen")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts servers and waits for them goes first, so that no long file is left to one process at the end."""
    items.sort(key=lambda item: item.nodeid.startswith("tests/unit/"))


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with running_nats(tmp_path / "nats") as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 server for the whole run: tests keep apart by the keys they use."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    with asyncio.Runner() as runner:
        with skipped_at_home():
            runner.run(server.start())
        try:
            yield server
        finally:
            runner.run(server.kill())


@pytest.fixture
def s3_store(s3_server: S3Server) -> S3Store:
    return S3Store(s3_server.endpoint, s3_server.access_key, s3_server.secret_key, s3_server.bucket)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the tiny checkpoints, by the names in `checkpoints.MODELS`; built once for all test processes."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder, built = shared / "models", shared / "models.built"
    with (shared / "models.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            with warnings.catch_warnings():
                # Building is the preparation, not what is tested: loading and running warn as errors.
                warnings.simplefilter("ignore")
                checkpoints.build(folder)
            built.touch()
    return {name: folder / name for name in checkpoints.MODELS}
