"""A Ray cluster that cannot be reached. `tests/replay/test_replay_workers.py` connects to one."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from streamchat.base import ray_cluster
from streamchat.base.errors import ConfigError
from tests.support.tiny_process import free_port


@pytest.fixture(autouse=True)
def ray_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda _: True)


@pytest.mark.parametrize("address", ["", "nonsense", "host:0", "host:99999", "http://host:1", "host:1/x"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="is neither 'auto', 'local', nor HOST:PORT of a head node"):
        ray_cluster.connected(address).__enter__()


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://localhost:{}"])
def test_a_head_node_that_does_not_answer(form: str) -> None:
    """Ray waited for two minutes, and printed its warnings."""
    address = form.format(free_port())
    with pytest.raises(ConfigError, match=f"--ray {address}: no cluster answers there"):
        ray_cluster.connected(address).__enter__()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ray_cluster.Cluster, socket.socket]]:
    """A cluster, and the port of its head node."""
    monkeypatch.setattr(ray_cluster, "PATIENCE_S", 0.05)
    monkeypatch.setattr(ray_cluster, "CHECK_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as head:
        yield ray_cluster.Cluster(f"127.0.0.1:{head.getsockname()[1]}"), head


def test_a_cluster_that_is_lost_is_reported(cluster: tuple[ray_cluster.Cluster, socket.socket]) -> None:
    """Ray waited for a minute, and then ended the process with a message of its own."""
    running, head = cluster
    running.check()
    assert running.call(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        running.call(lambda: 1 // 0)
    head.close()
    never = threading.Event()
    for action in (running.check, lambda: running.call(never.wait)):
        with pytest.raises(
            ray_cluster.ClusterLostError, match=f"the Ray cluster at {running.address} no longer answers"
        ):
            action()
    never.set()


def test_a_head_node_that_restarts_is_not_lost(
    cluster: tuple[ray_cluster.Cluster, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, _ = cluster
    answers = [True, False, False]
    monkeypatch.setattr(ray_cluster, "PATIENCE_S", 60.0)
    monkeypatch.setattr(ray_cluster.Cluster, "answers", property(lambda self: answers.pop()))
    running.check()
    assert not answers


def test_what_a_library_writes_to_stderr_is_dropped_for_the_length_of_a_block(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with ray_cluster.quiet():
        os.write(2, b"gcs_client.cc:210: Failed to get cluster ID\n")
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "later\n"
