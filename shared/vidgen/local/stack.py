"""The services as child processes, and the whole stack in one folder."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from vidgen import permissions
from vidgen.contracts import STAGES, Stage
from vidgen.identities import OWNER, Identities, local_users_conf, store_identities, write_private
from vidgen.local.process import POLL, LocalError, Process, http_status
from vidgen.local.servers import LOOPBACK, NatsServer, S3Server

START_LIMIT = 120.0  # seconds, for a service that loads no model
LOAD_LIMIT = 1800.0  # for one that may: it listens when its engine is set up
DRAIN_S = 20.0
# As the command adds. On processors that all share the gateway goes first, whom people ask. Workers and servers are
# alike: a server that went before them would interrupt a worker with each of its calls.
NICE = 10
LEAVE_S = 3.0  # what a second SIGTERM gives a worker to hand its task back

# What the stack decides for its services; whatever else VIDGEN_* the user has set goes through to them.
_OWN = frozenset(
    f"VIDGEN_{name}"
    for name in (
        "NATS_URL", "NATS_USER", "NATS_PASSWORD", "NATS_CREDS", "NATS_NKEY_SEED", "NATS_INBOX_PREFIX", "NATS_TLS_CA",
        "NATS_TLS_CERT", "NATS_TLS_KEY", "S3_ENDPOINT", "S3_PUBLIC_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY",
        "S3_BUCKET", "S3_REGION", "HTTP_HOST", "HTTP_PORT", "METRICS_HOST", "METRICS_PORT",
        "READY_FILE", "WORKER_ID", "WORK_DIR", "STREAM_REPLICAS", "GATEWAY_URL", "GATEWAY_ROLES",
    )
)  # fmt: skip


class Service:
    """One service as a child process: `python -m <module> <arguments>`, log and ready file in `folder`."""

    def __init__(
        self, name: str, module: str, folder: Path, env: Mapping[str, str], arguments: Sequence[str] = ()
    ) -> None:
        self.folder = folder.absolute()
        self.name, self.module, self.arguments, self.env = name, module, tuple(arguments), dict(env)
        self.process = Process(name, self.folder / f"{name}.log")
        self._ready_file = self.folder / f"{name}.url"
        self.url = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.running

    async def start(self, limit: float = START_LIMIT) -> None:
        """Start and wait until it is ready; raises LocalError with the end of its log if it dies or takes too long."""
        self.launch()
        await self.until_ready(limit)

    def launch(self) -> None:
        """Start it, without waiting."""
        self._ready_file.unlink(missing_ok=True)
        env = {**self.env, "VIDGEN_READY_FILE": str(self._ready_file)}
        # -P: a module of the same name in the caller's folder must not stand in for the service.
        self.process.start([sys.executable, "-P", "-m", self.module, *self.arguments], env)

    async def until_ready(self, limit: float = START_LIMIT) -> None:
        """Wait until it has written its URL and `/readyz` answers 200; kills it if that does not happen."""
        try:
            async with asyncio.timeout(limit):
                while not self._read_url():
                    self.process.check()
                    await asyncio.sleep(POLL)
                while await http_status(f"{self.url}/readyz") != 200:
                    self.process.check()
                    await asyncio.sleep(POLL)
        except TimeoutError as exc:
            failure = self.process.failure(f"was not ready within {limit:.0f} s")
            self.kill()
            raise failure from exc
        except BaseException:
            self.kill()
            raise

    def _read_url(self) -> bool:
        with contextlib.suppress(OSError):
            url = self._ready_file.read_text().strip()
            if url.startswith("http"):
                self.url = url.rstrip("/")
                return True
        return False

    async def terminate(self, grace: float = DRAIN_S) -> int | None:
        """SIGTERM and let it drain; after `grace` seconds a second SIGTERM (leave now), then SIGKILL."""
        try:
            if self.running:
                self.process.signal(signal.SIGTERM)
                if await self.process.wait(grace) is None:
                    await self.process.stop(LEAVE_S)
        finally:
            self.kill()
            self._ready_file.unlink(missing_ok=True)
        return await self.process.wait(0)

    def kill(self) -> None:
        self.process.kill()


class Stack:
    """NATS, S3, the gateway and the two GPU services as child processes, all their data in one folder.

    Where a GPU and the weights of both models are here, one process serves both stages instead.

    `env` adds to what the services inherit from this process (`VIDGEN_ENGINE`, `VIDGEN_EDIT_MODEL`, …). With
    `ephemeral` the data are not needed afterwards: everything is killed instead of stopped, which saves seconds.
    `workers` is their number per stage, `stages` are those that have any.
    A folder belongs to one stack at a time; two stacks in two folders run side by side.
    """

    def __init__(
        self, folder: Path, *, env: Mapping[str, str] | None = None, workers: int = 1, stages: Sequence[Stage] = STAGES,
        ephemeral: bool = False, drain_s: float = DRAIN_S,
    ) -> None:  # fmt: skip
        self.folder = folder.absolute()
        self._env, self._workers, self._stages = dict(env or {}), workers, tuple(stages)
        self._ephemeral, self._drain_s = ephemeral, drain_s
        self._identities = Identities(self.folder / "identities")
        self._password = secrets.token_urlsafe(24)
        self.nats = NatsServer(
            self.folder / "nats", sync_always=not ephemeral, users=self.folder / "nats" / "users.conf"
        )
        self.s3 = S3Server(self.folder / "s3")
        self.services: list[Service] = []
        self._lock: TextIO | None = None

    @property
    def gateway(self) -> Service:
        if not self.services:
            raise LocalError("the stack was not started")
        return self.services[0]

    @property
    def gateway_url(self) -> str:
        return self.gateway.url

    @property
    def nats_url(self) -> str:
        """The bus, with the password of its owner."""
        return self.nats.url.replace("://", f"://{OWNER}:{self._password}@")

    @property
    def s3_endpoint(self) -> str:
        return self.s3.endpoint

    @property
    def environment_file(self) -> Path:
        """`environment()` as shell assignments, readable by its owner alone, while the stack runs."""
        return self.folder / "environment"

    def environment(self) -> dict[str, str]:
        """The variables with which its owner connects to this stack; the credentials are among them."""
        found = {
            "VIDGEN_NATS_URL": self.nats_url,
            "VIDGEN_S3_ENDPOINT": self.s3.endpoint,
            "VIDGEN_S3_ACCESS_KEY": self.s3.access_key,
            "VIDGEN_S3_SECRET_KEY": self.s3.secret_key,
            "VIDGEN_S3_BUCKET": self.s3.bucket,
        }
        if self.services and self.gateway.url:
            found["VIDGEN_GATEWAY_URL"] = self.gateway.url
        return found

    @functools.cached_property
    def one_gpu(self) -> bool:
        """Whether the real models of both stages would run on a GPU here: then one worker serves both on it."""
        return len(self._stages) > 1 and both_on_gpu(self._stages, {**os.environ, **self._env})

    @property
    def nice(self) -> int:
        """How far workers and servers let the gateway go first: as the environment says, else by `NICE`."""
        asked = {**os.environ, **self._env}.get("VIDGEN_NICE", "")
        if asked.isdecimal():
            return int(asked)
        return 0 if self.one_gpu else NICE  # who waits for kernels to be launched is not to wait longer

    async def start(self, *, wait_for_workers: bool = True) -> None:
        """Start everything; raises LocalError, and then nothing is left running.

        Without `wait_for_workers` it returns when the gateway is ready: jobs may be sent, and wait for the workers,
        which load their engines meanwhile (`lost` tells if one of them cannot).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._take_lock()
        self.environment_file.unlink(missing_ok=True)
        try:
            await asyncio.to_thread(lambda: self.one_gpu)  # looks at the GPU's driver and at the weights' files
            self.nats.process.nice = self.s3.process.nice = self.nice
            self.nats.process.log_stays = self.s3.process.log_stays = not self._ephemeral
            self._let_in_the_services()
            self.s3.choose()
            promised = self.s3.endpoint
            # The services take as long to start as the S3 server: they do it side by side, and wait for it.
            await _together(self.s3.start(), self._launch_services())
            if self.s3.endpoint != promised:
                for service in self.services:
                    service.kill()
                await self._launch_services()
            await _together(
                self.gateway.until_ready(),
                *(worker.until_ready(LOAD_LIMIT) for worker in self.services[1:] if wait_for_workers),
            )
            lines = (f"{name}={shlex.quote(value)}\n" for name, value in self.environment().items())
            write_private(self.environment_file, "".join(lines))
        except BaseException:
            await self.stop()
            raise

    def _let_in_the_services(self) -> None:
        """Give each service an identity with the rights that it needs, as in a deployment."""
        self._identities.complete()
        known = tuple(self._identities)
        self.s3.others = tuple(store_identities(known, self.s3.bucket))
        for name, text in permissions.nats_files().items():
            path = self.nats.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        write_private(self.nats.folder / "users.conf", local_users_conf(known, self._password))

    def _identity(self, role: str) -> dict[str, str]:
        """What a service shows bus and store."""
        return {"VIDGEN_NATS_URL": self.nats.url, **self._identities.environment(role)}

    async def _launch_services(self) -> None:
        if not self.nats.process.running:
            await self.nats.start()
        self.services = self._make_services()
        for service in self.services:
            service.process.log_stays = not self._ephemeral
            service.launch()

    def _make_services(self) -> list[Service]:
        logs = self.folder / "services"
        logs.mkdir(exist_ok=True)
        env = {name: value for name, value in os.environ.items() if name not in _OWN}
        env |= {"VIDGEN_LOG_FORMAT": "json", "VIDGEN_GRACE_S": str(self._drain_s), **self._env, **self.environment()}
        env |= {"VIDGEN_HTTP_HOST": LOOPBACK, "VIDGEN_HTTP_PORT": "0"}
        if self._ephemeral:  # nobody could make a key for it, whatever the user's other gateways ask for
            env["VIDGEN_AUTH"] = "auto"
        env |= {"VIDGEN_METRICS_HOST": LOOPBACK, "VIDGEN_METRICS_PORT": "0"}
        gateway = Service("gateway", "gateway.main", logs, env | self._identity("gateway") | self._gateways_scratch())
        return [gateway, *self._make_workers(logs, env)]

    def _gateways_scratch(self) -> dict[str, str]:
        """Where a gateway that will be killed has its temporary files: what it leaves goes with the stack's folder."""
        if not self._ephemeral:
            return {}
        scratch = self.folder / "work" / "gateway"
        scratch.mkdir(parents=True, exist_ok=True)
        return {"TMPDIR": str(scratch)}

    def _make_workers(self, logs: Path, env: dict[str, str]) -> Iterator[Service]:
        beneath = {"VIDGEN_NICE": str(self.nice)}
        if not self._ephemeral:
            beneath["VIDGEN_COMPILE_CACHE"] = str(self.folder / "compiled")
        for number in range(1, self._workers + 1):
            for kind, module, arguments in self._kinds():
                name = kind if number == 1 else f"{kind}-{number}"
                work = self.folder / "work" / name
                work.mkdir(parents=True, exist_ok=True)
                own = {**beneath, **env, **self._identity(kind), "VIDGEN_WORK_DIR": str(work)}
                yield Service(name, module, logs, own, arguments)

    def _kinds(self) -> Iterator[tuple[str, str, Sequence[str]]]:
        """The workers that there is one of, or several: name, module and arguments."""
        if self.one_gpu:
            yield "worker", "vidgen.cli", ("worker", "--stages", ",".join(self._stages))
            return
        for stage in self._stages:
            yield f"{stage}-service", f"{stage}_service.main", ()

    async def lost(self) -> LocalError:
        """Wait until one of the processes ends by itself, and say which."""
        while True:
            for process in (self.nats.process, self.s3.process, *(service.process for service in self.services)):
                if not process.running:
                    return process.failure("ended unexpectedly")
            await asyncio.sleep(0.2)

    async def stop(self) -> None:
        """Stop in reverse order, the workers first so that they hand back what they hold; nothing is left running."""
        try:
            if self._ephemeral:
                return
            gateway, workers = self.services[:1], self.services[1:]
            await _together(*(service.terminate(self._drain_s) for service in workers))
            await _together(*(service.terminate(self._drain_s) for service in gateway))
            await _together(self.nats.stop(), self.s3.stop())
        finally:
            for service in self.services:
                service.kill()
            await self.nats.kill()
            await self.s3.kill()
            self.environment_file.unlink(missing_ok=True)
            self._release_lock()

    def _take_lock(self) -> None:
        lock = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise LocalError(
                f"{self.folder} is in use by another stack (process {owner}): stop it, or choose another folder",
                code="folder_in_use",
            ) from exc
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


def both_on_gpu(stages: Sequence[Stage], env: Mapping[str, str]) -> bool:
    """Whether services with this environment would run the real model of each stage on a GPU of this machine."""
    from vidgen import choice, gpu, weights
    from vidgen.settings import WorkerSettings

    gpus = gpu.visible()
    fields = WorkerSettings.model_fields
    given: dict[str, Any] = {name: env[key] for name in fields if env.get(key := f"VIDGEN_{name.upper()}")}
    if not gpus or given.get("engine") == "preview" or given.get("device") == "cpu":
        return False
    try:
        settings = WorkerSettings(**given)
    except ValueError:
        return False  # the services say what is wrong

    def real(stage: Stage) -> bool:
        reason = weights.why_not(*settings.model_of(stage), gpu=True)
        return reason is None and choice.choose(stage, settings, gpus=gpus, reason=reason).kind == "real"

    return all(real(stage) for stage in stages)


async def _together(*actions: Coroutine[Any, Any, object]) -> None:
    """Run them at once; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for action in actions:
                group.create_task(action)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
