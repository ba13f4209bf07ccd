"""Measures every family and writes the page about them.

python -m tests.family_table docs/families.md
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.layers.kinds import kind_of
from streamchat.cache.positions.rotation import TensorRotation
from streamchat.cache.positions.strategy import choose_fit
from streamchat.cache.press import StreamingPress
from streamchat.models.quiet import quiet
from tests.families import FAMILIES, SERVED, build, text
from tests.family_runs import (
    BUDGET,
    SINKS,
    TOLERANCE,
    Subject,
    expected,
    largest,
    rebasing,
    schedule,
    stream,
    subject,
    with_unmoved_sinks,
)

INTRODUCTION = """\
# Model families

This page is written by `python -m tests.family_table docs/families.md`; do not edit it.

No family is known by name. At load, the model's own rotary module is asked for its angles, how each cached tensor
carries its position is measured, and a numeric check compares keys moved by us with keys moved by the model
(`streamchat/cache/positions/`). `streamchat verify --model NAME` does that and more on your model.

Measured on tiny random models ({count} configurations, 2 to 4 layers, float32, logits scaled to a spread of 1) with a
budget of {budget} tokens and {sinks} sinks: a prompt of 20 tokens, 112 single tokens of which 100 evict, three chunks
of 7, and 5 single tokens. The reference shares no code with the product: it caches un-rotated keys, assigns positions
0, 1, 2, ... inside the cache at every step and lets the model's own rotary function turn all of them (arXiv:2309.17453,
3.2). For models whose positions are learned, it reads all kept tokens again at every step.

- *by*: **rotation**, sinks are turned to stand before the window; **no positions**, nothing has to be turned;
  **recompute**, positions cannot be moved, so the newer half is read again when the cache is full.
- *largest difference*: of any logit at any step, on sdpa and eager attention (-: not there in transformers). What is
  tested is {tolerance:.0e}. *rebased*: the same with positions set back every {rebase} tokens.
- *mistake*: the same with sinks left as they were cached, which is what a wrong position looks like (-: nothing is
  turned, or no query sees the sinks behind a smaller window).
- *generate*: 90 tokens of `generate` in a `StreamingPress` against feeding them one by one.
- *limit*: positions are kept below it, because the rope changes there, its table ends, or queries are scaled by the
  absolute position from there on (measured). A budget above it is refused.

The check at load also runs the attention in use (`attn_implementation`) on a cache that evicts, against eager
attention, and refuses it with figures when it is wrong there (`streamchat/cache/eviction/check.py`). FlexAttention on a
CPU without AVX-512 is refused this way.
"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    kind: str
    layout: str
    by: str
    sdpa: float | None
    eager: float | None
    rebased: float
    mistake: float | None
    generate: float
    limit: int | None


