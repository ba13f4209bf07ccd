"""Random chats: turns, stops, failures, undo, retry, edit, pins, recalls, /compact, /clear and resume at other budgets.

After each step an independent oracle compares ledger, layers, log, transcript, reported numbers, pins, the database and
the next logits. `python -m tools.random_chats` runs many more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from torch import Tensor

from streamchat.base import events as ev
from streamchat.base.eviction_policies import POLICIES
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.speculation import ngrams, speculator
from streamchat.conversation.speculation.costs import ForwardCosts
from streamchat.conversation.speculation.speculator import Speculator
from tests.support.chat_oracle import Fault, Oracle, Tokens
from tests.support.random_chats import RandomChat
from tests.support.random_plans import FAMILIES, Plan, Step, plan, shrunk

CHATS = 30
STEPS = 10


def carry_out(chosen: Plan, folder: Path) -> RandomChat:
    """Run a plan; a fault shows seed and steps."""
    chat = RandomChat(chosen, folder)
    try:
        chat.run()
    except Exception as error:
        error.add_note(f"in step {chat.at} of {chosen}")
        raise
    return chat


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CHATS))
def test_nothing_is_lost_and_all_that_is_told_is_so(seed: int, tmp_path: Path) -> None:
    carry_out(plan(seed, STEPS), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, CHATS, 3))
def test_nothing_is_lost_with_speculation(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every match, up to seven tokens are proposed; transformers' forward pass verifies them."""
    monkeypatch.setattr(speculator, "tokens_at_once", lambda model: 8)
    monkeypatch.setattr(speculator, "MIN_RATE", 0.0)
    monkeypatch.setattr(ngrams, "LENGTHS", (4, 2, 1))
    monkeypatch.setattr(ForwardCosts, "known", True)
    monkeypatch.setattr(Speculator, "_best_count", lambda self, matched, most: min(most, 7))
    proposed, forward = list[int](), Feeder.forward_proposals

    def noted(self: Feeder, token: int, proposals: Sequence[int]) -> Tensor:
        proposed.extend(proposals)
        return forward(self, token, proposals)

    monkeypatch.setattr(Feeder, "forward_proposals", noted)
    chat = carry_out(plan(seed, STEPS), tmp_path)
    if chat.plan.family not in ("gpt2", "falcon_h1"):
        assert proposed


def test_the_chats_cover_what_they_are_for() -> None:
    plans = [plan(seed, STEPS) for seed in range(CHATS)]
    assert {each.family for each in plans} == set(FAMILIES)
    steps = [step for each in plans for step in each.steps]
    assert {
        "turn",
        "undo",
        "retry",
        "edit",
        "reopen",
        "pin",
        "unpin",
        "quote",
        "keep",
        "compact",
        "resume",
        "clear",
    } <= {step.kind for step in steps}
    assert {"prompt", "reply", "memory", "copy", "crash"} <= {step.stop[0] for step in steps}
    assert {each.kv_dtype for each in plans} == {step.kv_dtype for step in steps} == {"", "int8", "int4"}
    assert {each.auto_recall for each in plans} == {"off", "on"}
    assert plan(7) == plan(7) != plan(8)


def turns(count: int, words: int = 3) -> list[Step]:
    """Messages and replies of some 10 to 20 tokens."""
    return [Step("turn", f"{number} of the " + "sea " * words, "green hills " * words) for number in range(count)]


def chat_of(size: int, steps: list[Step], family: str = "llama") -> Plan:
    return Plan(0, family, size, "oldest-turns", "evict", "", tuple(steps))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [name for name in POLICIES if not name.startswith("oldest-")])
def test_a_policy_that_evicts_in_the_middle_loses_nothing(policy: str, family: str, tmp_path: Path) -> None:
    """Undo, retry, pins, /compact and resume, with and without the snapshot and at other budgets."""
    undo, stopped = Step("undo"), Step("turn", "why is it?", "ask", ("prompt", 1))
    steps = [
        *(*turns(8, 1), undo, undo, *turns(2, 2), stopped, Step("pin", turn=6), *turns(3, 1)),
        *(Step("resume", size=200), undo, Step("retry", reply="so it is"), Step("resume", size=200, snapshot=False)),
        *(*turns(2, 1), Step("unpin", turn=6), Step("compact", reply="all of it"), *turns(3, 1)),
        *(Step("resume", size=128), *turns(2, 1), undo, Step("turn", "the sea " * 60, "green " * 30), undo),
    ]
    chat = carry_out(replace(chat_of(200, steps, family), evict=policy), tmp_path)
    assert chat.oracle.out_of_order > 0
    assert chat.checked > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_stops_where_nothing_may_be_evicted(policy: str, tmp_path: Path) -> None:
    chat = carry_out(replace(chat_of(96, turns(6)), evict=policy, on_full="stop"), tmp_path)
    assert not [event for event in chat.events if isinstance(event, ev.TokensEvicted)]
    assert 0 < len(chat.oracle.said) < 6


