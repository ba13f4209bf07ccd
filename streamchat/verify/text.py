"""A long English text that comes with Python: the documentation behind `help("topics")`."""

from __future__ import annotations

from typing import Any


def help_topics() -> str:
    """Return the language reference in `pydoc`, about 450,000 characters; it differs a little between versions."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


def help_topic_ids(tokenizer: Any, count: int) -> list[int]:
    """Return the first `count` token ids of `help_topics()`."""
    # 12 characters per token are more than enough; tokenizers warn about texts beyond the model's length
    ids: list[int] = tokenizer(help_topics()[: 12 * count + 100], add_special_tokens=False, verbose=False)["input_ids"]
    return ids[:count]
