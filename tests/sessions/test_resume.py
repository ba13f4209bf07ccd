"""Saved conversations on a real engine: resuming continues them to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.base.errors import CacheError, ExitCode
from streamchat.base.requests import (
    Compact,
    CountTokens,
    Edit,
    OpenSession,
    Pin,
    Quote,
    Submit,
    Undo,
)
from streamchat.cache import checkpoint
from streamchat.cache.dtype import set_cache_dtype
from streamchat.config.loader import Configuration
from streamchat.sessions import snapshot as snapshots
from streamchat.store.store import Store
from tests.support import toy_tokenizer as toy
from tests.support.real_engine import Watched, running, tiny_loaded
from tests.support.saved_chats import QUESTIONS, said, session_of
from tests.support.saved_chats import database as database  # a fixture

pytestmark = pytest.mark.smoke


def is_told(events: list[ev.Event], text: str) -> bool:
    """Whether a notice has this text; notices follow `ConversationResumed`."""
    return any(text in event.text for event in events if isinstance(event, ev.Notice))


def logits_of(chat: Watched) -> torch.Tensor:
    conversation: Any = chat.conversation
    logits: torch.Tensor = conversation.next_logits().clone()
    return logits


@contextmanager
def a_session(database: Path, questions: list[str] = QUESTIONS, **settings: Any) -> Iterator[tuple[Watched, str]]:
    """An engine that has said `questions`, and its session."""
    with running(store=database, **settings) as chat:
        said(chat, questions)
        yield chat, session_of(database)


FAMILIES = ["llama", "gpt_neox", "gpt2"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [96, 512], ids=["evicted", "whole"])
def test_resuming_gives_the_same_logits_and_the_same_next_replies(database: Path, family: str, size: int) -> None:
    def load(*_: Any) -> Any:
        return tiny_loaded(family=family)

    size = min(size, 256) if family == "gpt2" else size
    sampling: dict[str, Any] = {"cache_size": size, "temperature": 1.0}
    with running(load, store=database, **sampling) as chat:
        said(chat, QUESTIONS)
        session = session_of(database)
        conversation: Any = chat.conversation
        left = conversation.state()
        assert (left.compressions > 0) == (size == 96)
        ids = conversation.log.ids.tolist()
    with running(load, **sampling) as other:  # one that never stopped
        said(other, QUESTIONS)
        expected = logits_of(other)
        replies = said(other, ["one more", "and one more"])
    with running(load, store=database, session=session, cache_size=16) as chat:
        resumed = chat.wait(ev.ConversationResumed)
        assert resumed.prefilled == 0
        assert resumed.session == session
        assert [(turn.number, turn.text) for turn in resumed.turns] == list(enumerate(QUESTIONS, 1))
        conversation = chat.conversation
        assert conversation.log.ids.tolist() == ids
        assert conversation.state() == left
        assert chat.engine.settings.cache_size == size
        assert torch.equal(logits_of(chat), expected)
        assert said(chat, ["one more", "and one more"]) == replies


def test_without_a_snapshot_the_ids_that_were_held_are_read_again(database: Path) -> None:
    with a_session(database, cache_size=96) as (chat, session):
        conversation: Any = chat.conversation
        held, ids = conversation.cache.ledger.runs, conversation.log.ids.tolist()
        compressions = conversation.cache.compression_count
        model = conversation.model
    with Store(database) as store:
        path = store.snapshot_path(session)
    path.unlink()
    with running(store=database, session=session) as chat:
        resumed = chat.wait(ev.ConversationResumed)
        assert resumed.prefilled == sum(stop - first for first, stop in held)
        assert "because no cache was saved with it" in chat.wait(ev.Notice).text
        conversation = chat.conversation
        assert (conversation.cache.ledger.runs, conversation.log.ids.tolist()) == (held, ids)
        assert conversation.cache.compression_count == compressions
        assert conversation.cache.pins == ((0, conversation.system_tokens),)
        got = logits_of(chat)
        kept = conversation.log.ids_at(held)
        plain = tiny_loaded().model
        assert plain is not model
        torch.testing.assert_close(got, plain(torch.tensor([kept])).logits[0, -1], atol=2e-4, rtol=0)
        assert chat.turn("and now?").stats.turn == 6


def test_a_cache_of_an_older_fingerprint_is_read_again_once(database: Path) -> None:
    with a_session(database, cache_size=96) as (_, session):
        pass
    with Store(database) as store:
        path = store.snapshot_path(session)
    saved = snapshots.load(path)
    assert saved.fingerprint.startswith("2-")
    snapshots.save(path, replace(saved, fingerprint="0123456789abcdef" * 2))
    with running(store=database, session=session) as chat:
        assert chat.wait(ev.ConversationResumed).prefilled > 0
        said_why = "because its cache was saved by an older streamchat, which did not fingerprint all weights"
        assert said_why in chat.wait(ev.Notice).text
    with running(store=database, session=session) as chat:
        assert chat.wait(ev.ConversationResumed).prefilled == 0


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(path: Path, version: int, bit: int = 0) -> None:
    """Write a snapshot again in another format version; with `bit`, flip a bit of a tensor after its checksum."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["streamchat"]) | {"format": version}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts.pop("checksum")
    facts["checksum"] = snapshots._checksum(tensors, facts)
    tensors["cache.1.values"].view(torch.uint8)[0, 0, 0, 0] ^= bit
    save_file(tensors, path, {"streamchat": json.dumps(facts)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (damage, "its saved cache is damaged"),
        (cut_short, "its saved cache is damaged"),
        (lambda path: path.write_bytes(b""), "its saved cache is damaged"),
        (lambda path: rewrite(path, 1, bit=1), "its saved cache is damaged"),
        (lambda path: rewrite(path, 2, bit=1), "its saved cache is damaged"),
        (lambda path: rewrite(path, 99), "its saved cache has format 99 and this streamchat reads 1 to 3"),
    ],
    ids=["a bit", "short", "empty", "a bit in version 1", "a bit in version 2", "format"],
)
def test_a_snapshot_that_cannot_be_used_is_said_in_one_line(database: Path, change: Any, reason: str) -> None:
    with a_session(database, cache_size=96) as (_, session):
        pass
    with Store(database) as store:
        change(store.snapshot_path(session))
    with running(store=database, session=session) as chat:
        assert chat.wait(ev.ConversationResumed).prefilled > 0
        assert reason in chat.wait(ev.Notice).text
        chat.turn("and now?")


