"""What must hold in a chat, by rules of its own: lists of tokens, sets of turns, and a slow reference for the logits.

Nothing here asks the product how it plans evictions, undo or resume. It watches forwards and events, follows them with
plain lists, and compares those lists with ledger, layers, log, transcript and the numbers that are reported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from streamchat.base import events as ev
from streamchat.cache import checkpoint
from tests.support.paper_reference import PaperReference, cache_name

TOLERANCE = 3e-4
"""Of a logit; the models' logits have a spread of about 1 or more."""
LEAST_WINDOW = 8
Run = tuple[int, int]


class Fault(AssertionError):
    """A rule does not hold."""


def require(holds: object, *words: object) -> None:
    """Raise `Fault` with `words` unless `holds`."""
    if not holds:
        raise Fault(" ".join(map(str, words)))


def indices(runs: Iterable[Sequence[int]]) -> list[int]:
    """All numbers in the runs."""
    return [index for first, stop in runs for index in range(first, stop)]


class Tokens:
    """A slow copy of the cache: which tokens of the log it has, and, for models that rotate keys, a reference of it.

    Args:
        model: The model.
        rotates: Keep a reference that feeds and drops what the cache does.
    """

    def __init__(self, model: Any, rotates: bool) -> None:
        self.model, self.rotates = model, rotates
        self.clear()

    def clear(self) -> None:
        """Nothing was fed."""
        self.log: list[int] = []
        self.held: list[int] = []
        self.unread: list[int] = []
        """Ids of the newest tokens, which the reference has yet to read: all at once, since nothing left in between."""
        self.whole = True
        """Nothing was evicted since the first token: the state is that of one plain forward."""
        self.gone: dict[int, list[list[Tensor]]] = {}
        """Keys and values in each layer of the reference of tokens that left, as long as it knows them."""
        self._reference = PaperReference(self.model, 1 << 30, 0) if self.rotates else None
        if self._reference is not None:
            self._reference.tap._heads_second = True  # in every family that is tried here

    def feed(self, ids: Sequence[int]) -> None:
        """`ids` were fed in one forward."""
        self.held += range(len(self.log), len(self.log) + len(ids))
        self.log += ids
        self.unread += ids

    def _read(self) -> Tensor | None:
        """Let the reference read what it has yet to read; returns its logits (vocabulary,) after the last token."""
        ids, self.unread = self.unread, []
        if self._reference is None or not ids:
            return None
        return self._reference.feed(torch.tensor([ids]))[-1]

    def drop(self, gone: Iterable[int]) -> None:
        """Tokens with these log indices left."""
        leave = set(gone)
        self._read()
        if self._reference is not None:
            for slot, index in enumerate(self.held):
                if index in leave:
                    layers = self._reference.layers
                    self.gone[index] = [[x[:, :, slot : slot + 1] for x in layer.raw] for layer in layers]
        self.keep([i for i in self.held if i not in leave])
        self.whole = self.whole and not leave

    def page_in(self, back: Sequence[int]) -> None:
        """Tokens with these log indices are back, as they left."""
        self._read()
        old, self.held = self.held, sorted({*self.held, *back})
        reference = self._reference
        if reference is None or not all(index in self.gone for index in back):
            self.lose_track()
            return
        reference.kept.indices = list(range(len(self.held)))
        for i, layer in enumerate(reference.layers):
            slots = {index: [x[:, :, at : at + 1] for x in layer.raw] for at, index in enumerate(old)}
            slots |= {index: self.gone[index][i] for index in back}
            pairs = zip(*(slots[index] for index in self.held), strict=True)
            layer.raw = [torch.cat(column, dim=2) for column in pairs]

    def cut(self, count: int) -> None:
        """The newest `count` tokens were cut, from the log as well."""
        if count:
            self.keep(self.held[:-count])
            del self.log[-count:]

    def keep(self, held: list[int]) -> None:
        """Hold these of the tokens held."""
        self._read()
        stay = set(held)
        slots = [slot for slot, index in enumerate(self.held) if index in stay]
        self.held = held
        if self._reference is not None:
            reference = self._reference
            reference.kept.indices = list(range(len(slots)))
            for layer in reference.layers:
                layer.raw = [x[:, :, slots] for x in layer.raw]

    def prefill(self, held: list[int], stop: int) -> None:
        """The cache was emptied, and the tokens `held` of the log's first `stop` were fed as one text."""
        log = self.log[:stop]
        self.clear()
        self.log, self.held = log, list(held)
        self.unread = [log[i] for i in held]

    def lose_track(self) -> None:
        """Until the cache is filled again nothing slow can tell what the layers hold."""
        self.whole, self._reference = False, None

    def copy(self) -> Tokens:
        """As it is now."""
        self._read()
        other = copy.copy(self)
        other.log, other.held, other.unread = list(self.log), list(self.held), []
        other.gone = dict(self.gone)
        if self._reference is not None:
            other._reference = PaperReference(self.model, 1 << 30, 0)
            other._reference.kept = copy.deepcopy(self._reference.kept)
            other._reference.tap._heads_second = True
            for ours, theirs in zip(self._reference.layers, other._reference.layers, strict=True):
                theirs.raw, theirs._place, theirs.is_initialized = list(ours.raw), ours._place, ours.is_initialized
        return other

    @torch.no_grad()
    def next_logits(self, recompute: bool) -> Tensor | None:
        """Logits (vocabulary,) after the last token, fed once more; None where nothing slow can tell.

        Args:
            recompute: The model reads all kept tokens again after an eviction.
        """
        if self._reference is None:
            if not (self.whole or recompute):
                return None
            ids = torch.tensor([[self.log[i] for i in self.held]])
            plain: Tensor = self.model(input_ids=ids, use_cache=False).logits[0, -1]
            return plain
        again = self.copy()
        last = again.log[-1]
        again.cut(1)
        again.unread = [last]
        return again._read()


