"""DRY against a slow and plain reference: which tokens it penalizes and by how much, wherever the log comes from."""

from __future__ import annotations

import random
from array import array
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.cache.positions.strategy import Verdict, choose_fit
from streamchat.config.settings import Settings
from streamchat.conversation.conversation import Conversation
from streamchat.conversation.dry import LARGEST, DryPenalty, RepeatedSequences, dry_penalty, parse_breakers
from streamchat.conversation.log import TokenLog
from streamchat.conversation.sampling import Sampler, new_generator
from streamchat.conversation.template.format import choose_format
from tests.support.tiny import tiny_model
from tests.support.toy_tokenizer import CHATML, VOCABULARY, joining_tokenizer, toy_tokenizer

CPU = torch.device("cpu")
CONTROL = frozenset({0})
TEXTS = ["<end>", "a", "b", "c", "\n", "ab:", ": b", "x y", "st", "op", "stop", "d"]


def reference(
    ids: Sequence[int],
    settings: Settings,
    span: int,
    control: Collection[int],
    breakers: Collection[str],
    texts: Sequence[str] = TEXTS,
) -> dict[int, float]:
    """Compare the end of the text with every earlier place, token by token."""
    ends = [token in control for token in ids]
    text, starts = "", []
    for token in ids:
        if token in control:
            text = ""  # no breaker crosses a control token
        starts.append(len(text))
        text += texts[token] if token not in control else ""
        tail = len(text)
        ends[len(starts) - 1] |= any(
            text.startswith(breaker, at)
            for breaker in breakers
            for at in range(max(0, starts[-1] - len(breaker) + 1), tail)
            if starts[-1] < at + len(breaker) <= tail
        )
    first = max(0, len(ids) - span)
    newest = 0
    while newest < len(ids) - first and not ends[len(ids) - 1 - newest]:
        newest += 1
    found: dict[int, float] = {}
    for place in range(first, len(ids)):
        length = 0
        while length < min(newest, place - first) and ids[place - 1 - length] == ids[len(ids) - 1 - length]:
            length += 1
        if length >= settings.dry_allowed_length and ids[place] not in control:
            amount = settings.dry_multiplier * settings.dry_base ** (length - settings.dry_allowed_length)
            found[ids[place]] = max(found.get(ids[place], 0.0), min(LARGEST, amount))
    return found


def penalty(settings: Settings, log: TokenLog, cache_size: int = 1000) -> DryPenalty:
    return DryPenalty(settings, log, cache_size, CONTROL, TEXTS.__getitem__)


@pytest.mark.parametrize("breakers", ["", "\\n", '\\n : " *', "stop", "b\\sx \\n"])
@pytest.mark.parametrize("span", [-1, 7, 40])
def test_penalties_are_those_of_the_reference_at_every_token(breakers: str, span: int) -> None:
    """Texts of few tokens repeat often; the window moves over them; every length of the text is also a new reply."""
    for seed in range(6):
        chance = random.Random(seed)
        few = chance.sample(range(len(TEXTS)), 3 + seed)
        settings = Settings(
            dry_multiplier=0.5 + seed,
            dry_base=1.0 + 0.3 * seed,
            dry_allowed_length=1 + seed % 3,
            dry_penalty_last_n=span,
            dry_sequence_breakers=breakers,
        )
        size = span if span > 0 else 60
        log = TokenLog()
        followed = penalty(settings, log, 60)
        for _ in range(80):
            log.append([chance.choice(few)])
            expected = reference(log.ids, settings, size, CONTROL, parse_breakers(breakers))
            assert followed.penalties() == pytest.approx(expected)
            assert penalty(settings, log, 60).penalties() == pytest.approx(expected)


