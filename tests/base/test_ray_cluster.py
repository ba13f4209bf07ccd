"""A Ray cluster that cannot be reached. `tests/replay/test_replay_workers.py` connects to one."""

from __future__ import annotations

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
