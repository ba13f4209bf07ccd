"""A model that was switched off leaves no memory behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import SwitchModel
from tests.support.real_engine import running, tiny_loaded


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_the_old_model_is_freed(frozen: bool) -> None:
    models: list[weakref.ref[Any]] = []

    def load(*_: Any) -> Any:
        loaded = tiny_loaded()
        models.append(weakref.ref(loaded.model))
        return loaded

    gc.disable()  # the switch itself frees it
    try:
        with running(load) as watched:
            watched.wait(ev.ModelReady)
            watched.turn("The sea.")
            for number in range(2, 4):
                if frozen:
                    gc.freeze()  # as the app does
                watched.engine.send(SwitchModel("another"))
                watched.wait(ev.ModelReady, number)
                assert [model() is not None for model in models] == [False] * (number - 1) + [True]
    finally:
        gc.enable()
        gc.unfreeze()
