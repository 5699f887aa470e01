"""Where webhooks go: public addresses alone, each looked at in the moment of connecting, over TLS, without detours.

A name is resolved once per connection, every address that it has is checked, and the connection goes to one of these
very addresses: a name that points elsewhere a moment later changes nothing. Redirects are not followed, proxies of the
environment are not asked, no connection is used twice.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from socket import SOCK_STREAM, gaierror, getaddrinfo
from typing import Any
from urllib.parse import urlsplit

import certifi
import httpcore

from vidgen import errors

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Awaitable[list[str]]]

PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
# What `is_global` takes for the internet's before Python 3.11.10, or still: a cloud's metadata is at 192.0.0.192.
SPECIAL = (ipaddress.IPv4Network("192.0.0.0/24"), ipaddress.IPv6Network("3fff::/20"))
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
RESOLVERS = 64  # threads, made as they are needed: a name server that hangs must not take those that others need
ADDRESSES_TRIED = 3


def embedded(address: Address) -> Address:
    """The address that is meant: IPv4 within IPv6 (mapped, NAT64, 6to4) is what the packets reach in the end."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def public(address: Address) -> bool:
    """Whether an address is one of the internet's, and of nobody's own network, machine or link."""
    meant = embedded(address)
    if isinstance(meant, ipaddress.IPv6Address) and meant not in PUBLIC_IPV6:
        return False
    if any(meant in network for network in SPECIAL):
        return False
    return meant.is_global and not meant.is_multicast and not meant.is_reserved


@dataclass(frozen=True)
class Allowed:
    """Which receivers there may be: public addresses, and what the operator allows beside them."""

    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Allowed:
        """From a list of networks and host names; raises FatalError `settings`."""
        networks, hosts = [], set()
        for part in text.replace(",", " ").split():
            try:
                networks.append(ipaddress.ip_network(part))
            except ValueError as exc:
                if "/" in part or ":" in part:
                    message = f"VIDGEN_WEBHOOK_ALLOW: {part} is neither a network nor a host name"
                    raise errors.FatalError(message, code="settings") from exc
                hosts.add(part.lower())
        return cls(tuple(networks), frozenset(hosts))

    def check_url(self, url: str) -> None:
        """Refuse what no resolver is needed for; raises RejectedError."""
        host = urlsplit(url).hostname or ""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            if host == "localhost" or host.endswith(".localhost"):
                self.check(host, (ipaddress.IPv4Address("127.0.0.1"),))
            return
        self.check(host, (address,))

    def check(self, host: str, addresses: Iterable[Address]) -> None:
        """RejectedError unless every address may be connected to: one that may not taints the name."""
        if host.lower() not in self.hosts and not all(map(self._allows, addresses)):
            raise errors.RejectedError(
                "the receiver is not on the public internet: name one that is, or have VIDGEN_WEBHOOK_ALLOW name it",
                code="webhook_refused",
            )

    def _allows(self, address: Address) -> bool:
        meant = embedded(address)
        return public(address) or any(meant in network for network in self.networks)


class Dns:
    """The system's resolver, in threads of its own."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVERS, "webhook-dns")

    async def __call__(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, lambda: getaddrinfo(host, port, type=SOCK_STREAM))
        return [str(entry[4][0]) for entry in found]


class _Checked(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked, whatever their name says; TLS still asks for the name."""

    def __init__(self, allowed: Allowed, resolve: Resolver) -> None:
        self._allowed, self._resolve = allowed, resolve
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        try:
            found = [ipaddress.ip_address(one.partition("%")[0]) for one in await self._resolve(host, port)]
        except (gaierror, UnicodeError) as exc:
            raise httpcore.ConnectError("the name has no address") from exc
        self._allowed.check(host, found)
        failed: Exception = httpcore.ConnectError("the name has no address")
        for address in found[:ADDRESSES_TRIED]:
            try:
                return await self._network.connect_tcp(str(address), port, *args, **options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failed = exc
        raise failed


class Receivers:
    """Posts to receivers; use it as an async context manager."""

    def __init__(
        self, allowed: Allowed, *, timeout_s: float, ca_file: Path | None = None, resolve: Resolver | None = None
    ) -> None:
        """`ca_file` takes the place of the public certificate authorities; raises FatalError `settings`."""
        self.allowed, self._timeout_s = allowed, timeout_s
        try:
            tls = ssl.create_default_context(cafile=str(ca_file or certifi.where()))
        except OSError as exc:  # an SSLError is one
            message = f"VIDGEN_WEBHOOK_CA_FILE: {ca_file} holds no certificates that can be read"
            raise errors.FatalError(message, code="settings") from exc
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls, max_connections=None, max_keepalive_connections=0,
            network_backend=_Checked(allowed, resolve or Dns()),
        )  # fmt: skip

    async def __aenter__(self) -> Receivers:
        await self._pool.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._pool.__aexit__(*exc)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """The status of the answer, whose body is not read.

        Raises RejectedError `webhook_refused` where this receiver may not be, RetryableError where none answers.
        """
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._pool.stream("POST", url, headers=list(headers.items()), content=body) as answer,
            ):
                return int(answer.status)
        except (httpcore.TimeoutException, TimeoutError) as exc:
            message = f"the receiver did not answer within {self._timeout_s:g} s"
            raise errors.RetryableError(message, code="webhook_failed") from exc
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as exc:
            message = f"the receiver cannot be reached: {_reason(exc)}"
            raise errors.RetryableError(message, code="webhook_failed") from exc


def _reason(exc: BaseException) -> str:
    """What went wrong, without a word of the receiver's."""
    while exc.__cause__ is not None or exc.__context__ is not None:
        if isinstance(exc, ssl.SSLCertVerificationError):
            break
        exc = exc.__cause__ or exc.__context__ or exc
    if isinstance(exc, ssl.SSLCertVerificationError):
        return "its certificate is not one that is trusted here"
    return type(exc).__name__
