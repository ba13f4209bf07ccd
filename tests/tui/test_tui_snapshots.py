"""Pictures of the app, as text and colours, compared with those in `tests/snapshots`.

`UPDATE_SNAPSHOTS=1 pytest tests/tui/test_tui_snapshots.py` redraws them. Look at the difference before you commit it.
Each version of Textual draws a little differently, so the extra `dev` installs the one that the pictures were drawn
with. With another one the tests are skipped, and fail in CI.
"""

from __future__ import annotations

import itertools
import os
import string
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import textual
from textual.widgets import Input

import tests
from streamchat.base.requests import Pin
from streamchat.config.settings import Settings
from tests.support.app_driver import Driver, driving
from tests.support.model_lists import LIST
from tests.support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "snapshots"
DRAWN_WITH = FOLDER / "textual-version"
LETTERS = string.ascii_letters + string.digits
CODE = """Here is one:

```python
def add(a, b):
    return a + b
```

It takes **two numbers**, as in `add(1, 2)`."""
PLACES = """1. The *Eiffel Tower*, at dusk
2. The Louvre, early

| place | when |
|---|---|
| tower | dusk |
"""
LONG = "The sea is wide and blue and full of fish, and nobody has ever seen all of it. " * 5
THOUGHT = "<think>\nThey ask for more.\n</think>\n\nYes."


async def talk(driver: Driver) -> None:
    """A conversation with all there is: evictions, a pin, code, a table, reasoning, a command."""
    for question in ("What is there to see?", "Write a function that adds.", "Tell me about the sea.", "And more?"):
        await driver.ask(question)
    driver.engine.send(Pin(2))
    await driver.ask("Really?")
    await driver.ask("And the end?")
    await driver.until(lambda: driver.board.cache == driver.engine.cache.state())


async def at_the_end(driver: Driver) -> None:
    await talk(driver)


async def reading_back(driver: Driver) -> None:
    await talk(driver)
    await driver.pilot.press("ctrl+home")


async def in_the_map(driver: Driver) -> None:
    await talk(driver)
    await driver.pilot.press("ctrl+t", "left", "enter")
    await driver.pilot.pause(0.1)


async def help_screen(driver: Driver) -> None:
    await driver.pilot.press("f1")
    await driver.pilot.pause(0.1)


async def settings_screen(driver: Driver) -> None:
    """A wrong value in the line of a setting."""
    await driver.ask("hello")
    driver.engine.origins["temperature"] = "the catalogue"
    await driver.pilot.press("f4", *"temp", "enter", "x")
    driver.app.screen.query_one("#value", Input).cursor_blink = False
    await driver.pilot.pause(0.1)


async def commands(driver: Driver) -> None:
    await driver.ask("hello")
    await driver.pilot.press("slash")


async def models(driver: Driver) -> None:
    """The list of models during a fetch."""
    await driver.ask("What is there to see?")
    await driver.enter("/model pythia-1b")
    await driver.until(lambda: "50 %" in driver.chat.fetch_line.text)
    driver.app.state.find_models = lambda info: LIST
    await driver.pilot.press("ctrl+n")
    await driver.until(lambda: "pythia-410m" in driver.screen_text)
    await driver.pilot.press("down", "down")
    driver.app.screen.query_one(Input).cursor_blink = False


async def queued(driver: Driver) -> None:
    """A long queue: some messages are held, one is edited."""
    await driver.ask("What is there to see?")
    driver.app.state.outbox.begin_command(lambda event: False)
    for number in range(1, 51):
        await driver.enter(f"Question {number}, which is rather long and goes on and on:\n" + "word " * 30)
    await driver.pilot.press("escape")
    await driver.enter("Rather this")
    await driver.enter("And that")
    await driver.pilot.press("up")


SCENES: list[Callable[[Driver], Awaitable[None]]] = [
    at_the_end,
    reading_back,
    in_the_map,
    help_screen,
    settings_screen,
    commands,
    models,
    queued,
]
SIZES = [(80, 24), (140, 40)]
THEMES = ["textual-dark", "textual-light"]


