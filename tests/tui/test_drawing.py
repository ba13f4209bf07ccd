"""What a frame renders, places and arranges while a reply streams: no more than what changed, and the right cells."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest
from textual._compositor import Compositor
from textual._styles_cache import StylesCache
from textual.geometry import Region, Size
from textual.layouts.vertical import VerticalLayout
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget

from streamchat.base import events as ev
from streamchat.tui.drawing import SparseCompositor
from streamchat.tui.screens.chat import ChatScreen
from streamchat.tui.widgets.prompt import Prompt
from streamchat.tui.widgets.reply import Paragraph, Reply, ReplyMarkdown
from tests.support.app_driver import Driver, driving
from tests.support.scripted_engine import Reply as ScriptedReply
from tests.support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.slow

LONG = "\n\n".join(" ".join([word] * 60) for word in ("one", "two", "three", "four", "five", "six", "seven"))
KINDS = "# Title\n\n- one\n- two\n\n  more\n\n> quoted\n\n```\nx = 1\n```\n\n| a | b |\n| - | - |\n| 1 | 2 |\n"


@asynccontextmanager
async def streaming(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] = (140, 30)
) -> AsyncIterator[tuple[Driver, Callable[..., Awaitable[None]]]]:
    """A reply in progress, and a function that shows events as one frame."""
    engine = ScriptedEngine([ScriptedReply("begun again", hold_after=1)])
    async with driving(engine, size=size) as driver:
        await driver.begin("go")
        await driver.until(lambda: bool(driver.conversation.last_reply))
        monkeypatch.setattr(ChatScreen, "_show_after", lambda *_: None)
        driver.prompt.cursor_blink = False

        async def show(*events: ev.Event) -> None:
            driver.chat._pace._figures_at = -math.inf
            for event in events:
                driver.chat._bridge.put(event)
            await driver.chat.show_pending()
            for _ in range(5):
                await asyncio.sleep(0.02)
                await driver.pilot.pause()

        yield driver, show
        engine.release()


def text(words: str) -> ev.TextDelta:
    return ev.TextDelta(1, words)


def sample(driver: Driver, tps: float) -> ev.StatusSampled:
    return ev.StatusSampled(driver.board.cache, ev.MemoryState(1), 0.1, tps, True)


async def test_a_frame_has_the_cells_that_textual_would_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    render = SparseCompositor._render_chops

    def checked(
        compositor: SparseCompositor, crop: Region, is_rendered_line: Callable[[int], bool]
    ) -> Sequence[Mapping[int, Strip]]:
        chops = render(compositor, crop, is_rendered_line)
        expected = Compositor._render_chops(compositor, crop, is_rendered_line)
        for y in range(crop.y, crop.bottom):
            for column in compositor._columns(y) if is_rendered_line(y) else ():
                assert list(chops[y][column]) == list(expected[y][column]), (y, column)
                compared.append(y)
        return chops

    monkeypatch.setattr(SparseCompositor, "_render_chops", checked)
    async with streaming(monkeypatch) as (driver, show):
        for part in (LONG, "\n\n", *(KINDS[at : at + 7] for at in range(0, len(KINDS), 7))):
            await show(text(part), sample(driver, len(compared) % 97))
        driver.conversation.scroll_home(animate=False)
        await driver.pilot.pause()
        await driver.pilot.resize_terminal(90, 20)
        await driver.write("typed while scrolled back")
        await driver.pilot.press("f1")
        await driver.pilot.pause()
        await driver.pilot.press("escape")
        await driver.pilot.pause()
    assert len(compared) > 2000


async def test_a_frame_renders_only_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with streaming(monkeypatch) as (driver, show):
        await show(text(LONG), sample(driver, 99.0))
        await show(sample(driver, 100.0))
        rendered: list[Widget] = []
        render_lines = Widget.render_lines

        def noted(widget: Widget, crop: Region) -> list[Strip]:
            rendered.append(widget)
            return render_lines(widget, crop)

        monkeypatch.setattr(Widget, "render_lines", noted)
        # a figure at the top right and a word at the bottom left: the rectangle around both is the whole screen
        await show(text(" word"), sample(driver, 250.0))
        assert driver.figures("speed")["tok/s"] == "250.0"
        assert {widget.id for widget in rendered} >= {"speed"}
        paragraphs = [widget for widget in rendered if isinstance(widget, Paragraph)]
        assert set(paragraphs) == {driver.conversation.query(Paragraph).last()}
        assert not [widget for widget in rendered if isinstance(widget, Prompt)]
        assert len(rendered) < 12


async def test_a_frame_with_a_new_paragraph_is_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    async with streaming(monkeypatch) as (_, show):
        await show(text(LONG))
        layouts: list[None] = []
        refresh = Screen._refresh_layout

        def counted(screen: Screen[None], size: Size | None = None, scroll: bool = False) -> None:
            layouts.append(None)
            refresh(screen, size, scroll)

        monkeypatch.setattr(Screen, "_refresh_layout", counted)
        for number in range(5):
            await show(text(f"\n\nparagraph {number}"))
        assert len(layouts) == 5


async def test_a_layout_places_and_arranges_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with streaming(monkeypatch) as (driver, show):
        await show(text(LONG), sample(driver, 99.0))
        await show(sample(driver, 100.0))
        placed: list[None] = []
        arranged: Counter[type[Widget]] = Counter()
        arrange_root, arrange = Compositor._arrange_root, VerticalLayout.arrange

        def noted_root(
            compositor: Compositor, root: Widget, size: Size, visible_only: bool = True
        ) -> tuple[object, set[Widget]]:
            placed.append(None)
            return arrange_root(compositor, root, size, visible_only)

        def noted(layout: VerticalLayout, parent: Widget, *args: object, **kwargs: object) -> object:
            arranged[type(parent)] += 1
            return arrange(layout, parent, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(Compositor, "_arrange_root", noted_root)
        monkeypatch.setattr(VerticalLayout, "arrange", noted)
        for number in range(5):
            await show(text(" more" * 40), sample(driver, 101.0 + number))
        assert len(placed) == 5
        assert arranged[ReplyMarkdown] == arranged[Reply] == 5
        hidden = driver.conversation.query(Paragraph).first()
        assert hidden not in driver.chat._compositor.visible_widgets
        hidden.refresh()
        await driver.pilot.pause()
        assert driver.prompt.region.height > 0  # asks where it is
        assert len(placed) == 5


async def test_the_rows_of_a_container_are_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with streaming(monkeypatch) as (driver, show):
        await show(text(LONG))
        reply = driver.conversation.query_one(Reply)
        markdown = reply.query_one(ReplyMarkdown)
        caches = {reply._styles_cache: "reply", markdown._styles_cache: "markdown"}
        rows: Counter[str] = Counter()
        render_line = StylesCache.render_line

        def noted(cache: StylesCache, *args: object) -> Strip:
            rows[caches.get(cache, "other")] += 1
            return render_line(cache, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(StylesCache, "render_line", noted)
        await show(text(" more" * 40))
        assert 1 <= rows["reply"] <= 2
        assert rows["markdown"] <= 2
        assert rows["other"] < 60


async def test_figures_do_not_draw_the_input_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with streaming(monkeypatch) as (driver, _):
        drawn: list[None] = []
        monkeypatch.setattr(type(driver.prompt), "refresh", lambda *_, **__: drawn.append(None))
        driver.chat.show_keys()
        driver.chat.show_keys()
        assert not drawn