@pytest.mark.slow
def test_a_snapshot_in_the_format_of_an_earlier_version_is_restored(database: Path) -> None:
    with a_session(database, cache_size=96) as (_, session):
        pass
    with Store(database) as store:
        rewrite(store.snapshot_path(session), 1)
    with running(store=database, session=session) as chat:
        assert chat.wait(ev.ConversationResumed).prefilled == 0


def test_a_snapshot_that_the_cache_refuses_is_not_used(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fingerprint is that of the model, but the cache has other layers."""
    with a_session(database) as (_, session):
        pass

    def refuse(*_: Any) -> None:
        raise CacheError("6 layers, and the cache has 3")

    monkeypatch.setattr(checkpoint, "restore", refuse)
    with running(store=database, session=session) as chat:
        assert "because its cache was saved with another model" in chat.wait(ev.Notice).text
        assert chat.wait(ev.ConversationResumed).prefilled > 0


def test_a_snapshot_of_another_model_or_dtype_is_not_used(database: Path) -> None:
    with a_session(database) as (_, session):
        pass

    def other_weights(*_: Any) -> Any:
        loaded = tiny_loaded()
        embeddings: Any = loaded.model.get_input_embeddings()
        embeddings.weight.data *= 1.5
        return loaded

    with running(other_weights, store=database, session=session) as chat:
        assert "because its cache was saved with another model" in chat.wait(ev.Notice).text

    def other_dtype(*_: Any) -> Any:
        from dataclasses import replace

        loaded = tiny_loaded()
        return replace(loaded, model=loaded.model.bfloat16(), dtype="bfloat16")

    with running(other_dtype, store=database, session=session) as chat:
        assert "saved in float32 and the model now runs in bfloat16" in chat.wait(ev.Notice).text
        chat.turn("x")


def loaded_with_cache_in(dtype: str) -> Any:
    """A model in float32 that stores keys and values in `dtype`, as `load_model` returns it."""

    def load(*_: Any) -> Any:
        loaded = replace(tiny_loaded(), cache_dtype=dtype)
        set_cache_dtype(loaded.model, getattr(torch, dtype))
        return loaded

    return load


CACHE_IN_16_BITS = "float32, bfloat16 cache"


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ("bfloat16", "bfloat16", ""),
        ("float32", "bfloat16", ""),
        ("bfloat16", "float32", f"saved in {CACHE_IN_16_BITS} and the model now runs in float32"),
    ],
)
def test_a_snapshot_is_continued_with_keys_of_fewer_bits_and_not_of_more(
    database: Path, before: str, now: str, refused: str
) -> None:
    with running(loaded_with_cache_in(before), store=database) as chat:
        said(chat, QUESTIONS[:2])
    (path,) = database.parent.rglob("*.safetensors")
    form = snapshots.load(path).checkpoint.form
    assert form is not None
    with running(loaded_with_cache_in(now), store=database, session=session_of(database)) as chat:
        resumed = chat.wait(ev.ConversationResumed)
        if refused:
            chat.until(lambda events: is_told(events, refused))
        notices = " ".join(notice.text for notice in chat.of(ev.Notice))
        assert (resumed.prefilled > 0) == bool(refused)
        assert refused in notices
        assert ("and the model now runs in" in notices) == bool(refused)
        conversation: Any = chat.conversation
        assert conversation.cache.streaming_layers[0].keys.dtype == getattr(torch, now)
        assert (conversation.cache.form.generation == form.generation) == (before == now)  # else they are rounded
        chat.turn("and now?")


@pytest.mark.parametrize(("stored", "name"), [("float32", "float32"), ("bfloat16", CACHE_IN_16_BITS)])
def test_a_snapshot_names_the_dtype_of_its_keys(database: Path, stored: str, name: str) -> None:
    """An older streamchat compares the name and refuses a cache in 16 bits, which its forward could not continue."""
    with running(loaded_with_cache_in(stored), store=database) as chat:
        said(chat, QUESTIONS[:1])
    (path,) = database.parent.rglob("*.safetensors")
    saved = snapshots.load(path)
    keys = {str(tensor.dtype) for part, tensor in saved.checkpoint.tensors.items() if part.endswith(".keys")}
    assert (saved.dtype, keys) == (name, {f"torch.{stored}"})


def test_another_tokenizer_reads_the_texts(database: Path) -> None:
    """The ids of one mean nothing to the other."""
    with a_session(database) as (_, session):
        pass
    with running(lambda *_: tiny_loaded(template=None), store=database, session=session) as chat:
        resumed = chat.wait(ev.ConversationResumed)
        assert len(resumed.turns) == 5
        conversation: Any = chat.conversation
        text = conversation.tokenizer.decode(conversation.log.ids.tolist())
        assert "User: Tell me of the sea." in text
        assert "<|im_start|>" not in text
        chat.until(lambda events: is_told(events, "had to be re-tokenized"))
        chat.turn("x")
        ids = conversation.log.ids.tolist()
    with running(lambda *_: tiny_loaded(template=None), store=database, session=session) as chat:
        resumed = chat.wait(ev.ConversationResumed)
        assert resumed.prefilled == 0
        assert chat.conversation.log.ids.tolist() == ids


@pytest.mark.parametrize("template", [toy.INSIDE, toy.OPEN_REASONING, toy.CHANNELS], ids=["space", "think", "channel"])
def test_another_tokenizer_reads_replies_where_its_template_puts_them(database: Path, template: str) -> None:
    with a_session(database, cache_size=512) as (_, session):
        pass
    with running(lambda *_: tiny_loaded(template), store=database, session=session, cache_size=512) as chat:
        chat.wait(ev.ConversationResumed)
        conversation: Any = chat.conversation
        tokenizer = conversation.tokenizer
        messages = []
        for turn in conversation.log.turns:
            messages += [{"role": "user", "content": turn.text}, {"role": "assistant", "content": turn.reply}]
        messages.append({"role": "user", "content": "More?"})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        following = conversation.encoder.encoded("More?", False, previous=messages[-2]["content"]).prompt
        assert tokenizer.decode(conversation.log.ids.tolist() + following) == text


def test_another_tokenizer_keeps_pins_and_what_undo_needs(database: Path) -> None:
    with a_session(database, QUESTIONS[:3], cache_size=512) as (chat, session):
        chat.engine.send(Pin(2))
        chat.wait(ev.TurnPinned)
    with running(lambda *_: tiny_loaded(template=None), store=database, session=session) as chat:
        resumed = chat.wait(ev.ConversationResumed)
        assert {s.turn for s in resumed.cache.segments if s.turn and s.pinned} == {2}
        conversation: Any = chat.conversation
        starts = [turn.start for turn in conversation.log.turns]
        for number in (3, 2):
            chat.engine.send(Undo())
            undone = chat.wait(ev.TurnUndone, 4 - number)
            assert (undone.turn, undone.restored, undone.prefilled) == (number, 0, 0)
            assert conversation.cache.ledger.runs == [(0, starts[number - 1])]
        assert conversation.cache.turn_starts == starts[:1]
        assert not any(s.turn and s.pinned for s in undone.cache.segments)
        assert chat.turn("x").stats.turn == 2


def test_a_smaller_budget_keeps_the_newest_whole_turns(database: Path) -> None:
    with a_session(database, cache_size=512) as (_, session):
        pass
    with running(store=database, session=session) as chat:
        chat.wait(ev.ConversationResumed)
        assert chat.engine.settings.cache_size == 512

    from tests.support import real_engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_engine, "Configuration", lambda s, o, f: Configuration(s, {"cache_size": "--cache-size"}, f))
        with running(store=database, session=session, cache_size=160) as chat:
            resumed = chat.wait(ev.ConversationResumed)
            conversation: Any = chat.conversation
            assert resumed.cache.length <= 160
            assert resumed.cache.first_visible_turn > 1
            assert "does not fit into 160" in chat.wait(ev.Notice).text
            first = conversation.log.turns[resumed.cache.first_visible_turn - 1].start
            assert conversation.cache.ledger.runs == [(0, conversation.system_tokens), (first, len(conversation.log))]
            chat.turn("go on")


def test_undo_reaches_back_behind_a_resume(database: Path) -> None:
    with a_session(database, cache_size=512) as (_, session):
        pass
    with running(store=database, session=session) as chat:
        chat.wait(ev.ConversationResumed)
        for number in (5, 4):
            chat.engine.send(Undo())
            assert chat.wait(ev.TurnUndone, 6 - number).turn == number
        undone = chat.of(ev.TurnUndone)
        assert all(event.prefilled == 0 for event in undone)
        conversation: Any = chat.conversation
        assert len(conversation.log) == conversation.log.turns[-1].end == conversation.cache.ledger.next_index


def test_nothing_to_replace_gives_the_text_back(database: Path) -> None:
    with running(store=database) as chat:
        finished = chat.turn("hello", lambda text: chat.engine.send(Edit(text)))
        assert (finished.finish_reason, finished.rolled_back, finished.text) == ("error", True, "hello")
        assert "nothing to undo yet" in finished.message
        chat.engine.send(Undo())
        assert "nothing to undo yet" in chat.wait(ev.Notice).text


def test_the_second_process_is_told(database: Path) -> None:
    with a_session(database) as (_, session), running(store=database, session=session) as second:
        failed = second.wait(ev.EngineFailed)
        assert failed.exit_code == ExitCode.STORE
        assert f"the session {session} is open in another streamchat process (id " in failed.message
    with running(store=database, session=session) as chat:
        chat.wait(ev.ConversationResumed)


@pytest.mark.slow
def test_opening_another_session_in_a_running_chat(database: Path) -> None:
    with a_session(database, cache_size=96) as (_, session):
        pass
    with running(store=database, cache_size=512) as chat:
        chat.wait(ev.ModelReady)
        chat.turn("something else")
        ours = session_of(database)
        chat.engine.send(OpenSession(session))
        assert chat.wait(ev.ConversationResumed).prefilled == 0
        assert chat.engine.settings.cache_size == 96
        chat.turn("go on")
        chat.engine.send(OpenSession("zzzzzz"))
        assert "no saved session has the id 'zzzzzz'; " in chat.wait(ev.Notice).text
        assert "the current conversation continues" in chat.of(ev.Notice)[-1].text
        assert chat.turn("still here").stats.turn == 7
        chat.engine.send(OpenSession(ours))
        assert chat.wait(ev.ConversationResumed, 2).cache.cache_size == 512
        assert chat.turn("still there").stats.turn == 2
    with Store(database) as store:
        assert {(s.id, s.turns) for s in store.sessions()} == {(session, 7), (ours, 2)}


def test_a_pin_after_the_snapshot_survives_the_end_of_the_power(database: Path, tmp_path: Path) -> None:
    with running(store=database, snapshot_turns=2) as chat:
        said(chat, QUESTIONS[:2])
        chat.engine.send(Pin(2))
        chat.wait(ev.TurnPinned)
        pins = chat.conversation.cache.pins
        chat.engine.send(CountTokens("x"))
        chat.wait(ev.TextCounted)
        left = tmp_path / "left"
        shutil.copytree(database.parent, left)
    with running(store=left / database.name, session=session_of(database)) as chat:
        resumed = chat.wait(ev.ConversationResumed)
        assert resumed.prefilled == 0
        assert chat.conversation.cache.pins == pins != ()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("os error 12"), "there was not enough memory to read its saved cache"),
        (RuntimeError("unable to mmap 100 bytes"), "its saved cache could not be read"),
    ],
)
def test_a_snapshot_that_cannot_be_mapped_is_read_again(
    database: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    with running(store=database) as chat:
        said(chat, QUESTIONS[:2])

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(snapshots, "safe_open", fail)
    with running(store=database, session=session_of(database)) as chat:
        assert chat.wait(ev.ConversationResumed, timeout_s=20).prefilled > 0
        assert reason in chat.wait(ev.Notice).text


def test_a_quoted_text_is_read_with_a_given_reply_and_pinned(database: Path) -> None:
    with running(store=database, cache_size=512) as chat:
        chat.turn("one")
        finished = chat.turn("", lambda _: chat.engine.send(Quote("> the sea is green", "Noted.", True)))
        assert (finished.text, finished.reply) == ("> the sea is green", "Noted.")
        assert chat.wait(ev.TurnPinned).turn == 2


def test_a_summary_changes_nothing(database: Path) -> None:
    with running(store=database, cache_size=128) as chat:
        said(chat, QUESTIONS)
        conversation: Any = chat.conversation
        before = (conversation.log.ids.tolist(), list(conversation.cache.ledger.runs), conversation.state())
        chat.engine.send(Compact())
        summary = chat.wait(ev.SummaryReady)
        assert summary.text
        first, last = summary.turns
        assert 1 <= first <= last < 5
        assert (conversation.log.ids.tolist(), list(conversation.cache.ledger.runs), conversation.state()) == before
        assert not chat.engine.busy
    with running() as chat:
        chat.engine.send(Compact())
        assert chat.wait(ev.SummaryReady).text == ""
        assert "nothing to summarize" in chat.wait(ev.Notice).text


def test_the_next_start_says_that_the_last_conversation_was_not_closed(database: Path) -> None:
    with a_session(database) as (_, session):
        pass
    with Store(database) as store:
        store.mark_open(session, 4711)  # as a process leaves it that is killed
    with running(store=database) as chat:
        told = chat.wait(ev.Notice).text
        assert told == f"The last session was not closed properly; /resume {session} resumes it (5 turns)."
    with running(store=database) as chat:
        chat.turn("x")
        assert not [notice for notice in chat.of(ev.Notice) if "closed" in notice.text]


def test_a_reply_that_was_cut_off_is_kept_and_counted(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a crash: the turn is still running in the store."""
    monkeypatch.setattr("streamchat.sessions.recorder.BATCH_S", 0.0)
    with a_session(database, QUESTIONS[:2], cache_size=512, max_new_tokens=30) as (chat, session):
        chat.engine.send(Submit("a long story"))
        chat.wait(ev.TextDelta, len(chat.of(ev.TextDelta)) + 10)
        with Store(database) as store:
            killed = store.load(session).turns[-1]
        chat.wait(ev.TurnFinished, 3)
    assert killed.state == "running"
    with Store(database) as store:
        row = "(SELECT id FROM turns WHERE number = 3)"
        store._open.writer.execute(f"UPDATE messages SET text = 'x' WHERE role = 'assistant' AND turn = {row}")
        sql = "UPDATE turns SET state = 'running', ids = ?, stats = NULL, finish_reason = NULL WHERE number = 3"
        from streamchat.store.records import pack_ids

        store._open.writer.execute(sql, (pack_ids(killed.ids),))
        held = [(0, killed.start + len(killed.ids))]
        store._open.writer.execute("UPDATE sessions SET held = ?", (json.dumps(held),))
    with running(store=database, session=session) as chat:
        resumed = chat.wait(ev.ConversationResumed)
        last = resumed.turns[-1]
        conversation: Any = chat.conversation
        opening = len(conversation.encoder.reply_opening())
        written = len(killed.ids) - (killed.reply_start - killed.start) - opening
        assert last.finish_reason == "cancelled"
        assert 0 < last.new_tokens <= written
        assert last.reply
        assert killed.reply.startswith(last.reply[:3])
        chat.until(lambda events: is_told(events, "the saved part of the reply was kept"))
        assert chat.turn("go on").stats.turn == 4
    with running(store=database, session=session) as chat:
        assert [turn.finish_reason for turn in chat.wait(ev.ConversationResumed).turns][2] == "cancelled"
    with Store(database) as store:
        assert [turn.state for turn in store.load(session).turns] == ["done"] * 4


def test_an_imported_conversation_goes_on(database: Path) -> None:
    from array import array

    from streamchat.store.records import ModelIdentity, StoredTurn

    with Store(database) as store:
        session = store.create("Imported", ModelIdentity("default", "x"), {"system_prompt": "Be kind."})
        turns = [StoredTurn(n, f"question {n}", f"answer {n}", 0, 0, 0, array("i")) for n in (1, 2)]
        store.write(session, turns=turns)
    with running(store=database, session=session, cache_size=256) as chat:
        resumed = chat.wait(ev.ConversationResumed)
        assert resumed.system_prompt == "Be kind."
        assert [turn.finish_reason for turn in resumed.turns] == ["stop", "stop"]  # nobody stopped them
        assert "because it was imported and had to be tokenized" in chat.wait(ev.Notice).text
        conversation: Any = chat.conversation
        text = conversation.tokenizer.decode(conversation.log.ids_at(conversation.cache.ledger.runs))
        assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nquestion 1<|im_end|>")
        assert text.endswith("<|im_start|>assistant\nanswer 2<|im_end|>\n")
        assert chat.turn("and 3?").stats.turn == 3


def test_who_asks_as_soon_as_it_is_ready_meets_the_resumed_conversation(database: Path) -> None:
    with a_session(database, QUESTIONS[:2]) as (_, session):
        pass
    with running(store=database, session=session) as chat:
        chat.wait(ev.ModelReady)
        kinds = [type(event) for event in chat.events]
        assert kinds.index(ev.SessionOpened) < kinds.index(ev.ConversationResumed) < kinds.index(ev.ModelReady)
