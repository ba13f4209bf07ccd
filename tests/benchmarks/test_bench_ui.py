"""`streamchat bench` on a tiny model: what it counts, and its sentences where it cannot measure."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from streamchat.base.errors import ModelNotFoundError, StreamchatError
from streamchat.benchmarks import app
from streamchat.benchmarks.app import UiFigures
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import Load
from streamchat.models.load import LoadedModel
from tests.support.real_engine import tiny_loaded


def measured(tokens: int, load: Load = lambda *_: tiny_loaded()) -> UiFigures:
    """The figures of one round; with this seed the replies run to their limit."""
    settings = Settings(max_new_tokens=tokens, cache_size=128, seed=1)
    return app.measure_ui(Configuration(settings), load, 1, lambda _: None)


def unhurried(*_: object) -> LoadedModel:
    """A model whose reply lasts long enough for a key."""
    loaded = tiny_loaded()
    loaded.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    return loaded


@pytest.mark.slow
def test_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "KEY_INTERVAL_S", 0.01)
    figures = measured(96, unhurried)
    assert (figures.rounds, figures.tokens) == (1, 96)
    assert figures.keys >= 1
    assert 0 < figures.key_to_screen_p50_ms <= figures.key_to_screen_p95_ms
    assert figures.ratio == pytest.approx(figures.app_tps / figures.headless_tps)
    assert 0 < figures.core_share < 1.5
    assert figures.drawing_ms_per_token > 0


@pytest.mark.slow
def test_a_reply_of_one_token_has_no_speed() -> None:
    with pytest.raises(StreamchatError, match=r"ended after 1 token, .* --max-new-tokens"):
        measured(1)


def test_a_model_that_is_not_there_ends_it_with_its_sentence() -> None:
    def load(*_: object) -> LoadedModel:
        raise ModelNotFoundError("no model 'nope' here")

    with pytest.raises(StreamchatError, match="no model 'nope' here"):
        measured(8, load)


def test_resuming_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("streamchat.models.load.load_from_settings", lambda *_: tiny_loaded())
    assert cli.main(["bench", "--resume", "--cache-size", "128", "--rounds", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["same_logits"] is True
    assert 64 < figures["tokens"] <= 128
    assert figures["rounds"] == 2
    assert min(figures["save_ms"], figures["resume_ms"], figures["prefill_ms"], figures["ratio"]) > 0
    out = tmp_path / "out"
    assert cli.main(["bench", "--resume", "--cache-size", "128", "--rounds", "1", "--out", str(out)]) == 0
    assert "the next logits are bit-identical" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"bench-resume.json", "bench-resume.html"}
    saved = json.loads((out / "bench-resume.json").read_text())
    assert set(figures) == set(saved)
    assert {"model", "versions", "processor"} < set(saved)
