"""A long chat for timing: questions with follow-ups in the style of MT-Bench, and supplied replies."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

from streamchat.benchmarks.workloads import Turn
from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.template.format import choose_format
from streamchat.verify.text import help_topic_ids

QUESTIONS = (
    "Describe a quiet harbour at dawn for a travel magazine, in the present tense.",
    "Now write the same scene as a letter from a sailor to his sister.",
    "A train leaves at 14:05 and needs 95 minutes. When does it arrive, and how do you know?",
    "And if it is delayed by a quarter of an hour at each of its two stops?",
    "Explain to a ten-year-old why the sky is blue.",
    "Shorten that to two sentences, and keep the comparison.",
    "Write a Python function that returns the second largest number of a list.",
    "What does it do with a list of one number? Change it so that it says what is wrong.",
    "Which three questions should I ask before I rent a flat in a city I do not know?",
    "Answer the second of them as a landlord who hides something.",
    "Sort these by weight and say why: a whale, a bicycle, a grand piano, a cat.",
    "Add an animal that would stand between the last two.",
    "Summarise the plot of a film in which a clockmaker stops time, without its ending.",
    "Give three endings, each in one sentence: sad, funny, and surprising.",
    "What are the advantages and the drawbacks of working at night?",
    "Turn the drawbacks into advice for somebody who has no choice.",
)


def make_turns(tokenizer: Any, count: int, reply_tokens: int) -> list[Turn]:
    """Return `count` turns in the model's chat format, each with a reply of `reply_tokens` tokens of English text."""
    encoder = ChatEncoder(tokenizer, choose_format(tokenizer, "auto", ""))
    text = help_topic_ids(tokenizer, max(4096, 8 * reply_tokens))
    turns = []
    for number, question in enumerate(islice(cycle(QUESTIONS), count)):
        prompt = encoder.turn(question, first=number == 0)
        start = number * reply_tokens % (len(text) - reply_tokens)
        reply = [*text[start : start + reply_tokens], *encoder.close()]
        turns.append(Turn([*encoder.system_block(), *prompt] if number == 0 else prompt, reply))
    return turns
