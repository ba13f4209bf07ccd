"""A real headless Chromium, driven by Selenium, and the screen of the terminal in its page."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import pytest

pyte = pytest.importorskip("pyte")
RECORD = """
window.received = [];
const Plain = window.WebSocket;
window.WebSocket = class extends Plain {
  constructor(...given) {
    super(...given);
    this.addEventListener("message", (event) => {
      if (typeof event.data === "string") return;
      let text = "";
      for (const each of new Uint8Array(event.data)) text += String.fromCharCode(each);
      window.received.push(btoa(text));
    });
  }
};
"""
"""Keeps what the page receives for its terminal, whose canvas has no text."""
COLUMNS, ROWS = 200, 60
"""At least the terminal's size in the page."""


def programs() -> tuple[str, str]:
    """Chromium and its driver; skips without them (`.ci/run` installs them)."""
    found = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if None in found or find_spec("selenium") is None:
        pytest.skip("needs Chromium, chromedriver, and Selenium: apt-get install chromium-driver")
    return str(found[0]), str(found[1])


class Page:
    """A page with a terminal.

    Args:
        driver: Selenium's driver.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Load the page, or load it again."""
        self.driver.get(address)

    def type(self, text: str) -> None:
        """Type into the terminal as the keyboard would."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(text).perform()

    def screen(self) -> str:
        """The text of the terminal since the page was loaded."""
        screen = pyte.Screen(COLUMNS, ROWS)
        stream = pyte.ByteStream(screen)
        for part in self.driver.execute_script("return window.received || []"):
            stream.feed(base64.b64decode(part))
        return "\n".join(line.rstrip() for line in screen.display)

    def wait_for(self, text: str, timeout_s: float = 60.0) -> str:
        """Wait until the terminal shows `text`, and return its whole screen."""
        deadline = time.monotonic() + timeout_s
        while text not in (shown := self.screen()):
            assert time.monotonic() < deadline, f"{text!r} is not shown:\n{shown}"
            time.sleep(0.2)
        return shown

    def hosts(self) -> set[str]:
        """Hosts of all requests, sockets included."""
        found = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            given = message["params"]
            url = given.get("request", {}).get("url") or given.get("url") or ""
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                parts = urlsplit(url)
                if parts.scheme not in ("data", "blob"):
                    found.add(parts.hostname or "")
        return found

    def errors(self) -> list[str]:
        """Errors that the page has logged."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def browser() -> Iterator[Page]:
    """A browser with one page."""
    chromium, chromedriver = programs()
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    try:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": RECORD})
        yield Page(driver)
    finally:
        driver.quit()
