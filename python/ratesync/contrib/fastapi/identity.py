"""Who a request comes from: the client's address behind proxies, and identifiers as limiter keys.

Everything in a header may be written by an attacker, the left end of X-Forwarded-For first of all. So
the list is walked from the right, where our own proxies append, and only as long as the address at
hand is one of theirs. No header content raises.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ratesync import get_fastapi_config
from ratesync.errors import ConfigValidationError

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection, Request

__all__ = [
    "DEFAULT_TRUSTED_PROXY_NETWORKS",
    "IdentifierExtractor",
    "get_client_ip",
    "is_private_ip",
    "parse_networks",
    "safe_key",
    "validate_ip",
]

IdentifierExtractor = Callable[["Request"], str | Awaitable[str]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_TRUSTED_PROXY_NETWORKS = (
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "127.0.0.0/8",
    "::1/128",
    "fc00::/7",
)
UNKNOWN = "unknown"

_MAX_HOPS = 32  # proxies in a row that are looked through
_MAX_GROUP = 255  # characters of limiter id and key together, as the store counts them


def validate_ip(ip: str) -> str | None:
    """`ip` in its normal form, or None when it is not an address.

    Takes what proxies write: surrounding space and quotes, a port (`192.0.2.1:443`,
    `[2001:db8::1]:443`) and a zone (`fe80::1%eth0`), which are dropped. An IPv4 address mapped into
    IPv6 becomes that IPv4 address.

    Example:
        >>> validate_ip(" [2001:DB8::1]:443 "), validate_ip("::ffff:192.0.2.1"), validate_ip("1.2.3")
        ('2001:db8::1', '192.0.2.1', None)
    """
    address = _parse(ip)
    return None if address is None else str(address)


def is_private_ip(ip: str) -> bool:
    """Whether `ip` is an address that is private, loopback or reserved; False when it is no address.

    Example:
        >>> is_private_ip("10.1.2.3"), is_private_ip("9.9.9.9"), is_private_ip("nonsense")
        (True, False, False)
    """
    address = _parse(ip)
    return address is not None and (address.is_private or address.is_loopback or address.is_reserved)


def get_client_ip(request: HTTPConnection, trusted_proxies: Sequence[str] | None = None) -> str:
    """The address of the client, as far as it can be trusted; `"unknown"` when there is none.

    The peer of the connection counts unless it is a trusted proxy. Then X-Forwarded-For (all header
    lines together) is walked from the right past further trusted proxies, up to the first address that
    is none; where an entry is not an address, the proxy that wrote it counts. Without X-Forwarded-For
    it is X-Real-IP when valid, else the peer. `Forwarded` (RFC 7239) is not read: a proxy that does not
    know it passes on what the client wrote.

    Args:
        request: the request, or any connection with `client` and `headers`.
        trusted_proxies: networks or addresses of proxies. None: those of `[fastapi]
            trusted_proxy_networks` or `configure_fastapi()`, else `DEFAULT_TRUSTED_PROXY_NETWORKS`.

    Raises:
        ConfigValidationError: `trusted_proxies` holds something that is not a network.
    """
    client = request.client
    peer = _parse(client.host) if client is not None else None
    if peer is None:
        return UNKNOWN
    if trusted_proxies is None:
        trusted_proxies = get_fastapi_config().trusted_proxy_networks
    networks = parse_networks(
        DEFAULT_TRUSTED_PROXY_NETWORKS if trusted_proxies is None else tuple(trusted_proxies)
    )
    if not _trusted(peer, networks):
        return str(peer)
    lines = request.headers.getlist("x-forwarded-for")
    if not lines:
        real = _parse(request.headers.get("x-real-ip", ""))
        return str(real or peer)
    nearest = peer
    for entry in reversed(",".join(lines).rsplit(",", _MAX_HOPS)[-_MAX_HOPS:]):
        if not entry.strip():
            continue  # RFC 9110: empty elements of a list mean nothing
        address = _parse(entry)
        if address is None:
            break
        nearest = address
        if not _trusted(address, networks):
            break
    return str(nearest)


@functools.lru_cache(maxsize=64)
def parse_networks(networks: tuple[str, ...]) -> tuple[Network, ...]:
    """The networks as objects; ConfigValidationError for one that is none."""
    parsed = []
    for network in networks:
        try:
            if not isinstance(network, str):  # ip_network(5) would be 0.0.0.5/32
                raise ValueError
            parsed.append(ipaddress.ip_network(network, strict=False))
        except ValueError:
            raise ConfigValidationError(
                "trusted_proxies is not valid",
                "trusted_proxies",
                'networks such as "10.0.0.0/8"',
                repr(network)[:80],
            ) from None
    return tuple(parsed)


def safe_key(limiter_id: str, identifier: object) -> str:
    """`identifier` as a key of the limiter: itself, or a digest when it is too long or not storable.

    A key that the limiter refuses would be an error, and an error may let a request pass: whoever can
    choose the identifier must not be able to cause one.
    """
    text = identifier if isinstance(identifier, str) else "" if identifier is None else str(identifier)
    if not text:
        return UNKNOWN
    room = _MAX_GROUP - len(limiter_id) - 1
    length = len(text) + text.count(":") + text.count("\\")  # these are escaped
    if length <= room and "\0" not in text and _encodable(text):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[: max(1, room)]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(text: object) -> Address | None:
    if not isinstance(text, str):
        return None
    text = text.strip().strip('"').strip()
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not _is_port(port)):
            return None
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not _is_port(":" + port):
            return None
    if len(text) > 100:
        return None
    try:
        address = ipaddress.ip_address(text.partition("%")[0] if ":" in text else text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_port(text: str) -> bool:
    return text.startswith(":") and text[1:].isascii() and text[1:].isdigit() and len(text) <= 6


def _trusted(address: Address, networks: Iterable[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)