@pytest.mark.slow
@pytest.mark.parametrize("archive", ["native", "int8"])
@pytest.mark.parametrize("kv_dtype", ["", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral_window_16"])
def test_turns_are_paged_in_among_undo_pins_and_resumes(
    family: str, kv_dtype: str, archive: Literal["native", "int8"], tmp_path: Path
) -> None:
    """The tensors are compared to the bit after an undo, the logits with a reference unless they are rounded."""
    undo, keep = Step("undo"), [Step("keep", "a quote", turn=number) for number in range(3)]
    steps = [
        *(*turns(8, 1), keep[0], undo, keep[1], *turns(2, 1), undo, undo, undo, Step("pin", turn=5), keep[2]),
        *(
            *turns(2, 1),
            keep[0],
            undo,
            Step("resume", size=200),
            keep[0],
            *turns(3, 1),
            undo,
            undo,
            Step("unpin", turn=1),
        ),
        *(*turns(2, 1), keep[1], Step("resume", size=200, snapshot=False), keep[0], undo, *turns(1, 1), undo),
        *(Step("resume", size=200, kv_dtype="int8"), keep[0], *turns(2, 1), keep[1], undo, undo),
    ]
    chosen = replace(chat_of(200, steps, family), kv_dtype=kv_dtype, archive=archive, rebases=True)
    assert carry_out(chosen, tmp_path).paged >= 4


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kv_dtype", "archive"), [("llama", "", "native"), ("gpt_neox", "int8", "int8")])
def test_turns_are_recalled_among_undo_pins_and_resumes(
    family: str, kv_dtype: str, archive: Literal["native", "int8"], tmp_path: Path
) -> None:
    """Recalled tokens are never evicted for the reply; the next message makes them the oldest ones again."""
    undo, ask = Step("undo"), Step("turn", "ask why a dragon", "sing")
    failed = [replace(ask, stop=("prompt", 1)), replace(ask, stop=("memory", 2))]
    steps = [
        *(
            Step("turn", "why a dragon ask", "little girls sing"),
            *turns(8, 1),
            ask,
            undo,
            ask,
            Step("retry", reply="so"),
        ),
        *(*turns(1, 1), ask, Step("pin", turn=8), Step("keep", "a quote", turn=2), undo, undo, undo),
        *(ask, *failed, Step("compact", reply="they sing"), Step("edit", ask.text, "green hills")),
        *(Step("resume", size=200), *turns(2, 1), ask, undo, Step("resume", size=200, snapshot=False), ask, undo, undo),
    ]
    chosen = replace(chat_of(200, steps, family), auto_recall="on", kv_dtype=kv_dtype, archive=archive, rebases=True)
    chat = carry_out(chosen, tmp_path)
    assert chat.recalled >= 8
    assert chat.checked > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family"), [("retry", "llama"), ("edit", "llama"), *[("undo", family) for family in FAMILIES]]
)
def test_eight_turns_at_128_resumed_at_56(kind: str, family: str, tmp_path: Path) -> None:
    last = [Step("resume", size=56), Step(kind, "why?", "so it is"), Step("undo"), Step("turn", "on", "and on")]
    assert carry_out(chat_of(128, [*turns(8), *last], family), tmp_path).checked > 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(96, 200), (200, 96), (56, 56), (44, 128)])
def test_undo_behind_several_resumes(sizes: tuple[int, int], tmp_path: Path) -> None:
    steps = [*turns(5), Step("resume", size=sizes[0]), Step("undo"), *turns(2), Step("resume", size=sizes[1])]
    carry_out(chat_of(200, [*steps, *[Step("undo")] * 6], "gpt_neox"), tmp_path)


def test_a_reply_that_a_crash_cut_off_is_closed_where_nothing_may_be_evicted(tmp_path: Path) -> None:
    cut = Step("turn", "the sea " * 20, "green hills " * 4, ("crash", 4), size=44)
    carry_out(replace(chat_of(200, [cut]), on_full="stop"), tmp_path)


