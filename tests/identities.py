"""The bus and the store as they are deployed, with identities made for a test: each comes in as whom it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from tests.servers import skipped_at_home

from vidgen import jetstream
from vidgen.identities import Identities
from vidgen.jetstream import JetStreamBus
from vidgen.local import servers
from vidgen.local.process import POLL, Process, http_status
from vidgen.settings import Settings

NATS = Path(__file__).parents[1] / "deploy" / "nats"
TENANTS = ("default", "acme")
BOUND = 90.0
RELOADED = "Reloaded server configuration"


def made(folder: Path) -> Identities:
    """An installation's identities: a service's each, two tenants' publishers."""
    identities = Identities(folder)
    identities.complete()
    for tenant in TENANTS:
        identities.add(f"publisher.{tenant}")
    return identities


def settings(url: str, identities: Identities, name: str) -> Settings:
    given = {key.removeprefix("VIDGEN_").lower(): value for key, value in identities.environment(name).items()}
    return Settings.model_validate({"nats_url": url, **given})


@contextlib.asynccontextmanager
async def connected(url: str, identities: Identities, name: str, **more: Any) -> AsyncIterator[JetStreamBus]:
    """A connection as this identity."""
    options = settings(url, identities, name).nats_options()
    async with jetstream.connect(url, name.replace(".", "-"), **options, **more) as bus:
        yield bus


class DeployedNats:
    """nats-server with the very files under `deploy/nats`; address, ports and folder are ours."""

    def __init__(self, folder: Path, users: Path, config: str = "nats.conf") -> None:
        self.folder, self.users, self.config = folder, users, config
        self.process = Process("nats-server", folder / "log")
        self.url = self.monitor_url = ""

    def take_users(self) -> None:
        """Put what `vidgen identities` wrote beside the configuration, as it is mounted."""
        shutil.copyfile(self.users, self.folder / "users.conf")

    async def start(self, env: dict[str, str] | None = None) -> None:
        shutil.copytree(NATS, self.folder, dirs_exist_ok=True)
        for path in self.folder.glob("*.conf"):
            path.write_text(path.read_text().replace("/etc/nats/", f"{self.folder}/"))
        self.take_users()
        with skipped_at_home():
            program = servers.program("nats-server")
        flags = ["-a", "127.0.0.1", "-p", "-1", "-m", "-1", "-sd", str(self.folder / "data")]
        self.process.start(
            [program, "-c", str(self.folder / self.config), *flags, "--ports_file_dir", str(self.folder)], env
        )
        async with asyncio.timeout(BOUND):
            while not self._read_ports():
                self.process.check()
                await asyncio.sleep(POLL)
            while await http_status(f"{self.monitor_url}/healthz?js-enabled-only=true") != 200:
                self.process.check()
                await asyncio.sleep(POLL)

    async def reload(self) -> None:
        """Have it read anew who may come."""
        told = self.process.log.read_text().count(RELOADED)
        self.take_users()
        self.process.signal(signal.SIGHUP)
        async with asyncio.timeout(BOUND):
            while self.process.log.read_text().count(RELOADED) == told:
                self.process.check()
                await asyncio.sleep(POLL)

    def _read_ports(self) -> bool:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            told = json.loads((self.folder / f"nats-server_{self.process.pid}.ports").read_text())
            self.monitor_url = told["monitoring"][0]
            self.url = f"nats://{told['nats'][0].partition('://')[2]}"
            return True
        return False


@contextlib.contextmanager
def deployed_nats(folder: Path, identities_folder: Path) -> Iterator[DeployedNats]:
    server = DeployedNats(folder, identities_folder / "users.conf")
    try:
        asyncio.run(server.start())
        yield server
    finally:
        server.process.kill()
