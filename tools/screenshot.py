"""The README's picture: the app with the real default model, a short conversation over some evictions.

python -m tools.screenshot docs/screenshot.svg
python -m tools.screenshot --settings docs/settings.svg
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from streamchat.base.requests import Pin
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.engine.engine import Engine
from tests.support.app_driver import driving

QUESTIONS = (
    "What is the capital of France?",
    "Name three things to see there, as a list.",
    "What makes a good city? Answer in three sentences.",
    "Write a Python function that adds two numbers.",
)
PINNED = 1


async def take(path: Path, columns: int, rows: int, theme: str, *, with_settings: bool) -> None:
    """Talk, open the settings if asked for, then export the screen."""
    settings = Settings(cache_size=224, max_new_tokens=120, temperature=0.0, theme=theme)
    engine = Engine(Configuration(settings, {}, None))
    async with driving(engine, size=(columns, rows)) as driver:
        await driver.until(lambda: driver.board.info is not None, "the model", 300)
        for number, question in enumerate(QUESTIONS, start=1):
            await driver.enter(question)
            await driver.answered(number, 120)
            if number == PINNED:
                driver.app.state.engine.send(Pin(PINNED))
        if with_settings:
            await driver.pilot.press("f4", *"temp", "enter")
        await driver.pilot.pause(0.5)
        path.write_text(driver.app.export_screenshot(title="streamchat"), encoding="utf-8")


def main() -> int:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--columns", type=int, default=130)
    parser.add_argument("--rows", type=int, default=38)
    parser.add_argument("--theme", default="textual-dark")
    parser.add_argument("--settings", action="store_true", help="with the settings screen")
    args = parser.parse_args()
    asyncio.run(take(args.file, args.columns, args.rows, args.theme, with_settings=args.settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
