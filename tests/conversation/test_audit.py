"""Audits: emitted with which events, in which order, what they contain, and how they find a wrongly fed turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.conversation import audit as module
from streamchat.conversation.audit import Auditor
from streamchat.conversation.template.reference import Reference
from streamchat.conversation.template.rendering import UnusableTemplateError
from tests.support import toy_tokenizer as toy
from tests.support.scripted_model import Chat, make_chat
from tests.support.turn_figures import stats_of

STATE = ev.CacheState()
FINISHED = ev.TurnFinished(stats_of(1), "stop", "reply")


def talk(turns: int = 2, **settings: Any) -> Chat:
    chat = make_chat(cache_size=256, max_new_tokens=40, **settings)
    for number in range(turns):
        chat.say(f"question {number}", f"the answer {number}")
    return chat


def audited(chat: Chat, *events: ev.Event) -> list[ev.Event]:
    """What an auditor emits for these events."""
    emitted: list[ev.Event] = []
    auditor = Auditor(emitted.append, lambda: chat.conversation)
    for event in events:
        auditor(event)
    return emitted


def difference(chat: Chat) -> str:
    """How the newest turn differs from its rendering, by its audit."""
    audit = audited(chat, FINISHED)[0]
    assert isinstance(audit, ev.CacheAudited)
    assert audit.turn is not None
    return audit.turn.difference


@pytest.mark.parametrize(
    ("event", "after"),
    [
        (ev.TokensEvicted(1, (4, 5), (1,), (), 9, 8, "decode"), "eviction"),
        (ev.TurnPagedIn(1, 3, 0.1, STATE), "page_in"),
        (ev.TurnsRecalled(2, (1,), (), 3, ((4, 7),), 0.1, STATE), "recall"),
        (ev.TurnUndone(1, "text", "reply", STATE), "undo"),
        (ev.ConversationResumed("s", "", (), STATE, None, "", 0.0), "resume"),  # type: ignore[arg-type]
    ],
    ids=lambda each: type(each).__name__,
)
def test_an_audit_follows_what_changes_the_cache(event: ev.Event, after: str) -> None:
    first, second = audited(talk(1), event)
    assert first is event
    assert isinstance(second, ev.CacheAudited)
    assert second.after == after


@pytest.mark.parametrize(("rolled_back", "after"), [(False, "turn"), (True, "rollback")])
def test_the_audit_of_a_turn_precedes_its_end(rolled_back: bool, after: str) -> None:
    event = replace(FINISHED, rolled_back=rolled_back)
    first, second = audited(talk(1), event)
    assert isinstance(first, ev.CacheAudited)
    assert (first.after, second) == (after, event)


def test_other_events_have_no_audit() -> None:
    events = [ev.TurnStarted(1, "hello", 3), ev.TextDelta(1, "x"), ev.Notice("anything")]
    assert audited(talk(1), *events) == events


def test_without_a_conversation_there_is_nothing_to_audit() -> None:
    emitted: list[ev.Event] = []
    Auditor(emitted.append, lambda: None)(FINISHED)
    assert emitted == [FINISHED]


def test_an_audit_has_what_cache_and_log_contain() -> None:
    chat = make_chat(cache_size=128, max_new_tokens=40)
    for number in range(7):
        chat.say(f"question {number}", f"the answer {number}")
    conversation = chat.conversation
    conversation.set_pin(6, True)
    cache, log, newest = conversation.cache, conversation.log, conversation.log.turns[-1]
    assert cache.compression_count > 0
    assert audited(chat, FINISHED)[0] == ev.CacheAudited(
        after="turn",
        lengths=(cache.length,) * 3,
        ledger=tuple(cache.ledger.runs),
        next_index=len(log),
        log_tokens=len(log),
        cache_size=128,
        pins=cache.pins,
        compressions=cache.compression_count,
        cache_id=id(cache),
        kv_bytes=cache.kv_bytes,
        ids=tuple(chat.cached),
        turn=ev.AuditedTurn(7, newest.start, newest.prompt_end, newest.end),
    )


def test_an_empty_conversation_has_no_turn() -> None:
    audit = audited(talk(0), FINISHED)[0]
    assert isinstance(audit, ev.CacheAudited)
    assert audit.turn is None


@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("template", [toy.CHATML, None, toy.NEWEST], ids=["chatml", "plain", "newest"])
def test_turns_are_fed_as_the_template_writes_them(turns: int, template: str | None) -> None:
    chat = talk(turns, template=template)
    assert difference(chat) == ""
    newest = chat.conversation.log.turns[-1]
    chat.conversation.log.ids[newest.message_start] = chat.tokenizer("z", add_special_tokens=False)["input_ids"][0]
    assert difference(chat).startswith("the chat template writes '")


def test_only_the_audit_of_a_turn_compares_it() -> None:
    chat = talk()
    chat.conversation.log.ids[chat.conversation.log.turns[-1].message_start] += 1
    assert difference(chat)
    audit = audited(chat, ev.TurnUndone(1, "text", "reply", STATE))[1]
    assert isinstance(audit, ev.CacheAudited)
    assert audit.turn is not None
    assert audit.turn.difference == ""


def test_a_turn_of_another_process_is_not_compared() -> None:
    chat = talk()
    chat.conversation.log.turns[-1].text = "another"
    assert difference(chat)
    chat.conversation.log.turns[-1].prompt_end = None
    assert difference(chat) == ""


def test_a_template_that_raises_for_these_texts_has_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise UnusableTemplateError("roles must alternate")

    chat = talk()
    chat.conversation.log.turns[-1].text = "another"
    monkeypatch.setattr(module, "turn_difference", fail)
    assert difference(chat) == ""


def test_the_first_turn_and_the_one_before_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, histories = talk(5), list[Any]()

    def same(*args: Any) -> str:
        histories.append(args[3])
        return ""

    monkeypatch.setattr(module, "turn_difference", same)
    difference(chat)
    first, before, newest = (chat.conversation.log.turns[at] for at in (0, -2, -1))
    assert histories[0].history == [(first.text, first.reply), (before.text, before.reply)]
    assert histories[0].ids == chat.conversation.log.ids[before.start : newest.end].tolist()
    assert newest.prompt_end is not None
    assert histories[0].prompt_end == newest.prompt_end - before.start
    one = talk(1)
    difference(one)
    assert (histories[1].history, histories[1].ids) == ([], one.conversation.log.ids.tolist())


def test_a_reply_that_is_fed_otherwise_than_shown_is_a_difference() -> None:
    chat = talk()
    chat.conversation.log.turns[-1].reply = "x" * 300
    assert difference(chat) == f"the reply {'x' * 200!r} is fed as 'the answer 1'"
    chat.conversation.log.turns[-1].reply = "  the answer 1\N{REPLACEMENT CHARACTER}\n"  # neither is shown
    assert difference(chat) == ""


def test_a_difference_shows_the_end_of_the_text_without_special_tokens() -> None:
    chat = make_chat(cache_size=256, max_new_tokens=300, control=["<|pause|>"])
    pause = chat.tokenizer.convert_tokens_to_ids("<|pause|>")
    letter = chat.tokenizer("z", add_special_tokens=False)["input_ids"]
    chat.say("What?", [*letter * 110, pause, *letter * 110, chat.tokenizer.eos_token_id])
    assert difference(chat) == ""
    chat.conversation.log.turns[-1].reply = "A lake."
    assert difference(chat) == f"the reply 'A lake.' is fed as '{'z' * 200}'"


def test_a_given_reply_is_compared_id_by_id() -> None:
    chat = talk()
    chat.conversation.run_turn("What is it?", lambda: False, reply="A sea.")
    assert difference(chat) == ""
    turn = chat.conversation.log.turns[-1]
    turn.reply = "A lake."
    assert difference(chat).startswith("the chat template writes '")
    turn.given = False  # then only the text of the reply counts
    assert difference(chat) == "the reply 'A lake.' is fed as 'A sea.'"


def test_the_reference_is_made_once_for_each_format(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[str]()

    def noted(tokenizer: Any, chat_format: Any, prompt: str) -> Any:
        made.append(prompt)
        return Reference(tokenizer, chat_format, prompt)

    monkeypatch.setattr(module, "Reference", noted)
    chat = talk(2, system_prompt="Be brief.")
    emitted: list[ev.Event] = []
    auditor = Auditor(emitted.append, lambda: chat.conversation)
    auditor(FINISHED)
    auditor(FINISHED)
    assert made == ["Be brief."]
    chat.conversation.encoder.format = replace(chat.conversation.encoder.format, generation="other")
    auditor(FINISHED)
    assert made == ["Be brief."] * 2
    assert "" in {audit.turn.difference for audit in emitted if isinstance(audit, ev.CacheAudited) and audit.turn}
