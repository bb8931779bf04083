"""Where a URL leads, and whether we connect there: the defence against server-side request forgery.

The guard hands out the very addresses it has checked, because a name may resolve differently the next time.
"""

from __future__ import annotations

import re
import socket
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import quote, urlsplit

import idna

from attachments.errors import InvalidSource, SourceForbidden, unavailable_on_failure

HTTPS_PORT = 443

#: What no public host has (iana.org/assignments/iana-ipv4-special-registry and its IPv6 twin). Written out because
#: `ipaddress` counts multicast as global and had several of the others wrong before Python 3.11.10 (CVE-2024-4032).
_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's platform endpoint, reachable only from within a virtual machine
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # with Teredo and 6to4, which carry an IPv4 address
    )
)
#: All of IPv6 that is handed out. Beyond it are local and multicast addresses, and the mapped and NAT64 forms of IPv4.
_GLOBAL_UNICAST = ip_network("2000::/3")

#: Resolves a host and port to the addresses and ports to connect to, like `socket.getaddrinfo`. Raises OSError.
Resolve = Callable[[str, int], Sequence[tuple[str, int]]]


def resolve_by_system(host: str, port: int) -> Sequence[tuple[str, int]]:
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(str(address[0]), int(address[1])) for *_, address in answers]


@dataclass(frozen=True)
class HostPattern:
    """An allowed host: ``host`` (on port 443) or ``host:port``. ``*`` stands for any characters in either part.

    So ``*.example.com`` is every host under example.com but not example.com itself. An IPv6 address with a port is
    written ``[::1]:8443``.
    """

    host: str
    port: str

    @classmethod
    def parse(cls, text: str) -> HostPattern:
        """Raises ValueError when it is neither form; what could hold a password is not quoted."""
        match = re.fullmatch(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<host>[^\s:/@\[\]]+))(?::(?P<port>\d+|\*))?", text.lower())
        if match is None:
            shown = repr(text) if re.fullmatch(r"[\w.*: -]*", text) else "an entry"
            raise ValueError(f"{shown} is not a host or host:port")
        host = str(ip_address(match["v6"])) if match["v6"] else match["host"].rstrip(".")
        if not host.isascii():
            host = idna.encode(host, uts46=True).decode()
        return cls(host, match["port"] or str(HTTPS_PORT))

    def matches(self, host: str, port: int) -> bool:
        return _wildcard(self.host, host) and _wildcard(self.port, str(port))


def _wildcard(pattern: str, text: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), text) is not None


@dataclass(frozen=True)
class Destination:
    """Where a URL leads: ``host`` is in lower-case ASCII without brackets, ``target`` is path and query."""

    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, url: str) -> Destination:
        # urlsplit drops tabs and newlines silently, and some parsers read a backslash as a slash.
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise InvalidSource("the URL contains a space, a control character or a backslash")
        try:
            parts = urlsplit(url)
            port = HTTPS_PORT if parts.port is None else parts.port
            host = _ascii_host(parts.hostname or "")
        except ValueError:
            raise InvalidSource("the URL has no valid host and port") from None  # its text quotes the URL
        if parts.scheme != "https":
            raise SourceForbidden("attachments are fetched over https only, redirects included")
        if "@" in parts.netloc:
            raise InvalidSource("the URL carries a user name or password")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(host, port, quote(target, safe=string.punctuation))

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}" if self.port == HTTPS_PORT else f"https://{host}:{self.port}"


def _ascii_host(host: str) -> str:
    """Raises ValueError when this is not a host name or address. An IPv6 zone is none: it is for local addresses."""
    if ":" in host and "%" not in host:
        return str(IPv6Address(host))
    name = host if host.isascii() else idna.encode(host, uts46=True).decode()
    name = name.lower().removesuffix(".")
    if len(name) > 253 or not re.fullmatch(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", name):
        raise ValueError
    return name


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet and has no other address inside it."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip not in _GLOBAL_UNICAST:
        return False
    return ip.is_global and not any(ip in network for network in _NOT_PUBLIC)


@dataclass(frozen=True)
class Guard:
    """Decides which addresses may be connected to."""

    allowed: Sequence[HostPattern]
    resolve: Resolve

    def addresses(self, destination: Destination) -> Sequence[tuple[str, int]]:
        """Return the checked addresses of a destination; whoever connects must not resolve its name again."""
        origin = destination.origin
        if self.allowed and not any(pattern.matches(destination.host, destination.port) for pattern in self.allowed):
            raise SourceForbidden(f"{origin} is not among the allowed hosts")
        if not self.allowed and destination.port != HTTPS_PORT:
            raise SourceForbidden(f"{origin} is not on port {HTTPS_PORT}, and not among the allowed hosts")
        with unavailable_on_failure(origin):
            addresses = self.resolve(destination.host, destination.port)
        if not self.allowed and not all(is_public(address) for address, _ in addresses):
            raise SourceForbidden(f"{origin} has an address that is not public, and is not among the allowed hosts")
        return addresses
