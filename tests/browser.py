"""A real browser, Debian's Chromium, and what its pages complain about."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal, TypedDict, Unpack
from urllib.parse import urlsplit

from playwright.async_api import async_playwright, expect

from tests.process import DEADLINE_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import (
        Browser,
        BrowserContext,
        ConsoleMessage,
        Page,
        Request,
        ViewportSize,
    )

CHROMIUM: Final = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# Chromium's sandbox refuses to run as root, which runs the tests in a container.
_OPTIONS: Final = ["--no-sandbox"] if os.geteuid() == 0 else []

expect.set_options(timeout=DEADLINE_SECONDS * 1000)


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=_OPTIONS)
        try:
            yield browser
        finally:
            await browser.close()


class Options(TypedDict, total=False):
    """What a visitor's browser is like."""

    viewport: ViewportSize
    color_scheme: Literal["light", "dark"]
    reduced_motion: Literal["reduce"]
    timezone_id: str
    bypass_csp: bool


class Visitor:
    """Somebody with a browser profile of their own, and one or more tabs.

    `faults` is what no page may do: an error in the console (such as a violation of the page's
    policy), an exception that nobody catches, a request to another server.
    """

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context = context
        self.url = url
        self.faults: list[str] = []
        context.on("console", self._heard)
        context.on("weberror", lambda error: self.faults.append(str(error.error)))
        context.on("request", self._asked)

    async def tab(self) -> Page:
        """Open the page, and wait until it has the feed and hears of what is new."""
        page = await self.context.new_page()
        await page.goto(self.url)
        await page.locator("#connection.live").wait_for()
        return page

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.faults.append(message.text)

    def _asked(self, request: Request) -> None:
        if urlsplit(request.url)[:2] != urlsplit(self.url)[:2]:
            self.faults.append(f"a request to {request.url}")


@asynccontextmanager
async def visiting(
    browser: Browser, url: str, *, may_fail: bool = False, **options: Unpack[Options]
) -> AsyncIterator[Visitor]:
    """Make a visitor, whose pages must be faultless in the end.

    `may_fail` says that requests may fail: the browser itself writes that into the console.
    """
    context = await browser.new_context(locale="en-GB", **options)
    try:
        visitor = Visitor(context, url)
        yield visitor
        faults = [
            fault
            for fault in visitor.faults
            if not (may_fail and fault.startswith("Failed to load resource"))
        ]
        assert not faults
    finally:
        await context.close()
