"""Earlier states of a cache are put together to the bit, from what is cached and what was archived."""

from __future__ import annotations

import pytest

import streamchat.cache.history as histories
from streamchat.cache import checkpoint
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.past import PastState, rebuild
from tests.support.cache_streams import CUT, DTYPES, Stream, dtypes_of, policies_of
from tests.support.families import FAMILIES
from tests.support.family_runs import BUDGET, subject


class Archived(Stream):
    """A stream whose evicted tokens are archived, with the bookkeeping of each turn's start."""

    def archive(self, archived: list[EvictedTokens], pasts: list[PastState]) -> None:
        self.archived, self.pasts = archived, pasts
        self.history.on_evicted = self.archived.append

    def begin(self) -> None:
        cache = self.cache
        first = cache.streaming_layers[0]
        self.pasts.append(
            PastState(
                tuple(cache.ledger.runs),
                cache.ledger.next_index,
                first.base,
                first.num_originals,
                cache.form,
                cache.pins,
                tuple(cache.turn_starts),
                cache.compression_count,
            )
        )
        super().begin()


def streamed(name: str, kv: str, policy: str, seed: int, *, pages: bool) -> Archived:
    it = subject(name, FAMILIES[name].attentions[0])
    stream = Archived(it, policy, seed, DTYPES[kv])
    stream.archive([], [])
    if it.fit.method != "no positions":
        stream.cache.position_limit = min(stream.cache.position_limit, 2 * BUDGET)
    for _ in range(24):
        stream.turn()
        if pages and stream.random.random() < 0.5:
            stream.page_in()
    return stream


def families() -> list[object]:
    quick = {("llama", "native", True), ("llama", "int4", True), ("deepseek_v3", "native", True)}
    each = [("llama", kv, pages) for kv in DTYPES for pages in (False, True)]
    each += [(name, kv, True) for name in CUT if name != "llama" for kv in dtypes_of(name)]
    return [pytest.param(*one, marks=pytest.mark.smoke if one in quick else pytest.mark.slow) for one in each]


@pytest.mark.parametrize(("name", "kv", "pages"), families())
def test_every_turn_is_put_together_to_the_bit(name: str, kv: str, pages: bool) -> None:
    for policy, seed in policies_of(name, kv):
        stream = streamed(name, kv, policy, seed, pages=pages)
        assert stream.cache.compression_count > 15
        for past, moment in list(zip(stream.pasts, stream.moments, strict=True))[1:]:
            before = checkpoint.capture(stream.cache)
            built = rebuild(stream.cache, past, stream.archived)
            assert built is not None
            restored = checkpoint.capture(stream.cache)
            assert all(restored.tensors[key].equal(x) for key, x in before.tensors.items())  # it only reads
            assert built.tensors.keys() == moment.saved.tensors.keys()
            for key, tensor in moment.saved.tensors.items():
                assert built.tensors[key].equal(tensor), (past, key)
            assert (built.bases, built.runs, built.next_index) == (
                moment.saved.bases,
                moment.saved.runs,
                moment.saved.next_index,
            )
            assert (built.form, built.pins) == (moment.saved.form, moment.saved.pins)


def test_a_rebased_stream_needs_what_was_archived_at_the_rebase() -> None:
    stream = streamed("llama", "native", "oldest-tokens", 1, pages=False)
    assert any(tokens.part == "rebased" for tokens in stream.archived)
    kept = [tokens for tokens in stream.archived if tokens.part != "rebased"]
    built = [rebuild(stream.cache, past, kept) for past in stream.pasts[1:]]
    assert any(each is None for each in built)
    assert any(each is not None for each in built)


def test_undone_turns_and_what_follows_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with two branches: the archive drops what undone turns evicted."""
    monkeypatch.setattr(histories, "SMALLEST_LIMIT", 1 << 30)
    stream = streamed("llama", "native", "oldest-tokens", 5, pages=False)
    sizes: list[int] = []
    for seed in range(3):
        back = len(stream.pasts) - 4
        moment, past = stream.moments[back], stream.pasts[back]
        sizes.append(len(stream.archived))
        if seed % 2:
            built = rebuild(stream.cache, past, stream.archived)
            assert built is not None
            checkpoint.restore(stream.cache, built)
        else:
            stream.undo(moment)
        moment.must_be(stream.cache)
        assert stream.cache.form == past.form
        stop = moment.stop
        stream.archived[:] = [
            tokens for tokens in stream.archived if tokens.runs[-1][1] <= stop and _kept(stream, tokens)
        ]
        del stream.moments[back:], stream.pasts[back:]
        for _ in range(6):
            stream.turn()
        for past, moment in list(zip(stream.pasts, stream.moments, strict=True))[-6:]:
            built = rebuild(stream.cache, past, stream.archived)
            assert built is not None
            assert all(built.tensors[key].equal(x) for key, x in moment.saved.tensors.items())


def _kept(stream: Archived, tokens: EvictedTokens) -> bool:
    """Whether no token is cached: what an undone turn evicted is cached again."""
    return tokens.part != "evicted" or not any(stream.cache.ledger.count_in(*run) for run in tokens.runs)
