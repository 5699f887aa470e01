"""The bus over TLS, by deploy/nats/nats-tls.conf and the settings: strangers to its authority stay outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests import identities as installed
from tests.certificates import NEW_KEY, openssl
from tests.identities import DeployedNats

from vidgen import errors, jetstream
from vidgen.identities import Identities
from vidgen.settings import Settings


def authority(folder: Path, name: str) -> None:
    """An authority that no system knows."""
    openssl(
        folder, "req", "-x509", *NEW_KEY, "-days", "2", "-subj", f"/CN={name}", "-out", f"{name}.pem",
        "-keyout", f"{name}-key.pem", "-addext", "keyUsage=critical,keyCertSign",
    )  # fmt: skip


def certificate(folder: Path, name: str, signer: str) -> None:
    """A certificate for the loopback interface, or for whoever comes from there."""
    openssl(folder, "req", *NEW_KEY, "-subj", f"/CN={name}", "-out", f"{name}.csr", "-keyout", f"{name}-key.pem")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        folder, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{signer}.pem", "-CAkey", f"{signer}-key.pem",
        "-CAcreateserial", "-days", "2", "-extfile", "names", "-out", f"{name}.pem",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of two authorities: `ca`, which the bus knows, and one of somebody else's."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ca", "stranger"):
        authority(folder, name)
    certificate(folder, "server", "ca")
    certificate(folder, "client", "ca")
    certificate(folder, "forged", "stranger")
    return folder


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    return installed.made(tmp_path_factory.mktemp("identities"))


@contextlib.asynccontextmanager
async def running(folder: Path, identities: Identities, tls: Path | None, verify: bool) -> AsyncIterator[DeployedNats]:
    users = identities.env_file("gateway").parent / "users.conf"
    config = "nats-tls.conf" if tls else "nats.conf"
    server = DeployedNats(folder, users, config)
    if tls is not None:
        shutil.copytree(tls, folder / "tls")
    try:
        await server.start({**os.environ, "NATS_TLS_VERIFY": str(verify).lower()})
        yield server
    finally:
        server.process.kill()


def settings(server: DeployedNats, identities: Identities, **files: Path) -> Settings:
    told = installed.settings(server.url, identities, "edit-service")
    return told.model_copy(update={f"nats_tls_{name}": path for name, path in files.items()})


async def comes_in(own: Settings) -> bool:
    async with jetstream.connect(own.nats_url, "worker", **own.nats_options()) as bus:
        return bus.client.is_connected


async def stays_outside(own: Settings) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        # nats-py may wait for a handshake that has failed; whoever is let in is in within milliseconds.
        patch.setattr(jetstream, "FIRST_CONNECT_LIMIT", 3.0)
        with pytest.raises(errors.BusError):
            async with jetstream.connect(own.nats_url, "worker", **own.nats_options()):
                pytest.fail("the bus let a stranger in")
    return True


async def test_who_knows_the_authority_comes_in_and_nobody_else(
    tmp_path: Path, tls: Path, identities: Identities
) -> None:
    async with running(tmp_path / "nats", identities, tls, verify=False) as server:
        assert await comes_in(settings(server, identities, ca=tls / "ca.pem"))
        assert await stays_outside(settings(server, identities, ca=tls / "stranger.pem"))
        assert await stays_outside(settings(server, identities))  # an authority that no system knows
        assert await speaks_plainly(server.url) == b""


async def speaks_plainly(url: str) -> bytes:
    """What the server answers to one who goes on without TLS."""
    host, port = url.removeprefix("nats://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(installed.BOUND):
            assert b'"tls_required":true' in await reader.readline()
            writer.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
            with contextlib.suppress(ConnectionError):
                return await reader.read()
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_where_clients_must_be_known_a_certificate_is_asked_beside_the_key(
    tmp_path: Path, tls: Path, identities: Identities
) -> None:
    async with running(tmp_path / "nats", identities, tls, verify=True) as server:
        own = {"cert": tls / "client.pem", "key": tls / "client-key.pem"}
        forged = {"cert": tls / "forged.pem", "key": tls / "forged-key.pem"}
        assert await comes_in(settings(server, identities, ca=tls / "ca.pem", **own))
        assert await stays_outside(settings(server, identities, ca=tls / "ca.pem"))
        assert await stays_outside(settings(server, identities, ca=tls / "ca.pem", **forged))


async def test_who_wants_tls_refuses_a_bus_without_it(tmp_path: Path, tls: Path, identities: Identities) -> None:
    async with running(tmp_path / "nats", identities, None, verify=False) as server:
        assert await comes_in(settings(server, identities))
        own = settings(server, identities, ca=tls / "ca.pem")
        with pytest.raises(errors.FatalError, match="speaks no TLS") as caught:
            async with jetstream.connect(own.nats_url, "worker", **own.nats_options()):
                pytest.fail("it went on in the clear")
        assert caught.value.code == "settings"


@pytest.mark.parametrize("wrong", ["missing.pem", "server-key.pem"])
def test_a_certificate_that_is_none_is_named(tls: Path, wrong: str) -> None:
    own = Settings.model_validate({"nats_tls_ca": tls / wrong})
    with pytest.raises(errors.FatalError, match="correct VIDGEN_NATS_TLS_CA"):
        own.nats_options()
