"""Parts of turns as ids: what is next to a part decides its tokens. On a tokenizer whose tokens tests can foresee."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.conversation.control_tokens import byte_ids, control_tokens
from streamchat.conversation.encoding import ChatEncoder, TextEncoder
from streamchat.conversation.template.chat_format import ChatFormat
from tests.support.greedy_tokenizer import GreedyTokenizer

SIGNS = "abcdeiknoprstux</>SUA:|$. "
CHAT = ChatFormat("template", "S:", "", "|", "U:", "u:", "/A:", "</s>", reply_open="/A:")


def a_tokenizer(
    names: Iterable[str] = (),
    *,
    added: Mapping[str, bool] | None = None,
    special: Iterable[str] = ("</s>",),
    template: Any = None,
    **more: Any,
) -> Any:
    """A tokenizer with these names besides `SIGNS`.

    `added` are added tokens, and whether each is special; `special` are special tokens that are not added ones.
    """
    added = added or {}
    made: Any = GreedyTokenizer(list(dict.fromkeys([*SIGNS, *names, *added, *special])), **more)
    made.added_tokens_decoder = {
        made.ids[name]: SimpleNamespace(content=name, special=is_special) for name, is_special in added.items()
    }
    made.all_special_tokens = [*special]
    made.all_special_ids = [made.ids[name] for name in special]
    made.chat_template = template
    return made


def named(tokenizer: Any, ids: Iterable[int]) -> str:
    """The names of tokens, with spaces between them."""
    return " ".join(tokenizer.names[token] for token in ids)


# --- control tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("##", True), ("<x>", True), ("a b", False), ("ab1", False), ("é", False), ("#", False), ("  ", False)],
)
def test_added_tokens_that_the_template_writes_are_control_tokens_unless_they_read_as_text(
    name: str, expected: bool
) -> None:
    tokenizer = a_tokenizer(added={name: False}, special=())
    found = {tokenizer.ids[name]: name} if expected else {}
    assert control_tokens(tokenizer, f"1. {name}!") == found
    assert control_tokens(tokenizer, "1. !") == control_tokens(tokenizer) == {}


def test_special_tokens_are_control_tokens_unless_they_are_missing_or_blank() -> None:
    tokenizer = a_tokenizer(["x"], added={"<a>": True, "word": True, " ": True}, special=["</s>", "x"])
    tokenizer.all_special_ids.append(None)
    tokenizer.all_special_tokens.append("<none>")
    names = ["<a>", "word", "</s>", "x"]
    assert control_tokens(tokenizer) == {tokenizer.ids[name]: name for name in names}


def test_the_bytes_of_a_character_are_byte_level_or_hexadecimal_names() -> None:
    names = ["Ã", "©", "<0xC3>", "<0xA9>", "<0x0A>"]
    tokenizer = a_tokenizer(names, unknown="<unk>")
    ids = tokenizer.ids
    assert byte_ids(tokenizer, "é", set()) == [ids["Ã"], ids["©"]]
    assert byte_ids(tokenizer, "é", {ids["©"]}) == [ids["<0xC3>"], ids["<0xA9>"]]
    assert byte_ids(tokenizer, "é", {ids["©"], ids["<0xC3>"]}) == []
    assert byte_ids(tokenizer, "\n", set()) == [ids["<0x0A>"]]
    assert byte_ids(tokenizer, "a", set()) == [ids["a"]]
    assert byte_ids(tokenizer, "ü", set()) == []
    assert byte_ids(tokenizer, "\udc80", set()) == byte_ids(tokenizer, "?", set()) == []  # no character at all


def test_the_chat_template_of_the_tokenizer_tells_which_added_tokens_are_control_tokens() -> None:
    added = {"<think>": False, "<tool>": False, "<reason>": False}
    tokenizer = a_tokenizer(added=added, template="<think> <tool>")
    encoder = TextEncoder(tokenizer)
    assert encoder.control_names == {"<think>", "<tool>", "</s>"}
    assert encoder.control_ids == {tokenizer.ids[name] for name in encoder.control_names}
    assert encoder.reasoning_names == {"<think>"}
    assert TextEncoder(tokenizer, "<reason>").control_names == {"<reason>", "</s>"}
    tokenizer.chat_template = {"default": "<think>"}
    assert TextEncoder(tokenizer).control_names == {"</s>"}
    del tokenizer.chat_template
    assert TextEncoder(tokenizer).control_names == {"</s>"}


def test_plain_text_has_no_control_tokens_and_rendered_text_has_those_outside_of_the_letters() -> None:
    tokenizer = a_tokenizer(["<0x24>"], special=["</s>", "$"])
    encoder = TextEncoder(tokenizer, "")
    assert named(tokenizer, encoder.text("$a</s>")) == "<0x24> a < / s >"
    assert named(tokenizer, encoder.text("$")) == "<0x24>"
    assert named(tokenizer, encoder.rendered("$a</s>$", [(1, 3)])) == "$ a < / s > $"
    assert named(tokenizer, encoder.rendered("$a</s>$", [(0, 2)])) == "<0x24> a </s> $"


# --- what is next to a part -----------------------------------------------------------------------------------------


def test_a_system_block_is_encoded_as_before_the_first_message() -> None:
    tokenizer = a_tokenizer()
    encoder = ChatEncoder(tokenizer, replace(CHAT, system_prompt="a</s>", system_close="|</s>"))
    assert named(tokenizer, encoder.system_block()) == "S : a < / s > | </s>"
    tokenizer = a_tokenizer(["|u", "^S"], last="<end>")
    assert named(tokenizer, ChatEncoder(tokenizer, CHAT).system_block()) == "^S : |"
    # a token that spans both is no token of the block, which then is encoded as at the end of a text
    spans = ChatEncoder(tokenizer, replace(CHAT, first_user_open="u:", user_open="U:"))
    assert named(tokenizer, spans.system_block()) == "^S : | <end>"


def test_an_opening_is_encoded_as_after_the_system_block_or_a_closed_reply() -> None:
    tokenizer = a_tokenizer(["^U", "^u", ":a"], opens="|")
    encoder = ChatEncoder(tokenizer, CHAT)
    assert named(tokenizer, encoder.opening(first=True)) == "^U :"
    assert named(tokenizer, encoder.opening(first=False)) == "u :"
    encoder = ChatEncoder(a_tokenizer(["^U", "^u"], opens="</s>"), CHAT)
    assert named(tokenizer, encoder.opening(first=True)) == "U :"
    assert named(tokenizer, encoder.opening(first=False)) == "^u :"


def test_a_turn_is_encoded_as_after_the_previous_reply() -> None:
    tokenizer = a_tokenizer(["^u"], opens="x")
    encoder = ChatEncoder(tokenizer, replace(CHAT, assistant_close=""))
    for previous, opening in (("a" * 99 + "x", "^u :"), ("x" * 99 + "a", "u :"), ("x", "^u :"), ("a", "u :")):
        turn = encoder.encoded("a", False, previous=previous)
        assert named(tokenizer, turn.prompt) == f"{opening} a / A :"
    assert named(tokenizer, encoder.turn("b", first=False)) == "u : b / A :"
    assert named(tokenizer, encoder.turn("b", first=True)) == "U : b / A :"


@pytest.mark.parametrize(("reply", "close"), [("abx", "^/A"), ("ab", "/A"), ("x" * 80 + "b", "/A"), ("", "/A")])
def test_a_close_is_encoded_as_after_the_reply(reply: str, close: str) -> None:
    tokenizer = a_tokenizer(["^/A", "/A"], opens="x")
    encoder = ChatEncoder(tokenizer, replace(CHAT, assistant_close="/A"))
    assert named(tokenizer, encoder.close(reply)) == close
    assert named(tokenizer, encoder.close()) == "/A"


def test_a_close_is_encoded_as_before_another_message() -> None:
    tokenizer = a_tokenizer(["bU"], last="<end>")
    closing = replace(CHAT, assistant_close="/b")
    assert named(tokenizer, ChatEncoder(tokenizer, closing).close("a")) == "/ b"
    swapped = replace(closing, first_user_open="u:", user_open="U:")
    assert named(tokenizer, ChatEncoder(tokenizer, swapped).close("a")) == "/ b <end>"
    given = ChatEncoder(tokenizer, closing).encoded("a", True, "b")
    assert named(tokenizer, given.reply) == "b / b"
    assert named(tokenizer, ChatEncoder(tokenizer, swapped).encoded("a", True, "b").reply) == "b / b <end>"


def test_the_rest_of_a_reply_is_text_and_its_close_is_not() -> None:
    tokenizer = a_tokenizer(["<0x24>"], special=["</s>", "$"])
    encoder = ChatEncoder(tokenizer, CHAT)
    assert named(tokenizer, encoder.close("a", "$</s>b")) == "<0x24> < / s > b </s>"
    assert named(tokenizer, encoder.close("a")) == "</s>"


def test_the_opening_of_a_reply_is_encoded_as_after_a_message() -> None:
    tokenizer = a_tokenizer(["^/"])
    encoder = ChatEncoder(tokenizer, replace(CHAT, generation="/U:", reply_open="/A:"))
    assert named(tokenizer, encoder.reply_opening()) == named(tokenizer, encoder.reply_opening(given=False)) == "/ U :"
    assert named(tokenizer, encoder.reply_opening(given=True)) == "/ A :"


# --- whole turns ----------------------------------------------------------------------------------------------------


def test_the_places_of_message_and_reply_in_a_turn() -> None:
    tokenizer = a_tokenizer([":a", "b/"])
    encoder = ChatEncoder(tokenizer, replace(CHAT, generation="/S:"))
    turn = encoder.encoded("cd", True)
    assert (named(tokenizer, turn.prompt), turn.message_start, turn.reply_start) == ("U : c d / S :", 2, 4)
    assert turn.reply == []
    given = encoder.encoded("cd", False, "ek")
    assert (named(tokenizer, given.prompt), given.message_start, given.reply_start) == ("u : c d / A :", 2, 4)
    assert named(tokenizer, given.reply) == "e k </s>"
    # a token that spans two parts belongs to the first
    merged = encoder.encoded("ab", True, "ab")
    assert (named(tokenizer, merged.prompt), merged.message_start, merged.reply_start) == ("U :a b/ A :a", 2, 3)
    assert named(tokenizer, merged.reply) == "b </s>"


def test_names_of_control_tokens_are_letters_in_message_and_given_reply() -> None:
    tokenizer = a_tokenizer(["<0x24>"], special=["</s>", "$"])
    encoder = ChatEncoder(tokenizer, CHAT)
    turn = encoder.encoded("$</s>$", True)
    assert named(tokenizer, turn.prompt) == "U : <0x24> < / s > <0x24> / A :"
    given = encoder.encoded("$a$", True, "$</s>$")
    assert named(tokenizer, given.prompt) == "U : <0x24> a <0x24> / A :"
    assert named(tokenizer, given.reply) == "<0x24> < / s > <0x24> </s>"


class Deaf(GreedyTokenizer):
    """Drops every `~`, as some tokenizers drop signs that they do not know."""

    def __call__(self, text: str, **given: Any) -> dict[str, Any]:
        return super().__call__(text.replace("~", ""), **given)


def test_a_message_of_which_nothing_is_read_becomes_a_replacement_character() -> None:
    tokenizer: Any = Deaf([*SIGNS, "\N{REPLACEMENT CHARACTER}", "X"])
    tokenizer.added_tokens_decoder, tokenizer.all_special_ids, tokenizer.all_special_tokens = {}, [], []
    encoder = ChatEncoder(tokenizer, CHAT)
    assert encoder._readable("~~") == "\N{REPLACEMENT CHARACTER}"
    assert named(tokenizer, encoder.turn("~~", True)) == "U : \N{REPLACEMENT CHARACTER} / A :"
    for text in ("", "  ", "a", "~" * 99 + "a", "a" + "~" * 99):
        assert encoder._readable(text) == text


# --- reasoning in given replies ---------------------------------------------------------------------------------------

REASONING = {"<think>": False, "</think>": False, "<reason>": True, "<tool>": False, "<thought>": False}


def reasoning_encoder(names: Iterable[str] = (), **more: Any) -> tuple[Any, ChatEncoder]:
    """A format whose template knows five added tokens, one of which opens the messages of users."""
    texts = {"user_open": "<thought>:", "source": " ".join(REASONING)} | more.pop("texts", {})
    names = ("[think]", "[", "]", "h", "l", "g", "<0x24>", *names)
    tokenizer = a_tokenizer(names, added=REASONING, special=["</s>", "[think]", "$"], **more)
    return tokenizer, ChatEncoder(tokenizer, replace(CHAT, **texts))


def letters(text: str) -> str:
    return " ".join(text)


def test_a_given_reply_may_contain_tokens_around_reasoning_and_no_others() -> None:
    tokenizer, encoder = reasoning_encoder()
    assert encoder.control_names == {*REASONING, "</s>", "[think]", "$"}
    given = encoder.encoded("a", True, "<think>a</think>b")
    assert named(tokenizer, given.reply) == "<think> a </think> b </s>"
    for name in ("<reason>", "<tool>", "<thought>", "[think]", "</s>"):
        assert named(tokenizer, encoder.encoded("a", True, name).reply) == f"{letters(name)} </s>"
    assert named(tokenizer, encoder.encoded("<think>", True).prompt) == f"U : {letters('<think>')} / A :"


def test_a_message_with_names_of_reasoning_is_letters_though_the_reply_is_not() -> None:
    tokenizer, encoder = reasoning_encoder(["^/", "^$", "^a"], opens="</s>")
    given = encoder.encoded("c</think>", True, "$a<think>b")
    prompt = f"U : c {letters('</think>')} / A :"
    assert (named(tokenizer, given.prompt), given.message_start, given.reply_start) == (prompt, 2, 11)
    assert named(tokenizer, given.reply) == "<0x24> a <think> b </s>"
    again = encoder.encoded("<think>", False, "a<think>")
    assert named(tokenizer, again.prompt) == f"<thought> : {letters('<think>')} / A :"
    assert named(tokenizer, again.reply) == "a <think> </s>"


def test_a_turn_is_encoded_in_one_piece_unless_its_message_has_names_of_reasoning() -> None:
    """Only in one piece can a token span the opening of the reply and its text."""
    for opening in ("/A:", "<think>:"):
        tokenizer, encoder = reasoning_encoder([":b"], texts={"reply_open": opening})
        opened = opening.replace("/A:", "/ A ").replace("<think>:", "<think> ")
        merged = encoder.encoded("a", True, "bc")
        assert (named(tokenizer, merged.prompt), named(tokenizer, merged.reply)) == (f"U : a {opened}:b", "c </s>")
        apart = encoder.encoded("<think>", True, "bc")
        assert named(tokenizer, apart.prompt) == f"U : {letters('<think>')} {opened}:"
        assert named(tokenizer, apart.reply) == "b c </s>"
