"""What a file does to the decoder that reads it, it does to that process and to nobody else."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from tests import poison
from tests.gateways import BOUND, EDIT, KEY, Gateway, put
from tests.unit.gateway.test_intake import GOOD, Door

from gateway import decoder
from gateway.decoder import Decoder
from gateway.decoding import FEWEST, Decoders, Decoding
from vidgen import errors, images
from vidgen.contracts import JobStatus
from vidgen.testing import MemoryStore


def harmful() -> Decoder:
    return Decoder("tests.poison")


def image(folder: Path, colour: tuple[int, int, int] = (9, 9, 9), kind: str = "PNG") -> Path:
    path = folder / f"{colour}.{kind}"
    Image.new("RGB", (64, 48), colour).save(path, kind)
    return path


def process(of: Decoder) -> int:
    """The process's id."""
    assert of._child is not None
    peeked = of._child.end.peek()
    assert peeked is not None
    return int(peeked[2][0].pid)


def test_it_says_what_images_say(tmp_path: Path) -> None:
    own = Decoder()
    odd = image(tmp_path, kind="AVIF")
    plain = image(tmp_path)
    assert own.pixels(plain) == 64 * 48
    assert own.inspect(plain) == images.inspect(plain) == images.ImageFacts(64, 48, "PNG", normal=True)
    assert own.inspect(odd) == images.inspect(odd)
    made = tmp_path / "made.png"
    assert own.normalise(odd, made) == images.ImageFacts(64, 48, "PNG", normal=True)
    again = tmp_path / "again.png"
    images.normalise(odd, again)
    assert made.read_bytes() == again.read_bytes()


def test_it_refuses_as_images_do(tmp_path: Path) -> None:
    own = Decoder()
    broken = tmp_path / "broken"
    broken.write_bytes(image(tmp_path).read_bytes()[:-40])
    for work in (own.inspect, images.inspect):
        with pytest.raises(errors.RejectedError) as refused:
            work(broken)
        assert (refused.value.code, "send the whole file again" in refused.value.message) == ("truncated_image", True)
    with pytest.raises(FileNotFoundError):
        own.inspect(tmp_path / "none")


@pytest.mark.parametrize("colour", [poison.CRASHES, poison.ABORTS])
def test_an_image_that_ends_its_decoder_is_refused_and_the_next_is_decoded(
    tmp_path: Path, colour: tuple[int, int, int]
) -> None:
    own = harmful()
    for _ in range(2):
        with pytest.raises(errors.RejectedError) as refused:
            own.inspect(image(tmp_path, colour))
        assert refused.value.code == "unreadable_image"
        assert own.inspect(image(tmp_path)).normal


def test_a_decoder_that_somebody_else_ends_costs_nobody_an_image(tmp_path: Path) -> None:
    own = harmful()
    assert own.inspect(image(tmp_path, poison.ONCE)).normal
    os.kill(process(own), signal.SIGKILL)
    assert own.inspect(image(tmp_path)).normal


def test_an_image_that_takes_more_memory_than_there_may_be_is_refused_and_its_decoder_lives(tmp_path: Path) -> None:
    own = harmful()
    own.inspect(image(tmp_path))
    before = process(own)
    with pytest.raises(errors.RejectedError) as refused:
        own.inspect(image(tmp_path, poison.FILLS))
    assert refused.value.code == "image_too_complex"
    assert process(own) == before


def test_an_image_that_hangs_its_decoder_is_refused_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = harmful()
    own.inspect(image(tmp_path))
    hung = process(own)
    monkeypatch.setattr(decoder, "LIMIT_S", 0.3)
    with pytest.raises(errors.RejectedError) as refused:
        own.inspect(image(tmp_path, poison.HANGS))
    assert refused.value.code == "image_too_complex"
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)
    monkeypatch.undo()
    assert own.inspect(image(tmp_path)).normal


def test_a_decoder_that_does_not_start_is_no_fault_of_the_image(tmp_path: Path) -> None:
    with pytest.raises(errors.RetryableError) as failed:
        Decoder("tests.no_such_module").inspect(image(tmp_path))
    assert failed.value.code == "no_decoder"


