"""Bodies that are too large are answered before they are read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from tests.gateways import Call, Gateway

CHUNK = b"\0" * (64 << 10)
MANY = 50 << 20
FORM = "multipart/form-data; boundary=x"
IMAGE_HEAD = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    opened = await Gateway.open(max_upload_bytes=1 << 20)
    async with opened.client:
        yield opened


async def endless(head: bytes = b"") -> AsyncIterator[bytes]:
    yield head
    for _ in range(MANY // len(CHUNK)):
        yield CHUNK


async def answered(call: Call) -> tuple[int, dict[str, str], dict[str, object], int]:
    """Status, headers and problem, and how many bytes had been read when the answer was out."""
    start, body = await call.next(), await call.next()
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, json.loads(body["body"]), body["read so far"]


@pytest.mark.parametrize("content_type", ["application/json", FORM])
async def test_a_declared_length_over_the_limit_is_answered_before_a_byte_is_read(
    gateway: Gateway, content_type: str
) -> None:
    headers = {"Content-Type": content_type, "Content-Length": str(MANY), "Expect": "100-continue"}
    call = Call(gateway.app, "POST", "/v1/jobs", headers)  # the body never comes
    status, sent, problem, received = await answered(call)
    assert (status, problem["code"], received) == (413, "too_large", 0)
    assert sent["connection"] == "close"
    assert sent["content-type"] == "application/problem+json"
    await call.leave()


@pytest.mark.parametrize(
    ("content_type", "head", "limit"),
    [("application/json", b"", 128 << 10), (FORM, IMAGE_HEAD, 1 << 20), (FORM, b"--x\r\n", 4 << 20)],
    ids=["json", "one image", "a form of something else"],
)
async def test_a_body_of_unknown_length_is_cut_at_the_limit(
    gateway: Gateway, content_type: str, head: bytes, limit: int
) -> None:
    headers = {"Content-Type": content_type, "Transfer-Encoding": "chunked"}
    call = Call(gateway.app, "POST", "/v1/jobs", headers, endless(head))
    status, sent, _, received = await answered(call)
    assert status in (400, 413)  # what cannot be a form is not read any further either
    assert received <= limit + 2 * len(CHUNK)
    assert sent["connection"] == "close"
    await call.ended()


async def test_an_image_over_its_own_limit_is_named_before_the_rest_is_read(gateway: Gateway) -> None:
    headers = {"Content-Type": FORM, "Content-Length": str(3 << 20)}
    call = Call(gateway.app, "POST", "/v1/jobs", headers, endless(IMAGE_HEAD))
    status, _, problem, received = await answered(call)
    assert status == 413
    assert [error["field"] for error in problem["errors"]] == ["image.0"]
    assert received < 2 << 20
    await call.ended()


async def test_a_body_that_a_route_does_not_want_ends_the_connection(gateway: Gateway) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": str(MANY)}
    call = Call(gateway.app, "POST", "/v1/nothing", headers, endless())
    status, sent, _, received = await answered(call)
    assert (status, sent["connection"], received) == (404, "close", 0)
    await call.ended()


async def test_a_request_that_is_read_to_its_end_keeps_the_connection(gateway: Gateway) -> None:
    answer = await gateway.client.post("/v1/jobs", json={})
    assert answer.status_code == 422
    assert "connection" not in answer.headers


async def test_a_client_that_leaves_in_the_middle_is_no_error(gateway: Gateway) -> None:
    headers = {"Content-Type": FORM, "Content-Length": "1000"}
    call = Call(gateway.app, "POST", "/v1/jobs", headers)
    await call.leave()
    assert call.sent.empty()
