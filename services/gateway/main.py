"""The gateway's composition root: settings, bus, store, parts, HTTP; from the first connection to the drained end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import structlog
import uvloop

from gateway.api.app import create_app
from gateway.api.parts import Parts
from gateway.consumers import MOVING_ON, TAKEN_IN, Consumers
from gateway.deadlines import Deadlines
from gateway.decoding import Decoders
from gateway.fleet import Fleet
from gateway.forecast import Forecast
from gateway.intake import Intake
from gateway.jobs import Jobs, now
from gateway.keyring import Keyring
from gateway.orphans import Orphans
from gateway.quotas import Quotas
from gateway.receivers import Allowed, Receivers
from gateway.retention import Keep, Sweeper
from gateway.share import FairShare
from gateway.webhooks import Webhooks
from vidgen import bootstrap, errors, garbage, jetstream, probes, settings, telemetry, tracing, webhooks
from vidgen.artifacts import S3Store
from vidgen.jetstream import JetStreamBus
from vidgen.metrics import GatewayMetrics
from vidgen.settings import GatewaySettings
from vidgen.tenants import Tenants
from vidgen.topology import DAY, Topology
from vidgen.waiting import told_within

log = structlog.get_logger(__name__)

START_PATIENCE_S = 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 4.0
HTTP_GRACE_S = 5.0
DRAIN_S = 10.0
OPEN_FILES = 1 << 16

T = TypeVar("T")
Works = bootstrap.Keeper | Consumers | Deadlines | Orphans | Quotas | Sweeper | Webhooks


class StoppedError(Exception):
    """Told to leave before the start was over."""


def main() -> None:
    """Serve until told to stop. Exit code 0: drained; 1: could not start, or a part of it died."""
    settings.refuse_arguments("vidgen-gateway")
    try:
        own = settings.read(GatewaySettings)
    except errors.FatalError as exc:
        sys.stderr.write(f"{exc.message}\n")
        raise SystemExit(1) from exc
    telemetry.configure(own, "gateway")
    _open_more_files()
    try:
        if not own.asks_for_keys:
            log.info("callers need no key: only this machine can reach this gateway", _event="no_keys")
        with tracing.running(own.traces_url, "gateway"):
            uvloop.run(_Gateway(own).run())
    except errors.VidgenError as exc:
        log.error(exc.message, _event="left", code=exc.code)
        raise SystemExit(1) from exc


def _open_more_files() -> None:
    """Each feed of events is a connection, and many a shell lets a process have a thousand, until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < more:
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))