def test_a_decoder_for_which_there_is_no_process_is_no_fault_of_the_image_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    own = Decoder()
    with monkeypatch.context() as patch:
        patch.setattr(decoder.subprocess, "Popen", full)
        with pytest.raises(errors.RetryableError, match="temporarily") as failed:
            own.inspect(image(tmp_path))
    assert failed.value.code == "no_decoder"
    assert own.inspect(image(tmp_path)).normal


def test_it_knows_nothing_that_is_worth_having(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that a file takes over has no keys to give away."""
    monkeypatch.setenv("VIDGEN_S3_SECRET_KEY", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    own = Decoder()
    own.inspect(image(tmp_path))
    found = Path(f"/proc/{process(own)}/environ").read_bytes()
    assert b"secret" not in found
    assert Path(f"/proc/{process(own)}/oom_score_adj").read_text().strip() == "1000"


async def test_it_leaves_with_the_gateway_and_not_before(tmp_path: Path) -> None:
    own = Decoder()
    own.inspect(image(tmp_path))
    known = process(own)
    os.kill(known, signal.SIGTERM)
    assert own.inspect(image(tmp_path)).normal
    assert process(own) == known
    del own
    until = time.monotonic() + BOUND
    while time.monotonic() < until:
        try:
            os.kill(known, 0)
        except ProcessLookupError:
            return
        await asyncio.sleep(0.01)
    pytest.fail("it is still there")


async def test_images_that_end_their_decoders_harm_no_others_beside_them(tmp_path: Path) -> None:
    decoding = Decoding(decoders=Decoders(harmful))
    good, bad = image(tmp_path), image(tmp_path, poison.CRASHES)
    asked = [decoding.over(bad if k % 4 == 0 else good, lambda own, path: own.inspect(path)) for k in range(16)]
    found = await asyncio.gather(*asked, return_exceptions=True)
    for k, one in enumerate(found):
        if k % 4 == 0:
            assert isinstance(one, errors.RejectedError)
            assert one.code == "unreadable_image"
        else:
            assert isinstance(one, images.ImageFacts)


async def test_a_form_with_an_image_that_ends_its_decoder_is_refused_by_its_field(tmp_path: Path) -> None:
    gateway = await Gateway.open(decoders=Decoders(harmful))
    bad, good = image(tmp_path, poison.CRASHES).read_bytes(), image(tmp_path).read_bytes()
    refused, taken = await asyncio.gather(
        gateway.post_form([good, bad], {"edit": EDIT}), gateway.post_form([good], {"edit": EDIT})
    )
    assert (refused.status_code, [error["field"] for error in refused.json()["errors"]]) == (422, ["image.1"])
    assert taken.status_code == 202


async def test_a_request_on_the_bus_whose_image_ends_its_decoder_is_turned_away_at_once(tmp_path: Path) -> None:
    """It ended each gateway that it was given to, one after another, as long as it had deliveries."""
    door = Door(MemoryStore(), decoders=Decoders(harmful))
    await put(door.store, KEY, image(tmp_path, poison.CRASHES).read_bytes())
    await put(door.store, "uploads/good.png", image(tmp_path).read_bytes())
    await door.publish(GOOD)
    await door.publish(GOOD | {"references": ["uploads/good.png"]})
    bad, good = await door.handle_one(), await door.handle_one()
    assert (bad.status, good.status) == (JobStatus.REJECTED, JobStatus.QUEUED)
    assert bad.error is not None
    assert [field.field for field in bad.error.fields] == ["references.0"]
    (letter,) = await door.letters()
    assert letter.job_id == bad.id


def test_the_fewest_are_there_before_anybody_waits_for_them(tmp_path: Path) -> None:
    decoders = Decoders()
    decoders.start()
    begun = [one for one in decoders._idle.queue if one._child is not None]
    assert len(begun) == FEWEST
    known = {process(one) for one in begun}
    assert decoders.use(lambda own: (own.inspect(image(tmp_path)).normal, process(own) in known)) == (True, True)