@dataclass
class Moment:
    """A conversation before a turn."""

    tokens: Tokens
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    evictions: int


@dataclass
class Oracle:
    """Follows one conversation by what is fed and told; `check` compares."""

    tokens: Tokens
    tokenizer: Any
    oldest_first: bool = True
    """Whether the policy evicts the oldest tokens."""
    tolerance: float | None = TOLERANCE
    """Of a logit; None if keys are rounded too much."""
    out_of_order: int = 0
    """Evictions so far of others than the oldest tokens."""
    budget: int = 0
    sinks: int = 0
    system: int = 0
    """Tokens of the system block."""
    rendered_system: str = ""
    said: list[tuple[str, str]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Log index at which each turn of `said` begins."""
    pinned: set[int] = field(default_factory=set)
    recalled: list[int] = field(default_factory=list)
    """Log indices of the tokens that were recalled for the newest message."""
    recalled_before: dict[int, list[int]] = field(default_factory=dict)
    """Those before each turn, as long as the same process runs."""
    moments: dict[int, Moment] = field(default_factory=dict)
    """Before each turn, as far as that is known to the bit."""
    past: dict[int, Moment] = field(default_factory=dict)
    """The same from before the cache was filled again: only the archive still has the tokens as they were then."""
    held_before: dict[int, list[int]] = field(default_factory=dict)
    """What was in the cache before each turn."""
    compressions_before: dict[int, int] = field(default_factory=dict)
    evictions: int = 0
    """How many there were, without those of turns that were rolled back."""
    damaged: bool = False
    """Memory ran out while the cache was filled again; it has less than fits."""

    # --- rules ------------------------------------------------------------------------------------------------

    def turn_of(self, index: int) -> int:
        """Number of the turn that log index `index` is in; 0 for the system block."""
        return sum(1 for start in self.starts if start <= index)

    def stop_of(self, turn: int) -> int:
        """One past the last token of a turn that is over."""
        return self.starts[turn] if turn < len(self.starts) else len(self.tokens.log)

    def retained(self, held: list[int]) -> set[int]:
        """What of `held` never leaves, whatever was recalled."""
        stays = set(held[: self.sinks])
        return stays | {i for i in held if i < self.system or self.turn_of(i) in self.pinned}

    def droppable(self, held: list[int]) -> list[int]:
        """What of `held` may leave, in the order in which it does."""
        retained = self.retained(held) | set(self.recalled)
        return [i for i in held if i not in retained]

    def unpin_for_room(self, held: list[int]) -> list[int]:
        """Unpin the oldest turns until a window is left; returns which."""
        unpinned = []
        for turn in sorted(self.pinned):
            if len(self.retained(held)) + LEAST_WINDOW <= self.budget:
                break
            self.pinned.discard(turn)
            unpinned.append(turn)
        return unpinned

    def check_fit(self, before: list[int], after: list[int], what: str) -> None:
        """`after` is what eviction leaves of `before`, and if the policy is so: oldest first, no more than needed."""
        gone = [i for i in before if i not in set(after)]
        require(set(after) <= set(before), what, "has tokens that were never held")
        must = max(0, len(before) - self.budget)
        self.check_order(gone, before, what)
        require(len(after) <= self.budget, what, f"holds {len(after)} of {self.budget}")
        if not self.oldest_first:
            return
        needed = [i for i in gone if self.turn_of(i) != self.turn_of(gone[-1])] if gone else []
        require(not gone or len(needed) < must, what, f"dropped {len(gone)} where {must} had to leave")

    def check_order(self, gone: list[int], held: list[int], what: str) -> None:
        """Only evictable tokens are gone, and the oldest of them if the policy is so."""
        droppable = self.droppable(held)
        require(set(gone) <= set(droppable), what, "dropped", gone[:5], "of which some are retained")
        oldest = gone == droppable[: len(gone)]
        self.out_of_order += not oldest
        require(oldest or not self.oldest_first, what, "dropped", gone[:5], "and not the oldest of", held[:20])

    # --- what happens -----------------------------------------------------------------------------------------

    def evicted(self, event: ev.TokensEvicted) -> None:
        """An eviction was told."""
        gone = indices(event.runs)
        held = self.tokens.held
        require(event.count == len(gone), "evicted", event.count, "tells runs of", len(gone))
        self.check_order(gone, held, "an eviction")
        require(event.cache_len_before == len(held), "length before", event.cache_len_before, "is", len(held))
        self.tokens.drop(gone)
        self.evictions += 1
        require(event.cache_len_after == len(self.tokens.held), "length after", event.cache_len_after)

    def paged_in(self, event: ev.TurnPagedIn) -> None:
        """An evicted turn is back."""
        number = event.turn
        stop = self.stop_of(number)
        back = sorted({*range(max(self.starts[number - 1], self.sinks), stop)} - set(self.tokens.held))
        require(event.tokens == len(back), "told", event.tokens, "paged in, and it were", len(back))
        self.tokens.page_in(back)
        self.pinned.add(number)
        self.recalled = []

    def turns_recalled(self, conversation: Any, event: ev.TurnsRecalled, share: float) -> None:
        """Evicted turns are in context for the running turn: whole, or in part where one does not fit.

        Args:
            conversation: As it is now.
            event: What is told of it.
            share: Of the budget that may be recalled.
        """
        held, self.recalled = self.tokens.held, indices(conversation.cache.recalled)
        require(event.turn == len(self.starts), "recalled for turn", event.turn, "and not", len(self.starts))
        turns: dict[int, list[int]] = {}
        for index in self.recalled:
            turns.setdefault(self.turn_of(index), []).append(index)
        require(event.turns == tuple(turns), "told turns", event.turns, "recalled, and it were", tuple(turns))
        require(0 < event.turns[0] <= event.turns[-1] < event.turn, "recalled turns", event.turns)
        for number, found in turns.items():
            whole = list(range(max(self.starts[number - 1], self.sinks), self.stop_of(number)))
            require((found != whole) == (number in event.partly), "told turns", event.partly, "are there in part")
            require(found == list(range(found[0], found[-1] + 1)), "of turn", number, "there are", found)
        back = sorted(set(self.recalled) - set(held))
        require(indices(event.runs) == back, "told", event.runs, "paged in, and it were", back[:5], len(back))
        require(event.tokens == len(back), "told", event.tokens, "paged in, and it were", len(back))
        require(len(self.recalled) <= share * self.budget, len(self.recalled), "tokens are recalled")
        stay = len(self.retained(held) | set(self.recalled))
        require(self.budget - stay >= max(LEAST_WINDOW, self.budget // 4), stay, "tokens may not leave")
        self.tokens.page_in(back)

    def begin_turn(self, conversation: Any, number: int) -> None:
        """A turn begins; nothing of it was fed."""
        require(number == len(self.said) + 1, "turn", number, "follows", len(self.said))
        tensors = checkpoint.capture(conversation.cache).tensors
        self.past.pop(number, None)
        self.moments[number] = Moment(self.tokens.copy(), tensors, facts(conversation, number), self.evictions)
        self.held_before[number] = list(self.tokens.held)
        self.compressions_before[number] = conversation.cache.compression_count
        self.starts.append(len(self.tokens.log))
        self.recalled_before[number], self.recalled = self.recalled, []

    def turn_failed(self, conversation: Any, number: int, exact: bool) -> None:
        """The running turn was rolled back.

        Args:
            conversation: As it is now.
            number: Of the turn.
            exact: There was memory for a checkpoint.
        """
        moment = self.moments.pop(number)
        self.starts.pop()
        self.recalled = self.recalled_before.pop(number)
        require(ledger(conversation) == moment.tokens.held, "rolled back to", conversation.cache.ledger.runs)
        cropped = conversation.cache.croppable and set(moment.tokens.held) <= set(self.tokens.held)
        self.tokens, self.evictions = moment.tokens, moment.evictions
        if exact or cropped:
            self.check_tensors(conversation, moment.tensors)
        else:
            self.prefilled(moment.tokens.held)
        require(facts(conversation, number) == moment.facts, "rolled back to", facts(conversation, number))

    def prefilled(self, held: list[int]) -> None:
        """The cache was filled again: nothing before it is known to the bit any more."""
        self.tokens.prefill(held, len(self.tokens.log))
        self.past |= self.moments
        self.moments.clear()

    def undone(self, conversation: Any, event: ev.TurnUndone, fed: int, exact: bool) -> None:
        """A turn was taken back.

        Args:
            conversation: As it is now.
            event: What is told of it.
            fed: Tokens that the model read meanwhile.
            exact: It is the latest, nothing came between, and memory did not run out.
        """
        number = len(self.said)
        text, reply = self.said.pop()
        require((event.turn, event.text, event.reply) == (number, text, reply), "undone is", event.turn, event.text)
        first = self.starts.pop()
        left = [i for i in self.tokens.held if i < first]
        after = ledger(conversation)
        moment, past = self.moments.pop(number, None), self.past.pop(number, None)
        before, recalled = self.held_before.pop(number), self.recalled_before.pop(number, [])
        self.recalled = []
        self.pinned.discard(number)
        self.tokens.log = self.tokens.log[:first]
        stay = {self.turn_of(i) for i in before[self.sinks :]}
        self.pinned &= stay  # not those that were paged in since
        self.unpin_for_room(before)
        self.check_numbers(event, left, after, fed)
        require(not exact or event.prefilled == 0, "the latest turn was read again")
        self.damaged = self.damaged and after != before
        if self.damaged:
            require(set(after) <= set(before) and self.retained(before) <= set(after), "of", before, "is back", after)
            self.prefilled(after)
            self.recalled = recalled
            return
        if len(before) <= self.budget:
            require(after == before, "undone to", after[:20], len(after), "and not", before[:20], len(before))
        self.check_fit(before, after, "undo")
        self.recalled = recalled
        require(conversation.cache.compression_count == self.compressions_before.pop(number), "compressions")
        if event.prefilled:
            self.prefilled(after)
        elif moment is not None and moment.tokens.held == after:
            require(conversation.cache.turn_starts == moment.facts["starts"], "turn starts", moment.facts["starts"])
            # Where later turns evicted tokens of their own only, they were cut, and what is left has moved.
            if exact or left != before or self.evictions == moment.evictions:
                self.check_tensors(conversation, moment.tensors)
            self.tokens, self.evictions = moment.tokens, moment.evictions
        elif after != left and past is not None and past.tokens.held == after:  # all of it was archived
            self.check_tensors(conversation, past.tensors)
            self.tokens, self.evictions = past.tokens, past.evictions
        else:
            require(after == left, "nothing was read again, and", len(after) - len(left), "tokens are new")
            self.tokens.keep(left)

    def check_numbers(self, event: ev.TurnUndone, left: list[int], after: list[int], fed: int) -> None:
        """What is told of an undo is what happened."""
        restored = len(set(after) - set(left))
        require(event.restored == restored, f"told {event.restored} restored, and it were {restored}")
        require(event.prefilled == fed or self.damaged, f"told {event.prefilled} read again, and it were {fed}")
        require(event.prefilled in (0, len(after)), "read again", event.prefilled, "of", len(after))

    def check_tensors(self, conversation: Any, expected: dict[str, Tensor]) -> None:
        """The layers are as they were, to the bit."""
        found = checkpoint.capture(conversation.cache).tensors
        # a float32 copy of the sinks is taken at the first eviction: whether it is there yet changes nothing
        for name in {name for name in found | expected if "original" not in name}:
            same = name in found and name in expected and torch.equal(found[name], expected[name])
            require(same, name, "is not what it was, to the bit")

    # --- what holds at every moment ---------------------------------------------------------------------------

    def check(self, conversation: Any) -> None:
        """Ledger, layers, log, transcript, pins and reported state agree with what was followed."""
        cache, log = conversation.cache, conversation.log
        held = ledger(conversation)
        stale = getattr(cache, "stale", False)
        require(stale or cache.lengths == [len(held)] * len(cache.streaming_layers), "layers hold", cache.lengths)
        require(len(held) <= self.budget == cache.cache_size, f"{len(held)} tokens in a cache of {self.budget}")
        require(held == self.tokens.held, "the ledger has", cache.ledger.runs, "and", len(self.tokens.held), "are held")
        require(log.ids.tolist() == self.tokens.log, "the log has other ids than were fed")
        require(cache.ledger.next_index == len(log), "the ledger counts", cache.ledger.next_index, "of", len(log))
        require([(t.text, t.reply) for t in log.turns] == self.said, "the transcript is", log.turns[-1:])
        require([t.number for t in log.turns] == list(range(1, len(self.said) + 1)), "numbers of turns")
        require([t.start for t in log.turns] == self.starts, "starts of turns")
        require([t.end for t in log.turns] == [self.stop_of(t.number) for t in log.turns], "stops of turns")
        require(self.tokenizer.decode(log.ids.tolist()) == self.rendered(), "the log is not the rendered conversation")
        if held:
            wanted = min(self.sinks, len(log))
            require(held[:wanted] == list(range(wanted)), "sinks are", held[:wanted])
            require(held[: self.system] == list(range(self.system)), "of the system block", held[: self.system])
        self.check_turn_starts(cache.turn_starts, set(held))
        require(indices(cache.recalled) == self.recalled, "recalled are", cache.recalled, "and not", self.recalled[:5])
        if held:
            self.check_state(conversation.state(), held)

    def rendered(self) -> str:
        """The conversation as its template writes it."""
        turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
        return self.rendered_system + "".join(turn.format(*said) for said in self.said)

    def check_turn_starts(self, starts: list[int], held: set[int]) -> None:
        """Whole turns can be cut where turns begin that are in the cache."""
        require(starts == sorted(set(starts)), "turn starts", starts)
        require(set(starts) <= set(self.starts), "turn starts", starts, "of", self.starts)
        require(set(starts) <= held, "turn starts", starts, "were evicted")

    def check_state(self, state: ev.CacheState, held: list[int]) -> None:
        """The reported figures are those of the ledger."""
        kept = len(self.retained(held))
        require(state.length == len(held) or not state.length, "length", state.length)
        require(state.tokens_evicted == len(self.tokens.log) - len(held), "evicted", state.tokens_evicted)
        require(state.sinks + state.pinned == kept or not state.length, "kept", state.sinks, state.pinned, kept)
        recalled = set(self.recalled) - self.retained(held)
        require(state.recalled == len(recalled) or not state.length, "recalled", state.recalled, len(recalled))
        counts: dict[int, int] = {}
        for segment in state.segments:
            counts[segment.turn] = counts.get(segment.turn, 0) + segment.tokens
        ours: dict[int, int] = {}
        for slot, index in enumerate(held):
            turn = 0 if slot < self.sinks else self.turn_of(index)
            ours[turn] = ours.get(turn, 0) + 1
        require(counts == ours, "segments", counts, "and not", ours)
        pinned = {segment.turn for segment in state.segments if segment.turn and segment.pinned}
        require(pinned == self.pinned & set(ours), "pinned are", pinned, "and not", self.pinned)

    def check_logits(self, conversation: Any, recompute: bool) -> bool:
        """The next logits are those of the slow reference; returns whether it could tell."""
        held = self.tokens.held
        if len(held) < 2 or held[-1] != len(self.tokens.log) - 1:
            return False
        expected = self.tokens.next_logits(recompute) if self.tolerance is not None else None
        if expected is None or self.tolerance is None:
            return False
        cache = conversation.cache
        if cache.croppable:
            taken, history, recalled, cache.history = checkpoint.capture(cache), cache.history, cache.recalled, None
            found = conversation.next_logits()
            checkpoint.restore(cache, taken)
            cache.history, cache.recalled = history, recalled  # it is the same cache again, to the bit
        else:
            if len(self.tokens.held) >= self.budget:
                return False
            found, expected = self._probe(conversation, 5)
        off = (found - expected).abs().max().item()
        require(off < self.tolerance, f"logits are off by {off:.2g}")
        return True

    @torch.inference_mode()
    def _probe(self, conversation: Any, token: int) -> tuple[Tensor, Tensor]:
        """Logits after one more token, by cache and by one plain forward; the cache is as before."""
        cache, model = conversation.cache, conversation.model
        taken = checkpoint.capture(cache)
        more = {cache_name(model): cache, "use_cache": True}
        found: Tensor = model(input_ids=torch.tensor([[token]]), **more).logits[0, -1]
        checkpoint.restore(cache, taken)
        ids = [self.tokens.log[i] for i in self.tokens.held]
        return found, self.tokens.model(input_ids=torch.tensor([[*ids, token]]), use_cache=False).logits[0, -1]


def ledger(conversation: Any) -> list[int]:
    """Log indices in the cache, slot by slot."""
    return indices(conversation.cache.ledger.runs)


def facts(conversation: Any, number: int) -> dict[str, Any]:
    """What an undone turn leaves as it was, besides tokens and tensors."""
    cache = conversation.cache
    return {
        "starts": list(cache.turn_starts),
        "pins": cache.pins,
        "recalled": cache.recalled,
        "compressions": cache.compression_count,
        "turns": min(number - 1, len(conversation.log.turns)),
        "draw": conversation.rng_state.tolist(),
    }
