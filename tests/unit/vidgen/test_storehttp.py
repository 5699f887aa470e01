"""The store's HTTP, against a server that answers what it is told to, byte for byte."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.certificates import signed_by_itself
from urllib3 import exceptions

from vidgen.storehttp import Pool

OK = b"HTTP/1.1 200 OK\r\n"


class Server:
    """Gives the next of `answers` to each request; None: it closes instead. `heads` is what was asked."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.answers: list[bytes | None] = []
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._listening.getsockname()[1]}/bucket/key"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        if self._tls is not None:
            try:
                connection = self._tls.wrap_socket(connection, server_side=True)
            except OSError:  # turned away
                return
        with connection, connection.makefile("rb") as reader:
            while line := reader.readline():
                head = line
                while (line := reader.readline()) not in (b"\r\n", b""):
                    head += line
                length = next(
                    (int(one.split(b":")[1]) for one in head.splitlines() if one.lower().startswith(b"content-length")),
                    0,
                )
                self.bodies.append(reader.read(length))
                self.heads.append(head)
                answer = self.answers.pop(0)
                if answer is None:
                    return
                connection.sendall(answer)
                if b"Connection: close" in answer or (b"Content-Length" not in answer and b"chunked" not in answer):
                    return


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(connect_s=2, read_s=0.3, kept=4)
    yield pool
    pool.clear()


def test_a_connection_is_used_again(server: Server, pool: Pool) -> None:
    server.answers = [OK + b"Content-Length: 3\r\nETag: x\r\n\r\none", OK + b"Content-Length: 3\r\n\r\ntwo"]

    first = pool.urlopen("GET", server.url)
    second = pool.urlopen("GET", server.url + "?a=b")

    assert (first.status, first.data, first.headers["etag"]) == (200, b"one", "x")
    assert second.data == b"two"
    assert server.heads[1].startswith(b"GET /bucket/key?a=b HTTP/1.1\r\n")
    assert server.connections == 1


def test_a_body_goes_out_whole_and_one_without_bytes_says_so(server: Server, pool: Pool) -> None:
    server.answers = [OK + b"Content-Length: 0\r\n\r\n"] * 3
    large = b"0123456789" * 100_000

    pool.urlopen("PUT", server.url, body=large, headers={"Content-Length": str(len(large))})
    pool.urlopen("PUT", server.url, body=b"small", headers={"Content-Length": "5"})
    pool.urlopen("PUT", server.url, body=b"")

    assert server.bodies == [large, b"small", b""]
    assert b"Content-Length: 0" in server.heads[2]


def test_an_answer_in_pieces_of_any_kind_is_read_whole(server: Server, pool: Pool) -> None:
    server.answers = [
        OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\none\r\n4\r\nfour\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok",
        OK + b"\r\nuntil it closes",
    ]

    assert pool.urlopen("GET", server.url).data == b"onefour"
    assert pool.urlopen("GET", server.url).data == b"ok"
    assert pool.urlopen("GET", server.url).data == b"until it closes"


def test_a_head_has_no_body_whatever_length_it_tells(server: Server, pool: Pool) -> None:
    server.answers = [OK + b"Content-Length: 5000\r\n\r\n", OK + b"Content-Length: 2\r\n\r\nok"]

    assert pool.urlopen("HEAD", server.url).headers["content-length"] == "5000"
    assert pool.urlopen("GET", server.url).data == b"ok"
    assert server.connections == 1


def test_what_is_read_in_parts_is_all_there_and_frees_the_connection_at_its_end(server: Server, pool: Pool) -> None:
    body = bytes(range(256)) * 4000
    server.answers = [OK + b"Content-Length: %d\r\n\r\n" % len(body) + body, OK + b"Content-Length: 2\r\n\r\nok"]

    answer = pool.urlopen("GET", server.url, preload_content=False)
    parts = list(answer.stream(100_000))

    assert b"".join(parts) == body
    assert {len(part) for part in parts[:-1]} == {100_000}
    assert pool.urlopen("GET", server.url).data == b"ok"
    assert server.connections == 1


def test_an_answer_that_was_not_read_to_its_end_takes_its_connection_along(server: Server, pool: Pool) -> None:
    server.answers = [OK + b"Content-Length: 1000000\r\n\r\nabc", OK + b"Content-Length: 2\r\n\r\nok"]

    answer = pool.urlopen("GET", server.url, preload_content=False)
    answer.close()

    assert pool.urlopen("GET", server.url).data == b"ok"
    assert server.connections == 2


def test_a_connection_that_the_server_closed_is_not_used_again(server: Server, pool: Pool) -> None:
    server.answers = [OK + b"Connection: close\r\nContent-Length: 1\r\n\r\na", OK + b"Content-Length: 1\r\n\r\nb"]

    assert pool.urlopen("GET", server.url).data == b"a"
    assert pool.urlopen("GET", server.url).data == b"b"
    assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        None,
        OK + b"Content-Length: 10\r\nConnection: close\r\n\r\nshort",
        b"this is no HTTP\r\nConnection: close\r\n\r\n",
        OK + b"Content-Length: 10\r\n\r\nshort",
        OK + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nab",
    ],
    ids=["closed", "cut short", "not HTTP", "silent in the middle", "cut short in a chunk"],
)
def test_what_is_no_whole_answer_is_none(server: Server, pool: Pool, answer: bytes | None) -> None:
    server.answers = [answer, OK + b"Content-Length: 2\r\n\r\nok"]

    with pytest.raises(exceptions.HTTPError):
        pool.urlopen("GET", server.url)

    assert pool.urlopen("GET", server.url).data == b"ok"


def test_nobody_there_is_an_error_of_the_network(pool: Pool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    with pytest.raises(exceptions.HTTPError):
        pool.urlopen("GET", f"http://127.0.0.1:{port}/")


def test_a_line_break_in_a_header_is_not_sent(server: Server, pool: Pool) -> None:
    with pytest.raises(exceptions.HTTPError):
        pool.urlopen("GET", server.url, headers={"X-A": "b\r\nX-C: d"})

    assert server.connections == 0


@pytest.mark.parametrize("known", [True, False], ids=["an authority that is known", "one that nobody knows"])
def test_over_tls_only_a_server_whose_authority_is_known_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    certificate = signed_by_itself(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate.file, certificate.key)
    if known:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    server, pool = Server(tls), Pool(connect_s=2, read_s=5, kept=4)
    server.answers = [OK + b"Content-Length: 3\r\n\r\none", OK + b"Content-Length: 3\r\n\r\ntwo"]

    if known:
        assert pool.urlopen("GET", server.url).data == b"one"
        assert pool.urlopen("GET", server.url).data == b"two"
        assert server.connections == 1
    else:
        with pytest.raises(exceptions.HTTPError):
            pool.urlopen("GET", server.url)
        assert server.heads == []
    pool.clear()
    server.close()
