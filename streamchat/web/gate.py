"""Access control of `streamchat web`: requests need an expected host name, the origin of the page, and the token.

The host name is checked because a hostile page can point its own name to this machine (DNS rebinding), the origin
because any page can open a WebSocket to it, and the token because other users and programs can too.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from streamchat.base.errors import ConfigError


def _new_token() -> str:
    return secrets.token_urlsafe(32)


@dataclass(frozen=True)
class Gate:
    """Decides which requests are allowed."""

    host: str
    """Address the server binds to."""
    port: int
    url: str = ""
    """The address that browsers use, if different: `https://chat.example.org`."""
    token: str = field(default_factory=_new_token, repr=False)

    def addresses(self) -> list[str]:
        """Return the addresses to open in a browser, without the token."""
        if self.url:
            return [self.url]
        if not _is_unspecified(self.host):
            return [f"http://{_bracketed(self.host)}:{self.port}"]
        loopback = "[::1]" if ":" in self.host else "127.0.0.1"
        return [f"http://{name}:{self.port}" for name in (loopback, _bracketed(_outer_address()))]

    def refusal(self, hosts: list[str], origin: str | None) -> str:
        """Return why a request is refused; '' if it is allowed.

        Args:
            hosts: Its `Host` headers.
            origin: Its `Origin` header. Browsers send it with every WebSocket; without it the sender is not a page.
        """
        if len(hosts) != 1 or (name := host_name(hosts[0])) is None or not self._is_expected(name):
            return (
                "unknown host name in the request; open the address that the server printed, or start it with "
                "--url and the address that you use"
            )
        if origin is not None and origin.lower() not in (f"{kind}://{hosts[0].lower()}" for kind in ("http", "https")):
            return "the request comes from another page"
        return ""

    def scheme(self, host: str, forwarded: str) -> str:
        """Return `https` if the browser uses it (through a proxy), else `http`.

        Args:
            host: The `Host` header.
            forwarded: The `X-Forwarded-Proto` header. It only affects the addresses in the sender's own page.
        """
        if self.url and host_name(host) == urlsplit(self.url).hostname:
            return urlsplit(self.url).scheme
        return "https" if forwarded.lower() == "https" else "http"

    def is_token(self, given: str) -> bool:
        """Whether `given` is the token, compared in constant time."""
        return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self.token.encode())

    def _is_expected(self, name: str) -> bool:
        if name in ("localhost", self.host.lower(), urlsplit(self.url).hostname):
            return True
        address = _address(name)
        if _is_loopback(self.host):
            return address is not None and address.is_loopback
        # an IP address cannot be rebound to this machine like a name
        return address is not None or name in (here := socket.gethostname().lower(), f"{here}.local")


def checked_url(text: str) -> str:
    """Check the value of `--url` and return it without a trailing slash.

    Raises:
        ConfigError: It is neither `http://NAME[:PORT]` nor `https://NAME[:PORT]`.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    whole = parts.hostname and f"{parts.scheme}://{_bracketed(parts.hostname)}" + (f":{port}" if port else "")
    if parts.scheme not in ("http", "https") or text.lower().rstrip("/") != whole or host_name(parts.netloc) is None:
        raise ConfigError(f"--url {text}: must be an address without a path, such as https://chat.example.org")
    return text.lower().rstrip("/")


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


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def _is_unspecified(host: str) -> bool:
    address = _address(host)
    return not host or (address is not None and address.is_unspecified)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _outer_address() -> str:
    """Return the address of this machine in its network, or its name if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved address; connecting a datagram socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
