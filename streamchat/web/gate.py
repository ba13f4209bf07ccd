"""Access control of `streamchat web`: requests need an expected host name, the origin of the page, and the token.

The host name is checked because a hostile page can point its own name to this machine (DNS rebinding), the origin
because any page can open a WebSocket to it, and the token because other users and programs can too.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from streamchat.base.errors import ConfigError
from streamchat.base.host_names import AllowedHosts, bracketed, host_name, is_unspecified, outer_address


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
        if not is_unspecified(self.host):
            return [f"http://{bracketed(self.host)}:{self.port}"]
        loopback = "[::1]" if ":" in self.host else "127.0.0.1"
        return [f"http://{name}:{self.port}" for name in (loopback, bracketed(outer_address()))]

    def refusal(self, hosts: list[str], origin: str | None) -> str:
        """Return why a request is refused; '' if it is allowed.

        Args:
            hosts: Its `Host` headers.
            origin: Its `Origin` header. Browsers send it with every WebSocket; without it the sender is not a page.
        """
        return AllowedHosts(self.host, (urlsplit(self.url).hostname or "",)).refusal(
            hosts,
            origin,
            "open the address that the server printed, or start it with --url and the address that you use",
        )

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
        """Return whether `given` is the token; compares in constant time."""
        return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self.token.encode())


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
    whole = parts.hostname and f"{parts.scheme}://{bracketed(parts.hostname)}" + (f":{port}" if port else "")
    if parts.scheme not in ("http", "https") or text.lower().rstrip("/") != whole or host_name(parts.netloc) is None:
        raise ConfigError(f"--url {text}: must be an address without a path, such as https://chat.example.org")
    return text.lower().rstrip("/")
