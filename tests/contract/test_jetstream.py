"""What JetStream's adapter promises beyond the seam: outages, restarts, and the bootstrap."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats.errors
import pytest
import uvloop
from nats.aio.msg import Msg
from nats.js import api
from tests import engines
from tests.fault.proxy import Proxy
from tests.servers import connected_bus, running_nats

from vidgen import bootstrap, bus, credentials, deliveries, errors, feeds, jetstream, service, topology
from vidgen.inboxes import PullInbox
from vidgen.local import NatsServer
from vidgen.settings import WorkerSettings

QUEUE = topology.consumer_of("edit", "interactive")
SUBJECT = topology.subject_of_task("edit", "interactive", "j1")
BOUND = 60.0


async def pulled(connected: bus.Bus) -> bus.Delivery:
    """What a worker does: pull until something comes, whatever happens to the server meanwhile."""
    async with asyncio.timeout(BOUND):
        while True:
            try:
                delivery = await connected.pull(QUEUE, 1.0)
            except errors.BusError:
                await asyncio.sleep(0.05)
                continue
            if delivery is not None:
                return delivery


# ── outages ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_publish_during_a_restart_is_stored_once(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        await nats_server.kill()
        publish = asyncio.create_task(connected.publish(SUBJECT, b"body", message_id="a"))
        expected = asyncio.create_task(
            connected.publish(topology.subject_of_events("j1"), b"event", message_id="e", expect_last=0)
        )
        await nats_server.start()

        async with asyncio.timeout(BOUND):
            assert (await publish, await expected) == (1, 1)
        assert [message.body for message in await connected.tail(topology.TASKS, None, 9)] == [b"body"]
        assert [message.body for message in await connected.tail(topology.EVENTS, None, 9)] == [b"event"]


async def test_a_repeated_publish_is_no_conflict_where_the_bus_goes_away_once_more_before_it_says_so(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_bus(nats_server) as connected:
        subject = topology.subject_of_events("j1")
        stored = await connected.publish(subject, b"event", message_id="e", expect_last=0)
        look, answers = connected.first, [errors.BusError("gone"), errors.BusError("gone")]

        async def first(*asked: Any) -> bus.Stored | None:
            if answers:
                raise answers.pop()
            return await look(*asked)

        monkeypatch.setattr(connected, "first", first)
        assert await connected.publish(subject, b"event", message_id="e", expect_last=0) == stored
        assert not answers


async def test_a_waiting_pull_hears_of_an_outage_at_once_and_the_next_one_goes_on(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        await connected.depth(QUEUE)
        before = set(connected.client._subs)
        pull = asyncio.create_task(connected.pull(QUEUE, 300.0))
        await connected.depth(QUEUE)
        await nats_server.kill()
        with pytest.raises(errors.BusError):
            await asyncio.wait_for(pull, BOUND)
        await connected.settle()
        assert set(connected.client._subs) == before  # else its answer may yet come, with a message that nobody takes
        assert not await connected.ready()

        await nats_server.start()
        await connected.publish(SUBJECT, b"after", message_id="a")

        delivery = await pulled(connected)
        assert (delivery.body, delivery.num_delivered) == (b"after", 1)
        await delivery.ack()
        assert await connected.ready()


async def test_what_was_taken_before_a_restart_is_settled_after_it_or_comes_again(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        await connected.publish(SUBJECT, b"body", message_id="a")
        delivery = await pulled(connected)
        await nats_server.kill()
        await nats_server.start()

        async with asyncio.timeout(BOUND):
            while True:
                try:
                    await delivery.in_progress()
                    await delivery.ack()
                    break
                except errors.BusError:
                    # The server stores what it delivered a moment late: killed before, it does not answer for it, and
                    # gives it to whoever asks next.
                    with contextlib.suppress(errors.BusError):
                        delivery = await connected.pull(QUEUE, 0) or delivery
        assert await connected.get(topology.TASKS, delivery.seq) is None


async def test_a_supply_goes_on_after_a_restart(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        supply = connected.supply(QUEUE, 4)
        waiting = asyncio.create_task(supply.next())
        await connected.depth(QUEUE)
        await nats_server.kill()
        with pytest.raises(errors.BusError):
            await waiting
        await nats_server.start()
        async with asyncio.timeout(BOUND):
            for number in range(6):  # more than one pull brings
                subject = topology.subject_of_task("edit", "interactive", str(number))
                await connected.publish(subject, b"x", message_id=str(number))
            found = 0
            while found < 6:
                with contextlib.suppress(errors.BusError):
                    delivery = await supply.next()
                    assert delivery is not None
                    await delivery.ack()
                    found += 1
        await supply.close()


@pytest.mark.parametrize("batch", [1, 4])
async def test_a_supply_goes_on_when_its_consumer_is_back(nats_server: NatsServer, batch: int) -> None:
    async with connected_bus(nats_server) as connected:
        supply = connected.supply(QUEUE, batch)
        waiting = asyncio.create_task(supply.next())
        await connected.depth(QUEUE)
        await connected.jetstream.delete_consumer(QUEUE.stream, QUEUE.name)
        with pytest.raises(errors.BusError):
            await waiting
        await bootstrap.ensure(connected, topology.Topology())
        await connected.publish(SUBJECT, b"x", message_id="1")
        async with asyncio.timeout(BOUND):
            while True:
                with contextlib.suppress(errors.BusError):
                    delivery = await supply.next()
                    assert delivery is not None
                    assert delivery.body == b"x"
                    break
        await delivery.ack()
        await supply.close()


async def test_a_feed_goes_on_where_it_was_after_a_restart(nats_server: NatsServer) -> None:
    subject = topology.subject_of_events("j1")
    async with connected_bus(nats_server) as connected:
        for n in range(3):
            await connected.publish(subject, b"%d" % n, message_id=str(n))
        feed = await connected.follow(topology.EVENTS, subject)
        found = []
        async with asyncio.timeout(BOUND):
            found += [await feed.next(BOUND), await feed.next(BOUND)]
            await nats_server.kill()
            publish = asyncio.create_task(connected.publish(subject, b"3", message_id="3"))
            await nats_server.start()
            await publish
            while len(found) < 4:
                try:
                    message = await feed.next(1)
                except errors.BusError:
                    continue
                found += [message] if message else []
        assert [message.body for message in found if message] == [b"0", b"1", b"2", b"3"]
        assert await feed.next(0.2) is None
        await feed.close()


@pytest.mark.parametrize("waits", [False, True], ids=["between two looks", "while it waits"])
async def test_a_feed_outlives_its_consumer_on_the_server(nats_server: NatsServer, waits: bool) -> None:
    subject = topology.subject_of_events("j1")
    async with connected_bus(nats_server) as connected:
        await connected.publish(subject, b"0", message_id="0")
        feed = await connected.follow(topology.EVENTS, subject)
        first = await feed.next(BOUND)
        following = asyncio.create_task(feed.next(BOUND)) if waits else None
        await connected.depth(QUEUE)  # a round trip later the server knows of the pull
        for info in await connected.jetstream.consumers_info(topology.EVENTS):
            if info.name != topology.GATEWAY:
                await connected.jetstream.delete_consumer(topology.EVENTS, info.name)
        await connected.publish(subject, b"1", message_id="1")

        second = await (following or feed.next(BOUND))

        assert first is not None
        assert second is not None
        assert (first.body, second.body) == (b"0", b"1")
        await feed.close()


async def test_a_closed_feed_leaves_no_consumer_behind(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        feed = await connected.follow(topology.EVENTS, "vidgen.events.*")
        await feed.close()

        names = [info.name for info in await connected.jetstream.consumers_info(topology.EVENTS)]

        assert names == [topology.GATEWAY]


async def test_every_call_fails_in_an_outage_and_says_so_plainly(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected_bus(nats_server) as connected:
        await connected.publish(SUBJECT, b"", message_id="a")
        delivery = await pulled(connected)
        records = connected.records(topology.JOBS_BUCKET)
        await records.put("j1", b"")
        for module in (jetstream, deliveries):
            monkeypatch.setattr(module, "REQUEST_TIMEOUT", 0.3)
        monkeypatch.setattr(connected.jetstream, "_timeout", 0.3)
        monkeypatch.setattr(jetstream, "PUBLISH_PATIENCE", 0.3)
        await nats_server.kill()

        calls = [
            connected.publish(SUBJECT, b"", message_id="b"), connected.pull(QUEUE, 0),
            connected.last(topology.TASKS, SUBJECT), connected.tail(topology.TASKS, None, 1),
            connected.get(topology.TASKS, 1), connected.purge(topology.TASKS, SUBJECT), connected.depth(QUEUE),
            connected.held(topology.TASKS),
            connected.delete(topology.EVENTS, 1), connected.follow(topology.EVENTS, "vidgen.events.*"),
            records.get("j1"), records.latest("j1"), connected.latest(topology.EVENTS, SUBJECT),
            records.put("j1", b"", 7), records.all(), delivery.ack(), delivery.in_progress(),
        ]  # fmt: skip
        answers = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), BOUND)

        assert [type(answer) for answer in answers] == [errors.BusError] * len(calls)
        assert all(str(answer).startswith("the bus did not answer") for answer in answers)


async def test_an_outage_is_logged_once_however_often_the_bus_is_looked_for(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected_bus(nats_server) as connected:
        await nats_server.kill()
        knocks, often = 0, asyncio.Event()

        def knocked(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal knocks
            writer.close()
            knocks += 1
            if knocks == 5:
                often.set()

        port = int(nats_server.url.rsplit(":", 1)[1])
        async with asyncio.timeout(BOUND), await asyncio.start_server(knocked, "127.0.0.1", port):
            await often.wait()
        said = [message for message in caplog.messages if message.startswith("bus: ")]
        await nats_server.start()
        await connected.publish(SUBJECT, b"", message_id="a")

    assert said
    assert all(one != following for one, following in itertools.pairwise(said))


async def test_what_a_server_had_in_memory_is_made_anew_behind_its_restart(nats_server: NatsServer) -> None:
    # Found by random orders: nobody did, so that running jobs could neither be asked for nor be cancelled.
    wanted = topology.Topology()
    async with connected_bus(nats_server, wanted) as connected:
        stop = asyncio.Event()
        keeping = asyncio.create_task(bootstrap.Keeper(connected, wanted).run(stop))
        for _ in range(2):
            await nats_server.kill()
            await asyncio.sleep(0.2)
            await nats_server.start()
            async with asyncio.timeout(BOUND):
                while True:
                    try:
                        assert await connected.latest(topology.PROGRESS, topology.subject_of_progress("j1")) is None
                        assert await connected.records(topology.WORKERS_BUCKET).all() == {}
                        break
                    except errors.BusError:
                        await asyncio.sleep(0.05)
        stop.set()
        async with asyncio.timeout(BOUND):
            await keeping


async def test_connecting_to_nothing_fails_soon_and_names_the_place_without_its_credentials() -> None:
    with socket.socket() as held:  # bound and not listening: nobody answers, and nobody else can take the port
        held.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{held.getsockname()[1]}"

        with pytest.raises(errors.BusError) as caught:
            async with asyncio.timeout(BOUND), jetstream.connect(f"nats://user:secret@{place}", "test"):
                pass

    assert place in caught.value.message
    assert "VIDGEN_NATS_URL" in caught.value.message
    assert "secret" not in str(caught.value)
    assert "user" not in str(caught.value)


@pytest.mark.parametrize("ends", ["by its limit", "by a cancel"])
async def test_a_connection_that_is_given_up_as_it_is_made_is_closed(
    monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """It stayed open for as long as the process lived, one for each attempt: nats-py cleans up after its own only."""
    monkeypatch.setattr(jetstream, "FIRST_CONNECT_LIMIT", 1.0 if ends == "by its limit" else BOUND)
    greeted, gone = asyncio.Event(), asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"max_payload": 1048576}\r\n')
        with contextlib.suppress(ConnectionResetError):
            await reader.readuntil(b"PING\r\n")
            greeted.set()  # and waits for an answer that never comes
            await reader.read()
        writer.close()
        gone.set()

    async def connect(url: str) -> None:
        async with jetstream.connect(url, "test"):
            pass

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        place = "{}:{}".format(*server.sockets[0].getsockname())
        connecting = asyncio.create_task(connect(f"nats://{place}"))
        async with asyncio.timeout(BOUND):
            await greeted.wait()
            if ends == "by a cancel":
                connecting.cancel()
            with pytest.raises((errors.BusError, asyncio.CancelledError)):
                await connecting
            await gone.wait()


@pytest.mark.parametrize(
    "content", [None, b"", b"-----BEGIN USER NKEY SEED-----\nSU...\n------END USER NKEY SEED------\n"],
    ids=["no file", "nothing in it", "a seed alone"],
)  # fmt: skip
async def test_credentials_that_cannot_be_read_are_a_wrong_setting(
    nats_server: NatsServer, tmp_path: Path, content: bytes | None
) -> None:
    # Asked for it by a server, nats-py looks for a JWT that is not there for ever, and the loop stands still.
    path = tmp_path / "some.creds"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.FatalError) as caught:
        async with jetstream.connect(nats_server.url, "test", user_credentials=str(path)):
            pass
    assert caught.value.code == "settings"


def creds(jwt: str = "e.y.J", seed: str | None = None) -> str:
    """A NATS credentials file."""
    parts = (("NATS USER JWT", jwt), ("USER NKEY SEED", seed or credentials.make_seed()))
    return "".join(f"-----BEGIN {kind}-----\n{content}\n------END {kind}------\n\n" for kind, content in parts)


@pytest.mark.parametrize(
    "content",
    [
        b"", creds(seed="SU...").encode(), creds(jwt="\xff").encode("latin-1"),
        creds()[: creds().index("SEED")].encode(), creds()[creds().rindex("-----BEGIN") :].encode(),
    ],
    ids=["nothing in it", "no seed in its place", "not text", "no seed", "a seed alone"],
)  # fmt: skip
async def test_credentials_that_are_no_good_for_a_while_in_an_outage_are_read_again(
    tmp_path: Path, content: bytes
) -> None:
    """By some nats-py's reconnection ended, and the process lived on without a bus; by others its loop stood still."""
    path, came, writers = tmp_path / "some.creds", asyncio.Semaphore(0), list[asyncio.StreamWriter]()
    path.write_text(creds())

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(b'INFO {"max_payload": 1048576, "headers": true, "auth_required": true, "nonce": "once"}\r\n')
        came.release()
        with contextlib.suppress(ConnectionResetError):
            while line := await reader.readline():
                if line == b"PING\r\n":
                    writer.write(b"PONG\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, asyncio.timeout(BOUND):
        url = "nats://{}:{}".format(*server.sockets[0].getsockname())
        async with jetstream.connect(url, "test", user_credentials=str(path), reconnect_time_wait=0.05) as connected:
            await came.acquire()
            path.write_bytes(content)
            writers[0].close()
            for _ in range(2):  # it came, and came again
                await came.acquire()
            path.write_text(creds())
            await connected.back.wait()
        for writer in writers:  # none of those that came to nothing is open
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def cut_off_while_it_writes(server: NatsServer) -> AsyncIterator[tuple[jetstream.JetStreamBus, Proxy]]:
    """A bus that notices soon how its network swallows everything, with more written than the system takes."""
    host, port = server.url.removeprefix("nats://").split(":")
    async with Proxy(host, int(port)) as network, contextlib.AsyncExitStack() as stack:
        url = f"nats://127.0.0.1:{network.port}"
        connected = await stack.enter_async_context(
            jetstream.connect(url, "test", reconnect_time_wait=0.05, ping_interval=0.2)
        )
        network.cut()

        async def write() -> None:
            while True:
                await connected.signal("nobody.listens", bytes(200_000))

        transport = connected.client._transport._io_writer.transport  # type: ignore[union-attr]
        writing = asyncio.create_task(write())
        async with asyncio.timeout(BOUND):
            while not transport.get_write_buffer_size():
                await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        yield connected, network


async def test_what_a_dead_network_has_not_taken_does_not_hold_up_the_next_connection(nats_server: NatsServer) -> None:
    # nats-py waited until the system gave the old connection up, a quarter of an hour where nobody answers.
    async with cut_off_while_it_writes(nats_server) as (connected, network):
        lost = connected.lost
        async with asyncio.timeout(BOUND):
            await lost
            network.heal()
            while not connected.client.is_connected:
                await asyncio.sleep(0.01)


async def test_what_a_dead_network_has_not_taken_does_not_hold_up_who_leaves(nats_server: NatsServer) -> None:
    async with asyncio.timeout(BOUND), cut_off_while_it_writes(nats_server):
        pass


async def test_half_a_message_does_not_go_on_with_what_the_next_connection_brings(nats_server: NatsServer) -> None:
    # A write fails as the reading task is about to wake up: that reads half a message after nats-py cleared it away.
    async with connected_bus(nats_server) as connected:
        client: Any = connected.client
        subscription = await client.subscribe("some.subject")
        client._transport._io_reader.feed_data(b"MSG some.subject %d 500\r\nhalf" % subscription._id)
        await client._process_op_err(ConnectionResetError())
        async with asyncio.timeout(BOUND):
            while not await connected.ready():
                await asyncio.sleep(0.01)
        assert (subscription.pending_msgs, client.stats["reconnects"]) == (0, 1)


async def test_who_is_cut_off_with_a_word_comes_back(nats_server: NatsServer) -> None:
    # nats-py closed for good: the process lived on without a bus.
    async with connected_bus(nats_server) as connected:
        await connected.signal("x" * 5000, b"")  # "maximum control line exceeded"
        async with asyncio.timeout(BOUND):
            while not (connected.client.stats["reconnects"] and await connected.ready()):
                await asyncio.sleep(0.01)


async def test_leaving_while_the_server_is_gone_does_not_hang(nats_server: NatsServer) -> None:
    async with asyncio.timeout(BOUND), connected_bus(nats_server):
        await nats_server.kill()


def test_leaving_with_something_unsaid_while_the_server_is_gone_is_no_failure(tmp_path: Path) -> None:
    # On the loop of the services, where what has gone says so with a RuntimeError.
    async def leave() -> None:
        async with running_nats(tmp_path) as server, connected_bus(server) as connected:
            lost = connected.lost
            await server.kill()
            await lost
            await connected.signal("nobody.listens", b"")

    uvloop.run(leave())


def test_a_feed_opened_as_the_connection_breaks_is_refused_as_in_any_outage(tmp_path: Path) -> None:
    # uvloop raises a RuntimeError, which those who listen for as long as they live do not expect of a bus.
    async def listen() -> None:
        async with running_nats(tmp_path) as server, connected_bus(server) as connected:
            client: Any = connected.client
            client._transport._io_writer.transport.abort()
            await asyncio.sleep(0)  # it is closed, and the reading loop has not seen it
            with pytest.raises(errors.BusError):
                await connected.listen("nobody.signals")

    uvloop.run(listen())


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_stream_that_discards_new_messages_says_try_later(nats_server: NatsServer) -> None:
    small = tuple(
        dataclasses.replace(stream, max_bytes=2000) if stream.name == topology.REQUESTS else stream
        for stream in topology.STREAMS
    )
    async with connected_bus(nats_server, topology.Topology(streams=small)) as connected:
        for n in range(3):
            await connected.publish(topology.SUBJECT_REQUESTS, b"x" * 500, message_id=str(n))

        at_once = jetstream.PUBLISH_PATIENCE / 2  # it is the caller who waits, and tells its own caller
        with pytest.raises(errors.QueueFullError, match="full"):
            async with asyncio.timeout(at_once):
                await connected.publish(topology.SUBJECT_REQUESTS, b"x" * 500, message_id="last")


async def test_a_publish_behind_the_end_of_a_connection_fails_at_once(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        pass
    with pytest.raises(errors.BusError):
        async with asyncio.timeout(jetstream.PUBLISH_PATIENCE / 2):
            await connected.publish(SUBJECT, b"", message_id="a")


async def test_a_message_larger_than_the_server_takes_is_rejected_at_once(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        with pytest.raises(errors.RejectedError) as caught:
            await connected.publish(SUBJECT, b"x" * 300_000, message_id="a")
    assert caught.value.code == "too_large"


async def test_a_message_that_its_headers_make_too_large_is_rejected_and_nobody_is_cut_off(
    nats_server: NatsServer,
) -> None:
    async with connected_bus(nats_server) as connected:
        body = bytes(connected.client.max_payload - 10)
        with pytest.raises(errors.RejectedError) as refused:
            await connected.publish(topology.subject_of_events("j1"), body, message_id="a")
        assert refused.value.code == "too_large"
        assert await connected.ready()
        assert connected.client.stats["reconnects"] == 0


async def test_names_that_the_bus_cannot_take_are_rejected_at_once(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        with pytest.raises(errors.RejectedError):
            await connected.publish("vidgen.tasks.edit. .j", b"", message_id="a")
        with pytest.raises(errors.RejectedError):
            await connected.records(topology.JOBS_BUCKET).get("no such key")


async def test_a_request_named_like_an_answer_of_the_server_is_a_message(nats_server: NatsServer) -> None:
    # Anybody may publish a request with any header; it must not look like "404 no messages" to the intake.
    gateway = topology.Consumer(topology.REQUESTS, topology.GATEWAY)
    async with connected_bus(nats_server) as connected:
        for status in ("404", "503"):
            await connected.client.publish(topology.SUBJECT_REQUESTS, b"{}", headers={"Status": status})
            delivery = await connected.pull(gateway, BOUND)
            assert delivery is not None
            assert delivery.body == b"{}"
            await delivery.ack()


@pytest.mark.parametrize(
    "published",
    [
        b"HPUB vidgen.requests 2 4\r\n\r\n{}\r\n",
        b"HPUB vidgen.requests 8 10\r\nNATS/1.0{}\r\n",
        b"PUB vidgen.requests.\xff\xfe 2\r\n{}\r\n",
    ],
    ids=["headers that are none", "headers without an end", "a subject that is not UTF-8"],
)
async def test_a_request_that_nats_py_cannot_read_comes_like_another(nats_server: NatsServer, published: bytes) -> None:
    # The server stores it. It ended nats-py's reading: who pulled it was deaf for half a minute, and then the next one.
    requests = next(one for one in topology.CONSUMERS if one.stream == topology.REQUESTS)
    host, port = nats_server.url.removeprefix("nats://").split(":")
    async with connected_bus(nats_server) as connected:
        reader, writer = await asyncio.open_connection(host, int(port))
        await reader.readline()
        writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n' + published + b"PING\r\n")
        assert await reader.readline() == b"PONG\r\n"
        writer.close()
        async with asyncio.timeout(BOUND):
            delivery = await connected.pull(requests)
        assert delivery is not None
        assert (delivery.body, delivery.headers) == (b"{}", {})
        await delivery.ack()


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_each_of_many_requests_gets_its_own_answer(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        heard = await connected.client.subscribe("echo")
        asked = [asyncio.create_task(connected.client.request("echo", b"%d" % n, timeout=BOUND)) for n in range(9)]
        came = [await heard.next_msg(timeout=BOUND) for _ in asked]
        for message in reversed(came):
            await message.respond(message.data)

        assert [answer.data for answer in await asyncio.gather(*asked)] == [b"%d" % n for n in range(9)]


async def test_what_is_published_at_once_comes_whole_and_in_order(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        feed = await connected.listen("bench.order")
        bodies = [bytes([number % 251]) * (number * 400) for number in range(300)]
        for body in bodies:
            await connected.signal("bench.order", body)

        async with asyncio.timeout(BOUND):
            heard = [await feed.next(BOUND) for _ in bodies]
        assert [one.body for one in heard if one is not None] == bodies
        await feed.close()


class Written:
    """A transport that keeps the first word of each command that goes through it."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.words: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.words.append(data.split()[0])
        self._transport.write(data)

    def writelines(self, commands: list[bytes]) -> None:
        self.words += [command.split()[0] for command in commands]
        self._transport.writelines(commands)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_a_flush_asks_behind_all_that_it_waits_for(nats_server: NatsServer) -> None:
    # What asks first gets a PONG while the server knows nothing yet: a feed that hears nothing, a pull that takes more.
    async with connected_bus(nats_server) as connected:
        client: Any = connected.client
        client._transport = wire = Written(client._transport)
        feed = await connected.listen("bench.order")
        assert wire.words == [b"SUB", b"PING"]
        await connected.signal("bench.order", b"body")
        await client.flush()
        assert wire.words[2:] == [b"PUB", b"PING"]
        await feed.close()

        inbox = PullInbox(client)
        await inbox.ask("nobody.listens", b"")
        await inbox.close()
        assert wire.words[-4:] == [b"SUB", b"PUB", b"UNSUB", b"PING"]


async def test_who_gives_up_a_flush_goes_on_hearing_and_leaves_nothing_behind(nats_server: NatsServer) -> None:
    # nats-py's reading ended over a PONG that nobody waited for any more: the bus was deaf for half a minute.
    async with connected_bus(nats_server) as connected:
        client: Any = connected.client
        before = set(client._subs)
        listening = asyncio.create_task(connected.listen("nobody.signals"))
        async with asyncio.timeout(BOUND):
            while not client._pongs:
                await asyncio.sleep(0)
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening
        assert await connected.ready()
        assert set(client._subs) == before


@pytest.mark.parametrize("value", ["a\r\nNats-Rollup: all", "a\nb"])
async def test_a_line_break_in_a_header_does_not_become_one_on_the_wire(nats_server: NatsServer, value: str) -> None:
    async with connected_bus(nats_server) as connected:
        await connected.publish(SUBJECT, b"body", message_id="a", headers={"x-note": value})

        stored = await connected.last(topology.TASKS, SUBJECT)
        assert stored is not None
        assert stored.headers["x-note"] == " ".join(value.split("\n")).replace("\r", " ")
        assert "Nats-Rollup" not in stored.headers


async def test_an_answer_that_comes_too_late_is_let_go(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        heard = await connected.client.subscribe("slow")
        with pytest.raises(nats.errors.TimeoutError):
            await connected.client.request("slow", b"first", timeout=0.05)
        late = await heard.next_msg(timeout=BOUND)
        asked = asyncio.create_task(connected.client.request("slow", b"second", timeout=BOUND))
        await late.respond(b"of the first")
        await (await heard.next_msg(timeout=BOUND)).respond(b"of the second")

        assert (await asked).data == b"of the second"


async def test_pulls_that_follow_one_another_share_a_subscription(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        assert await connected.pull(QUEUE, 0) is None
        await connected.depth(QUEUE)
        before = set(connected.client._subs)
        for n in range(5):
            await connected.publish(SUBJECT, b"%d" % n, message_id=str(n))
            await (await pulled(connected)).ack()
            assert await connected.pull(QUEUE, 0.05) is None

        assert set(connected.client._subs) == before


async def test_a_pull_that_was_given_up_is_given_nothing_any_more(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server, topology.Topology(ack_wait=1.0)) as connected:
        pull = asyncio.create_task(connected.pull(QUEUE, BOUND))
        await connected.depth(QUEUE)
        pull.cancel()
        await asyncio.gather(pull, return_exceptions=True)
        await connected.settle()
        await connected.publish(SUBJECT, b"", message_id="a")

        assert (await pulled(connected)).num_delivered == 1


async def test_an_ack_that_nobody_waits_for_removes_the_message_too(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        await connected.publish(SUBJECT, b"body", message_id="a")
        delivery = await pulled(connected)
        await delivery.ack(heard=False)

        async with asyncio.timeout(BOUND):
            while await connected.get(topology.TASKS, delivery.seq) is not None:
                await asyncio.sleep(0.01)


async def test_more_feeds_are_open_at_once_than_a_server_takes_consumers_by_itself(nats_server: NatsServer) -> None:
    async with jetstream.connect(nats_server.url, "test") as connected:
        await connected.jetstream.add_stream(name=topology.EVENTS, subjects=["vidgen.events.*"], max_age=7 * 86400)
        await bootstrap.ensure(connected, topology.Topology())

        opened = [await connected.follow(topology.EVENTS, f"vidgen.events.{number}") for number in range(1100)]

        await connected.publish("vidgen.events.1099", b"heard", message_id="heard")
        message = await opened[-1].next(BOUND)
        assert message is not None
        assert message.body == b"heard"


async def test_a_feed_that_is_left_while_it_waits_leaves_no_consumer_behind(nats_server: NatsServer) -> None:
    async with jetstream.connect(nats_server.url, "test") as connected:
        await bootstrap.ensure(connected, topology.Topology())
        js = connected.jetstream
        before = (await js.stream_info(topology.EVENTS)).state.consumer_count
        feed = await connected.follow(topology.EVENTS, "vidgen.events.somebody")
        assert isinstance(feed, feeds.FollowFeed)
        waiting = asyncio.create_task(feed.next(60.0))
        async with asyncio.timeout(BOUND):
            while not (await js.consumer_info(topology.EVENTS, feed._consumer or "")).num_waiting:
                await asyncio.sleep(0.01)

        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await feed.close()
        await connected.settle()

        assert (await js.stream_info(topology.EVENTS)).state.consumer_count == before


# ── bootstrap ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_bootstrap_creates_all_and_changes_nothing_the_second_time(
    nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected_bus(nats_server) as connected:
        before = {info.config.name: info for info in await connected.jetstream.streams_info()}
        caplog.clear()
        with caplog.at_level("INFO", "vidgen.bus"):
            await bootstrap.ensure(connected, topology.Topology())
        assert caplog.messages == []
        after = {info.config.name: info for info in await connected.jetstream.streams_info()}

        names = {stream.name for stream in topology.STREAMS} | {f"KV_{bucket.name}" for bucket in topology.BUCKETS}
        assert set(before) == set(after) == names
        assert {name: info.config for name, info in before.items()} == {n: i.config for n, i in after.items()}
        for consumer in topology.CONSUMERS:
            found = (await connected.jetstream.consumer_info(consumer.stream, consumer.name)).config
            assert (found.ack_wait, found.max_deliver, found.max_ack_pending, found.filter_subject) == (
                topology.ACK_WAIT, consumer.max_deliver, consumer.max_ack_pending, consumer.filter_subject,
            )  # fmt: skip


async def test_several_services_may_bootstrap_at_once(tmp_path: Path) -> None:
    async with running_nats(tmp_path / "nats") as server, jetstream.connect(server.url, "test") as connected:
        await asyncio.gather(*(bootstrap.ensure(connected, topology.Topology()) for _ in range(4)))

        assert await connected.ready()


async def test_the_bootstrap_repairs_limits_and_keeps_what_is_stored(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server, topology.Topology(ack_wait=5.0)) as connected:
        await connected.publish(SUBJECT, b"kept", message_id="a")
        wanted = topology.Topology(
            ack_wait=30.0,
            streams=tuple(dataclasses.replace(s, max_age=999.0, duplicate_window=60.0) for s in topology.STREAMS),
            consumers=tuple(dataclasses.replace(c, max_deliver=7, max_ack_pending=70) for c in topology.CONSUMERS),
            buckets=tuple(dataclasses.replace(b, ttl=500.0) for b in topology.BUCKETS),
        )

        await bootstrap.ensure(connected, wanted)

        for stream in wanted.streams:
            config = (await connected.jetstream.stream_info(stream.name)).config
            assert (config.max_age, config.duplicate_window) == (999.0, 60.0)
        for consumer in wanted.consumers:
            found = (await connected.jetstream.consumer_info(consumer.stream, consumer.name)).config
            assert (found.ack_wait, found.max_deliver, found.max_ack_pending) == (30.0, 7, 70)
        for bucket in wanted.buckets:
            assert (await connected.jetstream.stream_info(f"KV_{bucket.name}")).config.max_age == 500.0
        assert (await pulled(connected)).body == b"kept"


async def test_the_list_of_one_tenant_costs_no_more_where_others_have_many_jobs(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    get = jetstream.JetStreamBus._get

    async def counted(self: jetstream.JetStreamBus, stream: str, **query: Any) -> bus.Stored | None:
        nonlocal reads
        reads += 1
        return await get(self, stream, **query)

    monkeypatch.setattr(jetstream.JetStreamBus, "_get", counted)
    async with connected_bus(nats_server) as connected:
        for start in range(0, 2000, 200):
            names = [("acme" if n in (3, 700, 701) else "umbrella", n) for n in range(start, start + 200)]
            await asyncio.gather(
                *(connected.publish(topology.subject_of_history(f"j{n}", t), b"", message_id=f"{n}") for t, n in names)
            )

        found = await connected.tail(topology.HISTORY, None, 21, topology.subject_of_history("*", "acme"))

    assert sorted(message.subject for message in found) == [f"vidgen.history.acme.j{n}" for n in (3, 700, 701)]
    assert reads < 30


async def test_an_upgrade_takes_in_new_subjects_and_keeps_what_was_queued(nats_server: NatsServer) -> None:
    before = {topology.TASKS: ("vidgen.tasks.*.*.*",), topology.HISTORY: ("vidgen.history.*",)}
    streams = tuple(
        dataclasses.replace(stream, subjects=before.get(stream.name, stream.subjects))
        for stream in topology.STREAMS if stream.name != topology.HELD
    )  # fmt: skip
    consumers = tuple(consumer for consumer in topology.CONSUMERS if consumer.stream != topology.HELD)
    async with jetstream.connect(nats_server.url, "test") as connected:
        # Given a bus of the version before, with a task and a job in the list
        await bootstrap.ensure(connected, topology.Topology(streams=streams, consumers=consumers, buckets=()))
        older = topology.subject_of_older_task("edit", "interactive", "j1")
        await connected.publish(older, b"older", message_id="j1:edit:1")
        await connected.publish(topology.subject_of_history("j1"), b"", message_id="j1")

        # When a gateway of this version comes
        await bootstrap.ensure(connected, topology.Topology())
        await connected.publish(SUBJECT, b"newer", message_id="j2:edit:1")

        # Then both tasks are given to the same workers, in their order, and the job is in its list
        assert [(await pulled(connected)).body for _ in range(2)] == [b"older", b"newer"]
        own = await connected.tail(topology.HISTORY, None, 9, topology.subject_of_history("*"))
        assert [message.subject for message in own] == ["vidgen.history.j1"]

        # And one of the version before does not take away what it does not know
        with pytest.raises(errors.FatalError, match="subjects"):
            await bootstrap.ensure(connected, topology.Topology(streams=streams, consumers=consumers, buckets=()))


@pytest.mark.parametrize(
    ("wider", "subject", "expected"),
    [
        ("a.*.>", "a.*.*", True), ("a.>", "a.b", True), ("a.>", "a.>", True), ("*.b", "a.b", True),
        ("a.*", "a.>", False), ("a.b", "a.*", False), ("a.>", "a", False), ("a.*.*", "a.*.>", False),
        ("a.*", "a.*.*", False),
    ],
)  # fmt: skip
def test_only_what_takes_all_that_was_taken_is_an_upgrade(wider: str, subject: str, expected: bool) -> None:
    assert topology.covers(wider, subject) is expected


async def test_the_bootstrap_refuses_a_stream_that_is_another(nats_server: NatsServer) -> None:
    async with jetstream.connect(nats_server.url, "test") as connected:
        await connected.jetstream.add_stream(name=topology.TASKS, subjects=["vidgen.tasks.*.*.*"], storage="memory")

        with pytest.raises(errors.FatalError) as caught:
            await bootstrap.ensure(connected, topology.Topology())

    assert caught.value.code == "topology_mismatch"
    for name in (topology.TASKS, "retention", "storage", "discard", "max_msgs_per_subject"):
        assert name in caught.value.message


async def test_the_bootstrap_refuses_a_consumer_with_another_filter(nats_server: NatsServer) -> None:
    async with jetstream.connect(nats_server.url, "test") as connected:
        await bootstrap.ensure(connected, topology.Topology(consumers=()))
        await connected.jetstream.add_consumer(
            topology.TASKS, api.ConsumerConfig(durable_name=QUEUE.name, filter_subject="vidgen.tasks.edit.>")
        )

        with pytest.raises(errors.FatalError, match="filter_subject") as caught:
            await bootstrap.ensure(connected, topology.Topology())

    assert caught.value.code == "topology_mismatch"


async def test_the_bootstrap_refuses_a_bucket_in_another_storage(nats_server: NatsServer) -> None:
    async with jetstream.connect(nats_server.url, "test") as connected:
        await connected.jetstream.create_key_value(bucket=topology.WORKERS_BUCKET, history=1)

        with pytest.raises(errors.FatalError, match="storage"):
            await bootstrap.ensure(connected, topology.Topology())


async def test_the_bootstrap_makes_queues_last_since_workers_begin_where_theirs_are(nats_server: NatsServer) -> None:
    first = dataclasses.replace(topology.CONSUMERS[0], stream="nowhere")
    async with jetstream.connect(nats_server.url, "test") as connected:
        with pytest.raises(errors.BusError):
            await bootstrap.ensure(connected, topology.Topology(consumers=(first,)))

        for bucket in topology.BUCKETS:
            await connected.records(bucket.name).put("key", b"value")


async def test_a_bucket_that_is_not_there_is_named(nats_server: NatsServer) -> None:
    async with jetstream.connect(nats_server.url, "test") as connected:
        records = connected.records("elsewhere")
        put = records.put
        for call in (records.get("key"), records.latest("key"), put("key", b"value"), put("key", b"value", revision=0)):
            with pytest.raises(errors.BusError, match="the bucket elsewhere is not there: start a gateway"):
                await call


@pytest.mark.parametrize("leader", ["refuses", "is silent"])
async def test_the_latest_comes_from_any_node_where_no_leader_says_it(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, leader: str
) -> None:
    """As while a leader is elected: records and logs can be read meanwhile."""
    async with connected_bus(nats_server) as connected:
        ask = connected.client.request
        asked: list[str] = []

        async def request(subject: str, payload: bytes = b"", timeout: float = 0.5, **options: Any) -> Msg:
            asked.append(subject)
            if not subject.startswith("$JS.API.STREAM.MSG.GET."):
                return await ask(subject, payload, timeout=timeout, **options)
            if leader == "refuses":
                error = {"code": 503, "err_code": 10008, "description": "JetStream system temporarily unavailable"}
                return Msg(connected.client, data=json.dumps({"error": error}).encode())
            assert timeout < 1
            raise nats.errors.TimeoutError

        records, subject = connected.records(topology.JOBS_BUCKET), topology.subject_of_events("j1")
        revision = await records.put("j1", b"record")
        await connected.publish(subject, b"event", message_id="e", headers={"traceparent": "00-a: b", "Status": "404"})
        said = await connected.latest(topology.EVENTS, subject)
        monkeypatch.setattr(connected.client, "request", request)
        assert await records.latest("j1") == (b"record", revision)
        assert await records.latest("j2") is None
        assert await connected.latest(topology.EVENTS, subject) == said
        assert len(asked) == 6


async def test_a_record_that_was_deleted_is_not_the_latest_either(nats_server: NatsServer) -> None:
    async with connected_bus(nats_server) as connected:
        records = connected.records(topology.JOBS_BUCKET)
        await records.put("j1", b"record")
        await (await connected.jetstream.key_value(topology.JOBS_BUCKET)).delete("j1")
        assert await records.latest("j1") is None
        assert await records.get("j1") is None


async def test_a_server_that_is_alone_and_is_to_keep_three_copies_says_which_setting_is_wrong(
    nats_server: NatsServer,
) -> None:
    """It was taken for a bus that is not there yet, and waited for."""
    with pytest.raises(errors.FatalError, match="set VIDGEN_STREAM_REPLICAS=1") as caught:
        async with connected_bus(nats_server, topology.Topology(replicas=3)):
            pass
    assert caught.value.code == "settings"


# ── a worker that binds ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("ack_wait", "fits"), [(4.0, True), (5.0, True), (4.35, True), (6.0, False)])
async def test_a_worker_whose_leases_are_longer_than_its_queues_says_so_and_does_not_begin(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, ack_wait: float, fits: bool
) -> None:
    """It was not told that it may renew them too late, after a quarter of its own."""
    monkeypatch.setattr(service, "START_PATIENCE_S", 0.0)
    settings = WorkerSettings(ack_wait=ack_wait, device="cpu")
    made = service._Service({"edit": lambda settings, chosen: engines.Instant()}, settings)
    kept = topology.Topology(ack_wait=4.35 if ack_wait == 4.35 else 5.0)
    async with connected_bus(nats_server, kept) as connected:
        if fits:
            await made._wait_for_queues(connected)
            return
        with pytest.raises(errors.FatalError, match=r"is 6 s here and 5 s at the queue edit-interactive") as told:
            await made._wait_for_queues(connected)
    assert told.value.code == "topology_mismatch"
