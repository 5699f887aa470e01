"""A worker outside: it reaches the bus over TLS, by nothing but its settings and a certificate that it was given."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.certificates import signed_by_itself
from tests.servers import skipped_at_home

from vidgen import errors, jetstream
from vidgen.local import servers
from vidgen.local.process import Process
from vidgen.settings import WorkerSettings

BOUND = 90.0
CONFIG = """
tls { cert_file: "certificate.pem", key_file: "key.pem", timeout: 60 }
authorization { user: vidgen, password: "only-for-workers", timeout: 60 }
"""


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for the loopback interface, signed by itself: an authority that no system knows."""
    return signed_by_itself(tmp_path).file


@pytest.fixture
async def bus(certificate: Path) -> AsyncIterator[str]:
    """The URL of a nats-server that speaks TLS alone."""
    folder = certificate.parent
    config = CONFIG.replace('"certificate.pem"', f'"{certificate}"').replace('"key.pem"', f'"{folder / "key.pem"}"')
    (folder / "nats.conf").write_text(config)
    server = Process("nats-server", folder / "log")
    with skipped_at_home():
        program = servers.program("nats-server")
    flags = ["-c", str(folder / "nats.conf"), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(folder)]
    server.start([program, *flags])
    told = folder / f"nats-server_{server.pid}.ports"
    try:
        async with asyncio.timeout(BOUND):
            while not (told.exists() and told.read_text().endswith("}")):
                server.check()
                await asyncio.sleep(0.02)
        yield f"tls://127.0.0.1:{json.loads(told.read_text())['nats'][0].rsplit(':', 1)[1]}"
    finally:
        server.kill()


def settings(url: str, password: str = "only-for-workers") -> WorkerSettings:
    return WorkerSettings.model_validate({"nats_url": url, "nats_user": "vidgen", "nats_password": password})


async def test_a_worker_comes_in_over_tls_with_its_password(
    bus: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    own = settings(bus)
    async with jetstream.connect(own.nats_url, "outside", **own.nats_options()) as connected:
        assert connected.client.is_connected
        assert connected.client.connected_url.scheme == "tls"


@pytest.mark.parametrize(
    ("known", "password", "said"),
    [(False, "only-for-workers", r"(?i)certificate"), (True, "guessed", r"(?i)authorization")],
    ids=["a certificate of nobody known", "a wrong password"],
)
async def test_without_the_certificate_or_the_password_nobody_comes_in(
    bus: str, certificate: Path, monkeypatch: pytest.MonkeyPatch, known: bool, password: str, said: str
) -> None:
    if known:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    else:
        monkeypatch.setattr(jetstream, "FIRST_CONNECT_LIMIT", 5.0)  # nats-py waits on behind a handshake that failed
    own = settings(bus, password)
    with pytest.raises(errors.BusError, match=said):
        async with jetstream.connect(own.nats_url, "outside", **own.nats_options()):
            pytest.fail("the bus let a stranger in")
