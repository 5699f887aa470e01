"""The two servers that come as wheels: nats-server and SeaweedFS' S3, ready when `start` returns."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from vidgen import errors, extras
from vidgen.identities import write_private
from vidgen.local.process import POLL, LocalError, Process, find_program, http_status

LOOPBACK = "127.0.0.1"
START_LIMIT = 60.0  # seconds; the first start reads a large program from a cold disk
PORT_TRIES = 5
READY_KEY, PROBE_BYTES = "ready", 1024
STORE_POLL = 0.1


def program(name: str) -> str:
    """The path of a server's program; LocalError with the remedy if it is not installed."""
    found = find_program(name)
    if found is None:
        raise LocalError(
            f"{name} was not found; install the embedded servers: {extras.install('local')}", code="not_installed"
        )
    return found


class _Server(abc.ABC):
    """What both servers share: a folder, a process, and being an async context manager."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder.absolute()
        self.process = Process(name, self.folder / "log")

    @property
    def pid(self) -> int:
        return self.process.pid

    @abc.abstractmethod
    async def start(self) -> None:
        """Start and wait until it serves; raises LocalError with the end of the log."""

    async def stop(self) -> None:
        """SIGTERM and wait; the data stay."""
        await self.process.stop(20.0)

    async def kill(self) -> None:
        """SIGKILL; the data stay, and `start` comes back on the same port."""
        self.process.kill()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


class NatsServer(_Server):
    """A nats-server with JetStream on the loopback interface, its data under `folder`.

    `port` -1 lets the OS choose at the first start; later starts of this object keep what was chosen, so that clients
    reconnect. `sync_always` is what a deployment uses: nothing that was acked is lost in a power cut. `users` is a file
    that says who may come; without it everybody may who is on this machine.
    """

    def __init__(
        self, folder: Path, *, port: int = -1, monitor_port: int = -1, sync_always: bool = True,
        users: Path | None = None,
    ) -> None:  # fmt: skip
        super().__init__("nats-server", folder)
        self.port, self.monitor_port, self.sync_always, self.users = port, monitor_port, sync_always, users

    @property
    def url(self) -> str:
        return f"nats://{LOOPBACK}:{self.port}"

    @property
    def monitor_url(self) -> str:
        return f"http://{LOOPBACK}:{self.monitor_port}"

    async def start(self) -> None:
        """Start and wait until JetStream answers; raises LocalError with the end of the log."""
        executable = program("nats-server")
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("nats-server_*.ports"):
            stale.unlink()
        config = self.folder / "nats.conf"
        config.write_text(self._config(), "utf-8")
        self.process.start([executable, "-c", str(config)])
        try:
            async with asyncio.timeout(START_LIMIT):
                while not self._read_ports():
                    self.process.check()
                    await asyncio.sleep(POLL)
                while await http_status(f"{self.monitor_url}/healthz?js-enabled-only=true") != 200:
                    self.process.check()
                    await asyncio.sleep(POLL)
        except TimeoutError as exc:
            failure = self.process.failure(f"was not ready within {START_LIMIT:.0f} s")
            await self.kill()
            raise failure from exc
        except BaseException:
            await self.kill()
            raise

    def _config(self) -> str:
        quoted = {name: _quoted(str(self.folder / name)) for name in ("data", "")}
        return (
            f"listen: {json.dumps(f'{LOOPBACK}:{self.port}')}\n"
            f"http: {json.dumps(f'{LOOPBACK}:{self.monitor_port}')}\n"
            f"ports_file_dir: {quoted['']}\n"
            "jetstream {\n"
            f"  store_dir: {quoted['data']}\n"
            f"  sync_interval: {'always' if self.sync_always else '2m'}\n"
            "  strict: true\n"
            # Fixed, so that the streams' reservations fit on a nearly full disk too.
            "  max_file_store: 8GB\n"
            "  max_memory_store: 256MB\n"
            "}\n"
            "max_payload: 262144\n"
            'ping_interval: "20s"\n'
            "ping_max: 2\n"
            'write_deadline: "10s"\n'
            # With it on, ordered consumers break nats-py's read loop (FACTS §4).
            "feature_flags { js_ack_fc_v2: false }\n"
        ) + self._include()

    def _include(self) -> str:
        # The server takes the path of an include as one from its configuration's folder, whatever it begins with.
        return f"include {_quoted(os.path.relpath(self.users, self.folder))}\n" if self.users else ""

    def _read_ports(self) -> bool:
        try:
            ports = json.loads((self.folder / f"nats-server_{self.pid}.ports").read_text())
            self.port, self.monitor_port = (_port_of(ports[name][0]) for name in ("nats", "monitoring"))
        except (OSError, ValueError, KeyError, IndexError):
            return False  # not there yet, or half written
        return True


def _quoted(text: str) -> str:
    """As a string of the server's configuration, which knows no `\\u` and takes UTF-8 as it is."""
    return json.dumps(text, ensure_ascii=False)