def picture(driver: Driver) -> str:
    """The screen as text, and below it its colours: a letter a cell, and what each letter is."""
    rows, colours = [], []
    letters: dict[str, str] = {}
    for strip in driver.app.screen._compositor.render_strips():
        rows.append(strip.text.rstrip())
        line = ""
        for segment in strip:
            front, back = (segment.style.color, segment.style.bgcolor) if segment.style else (None, None)
            key = f"{front.name if front else '-'} on {back.name if back else '-'}"
            line += letters.setdefault(key, LETTERS[len(letters) % len(LETTERS)]) * segment.cell_length
        colours.append(line)
    names = [f"{letter} {key}" for key, letter in letters.items()]
    return "\n".join([*rows, "", *colours, "", *names]) + "\n"


def require_the_version_of_the_pictures() -> None:
    """Skip the test if this Textual draws otherwise than the pictures; in CI, fail it."""
    drawn_with = DRAWN_WITH.read_text(encoding="utf-8").strip()
    if os.environ.get("UPDATE_SNAPSHOTS") or drawn_with == textual.__version__:
        return
    message = (
        f"the pictures were drawn with Textual {drawn_with} and this is {textual.__version__}; "
        f"run: pip install textual=={drawn_with}"
    )
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def file_of(scene: Callable[[Driver], Awaitable[None]], size: tuple[int, int], theme: str) -> Path:
    """Return the file of a picture."""
    return FOLDER / f"{scene.__name__}-{size[0]}x{size[1]}-{theme}.txt"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
async def test_pictures(scene: Callable[[Driver], Awaitable[None]], size: tuple[int, int], theme: str) -> None:
    require_the_version_of_the_pictures()
    settings = Settings(
        cache_size=256, num_sink_tokens=4, max_new_tokens=100, theme=theme, system_prompt="You answer briefly."
    )
    engine = ScriptedEngine(
        [PLACES, CODE, LONG, LONG, THOUGHT, LONG], settings=settings, speed=(0.05, 42.0), sample_s=0, hold_fetch=True
    )
    async with driving(engine, settings=settings, size=size) as driver:
        driver.board.clock = lambda: 0.0
        driver.board._ready_at = -75.0
        driver.prompt.cursor_blink = False
        await scene(driver)
        driver.board.lengths.values = [20.0, 60.0, 100.0, 200.0, 256.0, 256.0]  # sampled in real time
        driver.board.speeds.values = [40.0, 42.0, 41.0]
        driver.chat._show_figures()
        await driver.pilot.pause(0.2)
        drawn = picture(driver)
    file = file_of(scene, size, theme)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        FOLDER.mkdir(exist_ok=True)
        DRAWN_WITH.write_text(textual.__version__ + "\n")
        file.write_text(drawn, encoding="utf-8")
    assert drawn == file.read_text(encoding="utf-8"), f"the screen changed; see {file.name}"


def test_each_picture_is_compared() -> None:
    """A file without a scene would never be looked at again."""
    expected = {file_of(*each) for each in itertools.product(SCENES, SIZES, THEMES)}
    assert set(FOLDER.glob("*.txt")) == expected


def test_another_version_of_textual_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPDATE_SNAPSHOTS", raising=False)
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(textual, "__version__", "8.0.0")
    with pytest.raises(pytest.fail.Exception, match=r"this is 8\.0\.0; run: pip install textual==8\."):
        require_the_version_of_the_pictures()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match=r"this is 8\.0\.0"):
        require_the_version_of_the_pictures()


def test_the_dev_extra_installs_the_version_of_the_pictures() -> None:
    project = tomllib.loads(Path(tests.__path__[0], "..", "pyproject.toml").read_text(encoding="utf-8"))["project"]
    drawn_with = DRAWN_WITH.read_text(encoding="utf-8").strip()
    assert f"textual=={drawn_with}" in project["optional-dependencies"]["dev"]
