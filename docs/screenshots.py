"""Takes the pictures of the page that the documentation shows, of a ring of three ranks with the demo model, and says
when it was first painted. The system's chromium takes them; Inter, where it is installed, is its type.

    .venv/bin/python docs/screenshots.py [FOLDER]
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Browser, Page, Route, sync_playwright

SERVE = ["-m", "ringlm", "launch", "-n", "3", "--restarts", "1", "--"]
SERVE += ["serve", "-m", "demo", "--quant", "int4", "--threads", "1", "--port", "0"]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
STORY = "Tell a long story"  # without an end, so that the ring works while pictures are taken
QUESTION = "Write a Python function that reverses a string"


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    launcher = subprocess.Popen([sys.executable, *SERVE], stderr=subprocess.PIPE, text=True)
    try:
        assert launcher.stderr is not None
        url = next(found[1] for line in launcher.stderr if (found := re.search(r"ready: (http://\S+)v1 ", line)))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for scheme in ("light", "dark"):
                page = opened(browser, url, scheme)
                paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
                print(f"first paint, {scheme}: {paint:.0f} ms")
                ask(page, "What is the capital of France?")
                ask(page, STORY)
                ask(page, QUESTION)
                page.locator(".assistant:not(.busy)").wait_for(timeout=120_000)
                page.wait_for_timeout(3000)
                page.screenshot(path=folder / f"page-{scheme}.png")
                page.set_viewport_size(PHONE)
                page.wait_for_timeout(1000)
                page.screenshot(path=folder / f"phone-{scheme}.png")
                page.locator("#show-ring").click()
                page.wait_for_timeout(500)
                page.screenshot(path=folder / f"phone-ring-{scheme}.png")
                page.context.close()
            page = opened(browser, url, "dark")
            ask(page, STORY)
            page.wait_for_function(
                "() => document.querySelector('.assistant .text').innerText.length > 600", timeout=120_000
            )
            rank = next(p for p in psutil.Process(launcher.pid).children() if p.environ().get("RING_RANK") == "1")
            os.kill(rank.pid, signal.SIGKILL)
            page.locator("#drawing .lost").first.wait_for()
            page.locator(".status", has_text="waiting for rank").wait_for()
            page.screenshot(path=folder / "page-lost.png")
    finally:
        launcher.terminate()
        launcher.wait(60)


def opened(browser: Browser, url: str, scheme: Any) -> Page:
    page = browser.new_context(viewport=DESKTOP, color_scheme=scheme).new_page()  # type: ignore[arg-type]

    def greedy(route: Route) -> None:
        asked = route.request.post_data_json
        endless = {"ignore_eos": True, "max_tokens": 3000} if asked["messages"][-1]["content"] == STORY else {}
        route.continue_(post_data=asked | {"temperature": 0} | endless)

    page.route("**/v1/chat/completions", greedy)
    page.goto(url)
    page.locator("#ranks li").first.wait_for()
    return page


def ask(page: Page, question: str) -> None:
    """In a chat of its own."""
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    page.locator(".assistant .text > *").first.wait_for()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