def _port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


S3_PORTS = ("master", "volume", "filer", "s3", "admin")
ADMIN_GRPC_OFFSET = 10000  # its own worker looks for the admin's grpc port there, whatever the flag says


class S3Server(_Server):
    """An S3 server (`weed mini`) on the loopback interface, its data, credentials and ports under `folder`.

    Credentials are made at random once and kept in `s3.json`, readable by the owner alone. A second start uses the same
    data and, where they are still free, the same ports; a restart of one object keeps its S3 port in any case.
    `others` are more identities that it lets in, as `s3.json` has them.
    """

    def __init__(self, folder: Path, *, bucket: str = "vidgen", others: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__("the S3 server", folder)
        self.bucket, self.others = bucket, tuple(others)
        self.access_key = self.secret_key = ""
        self._ports: dict[str, int] = {}
        self._served_port: int | None = None  # that clients know: a restart must come back on it

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self._ports['s3.port']}"

    def choose(self) -> None:
        """Make the folder, the credentials and the choice of ports, so that they are known before the start.

        The choice holds unless somebody takes one of the ports first: look at `endpoint` again after `start`.
        """
        for name in ("data", "tmp", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._credentials()
        kept = self._ports or self._kept_ports()
        self._ports = kept if kept and all(map(_is_free, kept.values())) else _choose_ports(self._served_port)
        write_private(self.folder / "ports.json", json.dumps(self._ports))

    async def start(self) -> None:
        """Start and wait until objects are stored and served; raises LocalError with the end of the log."""
        executable = program("weed")
        for attempt in range(1, PORT_TRIES + 1):
            self.choose()
            try:
                await self._start(executable)
            except LocalError:
                # Somebody else may take a port between our choice and the server's bind: then choose anew.
                if attempt == PORT_TRIES or not _lost_a_port(self.process.log):
                    raise
                self._ports = {}
            else:
                self._served_port = self._ports["s3.port"]
                return

    async def _start(self, executable: str) -> None:
        self._remove_sockets()
        self.process.log.unlink(missing_ok=True)
        self.process.start(self._command(executable), {**os.environ, "TMPDIR": str(self.folder / "tmp")})
        try:
            async with asyncio.timeout(START_LIMIT):
                await self._until_stored()
        except TimeoutError as exc:
            failure = self.process.failure(f"was not ready within {START_LIMIT:.0f} s")
            await self.kill()
            raise failure from exc
        except BaseException:
            await self.kill()
            raise

    async def _until_stored(self) -> None:
        from vidgen.artifacts import S3Store  # here, so that the import runs while the server starts

        store = S3Store(self.endpoint, self.access_key, self.secret_key, self.bucket)
        # With something in it: an empty object is stored without the volumes, which come last, and with all that is
        # in them.
        probe, back = self.folder / "tmp" / "probe", self.folder / "tmp" / "back"
        probe.write_bytes(secrets.token_bytes(PROBE_BYTES))
        while await http_status(self.endpoint) is None:
            self.process.check()
            await asyncio.sleep(POLL)
        while True:
            self.process.check()
            # The bucket by ourselves: the server's own -bucket waits for its last component, seconds later.
            try:
                await store.ensure_bucket()
                await store.put(READY_KEY, probe, "application/octet-stream")
                await store.fetch(READY_KEY, back)
                return
            except (errors.StoreError, errors.NotFoundError):
                await asyncio.sleep(STORE_POLL)

    async def stop(self) -> None:
        # Its own farewell takes seconds, and nothing that it acked is lost without one.
        await self.process.stop(5.0)
        self._remove_sockets()

    async def kill(self) -> None:
        await super().kill()
        self._remove_sockets()

    def _command(self, executable: str) -> list[str]:
        return [
            executable, "-logdir", str(self.folder / "logs"), "-log_max_files=2", "-log_max_size_mb=8", "mini",
            f"-dir={self.folder / 'data'}", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", "-webdav=false",
            "-admin.ui=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false",
            "-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false",
            f"-s3.config={self.folder / 's3.json'}", *(f"-{name}={port}" for name, port in self._ports.items()),
        ]  # fmt: skip

    def _credentials(self) -> None:
        path = self.folder / "s3.json"
        keys = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_urlsafe(30)}
        try:
            if path.exists():
                keys = json.loads(path.read_text())["identities"][0]["credentials"][0]
            self.access_key, self.secret_key = keys["accessKey"], keys["secretKey"]
        except (ValueError, LookupError) as exc:
            raise LocalError(f"{path} holds no credentials: delete it, new ones are made") from exc
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        own = {"name": "vidgen", "credentials": [keys], "actions": actions}
        write_private(path, json.dumps({"identities": [own, *self.others]}))

    def _kept_ports(self) -> dict[str, int]:
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads((self.folder / "ports.json").read_text())
            if isinstance(kept, dict) and set(kept) == set(_port_names()):
                return kept
        return {}

    def _remove_sockets(self) -> None:
        """Remove the unix sockets it leaves in the temp folder: only those named by our own ports."""
        for port in self._ports.values():
            for folder in (Path("/tmp"), Path(tempfile.gettempdir())):  # noqa: S108  where the server hard-codes them
                for path in folder.glob(f"seaweedfs-*-{port}.sock"):
                    path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)


