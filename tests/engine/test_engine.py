"""The engine: one thread, requests in order, every event, and an end in any state."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.base.errors import NO_THREAD, TOO_MANY_FILES, ExitCode, ModelNotFoundError
from streamchat.base.out_of_memory import OUT_OF_MEMORY
from streamchat.base.requests import Clear, Retry, SetOption, SetSystemPrompt, Stop, Submit
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.engine.engine import Engine
from tests.support.real_engine import running, tiny_loaded
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.smoke


def test_a_conversation_far_beyond_the_cache() -> None:
    """Every figure told is what the layers hold; turns are told when they go, recalled ones again."""
    with running() as chat:
        chat.wait(ev.ModelReady)
        cache = chat.conversation.cache
        lengths: list[list[int]] = []
        chat.engine.subscribe(lambda event: lengths.append(cache.lengths))
        for number in range(1, 13):
            finished = chat.turn(f"Tell me story number {number} about the sea and the dragon.")
            assert finished.stats.turn == number
            assert finished.stats.cache_len == cache.lengths[0] == cache.length <= 128
            assert finished.reply == "".join(d.text for d in chat.of(ev.TextDelta) if d.turn == number)
            assert finished.stats.compressions == cache.compression_count == len(chat.of(ev.TokensEvicted))
            recalled = sum(e.tokens for e in chat.of(ev.TurnsRecalled))
            assert finished.stats.tokens_evicted == sum(e.count for e in chat.of(ev.TokensEvicted)) - recalled
        assert max(max(each) for each in lengths) <= 128
        assert all(len(set(each)) == 1 for each in lengths)
        gone = [turn for event in chat.of(ev.TokensEvicted) for turn in event.turns_gone]
        first_visible = chat.of(ev.StatusSampled)[-1].cache.first_visible_turn
        assert list(dict.fromkeys(gone)) == list(range(1, first_visible))
        assert set(gone) - {turn for event in chat.of(ev.TurnsRecalled) for turn in event.turns} == {
            turn for turn in gone if gone.count(turn) == 1
        }
        assert first_visible > 5
        info = chat.of(ev.ModelReady)[0].info
        assert (info.dtype, info.device, info.cache_size, info.chat_format) == ("float32", "cpu", 128, "template")
        assert info.pinned_tokens > 0
        # tied or not, each weight counts once
        assert info.parameters == sum(p.numel() for p in chat.conversation.model.parameters())


def test_the_order_of_events_of_a_run() -> None:
    with running(start=False) as chat:
        chat.engine.send(Submit("hi"))  # before anything is loaded
        busy = [chat.engine.busy]
        chat.engine.start()
        chat.wait(ev.TurnFinished)
        busy.append(chat.engine.busy)
        chat.engine.close(30)
        kinds = [type(e).__name__ for e in chat.events if not isinstance(e, ev.StatusSampled | ev.TextDelta)]
    assert busy == [True, False]
    assert kinds == [
        "ModelLoading",
        "ModelLoading",
        "ModelReady",
        "TurnStarted",
        "PrefillProgress",
        "TurnFinished",
        "EngineClosed",
    ]


def test_the_same_seed_gives_the_same_conversation() -> None:
    replies = []
    for seed in (7, 7, 8):
        with running(seed=seed, temperature=1.0) as chat:
            replies.append([chat.turn(text).reply for text in ("one", "two")])
    assert replies[0] == replies[1] != replies[2]


def test_a_new_seed_counts_from_the_next_turn_on() -> None:
    with running(temperature=1.0) as chat:
        replies = []
        for seed in (5, 5, 6):
            chat.engine.send(Clear())
            chat.engine.send(SetOption("seed", seed))
            replies.append(chat.turn("one").reply)
    assert replies[0] == replies[1] != replies[2]


def test_settings_system_prompt_and_clear_take_effect_in_order() -> None:
    with running(temperature=0.0, max_new_tokens=40) as chat:
        first = chat.turn("What is the capital of France?")
        chat.engine.send(Clear())
        chat.engine.send(SetOption("max_new_tokens", 3))
        second = chat.turn("What is the capital of France?")
        chat.engine.send(SetSystemPrompt("Answer in one word."))
        third = chat.turn("What is the capital of France?")
        assert chat.engine.settings.system_prompt == "Answer in one word."
        assert chat.engine.settings.max_new_tokens == 3
    assert first.stats.turn == second.stats.turn == third.stats.turn == 1
    assert (second.finish_reason, second.stats.new_tokens) == ("length", 3)
    assert first.reply.startswith(second.reply.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert chat.of(ev.SettingChanged) == [ev.SettingChanged("max_new_tokens", 3)]
    assert [event.system_prompt for event in chat.of(ev.ConversationCleared)] == ["", "Answer in one word."]


def test_a_system_prompt_that_does_not_fit_changes_nothing() -> None:
    with running() as chat:
        chat.turn("remember the dragon")
        chat.engine.send(SetSystemPrompt("very long " * 200))
        chat.wait(ev.Notice)
        assert chat.turn("go on").stats.turn == 2
        notice = chat.of(ev.Notice)[-1]
        assert notice.level == "error"
        assert notice.text.startswith(
            "Nothing has changed: the system prompt (1,806 tokens) leaves 0 of cache_size = 128"
        )
        assert chat.engine.settings.system_prompt == ""


def test_stop_ends_the_running_turn_only() -> None:
    with running(max_new_tokens=100_000) as chat:
        chat.engine.send(Submit("tell me everything"))
        chat.engine.send(Submit("and then?"))
        chat.wait(ev.TextDelta)
        chat.engine.send(Stop())
        first = chat.wait(ev.TurnFinished)
        assert first.finish_reason == "cancelled"
        assert not first.rolled_back
        assert first.reply
        chat.wait(ev.TurnStarted, 2)
        chat.engine.send(Stop())
        assert chat.wait(ev.TurnFinished, 2).finish_reason == "cancelled"
        chat.engine.send(Stop())  # nothing runs: nothing happens
        chat.engine.send(SetOption("max_new_tokens", 2))
        assert chat.turn("hello").finish_reason in ("length", "stop")


def test_a_turn_that_waits_can_be_taken_back() -> None:
    with running(start=False) as chat:
        chat.engine.send(Submit("never asked"))
        chat.engine.send(Stop())
        chat.engine.start()
        finished = chat.wait(ev.TurnFinished)
        assert (finished.rolled_back, finished.text, finished.stats.cache_len > 0) == (True, "never asked", True)
        assert chat.of(ev.TurnStarted) == []


def test_a_turn_that_fails_is_taken_back_and_said_and_the_chat_goes_on() -> None:
    with running(temperature=0.0) as chat:
        chat.turn("one")
        conversation: Any = chat.conversation
        before = conversation.state()
        ids = conversation.log.ids[:]

        def fail(*args: Any) -> None:
            raise ValueError("a broken kernel\nwith details")

        handle = conversation.model.model.layers[1].register_forward_pre_hook(fail)
        finished = chat.turn("two")
        handle.remove()
        assert (finished.finish_reason, finished.rolled_back, finished.text) == ("error", True, "two")
        assert finished.message == "the turn failed and was rolled back: ValueError: a broken kernel"
        assert conversation.log.ids == ids
        assert conversation.state().length == before.length == len(ids)
        assert chat.turn("three").stats.turn == 2


def raising(error: Exception) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error

    return hook


@pytest.mark.parametrize(
    ("hook", "failure"),
    [
        (lambda module, args, output: output * float("nan"), "not_finite"),
        (lambda module, args, output: output + float("inf"), "not_finite"),
        (raising(torch.OutOfMemoryError("2 GiB")), "out_of_memory"),
        (raising(MemoryError()), "out_of_memory"),
        (raising(ValueError("the model produced NaN/inf logits")), "other"),
    ],
)
def test_the_end_of_a_turn_names_why_it_failed(hook: Callable[..., Any], failure: str) -> None:
    with running(temperature=0.0) as chat:
        assert chat.turn("one").failure == ""
        handle = chat.conversation.model.lm_head.register_forward_hook(hook)
        assert chat.turn("two").failure == failure
        handle.remove()
        assert chat.turn("three").failure == ""


def test_a_full_cache_is_a_failure_with_a_name_and_so_is_a_turn_that_cannot_start() -> None:
    with running(cache_size=64, on_full="stop") as chat:
        finished = chat.turn("", lambda _: chat.engine.send(Retry()))
        assert (finished.failure, finished.message) == ("other", "nothing to undo yet")
        assert chat.turn("very long " * 40).failure == "cache_full"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (
            ModelNotFoundError("no model of that name; try another"),
            ExitCode.MODEL,
            "no model of that name; try another",
        ),
        (RuntimeError("kernel\nlost"), ExitCode.FAILURE, "unexpected RuntimeError: kernel"),
        (OSError(errno.EMFILE, "Too many open files"), ExitCode.FAILURE, TOO_MANY_FILES),
        (RuntimeError("can't start new thread"), ExitCode.FAILURE, NO_THREAD),
        (ImportError("libtorch.so: failed to map segment from shared object"), ExitCode.MODEL, OUT_OF_MEMORY),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_engine_with_its_sentence(
    error: Exception, code: int, sentence: str
) -> None:
    def load(*args: Any) -> Any:
        raise error

    with running(load) as chat:
        chat.engine.send(Submit("hi"))
        failed = chat.wait(ev.EngineFailed)
        chat.wait(ev.EngineClosed)
        assert (failed.exit_code, failed.message) == (code, sentence)
        assert "Traceback" in failed.details
        assert chat.events[-1] == ev.EngineClosed()


def other_model(family: str, attention: str = "sdpa") -> Any:
    return lambda *args: replace(tiny_loaded(), model=tiny_model(family, attention, vocab_size=400))


def test_a_model_that_cannot_stream_is_refused_with_the_reason() -> None:
    with running(other_model("mamba", "eager")) as chat:
        failed = chat.wait(ev.EngineFailed)
    assert failed.exit_code == ExitCode.MODEL
    assert "nothing to evict" in failed.message


def test_learned_positions_are_served_by_reading_again_and_that_is_said() -> None:
    """What the model answers is what it answers to the kept ids alone, without any cache."""
    with running(
        other_model("gpt2"), temperature=0.0, cache_size=96, repetition_penalty=1.0, max_new_tokens=30
    ) as chat:
        for number in range(8):
            chat.turn(f"story {number} about the sea")
        conversation: Any = chat.conversation
        cache = conversation.cache
        assert cache.compression_count >= 3
        chat.engine.close(30)
        kept = torch.tensor([conversation.log.ids_at(cache.ledger.runs)])
        ours = conversation.feeder.forward([5])
        assert any("prefilled again" in notice.text for notice in chat.of(ev.Notice))
    kept = torch.cat([kept[:, -cache.length + 1 :], torch.tensor([[5]])], dim=1)
    with torch.inference_mode():
        expected = conversation.model(input_ids=kept, use_cache=False).logits[0, -1]
    assert (ours - expected).abs().max() < 2e-5


@pytest.mark.parametrize("family", ["gpt2", "falcon_h1"])
def test_a_roll_back_on_models_that_cannot_be_cut_or_moved(family: str) -> None:
    with running(other_model(family), temperature=0.0, cache_size=128, repetition_penalty=1.0) as chat:
        for text in ("one", "two", "three"):
            chat.turn(text)
        conversation: Any = chat.conversation
        before, ids = conversation.state(), conversation.log.ids[:]

        def fail(*args: Any) -> None:
            handle.remove()  # once
            raise ValueError("a broken kernel")

        handle = conversation.model.get_output_embeddings().register_forward_pre_hook(fail)
        assert chat.turn("four").rolled_back
        assert conversation.log.ids == ids
        assert conversation.state().length == before.length
        assert conversation.cache.lengths == [before.length] * 3
        assert chat.turn("five").stats.turn == 4


def test_closing_while_the_model_loads_waits_for_no_model() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def load(configuration: Any, progress: Any) -> Any:
        reached.set()
        assert go_on.wait(30)
        progress("Loading", 0, 0, "")
        raise AssertionError("progress goes on after close")

    engine = Engine(Configuration(Settings(), {}, None), load)
    seen: list[ev.Event] = []
    engine.subscribe(seen.append)
    engine.start()
    assert reached.wait(30)
    assert not engine.close(0.01)  # busy where nothing can interrupt it
    go_on.set()
    assert engine.close(30)
    assert seen[-1] == ev.EngineClosed()
    assert not any(isinstance(event, ev.EngineFailed) for event in seen)


def test_closing_ends_a_running_reply_and_drops_what_waits() -> None:
    with running(max_new_tokens=100_000) as chat:
        chat.engine.send(Submit("tell me everything"))
        chat.engine.send(Submit("never reached"))
        chat.wait(ev.TextDelta)
        assert chat.engine.close(30)
        assert chat.wait(ev.TurnFinished).finish_reason == "cancelled"
        assert len(chat.of(ev.TurnStarted)) == 1
        model: Any = chat.conversation.model
        assert not model._forward_pre_hooks
        assert chat.engine.close(60)  # a second time


def test_an_engine_that_never_started_closes() -> None:
    assert Engine(Configuration(Settings(), {}, None)).close()


def test_a_subscriber_that_fails_harms_nobody() -> None:
    with running() as chat:

        def bad(event: ev.Event) -> None:
            raise RuntimeError("a broken screen")

        unsubscribe = chat.engine.subscribe(bad)
        assert chat.turn("hi").finish_reason in ("stop", "length")
        unsubscribe()
        unsubscribe()


def test_notes_of_the_loader_are_told_once() -> None:
    with running(lambda *_: tiny_loaded(None, notes=("float16 is slow here",))) as chat:
        chat.turn("hi")
        texts = [notice.text for notice in chat.of(ev.Notice)]
    assert texts[0] == "float16 is slow here"
    assert any("User:" in text for text in texts[1:])  # the plain format is said once
    assert len(texts) == 2


def test_only_the_engine_s_thread_touches_the_model() -> None:
    with running() as chat:
        chat.wait(ev.ModelReady)
        threads: set[str] = set()
        model: Any = chat.conversation.model
        model.register_forward_pre_hook(lambda *_: threads.add(threading.current_thread().name))
        chat.turn("hi")
        chat.engine.send(Clear())
        chat.engine.send(SetSystemPrompt("short"))
        chat.wait(ev.ConversationCleared, 2)
    assert threads == {"streamchat-engine"}
    assert not torch.is_inference_mode_enabled()
