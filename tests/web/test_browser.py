"""`streamchat web` in a real browser: typed, streamed, loaded again, and nothing asked of another host."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.browser import browser
from tests.support.models_help import save, tiny_llama
from tests.support.served_page import served


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("compiled_kernels")
def test_a_conversation_is_found_again_when_the_page_is_loaded_again(tmp_path: Path) -> None:
    folder = save(tiny_llama(max_position_embeddings=4096), tmp_path / "model")
    arguments = ["--model", str(folder), "--dtype", "float32", "--max-new-tokens", "8", "--temperature", "0"]
    # the process of a tab loads torch, on a machine that other tests share
    with served(*arguments) as address, browser() as page:
        page.open(address)
        page.wait_for("Write a message")
        page.wait_for("no chat template", 120.0)  # the model is ready
        page.type("zebras and quaggas\ue007")  # Enter
        shown = page.wait_for("max_new_tokens")
        assert "zebras and quaggas" in shown
        page.driver.refresh()
        shown = page.wait_for("resumed at turn 1", 120.0)
        assert "zebras and quaggas" in shown
        page.type("okapis\ue007")
        page.wait_for("8 tokens")
        assert page.hosts() == {"127.0.0.1"}
        assert page.errors() == []
        fonts = page.driver.execute_script("return document.fonts.check('16px \"Roboto Mono\"')")
        assert fonts
