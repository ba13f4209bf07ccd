"""Success means effect: slash commands for turns and for what was said. See tests/support/effect_table.py."""

from __future__ import annotations

import json
from pathlib import Path

from streamchat.base import events as ev
from tests.support.desk import Desk
from tests.support.effects import indices_of_turn, rows, said, talking
from tests.support.saved_sessions import stored


def test_a_pinned_turn_is_cached_after_1000_tokens_and_after_each_resume() -> None:
    with talking() as talk:
        talk.turn("the capital")
        talk.turn("the sea")
        session = talk.session
        talk.say("/pin 1", then=ev.TurnPinned)
        pinned = indices_of_turn(session, 1)
        talk.go_on()
        assert pinned <= talk.cached
        assert not indices_of_turn(session, 2) & talk.cached
    for _ in range(2):
        with talking(session) as talk:
            assert pinned <= talk.cached
            talk.go_on()
            assert pinned <= talk.cached
    [[pins, held]] = rows("SELECT pins, held FROM sessions WHERE id = ?", session)
    for runs in (json.loads(pins), json.loads(held)):
        assert pinned <= {index for first, stop in runs for index in range(first, stop)}


def test_an_unpinned_turn_is_evicted_like_any_other() -> None:
    with talking() as talk:
        talk.turn("the capital")
        talk.say("/pin 1", then=ev.TurnPinned)
        talk.say("/unpin 1", then=ev.TurnPinned)
        turn = indices_of_turn(talk.session, 1)
        assert turn <= talk.cached
        talk.go_on()
        assert not turn & talk.cached
        assert not turn & {i for a, b in json.loads(rows("SELECT pins FROM sessions")[0][0]) for i in range(a, b)}


def test_an_undone_turn_is_gone_from_cache_log_and_database() -> None:
    with talking() as talk:
        talk.turn("the sea")
        before, log = talk.cached, talk.log
        talk.turn("the unicorn")
        assert "the unicorn" in said(talk.session)
        talk.say("/undo")
        session = talk.session
        assert (talk.cached, talk.log) == (before, log)
        assert "the unicorn" not in said(session)
    with talking(session) as talk:
        assert (talk.cached, talk.log) == (before, log)
        assert "unicorn" not in talk.decoded(talk.log)


def test_a_retried_reply_takes_the_place_of_the_first() -> None:
    with talking(temperature=1.0, max_new_tokens=12) as talk:
        first = talk.turn("the sea").reply
        talk.say("/retry")
        session, second = talk.session, talk.watched.of(ev.TurnFinished)[-1].reply
        assert first != second
        assert said(session) == ["the sea", second]
        assert talk.decoded(talk.log).count("the sea") == 1
    with talking(session) as talk:
        assert [turn.reply for turn in talk.watched.of(ev.ConversationResumed)[0].turns] == [second]


def test_an_edited_message_takes_the_place_of_the_first() -> None:
    with talking() as talk:
        talk.turn("the unicorn")
        talk.say("/edit the dragon")
        assert said(talk.session)[::2] == ["the dragon"]
        text = talk.decoded(talk.log)
        assert ("the dragon" in text, "unicorn" in text) == (True, False)
        talk.say("/edit")  # puts it into the input
        assert said(talk.session) == []
        assert talk.watched.of(ev.TurnUndone)[-1].text == "the dragon"


def test_a_summary_is_of_the_oldest_turns_and_changes_nothing_by_itself() -> None:
    with talking(cache_size=256, max_new_tokens=12) as talk:
        for word in ("the sea", "the dragon", "the girl", "the capital"):
            talk.turn(word)
        before = talk.cached, talk.log, said(talk.session)
        talk.say("/compact")
        ready = talk.watched.of(ev.SummaryReady)[-1]
        assert ready.text
        assert ready.turns[0] == 1
        assert (talk.cached, talk.log, said(talk.session)) == before


def test_a_search_finds_what_another_process_finds() -> None:
    for title in ("unicorn", "unicorns and dragons", "sea"):
        stored(title)
    desk = Desk()
    text = desk.say("/recall unicorn").text
    assert [[text.count("Tell me about")]] == rows("SELECT count(*) FROM messages WHERE text LIKE '%unicorn%'") == [[2]]


def test_a_quoted_message_is_what_the_model_reads() -> None:
    stored("the unicorn")
    with talking() as talk:
        talk.turn("the sea")
        talk.say("/recall unicorn")
        talk.say("/quote 1")
        assert "Tell me about the unicorn" in talk.decoded(talk.log)
        assert "Tell me about the unicorn" in said(talk.session)[2]
        quoted = indices_of_turn(talk.session, 2)
        assert quoted <= talk.cached
        talk.go_on()
        assert not quoted & talk.cached


def test_a_kept_text_is_cached_after_1000_tokens_and_after_a_resume() -> None:
    with talking() as talk:
        talk.turn("the sea")
        talk.say("/keep the key is under the stone")
        session = talk.session
        kept = indices_of_turn(session, 2)
        assert "the key is under the stone" in talk.decoded([talk.log[index] for index in sorted(kept)])
        talk.go_on()
        assert kept <= talk.cached
    with talking(session) as talk:
        assert kept <= talk.cached


def test_a_file_that_is_read_is_in_the_message(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_text("the key is under the stone\n")
    with talking() as talk:
        talk.say(f"/read {file} what is it?")
        assert "the key is under the stone" in said(talk.session)[0]
        assert "the key is under the stone" in talk.decoded(talk.log)
