"""A long English text that is on every machine with Python: the documentation behind `help("topics")`."""

from __future__ import annotations

from typing import Any


def help_topics() -> str:
    """The language reference as `pydoc` carries it, some 450,000 characters; the wording varies a little by version."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


def help_topic_ids(tokenizer: Any, count: int) -> list[int]:
    """The first `count` token ids of that text."""
    # a token is rarely shorter than a character, and a tokenizer warns about texts beyond the model's length
    ids: list[int] = tokenizer(help_topics()[: 12 * count + 100], add_special_tokens=False, verbose=False)["input_ids"]
    return ids[:count]
