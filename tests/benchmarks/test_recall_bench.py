"""`streamchat recall-bench`: facts and filler, scores of forced replies, ranks, and the command."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.benchmarks.recall.filler import MOST_WORDS, NOTED, make_facts, read_turns
from streamchat.benchmarks.recall.forced import ForcedChat
from streamchat.benchmarks.recall.ranks import measure_ranks, read_paraphrases
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.recall_ranking import content_words
from streamchat.store.passages import PassageIndex
from tests.support.models_help import save, tiny_llama
from tests.support.real_engine import tiny_loaded
from tests.support.toy_tokenizer import toy_tokenizer

BOOK = "It was a quiet morning. Nobody came along the road, and the mill stood still. " * 60


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    messages = [{"role": "user", "content": "Is it far?"}, {"role": "assistant", "content": "An hour, says Ann."}]
    long = [{"role": "user", "content": "word " * MOST_WORDS}, {"role": "assistant", "content": "I see."}]
    lines = [json.dumps({"messages": each}) for each in (messages, long)]
    chat, book = tmp_path / "chat.jsonl", tmp_path / "book.txt"
    chat.write_text("\n".join(lines))
    book.write_text(BOOK)
    return [chat, book]


def test_facts_differ_and_their_answers_have_five_digits() -> None:
    facts = make_facts(200, 1)
    assert len({fact.answer for fact in facts}) == 200
    for fact in facts:
        [digits] = [word for word in fact.answer.rstrip(".").split() if word.isdigit()]
        assert len(digits) == 5
        assert digits in fact.statement
        assert digits not in fact.question
    assert make_facts(5, 1) == make_facts(5, 1) != make_facts(5, 2)
    with pytest.raises(ConfigError, match="1000 facts are too many"):
        make_facts(1000, 1)


def test_filler_alternates_between_chats_and_books(files: list[Path], tmp_path: Path) -> None:
    turns = list(islice(read_turns(files, 1), 4))
    assert turns[0] == turns[2] == ("Is it far?", "An hour, says Ann.")
    assert turns[1][0].startswith("It was a quiet morning.")
    assert turns[3][0] != turns[1][0]
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    with pytest.raises(ConfigError, match="no messages with replies"):
        read_turns([empty], 1)


def test_a_forced_reply_is_scored_and_leaves_nothing() -> None:
    chat = ForcedChat(Configuration(Settings(cache_size=192, seed=1), {}, None), tiny_loaded(), 192)
    [fact] = make_facts(1, 1)
    turn = chat.say(fact.statement, NOTED)
    for _ in range(9):
        chat.say("and what do you think about it now?", "I do not know.")
    before = chat.conversation.cache.ledger.runs, len(chat.conversation.log), chat.conversation.settings
    scores = {way: chat.score(fact.question, fact.answer, way, turn.number) for way in ("off", "text", "by hand", "on")}
    assert (chat.conversation.cache.ledger.runs, len(chat.conversation.log), chat.conversation.settings) == before
    assert {way: each.recalled for way, each in scores.items()} == {"off": (), "text": (), "by hand": (1,), "on": (1,)}
    assert len({tuple(each.nats) for each in scores.values()} - {tuple(scores["off"].nats)}) >= 2
    assert len(scores["on"].nats) == len(chat.tokenizer(fact.answer)["input_ids"])
    assert len(chat.score(fact.question, fact.answer, most=3).nats) == 3
    # the scores are those of the model's own distribution
    plain = chat.score(fact.question, fact.answer)
    assert plain.nats == scores["off"].nats
    assert all(math.isfinite(nats) and nats > 0 for nats in plain.nats)
    for first, nats in zip(plain.is_first, plain.nats, strict=True):
        assert not first or nats < math.log(chat.conversation.model.config.vocab_size)


def test_a_score_is_the_negative_log_likelihood() -> None:
    from streamchat.benchmarks.recall.forced import Scores, _ForcedSampler

    logits, scores = torch.tensor([0.5, 2.0, -1.0]), Scores()
    sampler = _ForcedSampler([1, 2], scores)
    assert [sampler(logits, ()), sampler(logits, ())] == [1, 2]
    total = sum(math.exp(x) for x in (0.5, 2.0, -1.0))
    assert scores.nats == pytest.approx([math.log(total) - 2.0, math.log(total) + 1.0], abs=1e-6)
    assert scores.is_first == [True, False]


def test_ranks_are_counted_by_the_kind_of_question(files: list[Path]) -> None:
    digits, direct, paraphrased = measure_ranks(toy_tokenizer(), 42, read_turns(files, 1), 2)
    assert [each.questions for each in (digits, direct, paraphrased)] == [42, 42, 42]
    assert (digits.turns, direct.turns) == (168, 440)
    for each in (digits, direct):
        assert 38 <= each.ranked_first <= each.ranked <= 42
        assert 34 <= each.bm25_first <= each.bm25 <= 42
    assert paraphrased.ranked == 0
    assert paraphrased.bm25 < 21


@pytest.mark.parametrize("fact", read_paraphrases(), ids=lambda fact: fact["statement"])
def test_a_paraphrase_shares_no_content_word_with_its_fact(fact: dict[str, str]) -> None:
    index = PassageIndex()
    index.add([fact["statement"]])
    shared = {kind: [word for word in content_words(fact[kind]) if index.having(word, 1)] for kind in fact}
    assert shared["direct"]
    assert shared["paraphrased"] == []


@pytest.mark.slow
def test_the_command(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tiny_llama(max_position_embeddings=4096), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    what = ["recall-bench", "--model", "model", "--dtype", "float32", *map(str, files), "--cache-size", "128"]
    sizes = ["--facts", "2", "--distances", "200,64", "--dense", "64", "--ranked", "5", "--chat-turns", "4"]
    assert cli.main([*what, *sizes, "--json"]) == ExitCode.OK
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {(each["way"], each["distance"]): each for each in data["digits"]}
    assert {distance for _, distance in found} == {64, 200}
    assert ("dense", 64) in found
    assert ("dense", 200) not in found
    assert all(len(each["nats"]) == 2 for each in found.values())
    assert data["cost"]["turns"] == 2
    for wrong in (["--distances", "10"], ["--facts", "0"]):
        assert cli.main([*what, *wrong]) == ExitCode.USAGE
