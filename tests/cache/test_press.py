"""StreamingPress: what `generate` and loops get is what the paper's bookkeeping gives; wrong use is a clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from streamchat import StreamingPress
from streamchat.base.errors import CacheError, CacheNotSeenError, ChunkTooLargeError, ConfigError, UnsupportedModelError
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.eviction.options import EvictionOptions
from tests.support.reference import Reference
from tests.support.tiny import config_of, fresh_model, random_ids, ready, tiny_model

pytestmark = pytest.mark.smoke
BUDGET, SINKS = 32, 4


def make(family: str = "llama", **options: Any) -> tuple[Any, StreamingPress]:
    model = ready(tiny_model(family))
    return model, StreamingPress(model, num_sink_tokens=SINKS, **({"cache_size": BUDGET} | options))


def given(press: StreamingPress) -> dict[str, Any]:
    """The cache as an argument, as this version of transformers calls it."""
    return {cache_keyword(press.model): press.cache}


def generate(press: StreamingPress, ids: Tensor, count: int, **more: Any) -> Tensor:
    """Greedy ids, the prompt included."""
    result: Tensor = press.model.generate(ids, max_new_tokens=count, do_sample=False, **given(press), **more)
    return result


class Greedy:
    """The reference, fed in the same pieces."""

    def __init__(self, model: Any) -> None:
        self.reference = Reference(model, BUDGET, SINKS)

    def go_on(self, pieces: list[Tensor], count: int) -> list[int]:
        """Read, then write `count` ids; the last one is not read, as in `generate`."""
        for piece in pieces:
            logits = self.reference.feed(piece)
        out = [int(logits[-1].argmax())]
        while len(out) < count:
            logits = self.reference.feed(torch.tensor(out[-1:]))
            out.append(int(logits[-1].argmax()))
        return out


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_generate_far_past_the_budget_and_the_training_length(family: str) -> None:
    model = ready(tiny_model(family, max_position_embeddings=64))
    press = StreamingPress(model, num_sink_tokens=SINKS, cache_size=BUDGET)
    ids = random_ids(20)
    with press:
        out = generate(press, ids, 200)
        assert press.lengths == [BUDGET] * 3
    assert out[0, 20:].tolist() == Greedy(model).go_on([ids[0]], 200)
    assert press.tokens_seen == 219
    assert press.tokens_evicted == press.compression_count == 219 - BUDGET
    assert press.method == "rotation"


def test_a_batch_of_equal_lengths() -> None:
    model, press = make()
    ids = torch.cat([random_ids(20, seed=1), random_ids(20, seed=2)])
    with press:
        out = generate(press, ids, 60)
    for row in range(2):
        assert out[row, 20:].tolist() == Greedy(model).go_on([ids[row]], 60)


@pytest.mark.parametrize("how", ["the whole text", "new tokens and a mask"])
def test_a_second_generate_on_the_same_cache(how: str) -> None:
    model, press = make()
    first, new = random_ids(20), random_ids(9, seed=3)
    greedy = Greedy(model)
    with press:
        text = generate(press, first, 50)
        assert text[0, 20:].tolist() == greedy.go_on([first[0]], 50)
        # the last token of the first reply was never read
        unread = text[:, -1:]
        if how == "the whole text":
            out = generate(press, torch.cat([text, new], 1), 40)[0, -40:]
        else:
            ids = torch.cat([unread, new], 1)
            mask = torch.ones(1, press.tokens_seen + ids.shape[1], dtype=torch.long)
            out = generate(press, ids, 40, attention_mask=mask)[0, -40:]
    assert out.tolist() == greedy.go_on([torch.cat([unread, new], 1)[0]], 40)
    assert press.tokens_seen == 20 + 50 + 9 + 39


@pytest.mark.parametrize(
    ("ids", "mask", "sentence"),
    [
        (
            random_ids(7),
            None,
            r"7 tokens are not more than the 69 that the cache was fed; .*torch.ones\(batch, 69",
        ),
        (random_ids(90, seed=8), None, r"these 90 tokens do not start with the 69"),
        (random_ids(7), torch.ones(1, 20), "attention_mask has 20 columns for 7 tokens on a cache that was fed 69"),
        (random_ids(14).view(2, 7), None, r"has a batch of 1 but generate was given 2; call press.reset"),
    ],
)
def test_a_second_generate_that_would_be_silently_wrong_is_refused(ids: Tensor, mask: Any, sentence: str) -> None:
    _, press = make()
    with press:
        generate(press, random_ids(20), 50)
        before = list(press.cache.ledger)
        with pytest.raises(CacheError, match=sentence):
            generate(press, ids, 5, **({} if mask is None else {"attention_mask": mask}))
        assert list(press.cache.ledger) == before


def test_a_new_text_needs_a_reset() -> None:
    _, press = make()
    with press:
        first = press.model.generate(random_ids(20), max_new_tokens=40, do_sample=False)  # the empty cache is ours
        assert press.lengths == [BUDGET] * 3
        with pytest.raises(CacheNotSeenError, match=r"call press\.reset"):
            press.model.generate(random_ids(20), max_new_tokens=4, do_sample=False)
        press.reset()
        assert press.tokens_seen == press.compression_count == press.tokens_evicted == 0
        assert torch.equal(press.model.generate(random_ids(20), max_new_tokens=40, do_sample=False), first)


def test_a_forward_that_begins_a_text_gets_the_cache_by_itself() -> None:
    model, press = make()
    ids = random_ids(50)
    reference = Reference(model, BUDGET, SINKS)
    with press, torch.inference_mode():
        logits = [model(ids[:, :20]).logits[0]]
        with pytest.raises(CacheNotSeenError, match=r"a new text was started .* pass press\.cache to continue"):
            model(ids[:, 20:21])
        logits += [model(ids[:, i : i + 1], **given(press)).logits[0] for i in range(20, 50)]
    expected = [reference.feed(ids[0, :20]), *(reference.feed(ids[0, i : i + 1]) for i in range(20, 50))]
    assert press.lengths == [BUDGET] * 3
    assert (torch.cat(logits).double() - torch.cat(expected)).abs().max() < 2e-5


@pytest.mark.parametrize("how", ["argument", "configuration", "the model's own configuration", "positional"])
def test_generating_with_candidates_is_refused(how: str) -> None:
    model, press = make()
    more: dict[str, Any] = {}
    args: list[Any] = [random_ids(20)]
    match how:
        case "argument":
            more = {"prompt_lookup_num_tokens": 3}
        case "configuration":
            more = {"generation_config": transformers.GenerationConfig(prompt_lookup_num_tokens=3)}  # type: ignore[no-untyped-call]
        case "the model's own configuration":
            model.generation_config.prompt_lookup_num_tokens = 3
        case _:
            args += [None, None, None, None, None, tiny_model("llama", seed=4)]
    name = "assistant_model" if how == "positional" else "prompt_lookup_num_tokens"
    with press, pytest.raises(CacheError, match=f"{name} makes generate feed candidates that may be rejected"):
        model.generate(*args, max_new_tokens=40, do_sample=False, **more)
    assert press.tokens_seen == 0


@pytest.mark.parametrize("chunk", [None, 5, 16])
def test_a_prompt_longer_than_the_budget(chunk: int | None) -> None:
    model, press = make()
    ids = random_ids(100)
    with press:
        out = generate(press, ids, 20, prefill_chunk_size=chunk)
    pieces = list(torch.split(ids[0], chunk or (BUDGET - SINKS) // 4))
    assert out[0, 100:].tolist() == Greedy(model).go_on(pieces, 20)


def test_all_logits_of_too_many_tokens_are_refused_with_what_fits() -> None:
    model, press = make()
    with press, torch.inference_mode():
        model(input_ids=random_ids(20), use_cache=True, **given(press))
        with pytest.raises(ChunkTooLargeError, match="chunks of at most 28"):
            model(input_ids=random_ids(29), use_cache=True, **given(press))
        assert press.tokens_seen == 20
        # get_seq_length counts the stream outside of forwards, also after one that failed
        assert press.cache.get_seq_length() == 20


@pytest.mark.parametrize("sizes", [(60, 10), (20, 10)])
def test_beam_search_and_several_sequences_equal_a_plain_cache_within_the_budget(sizes: tuple[int, int]) -> None:
    """Beams are reordered in the buffers; nothing evicted, so that transformers' own cache is the reference."""
    model, press = make(cache_size=128)
    ids = random_ids(sizes[0])
    more = {"max_new_tokens": sizes[1], "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = model.generate(ids, **more)
    with press:
        ours = model.generate(ids, **given(press), **more)
    assert torch.equal(ours, expected)


def test_beams_past_the_budget_stay_apart() -> None:
    """Three rows that are never mixed: the best beam is what the reference gives for its own tokens."""
    model, press = make()
    ids = random_ids(20)
    with press:
        out = model.generate(
            ids,
            **given(press),
            max_new_tokens=40,
            num_beams=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    reference, score = Reference(model, BUDGET, SINKS), 0.0
    logits = reference.feed(ids[0])
    for token in out.sequences[0, 20:]:
        score += logits[-1].log_softmax(-1)[token].item()
        logits = reference.feed(token[None])
    assert out.sequences_scores[0].item() == pytest.approx(score / 40, abs=1e-4)


def test_hooks_and_methods_are_gone_after_the_block_also_after_an_error() -> None:
    model, press = make()

    def traces() -> tuple[int, int, bool]:
        return len(model._forward_pre_hooks), len(model._forward_hooks), "generate" in model.__dict__

    with press:
        assert traces() == (1, 1, True)
        with pytest.raises(CacheError, match="already in use"), press:
            pass
        model(random_ids(3))
    assert traces() == (0, 0, False)
    with pytest.raises(RuntimeError, match="boom"), press:
        raise RuntimeError("boom")
    assert traces() == (0, 0, False)
    with press, pytest.raises(CacheNotSeenError):
        model(input_ids=random_ids(3), use_cache=False)
    assert traces() == (0, 0, False)


def test_inference_mode_and_no_grad_can_follow_each_other() -> None:
    model, press = make()
    with press:
        with torch.inference_mode():
            model(input_ids=random_ids(20), use_cache=True, **given(press))
        mask = torch.ones(1, 25, dtype=torch.long)
        assert generate(press, random_ids(5), 60, attention_mask=mask).shape == (1, 65)
        assert not model.training


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, 1024), ({"compression_ratio": 0.7}, 1228), ({"compression_ratio": 0.9999}, 14), ({"cache_size": 99}, 99)],
)
def test_the_budget(options: dict[str, Any], size: int) -> None:
    assert StreamingPress(tiny_model("llama"), **options).cache_size == size


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cache_size": 9, "compression_ratio": 0.5}, "give only one of them"),
        ({"compression_ratio": 1.0}, "compression_ratio = 1.0 must be at least 0 and below 1"),
        ({"cache_size": 4}, "num_sink_tokens = 4 does not fit into cache_size = 4"),
    ],
)
def test_impossible_sizes(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        StreamingPress(tiny_model("llama"), **options)


def test_a_model_without_keys_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to evict"):
        StreamingPress(tiny_model("mamba", "eager"))


def test_learned_positions_are_read_again_and_the_caller_sees_only_its_own_logits() -> None:
    model, press = make("gpt2")
    assert press.method == "recompute"
    ids = random_ids(120)
    worst, at = 0.0, 0
    for size in (20, *[1] * 60, 7, 7, 3, *[1] * 10):
        with press, torch.inference_mode():
            logits = model(input_ids=ids[:, at : at + size], use_cache=True, **given(press)).logits[0]
        assert len(logits) == size
        at += size
        kept = ids[:, list(press.cache.ledger)]
        with torch.inference_mode():
            expected = model(input_ids=kept, use_cache=False).logits[0, -size:]
        worst = max(worst, (logits - expected).abs().max().item())
        assert press.lengths == [len(press.cache.ledger)] * 3
        assert max(press.lengths) <= BUDGET
    assert worst < 2e-5
    assert press.compression_count >= 5
    assert list(press.cache.ledger)[:SINKS] == list(range(SINKS))


def test_learned_positions_through_generate_past_the_table() -> None:
    _, press = make("gpt2", cache_size=64)
    with press:
        out = generate(press, random_ids(20), 300)  # the table has 256 positions
        assert max(press.lengths) <= 64
        text = torch.cat([out, random_ids(5, seed=4)], 1)
        assert generate(press, text, 5).shape[1] == 330
        with pytest.raises(CacheError, match="do not start with"):
            generate(press, random_ids(400, seed=9), 5)


@pytest.mark.slow
@pytest.mark.parametrize("new_tokens", [50, 500])
def test_the_original_script(new_tokens: int) -> None:
    """Pythia-70m's shape, ratio 0.7, 4 sinks: 614 of 2,048 tokens. There 6 layers x 499 made 2,994 'compressions'."""
    config = config_of(
        "gpt_neox",
        vocab_size=512,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = ready(fresh_model(config))
    press = StreamingPress(model, compression_ratio=0.7, num_sink_tokens=4)
    assert press.cache_size == 614
    prompt = random_ids(200) % 512
    with press:
        generate(press, prompt, new_tokens)
    total = 200 + new_tokens - 1
    assert press.lengths == [min(614, total)] * 6
    assert press.compression_count == press.tokens_evicted == max(0, total - 614)


def test_options_reach_the_cache() -> None:
    _, press = make(options=EvictionOptions(block=7))
    with press:
        generate(press, random_ids(20), 60)
    assert press.compression_count == pytest.approx(press.tokens_evicted / 7, abs=1)


EXAMPLE = """
import torch, transformers
from streamchat import StreamingPress

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
ids = torch.arange(3, 40)[None]
with StreamingPress(model, num_sink_tokens=4, cache_size=64) as press:
    model.generate(ids, max_new_tokens=500, min_new_tokens=500, pad_token_id=0)
    print(press.lengths, press.compression_count)
"""


@pytest.mark.slow
def test_the_example_of_the_docs_runs_as_it_is_written() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    assert EXAMPLE.strip() in page
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXAMPLE], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(result.stdout.split("]")[0] + "]") == [64, 64]
    assert result.stdout.split() == ["[64,", "64]", "472"]
