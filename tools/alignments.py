"""Compares every alignment of sinks, chunk, and fill around the budget with a slow reference in float64.

    python -m tools.alignments
    python -m tools.alignments --only 4,17,48,llama,sdpa

For each number of sinks (0 to 8), chunk size (1 to 33) and fill (from 2 tokens below the budget to 2 above), a tiny
random model in float32 prefills the fill, then the chunk twice, then two single tokens. All logits must equal those of
`tests/support/reference.py` to 2e-5, and the cached tokens must be the same. This is done with eager attention, SDPA,
the decode step of PyTorch's operations, and that of the compiled kernels.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.streaming import StreamingCache
from streamchat.decode.install import install
from streamchat.kernels.library import load_kernels, why_unavailable
from tests.support.reference import Reference
from tests.support.tiny import random_ids, tiny_model

BUDGET = 48
SINKS, CHUNKS, FILLS = range(9), range(1, 34), range(BUDGET - 2, BUDGET + 3)
FAMILIES = ("llama", "gpt_neox")
WAYS = ("eager", "sdpa", "step", "compiled step")
"""Attentions of transformers, and decode steps: of PyTorch's operations, and of the compiled kernels."""
TOLERANCE = 2e-5
LAYERS = 2


@dataclass(frozen=True)
class Alignment:
    """One case."""

    sinks: int
    chunk: int
    fill: int

    def chunks(self) -> list[int]:
        """Return the sizes of all forwards."""
        prompt = min(self.fill, BUDGET)
        return [prompt, *[1] * (self.fill - prompt), self.chunk, self.chunk, 1, 1]


@dataclass(frozen=True)
class Fault:
    """A case that differs from the reference."""

    alignment: Alignment
    family: str
    way: str
    what: str

    def __str__(self) -> str:
        where = ",".join(map(str, (*astuple(self.alignment), self.family, self.way)))
        return f"--only '{where}': {self.what}"


def every_alignment() -> list[Alignment]:
    """Return all cases."""
    return [Alignment(*each) for each in itertools.product(SINKS, CHUNKS, FILLS)]


class Subject:
    """A model that computes in one of the ways.

    Raises:
        ValueError: This machine has no compiled kernels, or the model has no such step.
    """

    def __init__(self, family: str, way: str) -> None:
        self.family, self.way = family, way
        is_step = way.endswith("step")
        self.model: Any = tiny_model(family, "sdpa" if is_step else way, num_hidden_layers=LAYERS)
        self.fit = fit_positions(self.model)
        if is_step:
            kernels = load_kernels("auto") if way == "compiled step" else None
            if way == "compiled step" and kernels is None:
                raise ValueError(why_unavailable("auto"))
            if not install(self.model, kernels):
                raise ValueError(f"{family} has no step")
            if way == "compiled step":  # all forwards: of native weights, only short ones are faster
                self.model.forward._max_tokens = self.model.forward.step.max_tokens = BUDGET

    def read(self, of: Alignment, ids: Tensor) -> tuple[list[Tensor], list[int]]:
        """Return the logits of each forward, (tokens, vocabulary), and the cached tokens."""
        cache = StreamingCache(self.model.config, self.fit, cache_size=BUDGET, num_sink_tokens=of.sinks)
        name, found = cache_keyword(self.model), list[Tensor]()
        with StreamingHook(self.model, cache), torch.inference_mode():
            for piece in torch.split(ids, of.chunks(), dim=1):
                found.append(self.model(input_ids=piece, use_cache=True, **{name: cache}).logits[0])
        return found, list(cache.ledger)


@torch.inference_mode()
def expected(model: Any, of: Alignment, ids: Tensor) -> tuple[list[Tensor], list[int]]:
    """Return the reference's logits and cached tokens."""
    reference = Reference(model, BUDGET, of.sinks)
    return [reference.feed(piece[0]) for piece in torch.split(ids, of.chunks(), dim=1)], reference.kept


def faults(
    alignments: Sequence[Alignment], family: str, subjects: Sequence[Subject]
) -> Iterator[tuple[int, Fault | None]]:
    """Yield, for each case and way, the number of compared logits and the fault, if any."""
    for of in alignments:
        ids = random_ids(sum(of.chunks()), seed=hash(astuple(of)) % 2**31)
        meant, kept = expected(subjects[0].model, of, ids)
        for subject in subjects:
            logits, ledger = subject.read(of, ids)
            worst = max(float((a.double() - b).abs().max()) for a, b in zip(logits, meant, strict=True))
            what = "" if worst < TOLERANCE else f"logits differ by {worst:.3g}"
            what = what if ledger == kept else f"cached tokens {ledger}, expected {kept}"
            yield sum(each.numel() for each in logits), Fault(of, family, subject.way, what) if what else None


def subjects_of(family: str, ways: Sequence[str]) -> list[Subject]:
    """Return the models to compare; print why one is skipped."""
    found = []
    for way in ways:
        try:
            found.append(Subject(family, way))
        except ValueError as error:
            print(f"left out {way} of {family}: {error}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compare all cases, or a sample; return 1 if one differs."""
    parser = _parser()
    args = parser.parse_args(argv)
    chosen, families, ways = every_alignment(), args.families.split(","), list(WAYS)
    if args.only:
        words = ["", "", *args.only.split(",")]
        sizes, family, way = words[:-2], *words[-2:]
        chosen = [each for each in chosen if ["", "", *map(str, astuple(each))] == sizes]
        families, ways = [family], [way]
    elif args.sample is not None:
        chosen = random.Random(args.seed).sample(chosen, min(max(args.sample, 0), len(chosen)))
    if not chosen or not set(families) <= set(FAMILIES) or not set(ways) <= set(WAYS):
        there = [f"sinks 0 to {SINKS[-1]}, chunk 1 to {CHUNKS[-1]}, fill {FILLS[0]} to {FILLS[-1]}"]
        parser.error(f"nothing to compare; there are {', '.join([*there, *FAMILIES, *WAYS])}")
    started, compared, cases, found = time.monotonic(), 0, 0, list[Fault]()
    for family in families:
        subjects = subjects_of(family, ways)
        if not subjects:
            return 1
        for count, fault in faults(chosen, family, subjects):
            compared, cases = compared + count, cases + 1
            if fault:
                found.append(fault)
                print(fault, flush=True)
    spent = f"{time.monotonic() - started:,.0f} s, {time.process_time():,.0f} s of CPU time"
    print(f"{cases:,} cases, {compared:,} logits to {TOLERANCE}: {len(found)} faults; {spent}")
    return 1 if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.alignments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, help="number of cases, chosen at random (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sample (default: %(default)s)")
    parser.add_argument("--families", default=",".join(FAMILIES), help="separated by commas (default: %(default)s)")
    parser.add_argument("--only", help="one case: SINKS,CHUNK,FILL,FAMILY,WAY")
    return parser


if __name__ == "__main__":
    sys.exit(main())
