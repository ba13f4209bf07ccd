"""Deliberate faults in the kernels; `--mutants` reports which of them random programs detect."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamchat.kernels import build
from tools.kernel_programs.builds import Build
from tools.kernel_programs.runner import Batch, Fault

BATCH = 100


@dataclass(frozen=True)
class Mutant:
    """One change of the sources."""

    name: str
    file: str
    before: str
    after: str


MUTANTS = (
    Mutant(
        "a row of float32 is read one element too far",
        "tiles.h",
        "for (long k = 0; k < columns; k++)\n        total += row[k] * x[k];",
        "for (long k = 0; k <= columns; k++)\n        total += row[k] * x[k];",
    ),
    Mutant(
        "the last rows of a matrix are written whole",
        "products.c",
        "memcpy(to, results, sizeof(float) * (size_t)rows);",
        "memcpy(to, results, sizeof(float) * TILE);",
    ),
    Mutant("no barrier between phases", "team.c", "if (atomic_fetch_sub(&team.open, 1) == 1)", "if (left == 1)"),
    Mutant(
        "all threads share scratch memory",
        "team.c",
        "do_task(state, &team.members[index])",
        "do_task(state, team.members)",
    ),
    Mutant(
        "a sign is shifted as a signed integer",
        "common.h",
        "(uint32_t)(x & 0x8000u) << 16",
        "(uint32_t)((int32_t)(x & 0x8000u) << 16)",
    ),
    Mutant(
        "a float too large for an integer is converted",
        "common.h",
        "float turns = float_of(bits < least ? bits : least);",
        "float turns = float_of(bits);",
    ),
    Mutant(
        "the scales of the other half of a group", "tiles.h", "at + TILE * part + row", "at + TILE * (1 - part) + row"
    ),
    Mutant(
        "the window is one slot too long",
        "attention.h",
        "stop > a->window ? stop - a->window",
        "stop > a->window ? stop - a->window - 1",
    ),
    Mutant("lanes that are not used read on", "attend_many.c", "n < used ? n : used - 1", "n"),
    Mutant(
        "scratch memory without the rounded vectors",
        "products.c",
        "needs_rounded(p) ? panel_words(p->columns) : 0",
        "0",
    ),
    Mutant(
        "scratch memory one number too small",
        "experts.c",
        "e->num_experts + 2 + (long)e->count",
        "e->num_experts + 1 + (long)e->count",
    ),
    Mutant(
        "vectors of another block are used again",
        "products.c",
        "member->tag != tag || member->block != block + 1",
        "member->tag != tag",
    ),
    Mutant("the last of equal experts is chosen", "experts.c", "logits[i] > logits[best]", "logits[i] >= logits[best]"),
    Mutant("NaN does not stay NaN", "common.h", " + (x != x ? x : 0.0f);", ";"),
    Mutant("ties are not rounded to even", "common.h", "0x0fffu + ((size >> 13) & 1u)", "0x1000u"),
    Mutant("old sums do not fade", "span.h", "sum[i] * fade + total", "sum[i] + total"),
    Mutant(
        "pairs are rotated the other way",
        "attention.c",
        "x[d] * cos[d] - x[d + 1] * sin[d]",
        "x[d] * cos[d] + x[d + 1] * sin[d]",
    ),
    Mutant(
        "the first of several spans is forgotten",
        "attention.c",
        "for (int part = 0; part < spans; part++) {\n            long at",
        "for (int part = spans > 1; part < spans; part++) {\n            long at",
    ),
    Mutant(
        "every head stores the first key",
        "attention.c",
        "source = h / (a->repeats + 1)",
        "source = 0",
    ),
    Mutant(
        "an empty phase never ends",
        "team.c",
        "            break; /* nobody",
        "            break;\n        else\n            break; /* nobody",
    ),
    Mutant("a plain input has no sum", "products.c", " && !p->sum;", ";"),
    Mutant("the clip has no lower limit", "attention.c", "x[d] < -a->clip ? -a->clip : x[d]", "x[d]"),
    Mutant(
        "a minimum is added, not subtracted",
        "tiles.h",
        "-floats_of_halves(header + 2 * (TILE + row))",
        "floats_of_halves(header + 2 * (TILE + row))",
    ),
    Mutant(
        "a helper computes tasks of its old phase",
        "team.c",
        "(long)(number - team.first), team.tasks",
        "(long)(number - team.first) - (number > team.first), team.tasks",
    ),
    Mutant(
        "originals are rotated like slots",
        "moves.c",
        "rotate(m, dim, token, TO_ORIGINALS, x)",
        "rotate(m, dim, token, TO_SLOTS, x)",
    ),
    Mutant("the first dimensions are always rotated", "moves.c", "    x += m->first_dim;\n", ""),
    Mutant("all tokens are rotated by the first angles", "moves.c", "m->cos + (long)token * pairs", "m->cos"),
    Mutant(
        "the scale of the token before", "moves.c", "h * m->scale_stride + token", "h * m->scale_stride + token / 2"
    ),
    Mutant("one token more is moved", "moves.c", "token < m->tokens; token++", "token < m->tokens + (h == 0); token++"),
    Mutant(
        "originals have no gaps",
        "moves.c",
        "h * m->original_stride",
        "(long)h * m->tokens * m->dim",
    ),
    Mutant(
        "only the first move is done",
        "moves.c",
        "move(all->moves + task, all->direction)",
        "move(all->moves, all->direction)",
    ),
    Mutant("moves do not search", "moves.c", "m->format, m->searches, to", "m->format, 0, to"),
    Mutant("values of K8V4 do not search", "attention.c", "a->format == K8V4, value_at", "0, value_at"),
    Mutant("values of K8V4 are read as 8 bits", "attention.h", "format == K8V4 ? INT4 : format", "key_format(format)"),
    Mutant("the last scale is the best", "codes.h", "if (i == 0 || error < least)", "if (error == error || i == 0)"),
    Mutant("the worst scale is the best", "codes.h", "error < least)", "error > least)"),
    Mutant("errors are not squared", "codes.h", "error += off * off;", "error += __builtin_fabsf(off);"),
    Mutant(
        "the codes of the last scale",
        "codes.h",
        "memcpy(codes, found, (size_t)dim);\n        }",
        "}\n        memcpy(codes, found, (size_t)dim);",
    ),
    Mutant("the smallest code is -limit", "codes.h", "code < -limit - 1.0f ? -limit - 1.0f", "code < -limit ? -limit"),
    Mutant("a Hadamard matrix of another order", "codes.h", "to[d + half] = low - high;", "to[d + half] = high - low;"),
)


def mutate(mutant: Mutant, folder: Path) -> Path:
    """Return a copy of the sources in `folder` with the fault.

    Raises:
        ValueError: The text to replace does not occur exactly once in the sources.
    """
    sources = folder / "source"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(build.SOURCES, sources)
    text = (sources / mutant.file).read_text()
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.file} has {mutant.before!r} {text.count(mutant.before)} times, not once")
    (sources / mutant.file).write_text(text.replace(mutant.before, mutant.after))
    return sources


def run_mutants(builds: Sequence[Build], seed: int, programs: int, mutants: Sequence[Mutant] = MUTANTS) -> int:
    """Run programs with each mutant until a build detects it; return 1 if one is not detected, else 0."""
    seen = 0
    with tempfile.TemporaryDirectory(prefix="kernel-mutants-") as folder:
        for mutant in mutants:
            started = time.monotonic()
            found = notice(mutant, builds, seed, programs, Path(folder))
            seen += found is not None
            how = f"{found.build}, program {found.number}: {found.what[:140]}" if found else "NOT NOTICED"
            print(f"{mutant.name} ({mutant.file}): {how} [{time.monotonic() - started:.0f} s]", flush=True)
    print(f"{seen} of {len(mutants)} mutants were noticed")
    return int(seen < len(mutants))


def notice(mutant: Mutant, builds: Sequence[Build], seed: int, programs: int, folder: Path) -> Fault | None:
    """Return the first fault that programs detect in a mutant; the builds are tried one after the other."""
    sources = mutate(mutant, folder)
    for each in builds:
        if each.missing():
            continue
        command = each.compile(folder, sources)
        for first in range(0, programs, BATCH):
            batch = Batch.write(seed, range(first, min(first + BATCH, programs)), folder)
            if fault := next(batch.run(each.name, command, folder), None):
                return fault
    return None
