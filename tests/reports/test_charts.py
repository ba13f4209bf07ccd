"""Pictures: in characters for any terminal, as SVG and PNG files."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamchat.reports.chart import Bars, Chart, Heatmap, Picture, Series
from streamchat.reports.figure import save_pictures, svg_of
from streamchat.reports.terminal import text_of

NAN = float("nan")
CURVES = Chart(
    "curves", "Two curves", "What is seen.", "token", "nats",
    (Series("up", [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, NAN, 4.0]), Series("down", [1.0, 4.0], [4.0, 1.0])),
    line_at=2.5, from_zero=True,
)  # fmt: skip
BARS = Bars("bars", "Speeds", "", "tok/s", (("slow", 10.0), ("fast", 40.0)))
MAP = Heatmap(
    "map", "Perplexity", "", "sinks", "budget", ("0", "4"), ("256", "1,024"), ((31.92, 30.0), (19.5, NAN))
)  # fmt: skip


@pytest.mark.parametrize("picture", [CURVES, BARS, MAP])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "no-such-encoding"])
@pytest.mark.parametrize("width", [20, 60, 300])
def test_characters_fit_every_terminal(picture: Picture, encoding: str, width: int) -> None:
    text = text_of(picture, width, color=False, encoding=encoding)
    assert picture.title in text
    assert "\033" not in text
    assert max(map(len, text.splitlines())) <= max(40, min(width, 140))
    if encoding != "utf-8":
        assert text.isascii()


def test_colours_where_they_may_be() -> None:
    assert "\033[" in text_of(CURVES, 80, color=True)
    plain = text_of(CURVES, 80, color=False)
    # curves are told apart by their marks instead
    assert "* up" in plain.replace("**", "*")
    assert "+ down" in plain.replace("++", "+")


def test_bars_are_as_long_as_their_numbers() -> None:
    lines = text_of(BARS, 80, color=False, encoding="ascii").splitlines()
    slow, fast = (next(line for line in lines if name in line).count("#") for name in ("slow", "fast"))
    assert fast == pytest.approx(4 * slow, abs=4)
    assert lines.index(next(line for line in lines if "slow" in line)) < lines.index(
        next(line for line in lines if "fast" in line)
    )


def test_the_map_has_its_numbers_and_shades() -> None:
    lines = text_of(MAP, 80, color=False).splitlines()
    assert "██ 31.92" in lines[-2]
    assert "19.50" in lines[-1]
    assert lines[-1].endswith("-")


@pytest.mark.parametrize("picture", [CURVES, BARS, MAP])
def test_files(picture: Picture, tmp_path: Path) -> None:
    written = save_pictures(tmp_path, [picture])
    assert [path.suffix for path in written] == [".svg", ".png"]
    text = written[0].read_text()
    assert text.startswith("<svg")
    assert written[1].read_bytes().startswith(b"\x89PNG")
    save_pictures(tmp_path, [picture])
    assert written[0].read_text() == text  # nothing in it depends on the moment
    assert svg_of(picture) != text  # on any ground


def test_a_map_without_numbers_is_drawn() -> None:
    empty = Heatmap("e", "Empty", "", "a", "b", ("1",), ("2",), ((NAN,),))
    assert "-" in text_of(empty, 80, color=False)
    assert svg_of(empty).startswith("<svg")
