"""Images are decoded so many pixels at a time, whoever sends them, by turns of tenants and in the order of each."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from tests.gateways import BOUND, DECODERS, EDIT, KEY, Gateway, picture, put

from gateway.decoder import Decoder
from gateway.decoding import Decoding
from gateway.line import Line
from vidgen import contracts, errors, images
from vidgen.testing import MemoryStore

MOST = 10_000
PEAK_MB = 900  # of one process, the largest image that there may be in the largest form that it may have


class Desk:
    """Where images are worked on, for as long as nobody says that they are done."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.decoding = folder, Decoding(MOST, DECODERS)
        self.lock, self.go_on = threading.Lock(), threading.Event()
        self.now: list[str] = []
        self.begun: list[str] = []
        started, first = threading.Barrier(DECODERS.count), self.image("first", 1600)

        def start(decoder: Decoder) -> None:  # whose process is slow to start would be passed by
            decoder.pixels(first)
            started.wait(BOUND)

        with ThreadPoolExecutor(DECODERS.count) as threads:
            list(threads.map(DECODERS.use, [start] * DECODERS.count))

    def image(self, name: str, pixels: int) -> Path:
        path = self.folder / name
        Image.new("RGB", (100, pixels // 100)).save(path, "PNG")
        return path

    def work(self, decoder: Decoder, path: Path) -> str:
        with self.lock:
            self.now.append(path.name)
            self.begun.append(path.name)
        self.go_on.wait(BOUND)
        with self.lock:
            self.now.remove(path.name)
        return path.name

    def ask(self, path: Path, tenant: str = "default") -> asyncio.Task[str]:
        return asyncio.create_task(self.decoding.over(path, self.work, tenant))

    async def until(self, *names: str) -> None:
        async with asyncio.timeout(BOUND):
            while sorted(self.now) != sorted(names):
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert sorted(self.now) == sorted(names)


async def test_as_many_are_decoded_at_once_as_have_the_pixels_of_the_largest(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    asked = []
    for name, pixels in (("a", 4000), ("b", 4000), ("c", 4000), ("d", 1600)):
        asked.append(desk.ask(desk.image(name, pixels)))
        await asyncio.sleep(0.02)
    await desk.until("a", "b")  # d would fit, but c was there before
    desk.go_on.set()
    assert await asyncio.gather(*asked) == ["a", "b", "c", "d"]
    assert desk.begun[2:] == ["c", "d"]
    assert desk.decoding._pixels.left == MOST


async def test_nobody_waits_behind_all_the_images_of_another_tenant(tmp_path: Path) -> None:
    """Six forms of less than 3 MB each, with images that take long, kept another tenant's small one for 23 s."""
    desk = Desk(tmp_path)
    asked = [desk.ask(desk.image(f"acme-{number}", MOST), "acme") for number in range(5)]
    await desk.until("acme-0")
    for tenant in ("other", "third"):
        asked.append(desk.ask(desk.image(tenant, 1600), tenant))
    await desk.until("acme-0")
    desk.go_on.set()
    await asyncio.gather(*asked)
    assert set(desk.begun[:4]) == {"acme-0", "acme-1", "other", "third"}
    assert desk.begun[4:] == ["acme-2", "acme-3", "acme-4"]


async def test_nor_behind_all_its_requests_whose_references_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.intake.FILES", 1)
    store, inspect, begun, go_on = MemoryStore(), Decoder.inspect, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(decoder: Decoder, path: Path) -> images.ImageFacts:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(BOUND)
        return inspect(decoder, path)

    monkeypatch.setattr(Decoder, "inspect", slow)
    gateway, done = await Gateway.open(store=store), []

    async def submit(tenant: str, number: int) -> None:
        key = f"uploads/{tenant}/{number}.png"
        await put(store, key, picture())
        request = contracts.VideoRequest(references=(key,), edit=EDIT)
        await gateway.parts.intake.submit(request, f"{tenant}-{number}", tenant, fresh=True)
        done.append(tenant)

    asked = [asyncio.create_task(submit("acme", number)) for number in range(4)]
    await begun.wait()
    asked.append(asyncio.create_task(submit("other", 0)))
    async with asyncio.timeout(BOUND):
        while "other" not in gateway.parts.intake._files._waiting:
            await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(*asked)
    assert "other" in done[:3]


async def test_one_that_is_larger_than_all_the_room_has_it_alone(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    large = desk.ask(desk.image("large", 2 * MOST))
    await desk.until("large")
    small = desk.ask(desk.image("small", 1600))
    await desk.until("large")
    desk.go_on.set()
    assert await asyncio.gather(large, small) == ["large", "small"]


async def test_who_leaves_or_fails_gives_the_room_back(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    (tmp_path / "none").write_bytes(b"no image at all")
    with pytest.raises(errors.RejectedError):
        await desk.ask(tmp_path / "none")

    def fails(decoder: Decoder, path: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await desk.decoding.over(desk.image("a", MOST), fails)
    first, waits, last = (desk.ask(desk.image(name, MOST)) for name in ("first", "waits", "last"))
    await asyncio.sleep(0.05)
    waits.cancel()
    desk.go_on.set()
    assert (await asyncio.gather(first, waits, last, return_exceptions=True))[0::2] == ["first", "last"]
    assert waits.cancelled()
    assert desk.decoding._pixels.left == MOST


async def test_a_disk_that_fails_is_told_as_a_passing_fault(tmp_path: Path) -> None:
    decoding, odd = Decoding(decoders=DECODERS), tmp_path / "odd"
    odd.write_bytes(picture("AVIF"))
    with pytest.raises(errors.StoreError) as told:
        await decoding.over(odd, lambda decoder, path: decoder.normalise(path, tmp_path / "no folder" / "made.png"))
    assert told.value.code == "local_file"
    made = await decoding.over(odd, lambda decoder, path: decoder.normalise(path, tmp_path / "made.png"))
    assert made.normal


async def test_requests_and_forms_share_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    store, now, most, inspect = MemoryStore(), 0, 0, Decoder.inspect
    lock = threading.Lock()

    def counted(decoder: Decoder, path: Path) -> images.ImageFacts:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        try:
            threading.Event().wait(0.02)
            return inspect(decoder, path)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(Decoder, "inspect", counted)
    keys = [KEY.replace("photo", f"photo-{number}") for number in range(4)]
    for key in keys:
        await put(store, key, picture())
    gateway = await Gateway.open(store=store)
    gateway.parts.intake.decoding._pixels = Line(64 * 48)
    answers = await asyncio.gather(
        *(gateway.client.post("/v1/jobs", json={"references": [key], "edit": EDIT}) for key in keys),
        *(gateway.post_form([picture()], {"edit": EDIT}) for _ in range(2)),
    )
    assert {answer.status_code for answer in answers} == {202}
    assert most == 1


@pytest.mark.parametrize(("kind", "mode"), [("WEBP", "RGBA"), ("PNG", "I;16")])
def test_the_largest_image_that_there_may_be_takes_no_more_memory_than_a_gateway_is_given(
    tmp_path: Path, kind: str, mode: str
) -> None:
    """A file of 130 KB took 1 GB, which was all that a gateway has in Kubernetes: it was killed, and again."""
    path = tmp_path / "large"
    Image.new(mode, (7000, 7000)).save(path, kind, **({"method": 0} if kind == "WEBP" else {"compress_level": 1}))
    code = (
        "import sys; from pathlib import Path; from vidgen import images; "
        "images.inspect(Path(sys.argv[1])); images.normalise(Path(sys.argv[1]), Path(sys.argv[2])); "
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "plain.png")], env=env, check=True, capture_output=True
    )
    assert int(done.stdout) >> 10 < PEAK_MB
