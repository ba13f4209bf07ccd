"""A byte-level BPE tokenizer made in the test: 256 bytes, some merges, control tokens, all kinds of templates."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 400
TEXT = (
    "What is the capital of France? The capital of France is Paris. Tell me a story about the sea and the dragon. "
    "User: Assistant: You are a helpful assistant. system user assistant once upon a time there was a little girl"
)

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Qwen3: past replies are rendered differently from how they are generated, and texts are trimmed
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
# as Llama 2: the system prompt sits inside the first user message, every turn begins with the start token
INSIDE = (
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>[INST] {% if loop.first %}{{ s }}{% endif %}"
    "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} <|im_end|>{% endif %}{% endfor %}"
)
# as Gemma: no system role, strict alternation
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Mistral v2 and v3: the system prompt is written before the newest message, wherever that is
LAST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "<|im_start|>{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and s is defined %}"
    "{{ s }}\n\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
)
# as gpt-oss: a reply names its channel, and the newest message closes otherwise than earlier ones
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<channel>final{% endif %}<message>"
    "{{ m.content }}{% if loop.last and m.role == 'assistant' %}<|endoftext|>{% else %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# as DeepSeek R1: the generation prompt opens the reasoning, which earlier replies lose
OPEN_REASONING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') }}<|im_end|>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CLOCK = (
    "{% for m in messages %}<|im_start|>{{ m.role }} [{{ strftime_now('%H:%M:%S.%f') }}]\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Llama 3: the date is written once, before the conversation
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + CHATML
# as ChatGLM: turns are counted
ROUNDS = (
    "{% for m in messages %}{% if m.role == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\n<|im_start|>{{ m.content }}"
    "{% else %}<|im_end|>{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_end|>{% endif %}"
)
# the newest message looks different from earlier ones
NEWEST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' (new)' if loop.last else '' }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Alpaca: headings are text, and only a reply ends with a control token
HEADINGS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}### Instruction:\n"
    "{{ m.content }}{% else %}### Response:\n{{ m.content }}<|im_end|>{% endif %}{% if not loop.last %}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}\n\n### Response:\n{% endif %}"
)
# no control token at all, and texts are trimmed
LINES = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# what closes a reply is a text: line ends, which grow together with those of a reply
PARAGRAPHS = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# the same with words, which decoding shows
BRACKETS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} [/{{ m.role }}]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# as Qwen3: a switch that closes the reasoning in the generation prompt
SWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# as SmolLM3: the switch is also written into the system prompt
SWITCHED_AT_THE_START = (
    "{% set mode = '/think' if enable_thinking | default(true) else '/no_think' %}"
    "{% if messages[0].role == 'system' %}{% set given = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set given = '' %}{% set rest = messages %}{% endif %}"
    "<|im_start|>system\nMode: {{ mode }}\n{{ given }}<|im_end|>\n"
    "{% for m in rest %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if mode == '/no_think' %}<think>\n\n</think>\n{% endif %}{% endif %}"
)
# as DeepSeek V3.1: the switch has a default of its own, and each reply opens with the end of the reasoning
SWITCHED_OFF = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}</think>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|><|im_start|>assistant\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
RAISES = "{{ raise_exception('no chat today') }}"
DROPS = "{% if add_generation_prompt %}{{ messages[-1]['content'] }}{% endif %}"


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=CONTROL,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return str(tokenizer.to_str())


def toy_tokenizer(chat_template: str | None = CHATML) -> Any:
    """A new tokenizer with this chat template."""
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(_backend()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        additional_special_tokens=CONTROL,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def joining_tokenizer(chat_template: str | None = CHATML) -> Any:
    """The same, which drops spaces before signs unless it is told not to, as those of older models do."""
    tokenizer = toy_tokenizer(chat_template)
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return tokenizer


WORDS = ["▁", "▁hello", "▁world", "hello", "a", ".", "\n", "\N{REPLACEMENT CHARACTER}"]
"""Tokens of `byte_token_tokenizer` behind 3 control tokens and 256 bytes."""


def byte_token_tokenizer() -> Any:
    """As Llama 2, Mistral and Gemma: words with a mark for the space, and `<0x00>` to `<0xFF>` for everything else."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *WORDS]
    backend = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