@pytest.mark.parametrize(
    "breakers", ["aa", "aab", "bab abba", "baaa b\\sa ab", "aabb \\sb\\s babab bb", "\\s aba", "bbaa aaaab"]
)
def test_breakers_of_several_tokens_end_sequences_in_the_last_of_them(breakers: str) -> None:
    """Texts of two letters and a space: breakers cross tokens, start inside them, and do not cross control tokens."""
    texts, chance = ["<end>", "a", "b", " ", "ab", "baa"], random.Random(len(breakers))
    settings = Settings(dry_multiplier=1.0, dry_base=1.5, dry_allowed_length=1, dry_sequence_breakers=breakers)
    for few in ([1], [2, 1], [0, 1, 2], [1, 2, 3], [1, 2, 4, 5], [0, 1, 3, 5]):
        for span in (4, 9):
            log = TokenLog()
            followed = DryPenalty(settings, log, span, CONTROL, texts.__getitem__)
            for _ in range(12):
                log.append([chance.choice(few)])
                expected = reference(log.ids, settings, span, CONTROL, parse_breakers(breakers), texts)
                assert followed.penalties() == pytest.approx(expected)
                restarted = DryPenalty(settings, log, span, CONTROL, texts.__getitem__)
                assert restarted.penalties() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ids", "breaker", "newest"),
    [
        ([1, 2, 2], "babb", 1),  # the start of the log does not follow its end
        ([1, 1], "aa", 0),
        ([2, 1, 1, 1], "baa", 1),
        ([2, 1, 1], "aab", 1),
    ],
)
def test_a_breaker_at_the_start_of_the_log_or_of_the_range(ids: list[int], breaker: str, newest: int) -> None:
    """The newest token is repeated `newest` times, as far as no breaker ends in between."""
    texts = ["<end>", "a", "b"]
    settings = Settings(
        dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=1, dry_penalty_last_n=3, dry_sequence_breakers=breaker
    )
    found = DryPenalty(settings, TokenLog(array("i", ids)), 100, CONTROL, texts.__getitem__).penalties()
    assert found == ({ids[-1]: 2.0 ** (newest - 1)} if newest else {})


def test_sequences_may_be_followed_from_nothing_and_started_again() -> None:
    """Sequences of 4 tokens at most, without a log."""
    sequences = RepeatedSequences(4)
    for token in [5, 6, 5, 6]:
        sequences.append(token, ends_sequence=False)
    assert sequences.continuations(1) == {5: 2}
    sequences.append(5, ends_sequence=False)
    assert sequences.continuations(1) == {6: 2}  # the first 5 is out of range
    assert all(type(token) is int for token in sequences.continuations(1))
    sequences.start([6, 6, 5, 7, 8, 9, 9, 9], limit=1)
    assert sequences.continuations(1) == {9: 1}
    sequences.start([1, 2, 3], limit=3)
    assert sequences.continuations(1) == {}
    sequences.append(2, ends_sequence=True)
    assert sequences.continuations(1) == {}
    sequences.append(3, ends_sequence=False)
    assert sequences.continuations(1) == {2: 1}
    assert sequences.continuations(2) == {}


def test_the_breaker_none_is_an_empty_list() -> None:
    assert parse_breakers(" none ") == ()
    assert parse_breakers("none \\n") == ("none", "\n")


def test_breakers_are_compared_with_the_text_that_the_tokenizer_decodes() -> None:
    """Also if it would join words and signs, as older tokenizers do by default."""
    tokenizer = joining_tokenizer()
    tokenizer.add_tokens([" ."])
    dot, a = tokenizer.convert_tokens_to_ids([" .", "a"])
    settings = Settings(dry_multiplier=1.0, dry_allowed_length=1, dry_sequence_breakers="\\s")
    log = TokenLog(array("i", [a, dot, a, dot]))
    penalties = dry_penalty(settings, log, 64, (), tokenizer)
    assert penalties is not None
    assert penalties.penalties() == {}
    log.append([a])
    assert penalties.penalties() == {dot: pytest.approx(1.0)}


def test_the_penalty_grows_with_the_repeated_sequence() -> None:
    settings = Settings(dry_multiplier=0.8, dry_base=1.75, dry_allowed_length=2, dry_sequence_breakers="")
    log = TokenLog(array("i", [1, 2, 3, 11, 1, 2]))
    assert penalty(settings, log).penalties() == {3: pytest.approx(0.8)}
    log.append([3])
    assert penalty(settings, log).penalties() == {11: pytest.approx(0.8 * 1.75)}
    assert penalty(settings, TokenLog(array("i", [1, 2, 3, 11, 2]))).penalties() == {}


def test_a_very_long_loop_has_a_finite_penalty() -> None:
    settings = Settings(dry_multiplier=1.0, dry_base=4.0, dry_sequence_breakers="")
    amounts = penalty(settings, TokenLog(array("i", [1] * 5000)), 4000).penalties()
    assert amounts == {1: LARGEST}


