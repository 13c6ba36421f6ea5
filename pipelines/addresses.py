"""Restricts fetching to the public web on its usual ports; internal addresses are refused.

A URL is judged before it is fetched (`refuse`), and so is each address that its host resolves to
(`inside`, called on the very address that is connected to).
"""

from __future__ import annotations

import ipaddress
import socket
import string
from urllib.parse import quote, urlsplit

from pipelines.images import Rejected

IP = ipaddress.IPv4Address | ipaddress.IPv6Address

# Names that are always internal: this machine, a local network, a cloud's metadata.
_INSIDE_NAMES = ("localhost", "local", "internal", "home.arpa")
_SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "100.64.0.0/10",  # behind carriers' NAT; Alibaba's metadata is in it
        "192.0.0.0/24",  # IETF protocols; Oracle's old metadata is in it
        "192.88.99.0/24",  # formerly 6to4 relays
        "168.63.129.16/32",  # in a public range, but Azure's own endpoint on every machine
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # all else is local, reserved, or wraps an IPv4
_SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "3fff::/20")  # tunnels and tests; documentation
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

_WEB_PORTS = (80, 443)
_LOWEST_OPEN_PORT = 1024
_NO_WEB_PORTS = frozenset(  # above it, ports that browsers refuse: NFS, X11, SIP, IRC and the like
    {1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, 6679, 6697, 10080}
    | set(range(6665, 6670))
)


def refuse(url: str, *, allow_loopback: bool = False) -> Rejected | None:
    """Why a URL must not be fetched: its scheme, its port, or an internal host; None if it may.

    Looks at the URL only: a public name may still resolve to an internal address.
    """
    try:
        parts = urlsplit(wire_url(url))
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:  # UnicodeError, of a host name, is one
        return Rejected("bad url", str(error)[:200], "annotations")
    if parts.scheme not in ("http", "https"):
        return Rejected("unsupported scheme", parts.scheme, "annotations")
    if not host:
        return Rejected("bad url", "no host", "annotations")
    if "@" in parts.netloc or "\\" in parts.netloc:  # parsers disagree on where the host begins
        return Rejected("bad url", "user name or backslash in the host", "annotations")
    address = _literal(host)
    if (address and is_loopback(address)) or host == "localhost" or host.endswith(".localhost"):
        return None if allow_loopback else Rejected("private address", host, "annotations")
    if (address and inside(address)) or _is_inside_name(host):
        return Rejected("private address", host, "annotations")
    if port is not None and blocked_port(port):
        return Rejected("blocked port", str(port), "annotations")
    return None


def wire_url(url: str) -> str:
    """The URL as HTTP wants it: international names and letters encoded, the rest untouched."""
    if url.isascii() and url.isprintable() and " " not in url:
        return url
    scheme, slashes, rest = url.partition("://")
    netloc, slash, path = rest.partition("/")
    if not netloc.isascii():
        netloc = netloc.encode("idna").decode()
    return f"{scheme}{slashes}{netloc}{slash}{quote(path, safe=string.punctuation)}"


def inside(address: IP) -> bool:
    """Whether an address is not public; an IPv4 address wrapped in IPv6 is judged as such."""
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = address.ipv4_mapped or address.sixtofour
        if wrapped is None and address in _NAT64:
            wrapped = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if wrapped is not None:
            return inside(wrapped)
        return address not in _GLOBAL_V6 or any(address in network for network in _SPECIAL_V6)
    public = address.is_global and not address.is_multicast and not address.is_reserved
    return not public or any(address in network for network in _SPECIAL_V4)


def is_loopback(address: IP) -> bool:
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def blocked_port(port: int) -> bool:
    """Whether a port may not be fetched from: 80, 443, and most from 1024 up are open."""
    if port < _LOWEST_OPEN_PORT:
        return port not in _WEB_PORTS
    return port in _NO_WEB_PORTS


def _is_inside_name(host: str) -> bool:
    return any(host == name or host.endswith(f".{name}") for name in _INSIDE_NAMES)


def _literal(host: str) -> IP | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:  # the old spellings that resolvers take too: 127.1, 2130706433, 0x7f000001
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return None
