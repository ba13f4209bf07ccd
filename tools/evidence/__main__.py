"""docs/evidence.md from one command: the paper's claims on the default model, and what the method does not do.

    python -m tools.evidence BOOK.txt BOOK.txt --kept FOLDER

Books are plain texts, such as those of the PG-19 test split. Results are kept in FOLDER as they come: a run that was
stopped goes on there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from streamchat import __version__
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.load import load_model
from streamchat.models.quiet import quiet
from tools.evidence.forgetting import Asked, ask
from tools.evidence.page import write_page
from tools.evidence.runs import books, score_books

DOCS = Path(__file__).parents[2] / "docs"


def main() -> int:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("books", nargs="+", metavar="BOOK.txt")
    parser.add_argument("--kept", type=Path, required=True, metavar="FOLDER", help="where results are kept")
    parser.add_argument("--model", default="default")
    parser.add_argument("--tokens", type=int, default=20480, help="of each book (default: 20480)")
    parser.add_argument("--chunk", type=int, default=64, help="tokens a forward (default: 64)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page is written (default: docs)")
    args = parser.parse_args()
    args.kept.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def tick(what: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {what}", flush=True)

    loaded = load_model(args.model)
    with quiet():
        fit = choose_checked_fit(loaded.model)
    documents = books(args.books, loaded.tokenizer, args.tokens)
    with quiet():
        results = score_books(loaded, fit, documents, args.chunk, args.kept, tick)
        kept = args.kept / "forgetting.json"
        if not kept.exists():
            filler = loaded.tokenizer.decode(documents[-1].ids)
            assert isinstance(filler, str)
            rows = ask(loaded.model, loaded.tokenizer, fit, filler, tick)
            kept.write_text(json.dumps([{**asdict(row), "policy": row.policy.spec} for row in rows]))
    from streamchat.benchmarks.methods.registry import parse_methods

    asked = [
        Asked(parse_methods(row["policy"], 0, 0)[0], row["distance"], row["loss"], row["known"])
        for row in json.loads(kept.read_text())
    ]
    about = {
        "model": loaded.name,
        "dtype": loaded.dtype,
        "device": loaded.device,
        "chunk": args.chunk,
        "context": loaded.model.config.max_position_embeddings,
        "streamchat": __version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    for path in write_page(args.docs, results, asked, about):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