def test_pins_that_no_longer_fit_are_removed_oldest_first(tmp_path: Path) -> None:
    steps = [Step("turn", "mark " * 12, "well"), *turns(1), Step("pin", turn=1), Step("pin", turn=2)]
    chat = RandomChat(chat_of(200, [*steps, Step("resume", size=96)]), tmp_path)
    chat.run()
    assert chat.oracle.pinned == {2}
    assert any("Turn 1 is no longer pinned: with cache_size = 96" in getattr(e, "text", "") for e in chat.events)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retry", "edit", "reopen"])
@pytest.mark.parametrize("stop", [("", 0), ("prompt", 1)], ids=["answered", "stopped, and sent once more"])
def test_what_takes_the_place_of_a_pinned_turn_is_pinned(kind: str, stop: tuple[str, int], tmp_path: Path) -> None:
    steps = [*turns(2), Step("pin", turn=2), Step(kind, "and now?", "yes", stop)]
    if stop[0]:
        steps.append(Step("turn", "and now?", "yes"))
    chat = carry_out(chat_of(200, steps), tmp_path)
    assert chat.oracle.pinned == {2}


@pytest.mark.parametrize("step", [Step("undo"), Step("clear")])
def test_a_turn_after_an_undo_is_not_pinned(step: Step, tmp_path: Path) -> None:
    chat = carry_out(chat_of(200, [*turns(2), Step("pin", turn=2), step, *turns(2)]), tmp_path)
    assert chat.oracle.pinned == set()


FAILED = [
    Step("compact", reply="they sing", stop=("memory", 1)),
    Step("turn", "a long one " * 20, "x", ("prompt", 3)),
    Step("turn", "a long one " * 20, "x", ("memory", 3)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("between", "family"),
    [(Step("compact", reply="they sing of the sea " * 4), family) for family in FAMILIES]
    + [(step, family) for step in FAILED for family in ("llama", "falcon_h1")],
)
def test_undo_is_exact_behind_turns_that_did_not_stay(between: Step, family: str, tmp_path: Path) -> None:
    """The oracle requires the layers to be equal to the bit, and that nothing is read again."""
    carry_out(chat_of(96, [*turns(5), between, Step("undo")], family), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_h1"])
def test_memory_that_runs_out_during_an_undo_leaves_what_never_leaves(family: str, tmp_path: Path) -> None:
    steps = [*turns(6), Step("pin", turn=6), *turns(2), Step("undo"), Step("undo", stop=("memory", 2)), *turns(1)]
    chat = RandomChat(chat_of(128, steps, family), tmp_path)
    chat.run()
    assert chat.oracle.tokens.held[: chat.oracle.system] == list(range(chat.oracle.system))
    assert 6 in chat.oracle.pinned


@pytest.mark.slow
def test_a_fault_is_found_and_its_steps_become_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The oracle has teeth: a cache that is filled again without its newest token is noticed."""
    prefill_runs = Feeder.prefill_runs
    monkeypatch.setattr(Feeder, "prefill_runs", lambda self, runs, stop: prefill_runs(self, runs[:-1], stop))
    count = 0

    def fails(tried: Plan) -> bool:
        nonlocal count
        count += 1
        try:
            RandomChat(tried, tmp_path / str(count)).run()
        except Fault:
            return True
        return False

    chosen = chat_of(96, [*turns(5), Step("compact"), Step("resume", size=96, snapshot=False), *turns(2)])
    assert fails(chosen)
    small = shrunk(chosen, fails)
    assert [step.kind for step in small.steps] == ["turn", "resume"]
    assert "resume, at 96, without its snapshot" in str(small)


def test_the_oracle_knows_evictions_that_are_not_the_oldest() -> None:
    oracle = Oracle(Tokens(None, False), None, budget=16, sinks=2, system=4, starts=[4, 8, 12])
    oracle.tokens.held, oracle.tokens.log = list(range(16)), [0] * 16
    oracle.pinned = {1}
    oracle.budget = 12
    oracle.check_fit(list(range(16)), [*range(8), *range(12, 16)], "fit")
    for wrong in ([*range(12)], [*range(4), *range(8, 16)], [*range(8)], [*range(1, 8), *range(12, 16)]):
        with pytest.raises(Fault):
            oracle.check_fit(list(range(16)), wrong, "fit")