class _Gateway:
    def __init__(self, own: GatewaySettings) -> None:
        self._settings = own
        self._stop = asyncio.Event()
        self._denied: str | None = None

    async def run(self) -> None:
        """Serve until told to stop; raises VidgenError when that cannot be, or can no longer be."""
        self._take_signals()
        decoders = Decoders()
        if self._settings.serves_api:
            decoders.start()
        try:
            async with contextlib.AsyncExitStack() as stack:
                name = f"gateway-{secrets.token_hex(4)}"
                connected = await self._connect(stack, name)
                store = S3Store.from_settings(self._settings)
                # First: a worker that finds its queues needs the bucket.
                await self._persist("the object store", store.ensure_bucket)
                await self._bootstrap(connected)
                looks = await self._connect(stack, f"{name}-looks")
                await self._serve(connected, looks, store, decoders)
        except StoppedError:
            pass
        if self._denied is not None:
            raise errors.FatalError(
                f"the bus denies the gateway something that it needs: {self._denied}", code="bus_denied"
            )
        log.info("drained", _event="drained")

    async def _connect(self, stack: contextlib.AsyncExitStack, name: str) -> JetStreamBus:
        own = self._settings

        async def attempt() -> JetStreamBus:
            connection = jetstream.connect(own.nats_url, name, on_denied=self._on_denied, **own.nats_options())
            return await stack.enter_async_context(connection)

        return await self._persist("the bus", attempt)

    async def _bootstrap(self, connected: JetStreamBus) -> None:
        own = self._settings
        wanted = Topology(own.stream_replicas, own.ack_wait).keeping(
            events=own.keep_events * DAY, jobs=own.keep_jobs * DAY, dead=own.keep_dead * DAY
        )
        await self._persist("the bus", lambda: bootstrap.ensure(connected, wanted))
        self._keeper = bootstrap.Keeper(connected, wanted)

    async def _serve(
        self, connected: JetStreamBus, looks: JetStreamBus, store: S3Store, decoders: Decoders
    ) -> None:  # fmt: skip
        """`looks` is the connection of those who look on: what they ask does not wait behind what moves jobs on."""
        own, metrics, tenants = self._settings, GatewayMetrics(), Tenants(connected)
        jobs = Jobs(connected, FairShare(connected, tenants, own.tenant_waiting), looks)
        quotas = Quotas(connected, tenants, own)
        hooks = self._webhooks(connected, metrics)
        allowed = hooks.allowed if hooks else None
        intake = Intake(connected, store, jobs, quotas, own.max_upload_bytes, allowed, decoders=decoders)
        fleet = Fleet(connected)
        forecast = Forecast(connected, jobs, fleet)
        keyring = Keyring(connected)
        parts = Parts(own, looks, store, jobs, intake, fleet, forecast, metrics, keyring, quotas, self._stop)
        streams = (*(TAKEN_IN if own.serves_api else ()), *(MOVING_ON if own.moves_jobs else ()))
        consumers = Consumers(connected, jobs, intake, metrics, own.intake_concurrency, streams)
        working: list[Works] = [self._keeper, quotas, consumers, Deadlines(connected, jobs, now)]
        background: list[Works] = []
        if own.moves_jobs:
            orphans = Orphans(connected, fleet, metrics, own.worker_silence_s, own.ack_wait)
            working += [orphans, *([hooks] if hooks else [])]
            background.append(Sweeper(connected, store, jobs, Keep.from_settings(own), metrics))
        consuming = asyncio.create_task(self._work(working), name="consumers")
        sweeping = asyncio.create_task(self._work(background), name="sweeper")
        stopped = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            async with probes.run_app(create_app(parts), own.http_host, own.http_port, grace=HTTP_GRACE_S) as url:
                garbage.collect_rarely()
                probes.write_ready_file(own.ready_file, url)
                log.info("ready for requests", _event="ready", url=url)
                await asyncio.wait((consuming, stopped), return_when=asyncio.FIRST_COMPLETED)
                self._stop.set()  # feeds end, no more is taken from the bus; what has begun is finished
            await asyncio.wait((consuming,), timeout=DRAIN_S)
        finally:
            self._stop.set()
            for task in (consuming, sweeping, stopped):
                task.cancel()
            await asyncio.gather(consuming, sweeping, stopped, return_exceptions=True)
        if not consuming.cancelled() and (died := consuming.exception()) is not None:
            raise errors.FatalError("the consumers died: the log says of what", code="consumers_died") from died

    def _webhooks(self, bus: JetStreamBus, metrics: GatewayMetrics) -> Webhooks | None:
        """What delivers webhooks, where there is a secret to sign them with."""
        own = self._settings
        given = own.webhook_secret.get_secret_value() if own.webhook_secret else ""
        if not given:
            return None
        allowed = Allowed.parse(own.webhook_allow)
        receivers = Receivers(allowed, timeout_s=own.webhook_timeout_s, ca_file=own.webhook_ca_file)
        return Webhooks(
            bus, receivers, webhooks.Secret.parse(given), metrics,
            give_up_after=own.webhook_give_up_s, concurrency=own.webhook_concurrency, renew_every=own.ack_wait / 4,
        )  # fmt: skip

    async def _work(self, parts: Iterable[Works]) -> None:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(part.run(self._stop))

    async def _persist(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try until it works, for a while; raises FatalError, or StoppedError when told to stop meanwhile."""
        clock = asyncio.get_running_loop().time
        give_up, pause = clock() + START_PATIENCE_S, FIRST_PAUSE_S
        while True:
            if self._stop.is_set():
                raise StoppedError
            try:
                return await attempt()
            except errors.RetryableError as exc:
                if clock() + pause > give_up:
                    raise errors.FatalError(
                        f"{what} was not there within {START_PATIENCE_S:.0f} s: {exc.message}", code="not_there"
                    ) from exc
                log.warning(exc.message, _event="not_there_yet", waiting_for=what, again_in_s=pause)
            await told_within(self._stop, pause)
            pause = min(LONGEST_PAUSE_S, pause * 2)

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.warning("leaving now", _event="killed")
            os._exit(128 + number)
        log.info("draining: nothing new is taken, what has begun is finished", _event="draining")
        self._stop.set()

    def _on_denied(self, text: str) -> None:
        self._denied = text
        self._stop.set()


if __name__ == "__main__":
    main()
