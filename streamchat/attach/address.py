"""Parses the address of a server, and builds the URL to connect to."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit

from streamchat.attach.frames import PATH
from streamchat.base.errors import ConfigError
from streamchat.base.host_names import bracketed

DEFAULT_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Address:
    """A server that front ends can be attached to."""

    host: str
    port: int
    is_secure: bool = False
    path: str = ""
    """Prefix of the paths, for a server behind a proxy."""
    token: str = ""
    """The server's token; '' for none."""

    @property
    def url(self) -> str:
        """The address, as a user gives it."""
        return f"{'https' if self.is_secure else 'http'}://{bracketed(self.host)}:{self.port}{self.path}"

    def socket_url(self, **query: str) -> str:
        """Return the URL of the WebSocket."""
        scheme = "wss" if self.is_secure else "ws"
        found = urlencode({name: value for name, value in query.items() if value}, quote_via=quote)
        return f"{scheme}://{bracketed(self.host)}:{self.port}{self.path}{PATH}?{found}"


def parse_address(text: str, token: str = "") -> Address:
    """Return the address in `text`. `http://` and the port may be omitted; `/v1` at the end is ignored.

    Raises:
        ConfigError: It is not the URL of a server.
    """
    given = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(given)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as when its address is looked up
    except ValueError:  # also UnicodeError: a part of the name is empty or too long
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ConfigError(f"{text!r} is not the URL of a server; it looks like {DEFAULT_URL}")
    is_secure = parts.scheme == "https"
    if port is None:
        port = 443 if is_secure else 8080 if "://" not in text else 80
    return Address(parts.hostname, port, is_secure, parts.path.rstrip("/").removesuffix("/v1").rstrip("/"), token)