def test_a_reply_can_always_end() -> None:
    settings = Settings(dry_multiplier=1.0, dry_sequence_breakers="")
    assert penalty(settings, TokenLog(array("i", [1, 2, 3, 0, 1, 2, 3]))).penalties() == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("  ", ()),
        ('\\n : " *', ("\n", ":", '"', "*")),
        ("\\s", (" ",)),
        ("a\\tb \\\\n a\\tb", ("a\tb", "\\n")),
    ],
)
def test_breakers_are_separated_by_spaces_and_may_be_escaped(text: str, expected: tuple[str, ...]) -> None:
    assert parse_breakers(text) == expected


@pytest.mark.parametrize("off", [{"dry_multiplier": 0.0}, {"dry_multiplier": 1.0, "dry_penalty_last_n": 0}])
def test_it_is_off_without_a_multiplier_or_a_range(off: dict[str, Any]) -> None:
    assert dry_penalty(Settings(**off), TokenLog(), 64, (), None) is None


def test_the_sampler_subtracts_the_penalties_after_the_repetition_penalty() -> None:
    settings = Settings(temperature=0.0, repetition_penalty=2.0, dry_multiplier=1.5, dry_sequence_breakers="")
    log = TokenLog(array("i", [1, 2, 3, 11, 1, 2]))
    sample = Sampler(settings, CPU, new_generator(0, CPU), penalty(settings, log))
    logits = torch.zeros(12)
    logits[3], logits[4] = 8.0, 2.6
    assert sample(logits, (3,)) == 4  # 8 / 2 - 1.5 = 2.5
    logits[4] = 2.4
    assert sample(logits, (3,)) == 3


# --- in a conversation ------------------------------------------------------------------------------------------------


class Unending(Sampler):
    """Samples no control tokens: random models would end most replies early."""

    def __call__(self, logits: torch.Tensor, recent: Any) -> int:
        tokenizer = toy_tokenizer(CHATML)
        control = torch.tensor(tokenizer.all_special_ids)
        return super().__call__(logits.clone().index_fill_(0, control, -1e9), recent)


def chat_of(cache_size: int = 96, max_new_tokens: int = 60, **settings: Any) -> tuple[Conversation, list[ev.Event]]:
    tokenizer, events = toy_tokenizer(CHATML), list[ev.Event]()
    model = tiny_model("llama", vocab_size=VOCABULARY)
    plain: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "loop_guard": "off"}
    chosen = Settings(**(plain | settings), max_new_tokens=max_new_tokens)
    fit = choose_fit(model, verdict=Verdict(absolute_limit=None))
    chat_format = choose_format(tokenizer, "auto", "")
    return Conversation(model, tokenizer, fit, chat_format, chosen, cache_size, events.append, Unending), events


def longest_repeat(ids: Sequence[int]) -> int:
    """The longest sequence that occurs twice in `ids`."""
    text = [str(token) for token in ids]
    length = 0
    while any(
        text[a : a + length + 1] == text[b : b + length + 1]
        for a in range(len(text) - length)
        for b in range(a + 1, len(text) - length)
    ):
        length += 1
    return length


def reply_ids(chat: Conversation) -> list[int]:
    turn = chat.log.turns[-1]
    assert turn.prompt_end is not None
    return list(chat.log.ids[turn.prompt_end : turn.end])


def test_a_reply_with_evictions_repeats_itself_less() -> None:
    plain, _ = chat_of(max_new_tokens=150)
    plain.run_turn("tell me of the sea", lambda: False)
    dry, events = chat_of(dry_multiplier=5.0, dry_sequence_breakers="", max_new_tokens=150)
    dry.run_turn("tell me of the sea", lambda: False)
    assert any(isinstance(event, ev.TokensEvicted) for event in events)
    plain_repeat, repeat = (longest_repeat(reply_ids(chat)[-90:]) for chat in (plain, dry))
    assert plain_repeat > 8 > 4 >= repeat


def test_undone_and_repeated_turns_have_the_same_penalties() -> None:
    chat, _ = chat_of(dry_multiplier=2.0, dry_sequence_breakers="")
    chat.run_turn("one", lambda: False)
    second = chat.run_turn("two", lambda: False).reply
    third = chat.run_turn("three", lambda: False).reply
    chat.undo()
    other = chat.run_turn("another branch", lambda: False).reply
    chat.undo()
    assert chat.run_turn("three", lambda: False).reply == third != other
    chat.undo()
    chat.undo()
    assert chat.run_turn("two", lambda: False).reply == second
