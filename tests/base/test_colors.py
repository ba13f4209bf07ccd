"""When colors are written."""

from __future__ import annotations

import pytest

from streamchat.base.colors import wants_color


@pytest.mark.parametrize(
    ("environ", "terminal", "elsewhere"),
    [
        ({}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": "0"}, False, False),  # any value but the empty one
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "3", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "0"}, True, False),
        ({"FORCE_COLOR": "False"}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False),
        ({"NO_COLOR": "", "FORCE_COLOR": "1"}, True, True),
    ],
)
def test_the_rules_of_both_variables(environ: dict[str, str], terminal: bool, elsewhere: bool) -> None:
    assert wants_color(environ, is_terminal=True) is terminal
    assert wants_color(environ, is_terminal=False) is elsewhere
