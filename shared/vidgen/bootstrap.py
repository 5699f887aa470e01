"""Makes what `vidgen.topology` names on a JetStream server, and checks what is there already."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import nats.js.errors as js_errors
from nats.js import JetStreamContext, api

from vidgen import errors, topology
from vidgen.jetstream import JetStreamBus
from vidgen.natserrors import translated

log = logging.getLogger("vidgen.bus")

PAUSE_S = 0.5
FIXED = ("retention", "storage", "discard", "discard_new_per_subject", "max_msgs_per_subject")
TUNABLE = ("max_age", "max_bytes", "max_consumers", "duplicate_window", "allow_direct")


class Keeper:
    """Makes anew what a bus forgot: a server that is started again, and is alone, has lost what it had in memory."""

    def __init__(self, bus: JetStreamBus, wanted: topology.Topology) -> None:
        self._bus, self._wanted = bus, wanted

    async def run(self, stop: asyncio.Event) -> None:
        """Look behind each reconnection until `stop`; raises FatalError as `ensure` does."""
        stopping = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                back = asyncio.ensure_future(self._bus.back.wait())
                try:
                    await asyncio.wait((back, stopping), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    back.cancel()
                if self._bus.back.is_set():
                    self._bus.back.clear()
                    await self._ensure()
        finally:
            stopping.cancel()

    async def _ensure(self) -> None:
        try:
            await ensure(self._bus, self._wanted)
        except errors.BusError as exc:
            log.warning("bus: %s: looking again", exc.message)
            await asyncio.sleep(PAUSE_S)
            self._bus.back.set()


async def ensure(bus: JetStreamBus, wanted: topology.Topology) -> None:
    """Create what is missing, repair limits, and check the rest.

    Raises FatalError `topology_mismatch` on a difference that cannot be repaired without losing messages. Replicas
    are only ever raised: a service that was not told of them must not take them from one that was.
    """
    js = bus.jetstream
    for stream in wanted.streams:
        config = api.StreamConfig(
            name=stream.name, subjects=list(stream.subjects), retention=api.RetentionPolicy(stream.retention),
            storage=api.StorageType(stream.storage), discard=api.DiscardPolicy(stream.discard),
            max_age=stream.max_age, max_bytes=stream.max_bytes, max_msgs_per_subject=stream.max_msgs_per_subject,
            max_consumers=stream.max_consumers,
            discard_new_per_subject=stream.discard_new_per_subject, num_replicas=wanted.replicas, allow_direct=True,
            duplicate_window=min(stream.duplicate_window, stream.max_age or stream.duplicate_window),
        )  # fmt: skip
        await _ensure_stream(js, f"stream {stream.name}", config)
    for bucket in wanted.buckets:
        await _ensure_bucket(js, bucket, wanted.replicas)
    for consumer in wanted.consumers:  # last: a worker that finds its queues begins, and needs all of the above
        await _ensure_consumer(js, consumer, wanted.ack_wait)


async def _ensure_stream(js: JetStreamContext, what: str, wanted: api.StreamConfig) -> None:
    with translated():
        try:
            found = (await js.stream_info(wanted.name or "")).config
        except js_errors.NotFoundError:
            await js.add_stream(wanted)
            return
    differ = [name for name in FIXED if (getattr(found, name) or None) != (getattr(wanted, name) or None)]
    had, takes = sorted(found.subjects or []), sorted(wanted.subjects or [])
    if not all(any(topology.covers(wider, subject) for wider in takes) for subject in had):
        differ.append("subjects")
    if differ:
        raise errors.FatalError(
            f"{what} exists with another {', '.join(differ)}: drain it and delete it, or use another bus",
            code="topology_mismatch",
        )
    repair = {
        name: getattr(wanted, name) for name in TUNABLE
        if getattr(wanted, name) is not None and getattr(found, name) != getattr(wanted, name)
    }  # fmt: skip
    if had != takes:  # of the version before: what it holds stays, and more is taken
        repair["subjects"] = takes
    if (wanted.num_replicas or 1) > (found.num_replicas or 1):
        repair["num_replicas"] = wanted.num_replicas
    if repair:
        log.info("bus: %s: setting %s", what, ", ".join(sorted(repair)))
        with translated():
            await js.update_stream(found.evolve(**repair))


async def _ensure_consumer(js: JetStreamContext, consumer: topology.Consumer, ack_wait: float) -> None:
    tunable: dict[str, Any] = {
        "ack_wait": ack_wait, "max_deliver": consumer.max_deliver, "max_ack_pending": consumer.max_ack_pending
    }  # fmt: skip
    config = api.ConsumerConfig(
        durable_name=consumer.name, ack_policy=api.AckPolicy.EXPLICIT, filter_subject=consumer.filter_subject,
        max_waiting=2048, **tunable,
    )  # fmt: skip
    with translated():
        try:
            found = (await js.consumer_info(consumer.stream, consumer.name)).config
        except js_errors.NotFoundError:
            await js.add_consumer(consumer.stream, config)
            return
    differ = [
        name for name in ("filter_subject", "ack_policy", "deliver_subject", "backoff")
        if (getattr(found, name) or None) != (getattr(config, name) or None)
    ]  # fmt: skip
    if differ:
        raise errors.FatalError(
            f"consumer {consumer.name} of {consumer.stream} exists with another {', '.join(differ)}: delete it",
            code="topology_mismatch",
        )
    repair = {name: value for name, value in tunable.items() if getattr(found, name) != value}
    if repair:
        log.info("bus: consumer %s of %s: setting %s", consumer.name, consumer.stream, ", ".join(sorted(repair)))
        with translated():
            await js.add_consumer(consumer.stream, found.evolve(**repair))


async def _ensure_bucket(js: JetStreamContext, bucket: topology.Bucket, replicas: int) -> None:
    config = api.KeyValueConfig(
        bucket=bucket.name, ttl=bucket.ttl, history=1, storage=api.StorageType(bucket.storage), replicas=replicas,
        direct=True,
    )  # fmt: skip
    with translated():
        try:
            found = (await js.stream_info(f"KV_{bucket.name}")).config
        except js_errors.NotFoundError:
            await js.create_key_value(config)
            return
    window = found.duplicate_window  # without an age the server's own, and a change of it would have no effect
    if bucket.ttl:
        window = min(window or bucket.ttl, bucket.ttl)
    wanted = found.evolve(
        max_age=bucket.ttl, storage=config.storage, num_replicas=replicas, max_msgs_per_subject=1,
        duplicate_window=window,
    )  # fmt: skip
    await _ensure_stream(js, f"bucket {bucket.name}", wanted)
