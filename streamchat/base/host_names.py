"""Names and addresses of hosts, and which requests a server on one of them may answer.

The `Host` header is checked because a hostile page can point its own name to this machine (DNS rebinding), and the
`Origin` header because any page can send requests to it.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from streamchat.base.errors import ConfigError, reason_of


@dataclass(frozen=True)
class AllowedHosts:
    """The hosts that requests to a server may name."""

    host: str
    """Address the server binds to."""
    names: tuple[str, ...] = ()
    """Other names of it, in lower case; '' for none."""

    def refusal(self, hosts: Sequence[str], origin: str | None, advice: str) -> str:
        """Return why a request is refused; '' if it is allowed.

        Args:
            hosts: Its `Host` headers.
            origin: Its `Origin` header. Browsers send it with every WebSocket and every request of another page;
                without it the sender is not such a page.
            advice: What to do about an unknown host name.
        """
        if len(hosts) != 1 or (name := host_name(hosts[0])) is None or not self._is_expected(name):
            return f"unknown host name in the request; {advice}"
        if origin is not None and origin.lower() not in (f"{kind}://{hosts[0].lower()}" for kind in ("http", "https")):
            return "the request comes from another page"
        return ""

    def _is_expected(self, name: str) -> bool:
        if name in ("localhost", self.host.lower(), *filter(None, self.names)):
            return True
        address = _address(name)
        if is_loopback(self.host):
            return address is not None and address.is_loopback
        # an IP address cannot be rebound to this machine like a name
        return address is not None or name in (here := socket.gethostname().lower(), f"{here}.local")


def resolve(host: str, port: int) -> tuple[int, tuple[Any, ...]]:
    """Return the address family and the address of a server on `host`.

    Raises:
        OSError: There is no such address, `host` is not a valid name, or it is empty, which sockets take for every
            address of this machine.
    """
    if not host:
        raise OSError(errno.EADDRNOTAVAIL, "the host name is empty")
    try:
        [found, *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, "not a valid host name") from error
    return found[0], found[4]


def new_socket(host: str, port: int) -> tuple[socket.socket, tuple[Any, ...]]:
    """Return a socket for a server, and the address to bind it to.

    Raises:
        ConfigError: `resolve` finds no address, or there are no sockets for it.
    """
    try:
        family, address = resolve(host, port)
        return socket.socket(family), address
    except OSError as error:
        raise ConfigError(
            f"--host {host!r} cannot be used ({reason_of(error)}); give an address of this machine"
        ) from error


def host_name(header: str) -> str | None:
    """Return the name in a `Host` header, in lower case and without its port; None if it is not valid."""
    try:
        parts = urlsplit(f"//{header}")
        _ = parts.port
    except ValueError:
        return None
    name = parts.hostname or ""
    plain = name.replace("-", "").replace(".", "").replace("_", "")
    if parts.netloc != header or "@" in header or not (_address(name) or (plain.isascii() and plain.isalnum())):
        return None
    return name.rstrip(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Return whether a server on this address can only be reached from this machine."""
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def is_unspecified(host: str) -> bool:
    """Return whether this address means all addresses of the machine."""
    address = _address(host)
    return not host or (address is not None and address.is_unspecified)


def bracketed(host: str) -> str:
    """Return a host as it is written in a URL."""
    return f"[{host}]" if ":" in host else host


def outer_address() -> str:
    """Return the address of this machine in its network, or its name if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved address; connecting a datagram socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
