"""The size of the cache, and the figures of the status board."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.formatting import format_turns, human_bytes, human_seconds
from streamchat.cache.context import context_length
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.budget import resolve_cache_size
from streamchat.frontend.messages import eviction_sentence
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import memory_rows
from streamchat.sessions.settings import resumed_configuration
from tests.support.tiny import config_of


def given_settings(**settings: Any) -> Configuration:
    return Configuration(Settings(**settings), dict.fromkeys(settings, "flag"), None)


@pytest.mark.parametrize(
    ("settings", "context", "size"),
    [
        ({}, 8192, 1024),
        ({}, None, 1024),
        ({"cache_size": 4096}, 8192, 4096),
        ({"cache_size": 8192}, 8192, 8192),
        # the original script's formula
        ({"compression_ratio": 0.7}, 2048, 614),
        ({"compression_ratio": 0.999}, 2048, 14),
        ({"compression_ratio": 0.999, "num_sink_tokens": 20}, 2048, 30),
    ],
)
def test_the_budget(settings: dict[str, Any], context: int | None, size: int) -> None:
    assert resolve_cache_size(given_settings(**settings), context) == (size, None)


def test_a_small_model_gets_what_it_can_address_and_says_so() -> None:
    size, note = resolve_cache_size(given_settings(), 512)
    assert size == 512
    assert note == "cache_size was lowered from 1024 to 512 tokens, this model's context length."


def test_a_saved_budget_is_fitted_to_a_model_that_addresses_less() -> None:
    """What a conversation was begun with is no reason not to resume it, and its default was none of the user's."""
    info = SimpleNamespace(id="abcdef", settings={"cache_size": 1024})
    resumed = resumed_configuration(Configuration(), info)  # type: ignore[arg-type]
    assert resolve_cache_size(resumed, 128) == (
        128,
        "cache_size was lowered from 1024 to 128 tokens, this model's context length.",
    )
    given = resumed_configuration(Configuration(Settings(cache_size=512), {"cache_size": "--cache-size"}), info)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--cache-size: cache_size = 512 exceeds .* context length of 128 tokens"):
        resolve_cache_size(given, 128)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    # as written by an earlier version, as today, and by a version that has more policies
    [("tokens", "oldest-tokens"), ("key-diversity", "key-diversity"), ("newest", "keep-first-turn")],
)
def test_a_session_continues_with_its_policy_if_this_version_has_it(saved: str, resumed: str) -> None:
    info = SimpleNamespace(id="abcdef", settings={"evict": saved})
    here = Configuration(Settings(evict="keep-first-turn"), {"evict": "a file"})
    assert resumed_configuration(here, info).settings.evict == resumed  # type: ignore[arg-type]
    given = Configuration(Settings(evict="oldest-turns"), {"evict": "--evict"})
    assert resumed_configuration(given, info).settings.evict == "oldest-turns"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "context", "sentence"),
    [
        ({"cache_size": 4096}, 2048, r"flag: cache_size = 4096 exceeds .* length of 2048 tokens; .* 16 to 2048"),
        ({"cache_size": 999, "num_sink_tokens": 100}, 500, "from 101 to 500"),
        ({"compression_ratio": 0.5}, None, "known context length"),
        ({"compression_ratio": 0.5, "num_sink_tokens": 100}, 64, "num_sink_tokens = 100 .* from 0 to 54"),
        ({"num_sink_tokens": 600}, 512, "num_sink_tokens = 600 .* from 0 to 511"),
    ],
)
def test_impossible_budgets_are_refused(settings: dict[str, Any], context: int | None, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve_cache_size(given_settings(**settings), context)


def test_context_length_is_read_whatever_its_name() -> None:
    assert context_length(config_of("llama")) == 4096
    assert context_length(config_of("gpt2")) == 256
    assert context_length(SimpleNamespace(get_text_config=lambda: SimpleNamespace())) is None


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (46_100_000, "46.1 MB"), (269e6, "269 MB"), (2.5e13, "25.00 TB")],
)
def test_bytes(count: float, words: str) -> None:
    assert human_bytes(count) == words


@pytest.mark.parametrize(("seconds", "words"), [(0.045, "45 ms"), (1.25, "1.2 s"), (245, "4 min 05 s")])
def test_seconds(seconds: float, words: str) -> None:
    assert human_seconds(seconds) == words


def test_turn_words() -> None:
    assert format_turns((4,)) == "turn 4"
    assert format_turns((1, 2, 3)) == "turns 1-3"
    assert format_turns([5, 1, 2]) == "turns 1-2, 5"


def evicted(turns: tuple[int, ...], gone: tuple[int, ...]) -> str:
    return eviction_sentence(ev.TokensEvicted(120, (4, 124), turns, gone, 500, 380, "decode", ev.CacheState(380, 512)))


def test_eviction_sentences() -> None:
    end = " (120 tokens evicted, 380 of 512 cached)"
    assert evicted((1, 2), (1, 2)) == "turns 1-2 are no longer in context" + end
    assert evicted((3,), ()) == "turn 3 is now only partly in context" + end
    assert evicted((2, 3), (2,)) == ("turn 2 is no longer in context; turn 3 is now only partly in context" + end)
    assert evicted((), ()) == "older text is now out of context" + end


def test_memory_labels_say_which_number_it_is() -> None:
    def shown(memory: ev.MemoryState | None) -> list[tuple[str, str]]:
        return [(row.label, row.value) for row in memory_rows(memory)]

    assert shown(None) == [("memory", "n/a")]
    assert shown(ev.MemoryState(5_000_000)) == [("VRAM", "n/a (on CPU)"), ("process memory", "5.0 MB")]
    assert shown(ev.MemoryState(1000, "cuda", 2000, 3000, 80_000_000_000)) == [
        ("VRAM allocated", "2.0 kB"),
        ("VRAM reserved", "3.0 kB"),
        ("VRAM of device", "80.0 GB"),
        ("process memory", "1.0 kB"),
    ]


def stats(turn: int, reason: ev.FinishReason = "stop") -> ev.TurnStats:
    return ev.TurnStats(turn, 10, 5, 15, 512, 0, 0, 0.5, 20.0, 1, 2, None, reason)


def test_the_board_counts_only_turns_that_became_part_of_the_conversation() -> None:
    board = StatusBoard()
    board.apply(ev.TurnStarted(1, "hi", 10))
    assert board.busy
    board.apply(ev.TurnFinished(stats(1), "stop", "hello"))
    assert (board.busy, board.turns, board.prompt_tokens, board.new_tokens) == (False, 1, 10, 5)
    board.apply(ev.TurnFinished(stats(2, "error"), "error", "", rolled_back=True))
    assert (board.turns, board.prompt_tokens, board.new_tokens) == (1, 10, 5)
    board.apply(ev.ConversationCleared())
    assert (board.turns, board.prompt_tokens, board.new_tokens, board.ttft_s) == (0, 0, 0, None)
