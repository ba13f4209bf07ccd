"""Addresses that a server is to listen on."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace

import pytest

from streamchat.base.errors import ConfigError
from streamchat.base.host_names import resolve
from streamchat.commands.replay_chaos import with_metrics
from streamchat.config.loader import Configuration
from streamchat.server.run import open_port
from streamchat.telemetry.metrics import Metrics
from streamchat.web.launch import Served
from streamchat.web.serve import serve

IMPOSSIBLE = ["", " ", "\udcff", "é..b", "a." + "x" * 80, "a\0b", "256.1.1.1"]


def test_a_host_has_an_address() -> None:
    assert resolve("127.0.0.1", 80) == (socket.AF_INET, ("127.0.0.1", 80))
    assert resolve("::1", 80)[0] == socket.AF_INET6


@pytest.mark.parametrize("host", IMPOSSIBLE)
def test_what_cannot_be_an_address_is_an_error_of_the_system(host: str) -> None:
    with pytest.raises(OSError, match=r"empty|not a valid host name|not known|null|in name"):
        resolve(host, 80)


def _chaos(host: str) -> object:
    configuration = Configuration()
    return with_metrics(
        replace(configuration, settings=replace(configuration.settings, metrics_host=host)), is_resumed=False
    )


SERVERS: dict[str, Callable[[str], object]] = {
    "api": lambda host: open_port(host, 8123),
    "web": lambda host: serve(Served(host=host, port=8123)),
    "metrics": lambda host: Metrics(host, 8123),
    "chaos": _chaos,
}


@pytest.mark.parametrize("host", IMPOSSIBLE)
@pytest.mark.parametrize("server", SERVERS)
def test_every_server_refuses_such_a_host_and_never_listens_everywhere(server: str, host: str) -> None:
    with pytest.raises(ConfigError):
        SERVERS[server](host)
