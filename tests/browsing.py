"""A real browser for tests: Chromium from the PATH, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

PHONE: Any = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Headless; a test that needs it is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser on the PATH (looked for {', '.join(names)}); on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, place: Path | str, fragment: str = "", **context: Any) -> Iterator[Page]:
    """A file, or the page of a server, that must stay silent: no message on its console, no error, no dialog, and no
    request except for pages of the same folder or to the same server."""
    troubles: list[str] = []
    address, folder = (place, place) if isinstance(place, str) else (place.as_uri(), place.parent.as_uri())
    with browser.new_context(**context) as visit:
        page = visit.new_page()
        page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if _own_page(r, folder) else troubles.append(f"request: {r.url}"))
        page.goto(address + fragment)
        yield page
        assert not troubles


def _own_page(request: Any, folder: str) -> bool:
    return request.url.startswith(folder) and (folder.startswith("http") or request.resource_type == "document")


def scrolls_sideways(page: Page) -> bool:
    """Whether anything exceeds the right edge of the window."""
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
