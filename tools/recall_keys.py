"""Ranks the turns of a chat by mean keys instead of words: does that find facts that are asked for in other words?

    python -m tools.recall_keys conversations.jsonl 10146.txt --layers 16

A chat states 40 facts with ten other turns after each. Each turn runs through the model by itself. A passage and a
question are compared by the cosine of their mean unrotated keys, without the mean over all passages. Prints for how
many questions the right turn is the first, and among the first three, per layer and for the sum over all layers.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from streamchat.benchmarks.recall.filler import Fact, read_turns
from streamchat.benchmarks.recall.ranks import BEST, WIDE_SPACING, RankedChat, read_paraphrases
from streamchat.models.load import load_model

WORDS = 35, 25
"""Maximum words of a message and of a reply between the facts, to save time."""
KINDS = ("direct", "paraphrased")


class Keys:
    """Computes the unrotated keys of texts, by hooks on the key projections of the first `layers` layers."""

    def __init__(self, model: Any, layers: int) -> None:
        self._model, self._found = model.model, dict[int, Tensor]()
        self._model.layers = self._model.layers[:layers]
        for number, layer in enumerate(self._model.layers):
            layer.self_attn.k_proj.register_forward_hook(
                lambda module, args, out, number=number: self._found.update({number: out[0].float()})
            )

    @torch.inference_mode()
    def of(self, ids: Sequence[int]) -> Tensor:
        """Return the keys (layers, tokens, width) of a text."""
        self._model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        return torch.stack([self._found[number] for number in sorted(self._found)])


def passage_keys(chat: RankedChat, keys: Keys, opening: Sequence[int]) -> Tensor:
    """Return the mean keys (passages, layers, width) of all passages of the chat.

    Args:
        chat: The chat.
        keys: Computes them.
        opening: Ids before each turn, so that no passage begins with the first token of a stream.
    """
    log, means = chat.log, list[Tensor]()
    for turn in log.turns:
        assert turn.end is not None
        found = keys.of([*opening, *log.ids[turn.start : turn.end]])[:, len(opening) :]
        runs = [passage.run for passage in chat.passages.all if passage.turn == turn.number]
        means += [found[:, a - turn.start : b - turn.start].mean(1) for a, b in runs]
    return torch.stack(means)


def ranks(scores: Tensor, turns: Sequence[int], right: int) -> int:
    """Return the rank of turn `right` if the best passage of each turn counts; 1 is the best."""
    best: dict[int, float] = {}
    for turn, score in zip(turns, scores.tolist(), strict=True):
        best[turn] = max(score, best.get(turn, score))
    return 1 + sum(score > best[right] for score in best.values())


def shortened(filler: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Cut the messages and replies to `WORDS`."""
    for message, reply in filler:
        yield " ".join(message.split()[: WORDS[0]]), " ".join(reply.split()[: WORDS[1]])


def measure(model: Any, tokenizer: Any, filler: Iterator[tuple[str, str]], layers: int) -> dict[str, Tensor]:
    """Return by kind of question the ranks (questions, layers + 1) of the right turns; the last is that of the sum."""
    pairs = read_paraphrases()
    random.Random(1).shuffle(pairs)
    facts = [Fact(pair["statement"], pair["direct"], "") for pair in pairs]
    chat, keys = RankedChat(tokenizer, facts, filler, WIDE_SPACING), Keys(model, layers)
    opening = tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    found = passage_keys(chat, keys, opening)
    middle = found.mean(0)
    passages = torch.nn.functional.normalize(found - middle, dim=-1)
    turns = [passage.turn for passage in chat.passages.all]
    result: dict[str, Tensor] = {}
    for kind in KINDS:
        rows = []
        for pair in pairs:
            ids = tokenizer(pair[kind], add_special_tokens=False)["input_ids"]
            mean = keys.of([*opening, *ids])[:, len(opening) :].mean(1)
            cosines = (passages * torch.nn.functional.normalize(mean - middle, dim=-1)).sum(-1)
            scores = torch.cat([cosines, cosines.sum(1, keepdim=True)], dim=1)
            rows.append([ranks(column, turns, chat.turn_of[pair["statement"]]) for column in scores.T])
        result[kind] = torch.tensor(rows)
    return result


def main() -> int:
    """Print one line per layer, and one for the sum."""
    parser = argparse.ArgumentParser(prog="python -m tools.recall_keys", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="books (.txt), or chats (.jsonl, .json)")
    parser.add_argument("--model", default="default")
    parser.add_argument("--layers", type=int, default=16, help="compute only the first layers (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(args.model, device="cpu", dtype="float32")
    result = measure(loaded.model, loaded.tokenizer, shortened(read_turns(args.files, 1)), args.layers)
    count = len(result[KINDS[0]])
    for at in range(result[KINDS[0]].shape[1]):
        name = "sum" if at == result[KINDS[0]].shape[1] - 1 else f"layer {at}"
        parts = (
            f"{kind}: {int((found[:, at] == 1).sum())} first, {int((found[:, at] <= BEST).sum())} in the first {BEST}"
            for kind, found in result.items()
        )
        print(f"{name:>8}, of {count} questions: {'; '.join(parts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
