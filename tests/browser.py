"""A real browser for tests: Debian's Chromium, driven by Playwright. Missing, it skips at home and fails in CI."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

PATIENCE_MS = 180_000  # for what must come, on a busy machine
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        message = "chromium is not installed: apt-get install chromium, or name the binary in CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS), timeout=PATIENCE_MS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Window:
    """One page in a context of its own, and what it did besides: requests, console errors, refused loads."""

    page: Page
    origin: str
    requested: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("request", self._on_request)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _on_request(self, request: Request) -> None:
        self.requested.append(request.url)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} ({message.location.get('url', '')})")

    def go(self, address: str = "#/") -> None:
        """Load an address of the page afresh."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.origin}/{address}")

    def elsewhere(self) -> list[str]:
        """What was asked of any other origin; `blob:` is the page's own memory."""
        own = (f"{self.origin}/", f"blob:{self.origin}/", "about:")
        return [url for url in self.requested if not url.startswith(own)]


@contextlib.contextmanager
def opened(browser: Browser, origin: str, **options: Any) -> Iterator[Window]:
    """A window on the page, closed at the end; whatever it complained of fails the test."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 820}, "locale": "en-GB"} | options)
    try:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        window = Window(page, origin)
        window.listen()
        yield window
        assert window.complaints == [], window.complaints  # pytest shows nothing of asserts outside of test files
        assert window.elsewhere() == [], window.elsewhere()
    finally:
        context.close()
