"""Writes docs/pictures/page-*.png: the server's page as a browser shows it, with a model that really answers.

    hybrimoe demo smollm2                  # once: makes the model
    python benchmarks/page_pictures.py     # make pictures

Needs the extra `browser` and the system's Chromium. In the chats the model runs on the CPU; in the live view also on
the emulated accelerator, so what that picture says of accelerator and link is emulated.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from hybrimoe.bench.serve.process import running_server

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
MODEL = ("smollm2", "--dtype", "int8")
ON_CPU, WITH_SLOTS = ("--accelerator", "none"), ("--accelerator", "emulated", "--slots", "0.25")
DESK, VIEW, PHONE = {"width": 1200, "height": 750}, {"width": 1120, "height": 870}, {"width": 360, "height": 740}
CHATS = ("Explain in two sentences why the sky is blue.", "Show me a JSON example of a person with name, age and city.")
ON_PHONE = "Name three things to see in Paris, in a short list."
MOST_BYTES = 150_000
REPLY_MS = 300_000
WATCHED_MS = 45_000
"""So long the live view is looked at before its picture is taken, so that its charts have something to show."""


def opened(browser: Browser, url: str, scheme: str, size: dict[str, int], *, phone: bool = False) -> Page:
    """The page, before the first conversation. On a phone a point has one and a half pixels."""
    context = browser.new_context(
        viewport=size, color_scheme=scheme, is_mobile=phone, has_touch=phone, device_scale_factor=1.5 if phone else 1
    )
    context.set_default_timeout(REPLY_MS)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("html[data-ready]")
    page.get_by_role("button", name="Settings of this conversation").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest reply").fill("260")
    page.get_by_role("button", name="Use for new conversations").click()
    page.get_by_role("button", name="Close the settings").click()
    return page


def ask(page: Page, question: str) -> None:
    """A new conversation, and its reply to the end."""
    page.evaluate("location.hash = '#/'")
    page.get_by_role("heading", name="New conversation").wait_for()
    page.get_by_role("textbox", name="Your message").fill(question)
    page.keyboard.press("Enter")
    page.locator(".message.assistant .facts").wait_for()


def keep(page: Page, name: str) -> None:
    """Write the picture; what is too large for a page of the docs is refused."""
    path = PICTURES / f"page-{name}.png"
    page.mouse.move(0, 0)
    page.screenshot(path=path, animations="disabled")
    n_bytes = path.stat().st_size
    assert n_bytes < MOST_BYTES, f"{path} has {n_bytes} bytes"
    print(path.name, n_bytes)


def main() -> None:
    """Takes all pictures."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=as_root)
        with running_server([*MODEL, *ON_CPU]) as url:
            for scheme in ("light", "dark"):
                page = opened(browser, url, scheme, DESK)
                for question in CHATS:
                    ask(page, question)
                if scheme == "dark":
                    page.get_by_role("button", name="Settings of this conversation").click()
                    page.evaluate("document.activeElement.blur()")
                keep(page, scheme)
            phone = opened(browser, url, "light", PHONE, phone=True)
            ask(phone, ON_PHONE)
            keep(phone, "phone")
        with running_server([*MODEL, *WITH_SLOTS]) as url:
            take_live_view(opened(browser, url, "dark", VIEW), url)
        browser.close()


def take_live_view(page: Page, url: str) -> None:
    """The live view while replies are computed, with a step that was recorded."""
    page.goto(f"{url}/#/live")
    page.get_by_role("button", name="Generate something to watch").click()
    page.wait_for_timeout(WATCHED_MS)
    page.get_by_role("button", name="Record the next step").click()
    page.locator(".gantt").wait_for()
    page.evaluate("document.querySelector('.live-scroll').scrollTop = 0")
    page.wait_for_timeout(1500)
    keep(page, "live")


if __name__ == "__main__":
    main()
