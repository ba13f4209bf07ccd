"""The identity of a model is computed once, and does not keep a replaced model in memory."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.sessions.identities import Identities


class Model:
    """Can be referred to weakly."""


def active(model: Model | None) -> Any:
    encoder = SimpleNamespace(format=SimpleNamespace(identity=("chatml",)))
    settings = SimpleNamespace(model="owner/name")
    conversation = SimpleNamespace(model=model, encoder=encoder, settings=settings, tokenizer=None)
    info = SimpleNamespace(name="name", precision="float32", compute_precision="float32")
    return SimpleNamespace(conversation=conversation, info=info)


def test_it_is_computed_once_and_the_replaced_model_is_freed_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Model] = []
    first: Model | None = Model()
    before = weakref.ref(first)
    alive: list[bool] = []

    def fingerprint(model: Model) -> str:
        computed.append(model)
        if len(computed) == 2:
            computed[0] = model
            gc.collect()
            alive.append(before() is not None)
        return f"2-{len(computed)}"

    monkeypatch.setattr("streamchat.models.fingerprint.model_fingerprint", fingerprint)
    monkeypatch.setattr("streamchat.models.fingerprint.tokenizer_fingerprint", lambda tokenizer, parts: "t")
    identities = Identities()
    for _ in range(2):
        assert identities.of(active(first)).fingerprint == "2-1"
    assert len(computed) == 1
    first = None
    assert identities.of(active(Model())).fingerprint == "2-2"
    assert alive == [False]
