"""The address of a server."""

from __future__ import annotations

import pytest

from streamchat.attach.address import parse_address
from streamchat.base.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "url", "socket"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080", "ws://127.0.0.1:8080/v1/attach?client=a%20b"),
        ("http://localhost:8080/v1/", "http://localhost:8080", "ws://localhost:8080/v1/attach?client=a%20b"),
        ("localhost", "http://localhost:8080", "ws://localhost:8080/v1/attach?client=a%20b"),
        ("http://example.org", "http://example.org:80", "ws://example.org:80/v1/attach?client=a%20b"),
        (
            "https://example.org/chat",
            "https://example.org:443/chat",
            "wss://example.org:443/chat/v1/attach?client=a%20b",
        ),
        ("http://[::1]:9", "http://[::1]:9", "ws://[::1]:9/v1/attach?client=a%20b"),
    ],
)
def test_an_address(given: str, url: str, socket: str) -> None:
    address = parse_address(given)
    assert address.url == url
    assert address.socket_url(client="a b", session="") == socket


@pytest.mark.parametrize(
    "given",
    [
        "",
        "ftp://x",
        "http://",
        "http://x:99999",
        "http://user@x",
        "http://x?y",
        "http://[::1",
        "http://x#y",
        "http://x..y",
        f"http://{'x' * 64}.org",
    ],
)
def test_what_is_not_an_address(given: str) -> None:
    with pytest.raises(ConfigError, match=r"is not the URL of a server; it looks like http://127\.0\.0\.1:8080"):
        parse_address(given)
