"""Where webhooks may go: public addresses alone, whatever a name says a moment later, and only over trusted TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.receivers import BOUND_S, NAME, Certificate, Post, Receiver, make_certificate, status

from gateway import receivers, webhooks
from gateway.receivers import Allowed, Dns, Receivers, Resolver, public
from vidgen import errors
from vidgen.settings import GatewaySettings

LOOPBACK = Allowed.parse("127.0.0.0/8")
PRIVATE = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4",
    "240.0.0.0/4", "255.255.255.255/32",
)  # fmt: skip


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def resolving(*answers: list[str]) -> Resolver:
    """A name server that says something else each time it is asked, and then the last again."""
    left = list(answers)

    async def resolve(host: str, port: int) -> list[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


async def post(
    url: str, certificate: Certificate | None, allowed: Allowed = LOOPBACK, resolve: Resolver | None = None,
    timeout_s: float = 30.0,
) -> int:  # fmt: skip
    ca_file = certificate.file if certificate else None
    async with Receivers(allowed, timeout_s=timeout_s, ca_file=ca_file, resolve=resolve) as opened:
        return await opened.post(url, b"{}", {"content-type": "application/json"})


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def private_addresses(draw: st.DrawFn) -> ipaddress.IPv4Address:
    return draw(st.ip_addresses(network=draw(st.sampled_from(PRIVATE))))


def inside_ipv6(address: ipaddress.IPv4Address) -> list[ipaddress.IPv6Address]:
    """The ways in which an IPv6 address can mean an IPv4 address."""
    value = int(address)
    return [
        ipaddress.IPv6Address(0xFFFF << 32 | value),  # mapped
        ipaddress.IPv6Address(value),  # compatible, of old
        ipaddress.IPv6Address(0xFFFF << 48 | value),  # translated
        ipaddress.IPv6Address(0x64FF9B << 96 | value),  # NAT64
        ipaddress.IPv6Address(0x2002 << 112 | value << 80),  # 6to4
        ipaddress.IPv6Address(0x20010000 << 96 | value ^ 0xFFFFFFFF),  # Teredo
    ]


@given(private_addresses())
def test_no_private_address_is_public_in_any_of_its_forms(address: ipaddress.IPv4Address) -> None:
    assert [one for one in (address, *inside_ipv6(address)) if public(one)] == []


@pytest.mark.parametrize(
    "address",
    [
        "::", "::1", "fe80::1", "fc00::1", "fd12:3456::1", "fec0::1", "ff02::1", "2001:db8::1", "64:ff9b:1::1",
        "100::1", "3fff::1", "169.254.169.254", "192.0.0.192", "fd00:ec2::254",
    ],
)  # fmt: skip
def test_what_only_this_machine_or_network_knows_is_not_public(address: str) -> None:
    assert not public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert public(ipaddress.ip_address(address))


@given(st.ip_addresses())
def test_an_ipv6_form_is_as_public_as_the_address_that_it_means(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if isinstance(address, ipaddress.IPv4Address):
        mapped, _, _, nat64, six_to_four, _ = inside_ipv6(address)
        assert {public(mapped), public(nat64), public(six_to_four)} == {public(address)}
    else:
        assert not public(address) or address in ipaddress.ip_network("2000::/3") or address.ipv4_mapped or (
            address in ipaddress.ip_network("64:ff9b::/96")
        )  # fmt: skip


async def test_a_name_server_that_hangs_over_one_receiver_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()

    def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if host == "slow.example":
            hangs.wait(BOUND_S)
        return [(0, 0, 0, "", ("8.8.8.8", port))]

    monkeypatch.setattr(receivers, "getaddrinfo", getaddrinfo)
    dns, places = receivers.Dns(), GatewaySettings().webhook_concurrency // webhooks.SHARE
    # Those who gave up waiting still have their thread: a name is asked for again and again.
    slow = [asyncio.ensure_future(dns("slow.example", 443)) for _ in range(3 * places)]
    await asyncio.sleep(0)  # they are first
    try:
        async with asyncio.timeout(BOUND_S / 2):  # sooner than those who hang
            assert await dns("quick.example", 443) == ["8.8.8.8"]
    finally:
        hangs.set()
        await asyncio.gather(*slow)


# ── what an operator allows ──────────────────────────────────────────────────────────────────────────────────────


def test_the_operator_may_allow_networks_and_hosts() -> None:
    allowed = Allowed.parse("10.1.0.0/16, hooks.internal fd00::/8")

    allowed.check("a.example", [ipaddress.ip_address("10.1.2.3"), ipaddress.ip_address("fd00::1")])
    allowed.check("a.example", [ipaddress.ip_address("::ffff:10.1.2.3")])
    allowed.check("Hooks.Internal", [ipaddress.ip_address("127.0.0.1")])
    for address in ("10.2.0.1", "127.0.0.1", "::1"):
        with pytest.raises(errors.RejectedError) as caught:
            allowed.check("a.example", [ipaddress.ip_address("8.8.8.8"), ipaddress.ip_address(address)])
        assert caught.value.code == "webhook_refused"


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.0/99", "fd00::/8/8", "a:b"])
def test_a_network_that_is_none_is_told(text: str) -> None:
    with pytest.raises(errors.FatalError, match="VIDGEN_WEBHOOK_ALLOW") as caught:
        Allowed.parse(text)

    assert caught.value.code == "settings"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "localhost", "hooks.localhost", "10.0.0.1", "[::ffff:192.168.0.1]", "169.254.169.254"],
)
def test_a_url_that_names_such_an_address_is_refused_before_anything_is_asked(host: str) -> None:
    with pytest.raises(errors.RejectedError, match="VIDGEN_WEBHOOK_ALLOW"):
        Allowed().check_url(f"https://{host}/hook")


def test_a_url_that_names_a_public_address_or_any_name_is_looked_at_when_it_is_called() -> None:
    for host in ("8.8.8.8", "hooks.example.com", "[2606:4700::1111]"):
        Allowed().check_url(f"https://{host}/hook")


# ── connections ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_receiver_is_called_by_its_name_at_the_address_that_was_checked(certificate: Certificate) -> None:
    async with Receiver().listening(certificate) as receiver:
        url = f"https://{NAME}:{receiver.port}/hooks/vidgen"
        assert await post(url, certificate, resolve=resolving(["127.0.0.1"])) == 204

        got = await receiver.next()
    assert got.target == "/hooks/vidgen"
    assert got.headers["host"] == f"{NAME}:{receiver.port}"
    assert got.body == b"{}"


@pytest.mark.parametrize("numeric", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "127.0.0.1"])
async def test_loopback_in_whatever_spelling_is_refused(certificate: Certificate, numeric: str) -> None:
    async with Receiver().listening(certificate) as receiver:
        with pytest.raises(errors.RejectedError):
            await post(receiver.url(numeric), certificate, allowed=Allowed())

        assert receiver.connections == 0


async def test_one_private_address_among_public_ones_is_enough_to_refuse_a_name(certificate: Certificate) -> None:
    async with Receiver().listening(certificate) as receiver:
        with pytest.raises(errors.RejectedError):
            await post(receiver.url(NAME), certificate, Allowed(), resolving(["8.8.8.8", "127.0.0.1"]))

        assert receiver.connections == 0


async def test_a_name_that_points_elsewhere_a_moment_later_is_asked_once(certificate: Certificate) -> None:
    """DNS rebinding: allowed when it was looked at, private when it would be looked at again."""
    asked = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    allowed = Allowed.parse("127.0.0.1/32")
    async with Receiver().listening(certificate) as receiver:
        async with Receivers(allowed, timeout_s=30, ca_file=certificate.file, resolve=rebinding) as receivers:
            assert await receivers.post(receiver.url(NAME), b"{}", {}) == 204
            assert asked == [NAME]
            with pytest.raises(errors.RejectedError):
                await receivers.post(receiver.url(NAME), b"{}", {})

        assert (asked, receiver.connections) == ([NAME, NAME], 1)


async def test_a_redirect_is_not_followed(certificate: Certificate) -> None:
    async with Receiver().listening(certificate) as inside:

        async def elsewhere(post: Post) -> bytes:
            return status(307, f"location: {inside.url()}")

        async with Receiver(elsewhere).listening(certificate) as receiver:
            assert await post(receiver.url(), certificate) == 307

        assert inside.connections == 0


async def test_a_receiver_that_is_slow_is_left(certificate: Certificate) -> None:
    never = asyncio.Event()

    async def hang(post: Post) -> bytes:
        await never.wait()
        return b""

    async with Receiver(hang).listening(certificate) as receiver:
        with pytest.raises(errors.RetryableError, match="did not answer within"):
            await post(receiver.url(), certificate, timeout_s=0.3)
        never.set()


async def test_an_answer_without_an_end_is_not_read(certificate: Certificate) -> None:
    async def endless(post: Post) -> bytes:
        return b"HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\n" + b"x" * 100_000

    async with Receiver(endless).listening(certificate) as receiver:
        assert await post(receiver.url(), certificate) == 200


async def test_headers_without_an_end_are_not_read(certificate: Certificate) -> None:
    async def endless(post: Post) -> bytes:
        return b"HTTP/1.1 200 OK\r\n" + b"x-a: b\r\n" * 100_000

    async with Receiver(endless).listening(certificate) as receiver:
        with pytest.raises(errors.RetryableError, match="cannot be reached"):
            await post(receiver.url(), certificate)


async def test_what_is_no_http_is_told_as_such(certificate: Certificate) -> None:
    async def rude(post: Post) -> bytes:
        return b"go away\r\n\r\n"

    async with Receiver(rude).listening(certificate) as receiver:
        with pytest.raises(errors.RetryableError, match="RemoteProtocolError"):
            await post(receiver.url(), certificate)


async def test_a_certificate_that_nobody_vouches_for_is_not_trusted(certificate: Certificate) -> None:
    async with Receiver().listening(certificate) as receiver:
        with pytest.raises(errors.RetryableError, match="certificate"):
            await post(receiver.url(), None)

        assert receiver.posts.empty()


async def test_a_certificate_for_another_name_is_not_trusted(certificate: Certificate) -> None:
    async with Receiver().listening(certificate) as receiver:
        with pytest.raises(errors.RetryableError, match="certificate"):
            await post(receiver.url("other.example.test"), certificate, resolve=resolving(["127.0.0.1"]))

        assert receiver.posts.empty()


async def test_a_name_without_an_address_and_a_port_where_nobody_listens_are_faults_that_pass(
    certificate: Certificate,
) -> None:
    async with Receiver().listening(certificate) as receiver:
        url = receiver.url()
    with pytest.raises(errors.RetryableError):
        await post(url, certificate)
    with pytest.raises(errors.RetryableError):
        await post("https://nowhere.invalid/hook", certificate, resolve=resolving([]))


@pytest.mark.parametrize(("before", "reached"), [(2, True), (3, False)])
async def test_a_few_of_the_addresses_of_a_name_are_tried(certificate: Certificate, before: int, reached: bool) -> None:
    addresses = [*(f"127.0.0.{number + 2}" for number in range(before)), "127.0.0.1"]
    async with Receiver().listening(certificate) as receiver:
        with contextlib.nullcontext() if reached else pytest.raises(errors.RetryableError):
            await post(receiver.url(NAME), certificate, resolve=resolving(addresses))

        assert receiver.connections == reached


async def test_a_name_that_no_resolver_can_be_asked_for_is_a_fault_that_passes(certificate: Certificate) -> None:
    with pytest.raises(errors.RetryableError, match="cannot be reached"):
        await post(f"https://{'a' * 64}.example/hook", certificate, resolve=Dns())


async def test_a_proxy_of_the_environment_is_not_asked(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Receiver().listening(certificate) as proxy, Receiver().listening(certificate) as receiver:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert await post(receiver.url(), certificate) == 204

        assert proxy.connections == 0


def test_authorities_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("none")

    with pytest.raises(errors.FatalError, match="VIDGEN_WEBHOOK_CA_FILE"):
        Receivers(LOOPBACK, timeout_s=1, ca_file=tmp_path / "ca.pem")
