"""Numbers as users type them."""

from __future__ import annotations

import argparse

import pytest

from streamchat.base.errors import ConfigError
from streamchat.base.formatting import parse_float, parse_int, parse_whole_number
from streamchat.cli.parser import Parser

ARABIC, FULL_WIDTH, UNDERSCORE = "\u0663", "\uff13", "1_000"


@pytest.mark.parametrize("text", [ARABIC, FULL_WIDTH, UNDERSCORE, "\u00b3", "", "x"])
def test_numbers_have_the_digits_0_to_9(text: str) -> None:
    assert parse_whole_number(text) is None
    for parse in (parse_int, parse_float):
        with pytest.raises(ValueError, match=r"literal|convert|not a number"):
            parse(text)


def test_numbers_are_parsed() -> None:
    assert (parse_whole_number("12"), parse_int("-12"), parse_float("1.5e3")) == (12, -12, 1500.0)


@pytest.mark.parametrize(("flag", "kind"), [("--count", "int"), ("--share", "float")])
@pytest.mark.parametrize("text", [ARABIC, FULL_WIDTH, UNDERSCORE])
def test_every_flag_and_subcommand_refuses_other_digits(flag: str, kind: str, text: str) -> None:
    parser = Parser(prog="streamchat")
    for each in (parser, parser.add_subparsers().add_parser("inner")):
        each.add_argument("--count", type=int)
        each.add_argument("--share", type=float)
    for arguments in ([flag, text], ["inner", flag, text]):
        with pytest.raises(ConfigError, match=f"{flag}: invalid {kind} value: '{text}'"):
            parser.parse_args(arguments)
    assert parser.parse_args(["inner", "--count", "3"]) == argparse.Namespace(count=3, share=None)