def measure(name: str) -> Row:
    """Run the schedule of one family."""
    family = FAMILIES[name]
    first = subject(name, family.attentions[0])
    goal = expected(name, family.attentions[0]).logits
    direct = {
        attention: largest(it.run(it.new_cache()), expected(name, attention).logits)
        for attention in family.attentions
        for it in [subject(name, attention)]
    }
    mistake = None
    if first.fit.rotates and family.sinks_seen:
        mistake = largest(first.run(with_unmoved_sinks(first.new_cache())), goal)
    return Row(
        name,
        type(first.model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel"),
        layout(first),
        first.fit.method,
        direct.get("sdpa"),
        direct.get("eager"),
        largest(first.run(rebasing(first.new_cache())), goal),
        mistake,
        generated(first),
        first.fit.position_limit if first.fit.rotates else None,
    )


def generated(it: Subject) -> float:
    """The largest difference of logits between `generate` and a loop over its output."""
    prompt = text(12)
    with StreamingPress(it.model, cache_size=BUDGET, num_sink_tokens=SINKS, fit=it.fit):
        out = it.model.generate(
            prompt,
            max_new_tokens=90,
            min_new_tokens=90,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = stream(it.model, it.new_cache(), out.sequences[:, :-1], [12] + [1] * 89)
    return largest(torch.cat(list(out.logits)), logits[11:])


def layout(it: Subject) -> str:
    """How the cached tensors carry positions, in words."""
    if it.fit.method == "recompute":
        return "learned, or not only a rotation"
    kinds = [kind_of(layer) for layer in transformers.DynamicCache(config=it.model.config).layers]
    words: list[str] = []
    turned = 0
    for layer, kind in zip(it.fit.layers, kinds, strict=True):
        if kind == "recurrent":
            continue
        for name in ("keys", "values"):
            rotation: TensorRotation | None = getattr(layer, name)
            if rotation is not None:
                turned += 1
                words.append(_rotation_words(name, rotation, it))
    attention = sum(kind != "recurrent" for kind in kinds)
    found = " or ".join(dict.fromkeys(words)) or "none"
    if 0 < turned < attention:
        found += f"; {attention - turned} of {attention} layers without positions"
    if recurrent := len(kinds) - attention:
        found += f"; {recurrent} recurrent layers, left as they are"
    if "mixed" in kinds:
        found += "; a recurrent state beside it, left as it is"
    return found


def _rotation_words(name: str, rotation: TensorRotation, it: Subject) -> str:
    pairs = rotation.source.angles(torch.tensor([1]))[0].shape[-1]
    how = "interleaved" if rotation.interleaved else "halves"
    where = "" if rotation.offset == 0 else f" from dimension {rotation.offset}"
    back = ", turned back" if rotation.reverse else ""
    tensor = "" if name == "keys" else ", in `values`"
    return f"{2 * pairs} dimensions, {how}{where}{back}{tensor}"


def page() -> str:
    """The whole page."""
    rows = [measure(name) for name in SERVED]
    worst = max(max(row.sdpa or 0, row.eager or 0, row.rebased, row.generate) for row in rows)
    heading = ["name", "class", "by", "layout in the cache", "sdpa", "eager", "rebased", "mistake", "generate", "limit"]
    lines = [
        INTRODUCTION.format(count=len(rows), budget=BUDGET, sinks=SINKS, tolerance=TOLERANCE, rebase=BUDGET),
        f"Largest of all: {worst:.1e}. transformers {transformers.__version__}, torch {torch.__version__}, CPU, one "
        "thread.",
        "",
        "| " + " | ".join(heading) + " |",
        "|" + "---|" * len(heading),
    ]
    for row in rows:
        cells = [row.name, row.kind, row.by, row.layout, *map(_figure, (row.sdpa, row.eager, row.rebased, row.mistake))]
        cells += [_figure(row.generate), "" if row.limit is None else str(row.limit)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Refused", "", "Whatever does not fit is refused at load, with the reason:", ""]
    for name, family in FAMILIES.items():
        if family.served == "refused" and family.available:
            lines.append(f"- {name}: {_refusal(name)}")
    lines += ["", "## Limits", "", LIMITS]
    return "\n".join(lines)


LIMITS = """\
- A recurrent state (Mamba layers in hybrids) has no tokens to drop: it goes on remembering evicted text.
- Where the library itself reads several tokens on a filled cache wrongly (Jamba on a CPU), tokens are fed one by one.
- Layers that attend in chunks (Llama 4) need a budget within one chunk.
- Padded batches are refused: a mask is as long as the text, not as the cache.
"""


def _refusal(name: str) -> str:
    try:
        choose_fit(build(name, FAMILIES[name].attentions[0]))
    except UnsupportedModelError as error:
        return str(error)
    raise AssertionError(f"{name} was served")


def _figure(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with quiet():
        content: Any = page()
    args.file.write_text(content, encoding="utf-8")
    print(f"{len(SERVED)} families, {sum(schedule('llama'))} tokens each: {args.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