def _port_names() -> Iterator[str]:
    for name in S3_PORTS:
        yield f"{name}.port"
        yield f"{name}.port.grpc"


def _choose_ports(s3_port: int | None) -> dict[str, int]:
    """A free port for each of the server's listeners; `s3_port` is kept if it is given."""
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as held:  # all held until all are chosen, so that none is chosen twice
        for name in _port_names():
            if name == "admin.port.grpc":
                continue
            if name == "s3.port" and s3_port is not None:
                ports[name] = s3_port
                continue
            port = _bind(held, 0)
            while name == "admin.port" and not (
                port + ADMIN_GRPC_OFFSET < 65536 and _is_free(port + ADMIN_GRPC_OFFSET)
            ):
                port = _bind(held, 0)
            ports[name] = port
        ports["admin.port.grpc"] = ports["admin.port"] + ADMIN_GRPC_OFFSET
    return ports


def _bind(held: contextlib.ExitStack, port: int) -> int:
    listener = held.enter_context(socket.socket())
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    return int(listener.getsockname()[1])


def _is_free(port: int) -> bool:
    with contextlib.ExitStack() as held:
        try:
            _bind(held, port)
        except (OSError, OverflowError):  # taken, or no port at all
            return False
    return True


def _lost_a_port(log: Path) -> bool:
    # All of it: what runs at that moment is listed behind the line that says so.
    with contextlib.suppress(OSError):
        said = log.read_text(errors="replace")
        return "is not available" in said or "address already in use" in said
    return False
