"""The flags of a cluster, and which replica a request goes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamchat.base.errors import ConfigError, ExitCode, StoreError
from streamchat.cli import main as cli
from streamchat.server.cluster import deploy
from streamchat.server.cluster.local_folder import LocalFolder
from streamchat.server.cluster.plan import Replicas, parse_replicas
from streamchat.server.cluster.routing import replica_for, route_to
from streamchat.store.shared.folder import SharedFolder


def test_replicas_are_a_number_or_a_range() -> None:
    assert parse_replicas("3", 2, 0) == Replicas(3, 3, 2, 0)
    assert parse_replicas("1-4", 1, 0.5) == Replicas(1, 4, 1, 0.5)


@pytest.mark.parametrize("text", ["0", "4-1", "x", "1-", "", "99999", "-2", "１"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--replicas"):
        parse_replicas(text, 1, 0)


@pytest.mark.parametrize(("cpus", "gpus"), [(-1, 0), (float("nan"), 0), (0, 2000)])
def test_shares_are_checked(cpus: float, gpus: float) -> None:
    with pytest.raises(ConfigError, match=r"--replica-(cpus|gpus) \S+ must be from 0 to 1024"):
        parse_replicas("1", cpus, gpus)


def test_a_session_goes_to_its_owner_or_to_one_that_all_routers_choose() -> None:
    replicas = dict.fromkeys("abcd")
    assert replica_for("", replicas) is None
    assert replica_for(route_to("b", "s1"), replicas) == "b"
    chosen = {f"s{i}": replica_for(route_to("gone", f"s{i}"), replicas) for i in range(200)}
    assert chosen == {f"s{i}": replica_for(route_to("gone", f"s{i}"), dict.fromkeys("dcba")) for i in range(200)}
    assert set(chosen.values()) == set("abcd")
    without_d = {name: replica_for(route_to("gone", name), dict.fromkeys("abc")) for name in chosen}
    assert all(without_d[name] == replica for name, replica in chosen.items() if replica != "d")
    assert replica_for(route_to("gone", "s"), {}) is None


def test_files_of_a_killed_replica_are_deleted_and_those_of_a_running_one_stay(tmp_path: Path) -> None:
    running, killed = LocalFolder(tmp_path, "a"), LocalFolder(tmp_path, "b")
    (running.path / "file").touch()
    killed._lock.release()  # as the system does at its end
    new = LocalFolder(tmp_path, "c")
    assert (running.path / "file").exists()
    assert not killed.path.exists()
    new.close()
    running.close()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--replicas=x"], "--replicas 'x' is neither a number"),
        (["--save=never"], "save = never cannot be used with --ray"),
        (["--port=0"], "--port 0 cannot be used with --ray"),
        (["--shared="], "--shared is empty; give a folder"),
    ],
)
def test_wrong_flags_are_reported_before_anything_starts(
    flags: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--ray", "local", *flags]) == ExitCode.USAGE
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--replicas=3", "--replica-cpus=2", "--replica-gpus=0", "--shared=folder"])
def test_flags_of_a_cluster_need_ray(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They were ignored: one model was served."""
    assert cli.main(["serve", flag]) == ExitCode.USAGE
    assert f"{flag.partition('=')[0]} applies to a Ray cluster; give --ray, too" in capsys.readouterr().err


def test_a_range_in_the_wrong_order_is_corrected() -> None:
    with pytest.raises(ConfigError, match="--replicas 4-1 has the larger number first; write 1-4"):
        parse_replicas("4-1", 1, 0)


@pytest.mark.parametrize("path", [__file__, f"{__file__}/folder"])
def test_a_shared_folder_that_cannot_be_used(path: str) -> None:
    """The first one was an unexpected error."""
    with pytest.raises(StoreError, match=r"cannot be used \(.*\); check the folder that is given with --shared"):
        SharedFolder(Path(path)).identity()


def test_a_failed_replica_is_reported_with_its_own_sentence() -> None:
    text = (
        "Deploying application streamchat failed: ... Traceback (most recent call last):\n"
        "  File ...\nstreamchat.base.errors.ModelNotFoundError: there is no model named x\nand more"
    )
    assert deploy._reason(text) == "there is no model named x"
    assert deploy._reason("some\nother  failure") == "some other failure"
