"""The user's Hub token: sent to the Hub, named by its origin in messages, and shown or stored nowhere."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from streamchat.base.errors import ModelNotFoundError
from streamchat.cli import main as cli
from streamchat.models.load import load_model
from tests.support.fake_hub import FakeHub, serve_hub
from tests.support.models_help import save, tiny_neox

TOKEN = "hf_OnlyTheHubMaySeeThis"
NAME = "a/gated"


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub with one gated model, and a home without a token file."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for server in serve_hub(monkeypatch):
        server.repositories[NAME] = save(tiny_neox(), tmp_path / "gated")
        server.gated.add(NAME)
        server.members.add(TOKEN)
        yield server


def refusal() -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        load_model(NAME, device="cpu", kernels="torch")
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_the_token_of_the_environment_is_sent(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, f" {TOKEN}\n")
    assert load_model(NAME, device="cpu", kernels="torch").name == "gated"
    assert set(fake_hub.tokens) == {TOKEN}


def test_the_token_file_of_hf_auth_login_is_sent(fake_hub: FakeHub) -> None:
    Path(constants.HF_TOKEN_PATH).write_text(f"{TOKEN}\n")
    assert load_model(NAME, device="cpu", kernels="torch").name == "gated"
    assert set(fake_hub.tokens) == {TOKEN}


def test_without_a_token_a_gated_model_names_the_ways_to_get_in(fake_hub: FakeHub) -> None:
    text = refusal()
    assert f"accept them on {fake_hub.url}/{NAME}, then set HF_TOKEN or run `hf auth login`" in text
    assert fake_hub.tokens == []


def test_a_token_that_may_not_read_the_model(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.members.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "the token in HF_TOKEN is not of one of them or may not read it" in refusal()
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    assert f"the token in {constants.HF_TOKEN_PATH} is not of one of them" in refusal()
    fake_hub.repositories.clear()
    assert "or it is private and the token in " in refusal()


def test_a_token_that_the_hub_rejects(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.rejected.add(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refusal().endswith(f"make a new one on {fake_hub.url}/settings/tokens, or unset HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    assert refusal().endswith("or run `hf auth logout`")


@pytest.mark.parametrize("broken", [f"{TOKEN} {TOKEN}", f"“{TOKEN}”", f"{TOKEN}\0"[:-1] + "\x7f"])
def test_a_token_that_cannot_be_sent(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setenv("HF_TOKEN", broken)
    assert "the token in HF_TOKEN contains characters that no token has; copy it again" in refusal()
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_bytes(b"\xff" + TOKEN.encode())
    assert f"the token in {constants.HF_TOKEN_PATH} contains characters" in refusal()
    assert fake_hub.tokens == []


def test_the_password_of_an_endpoint_is_not_shown(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", fake_hub.url.replace("//", f"//me:{TOKEN}@"))
    fake_hub.close()
    assert "127.0.0.1" in refusal()


def test_the_token_is_stored_and_shown_nowhere(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("STREAMCHAT_KERNELS", "torch")  # compiling them takes most of the time
    chat = ["--model", NAME, "--save", "always", "--max-new-tokens", "2", "--stats-json", "stats.jsonl"]

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
        return cli.main(arguments)

    fake_hub.members.clear()
    assert run(*chat, "--debug") == 3
    fake_hub.rejected.add(TOKEN)
    assert run(*chat, "--debug") == 3
    fake_hub.members.add(TOKEN)
    fake_hub.rejected.clear()
    assert run(*chat) == 0
    assert TOKEN in fake_hub.tokens
    assert run("config") == run("doctor") == run("models") == run("sessions", "list", "--json") == 0
    out, err = capfd.readouterr()
    assert NAME in out
    assert "Traceback" in err  # of --debug
    assert TOKEN not in out + err
    files = [path for path in Path(os.environ["HOME"]).rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" or "sessions" in path.name for path in files)
    assert any(path.suffix == ".log" for path in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
