"""The page at /, in a browser: chats, the ring beside them, and what is asked of pages that all can use."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psutil
import pytest
import uvicorn

from ringlm.cluster.messages import LinkStats, Recovering, Stats
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine, until
from tests.frontend.server.conftest import Serve
from tests.frontend.server.ring import serving

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here; on Debian: apt install chromium")
sync_api = pytest.importorskip("playwright.sync_api")
Page = Any  # playwright's own types would be needed where it is not installed

ANSWER = """# Sums

Add **both** numbers with `+`, or <img src=x onerror="document.title='run'"> not:

1. take *one*
2. take [the other](javascript:alert)
   - as [it is](https://example.org/a_b)

| a | b |
|---|--:|
| 1 | 2 |

```python
def add(a, b):
    return a + b
```
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., Page]]:
    """Opens a page in a browser that knows nothing yet; nothing may go wrong in its scripts."""
    with contextlib.ExitStack() as stack:
        wrong: list[str] = []

        def at(url: str, **options: Any) -> Page:
            context = stack.enter_context(contextlib.closing(browser.new_context(**options)))
            context.set_default_timeout(90_000)
            page = context.new_page()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
            page.goto(url)
            return page

        yield at
    assert wrong == []


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    """Two ranks that answer with ANSWER."""
    engine = FakeEngine(lambda _: [*tokenizer.encode(ANSWER), EOS])
    figures = 1, 2, 100, 30, 20, 4, 500, 60, 10, 3, 1.5, 0.25, 1.25
    engine.stats = Stats(*figures, [LinkStats(1, 1000, 2000, 0.0002)], at_s=1.0)
    return engine


@pytest.fixture
def start(serve: Serve) -> Iterator[Callable[..., str]]:
    """Lets a server be asked over HTTP; its address."""
    with contextlib.ExitStack() as stack:

        def listen(engine: FakeEngine, **options: Any) -> str:
            config = uvicorn.Config(serve(engine, **options).app, port=0, log_config=None, lifespan="off")
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(setattr, server, "should_exit", True)
            until(lambda: server.started)
            return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"

        yield listen


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def ended(page: Page, text: str = "") -> Any:
    """The last answer, once it is whole."""
    answer = page.locator("#thread > .assistant:not(.busy)").last
    answer.filter(has_text=text).wait_for()
    page.get_by_role("button", name="Send").wait_for()
    return answer


def test_answers_are_drawn_and_nothing_of_them_runs(look: Any, start: Any, engine: FakeEngine) -> None:
    page = look(start(engine), permissions=["clipboard-read", "clipboard-write"])
    page.locator("#served", has_text="fake answers, from 2 ranks.").wait_for()
    say(page, "Add <b>two</b> numbers")
    answer = ended(page, "return a + b")
    assert page.locator(".user .said").inner_text().endswith("Add <b>two</b> numbers")
    assert answer.locator("h3").inner_text() == "Sums"
    assert answer.locator("strong").inner_text() == "both"
    assert answer.locator("ol > li").count() == 2
    assert [link.get_attribute("href") for link in answer.locator("a").all()] == ["https://example.org/a_b"]
    assert answer.locator("td.right").inner_text() == "2"
    assert answer.locator("img").count() == 0
    assert "<img src=x onerror=" in answer.inner_text()
    assert page.title() == "Add <b>two</b> numbers – ringlm"
    answer.get_by_role("button", name="Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "def add(a, b):\n    return a + b"
    assert page.locator("#live").inner_text().startswith("Answer: # Sums")


def test_chats_are_kept_changed_and_deleted(look: Any, start: Any, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    page = look(start(engine))
    say(page, "First")
    ended(page)
    page.get_by_role("button", name="New chat").click()
    say(page, "Second")
    ended(page)
    page.reload()
    ended(page, "return a + b")
    assert page.locator("#chat-list li").all_inner_texts() == ["Second", "First"]
    page.get_by_role("button", name="Edit the message").click()
    page.get_by_label("Edit the message").fill("Changed")
    page.keyboard.press("Enter")
    ended(page)
    assert page.locator("#thread > li").count() == 2
    page.get_by_role("button", name="Answer again").click()
    until(lambda: len(engine.submitted) == 4)
    ended(page)
    for request in (3, 4):
        assert "Changed" in tokenizer.decode(engine.submitted[request][0])
    page.get_by_role("button", name="Rename “First”").focus()
    page.keyboard.press("Enter")
    page.get_by_label("Name of the chat").fill("Other")
    page.keyboard.press("Enter")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete “Second”").focus()
    page.keyboard.press("Enter")
    page.locator("#welcome").wait_for()
    page.reload()
    assert page.locator("#chat-list li").all_inner_texts() == ["Other"]


def test_an_answer_is_stopped_also_by_a_reload(look: Any, start: Any, engine: FakeEngine) -> None:
    engine._delay_s = 0.05
    page = look(start(engine))
    say(page, "Add")
    page.locator(".assistant.busy .text h3").wait_for()
    page.get_by_role("button", name="Stop the answer").click()
    assert "Stopped." in ended(page).inner_text()
    until(lambda: 1 in engine.canceled)
    page.get_by_role("button", name="Answer again").click()
    page.locator(".assistant.busy .text h3", has_text="Sums").wait_for()
    page.reload()
    assert "Stopped." in ended(page, "Sums").inner_text()
    until(lambda: 2 in engine.canceled)


def test_settings_thoughts_and_tools(look: Any, start: Any, engine: FakeEngine) -> None:
    page = look(start(engine))
    asked: list[Any] = []
    call = {"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    deltas = [{"reasoning_content": "Hm."}, {"tool_calls": [call]}]

    def reply(route: Any) -> None:
        asked.append(route.request.post_data_json)
        events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas[: 3 - len(asked)]]
        lines = "".join(f"data: {msgspec.json.encode(event).decode()}\n\n" for event in events)
        route.fulfill(content_type="text/event-stream", body=f": nothing new\n\n{lines}data: [DONE]\n\n")

    page.route("**/v1/chat/completions", reply)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tools").fill("{}")
    page.get_by_role("button", name="Save").click()
    assert page.locator("#settings-error").inner_text() == "Tools: this is no JSON list."
    page.get_by_label("Tools").fill('[{"type": "function", "function": {"name": "add"}}]')
    page.get_by_role("button", name="Save").click()
    say(page, "Add")
    answer = ended(page, "calls add")
    thoughts = answer.get_by_text("Hm.")
    assert not thoughts.is_visible()
    answer.get_by_text("Thoughts").click()
    assert thoughts.is_visible()
    answer.get_by_label("Result of add").fill("3")
    answer.get_by_role("button", name="Give the results").click()
    until(lambda: page.wait_for_timeout(20) or len(asked) == 2)
    system, user, calls, result = asked[1]["messages"]
    assert (system, user) == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add"})
    assert calls["tool_calls"][0]["function"] == call["function"]
    assert result == {"role": "tool", "content": "3", "tool_call_id": "c1"}
    assert (asked[1]["temperature"], asked[1]["tools"][0]["function"], "seed" in asked[1]) == (
        0,
        {"name": "add"},
        False,
    )


def test_it_asks_for_a_key_where_one_is_needed(look: Any, start: Any, engine: FakeEngine) -> None:
    page = look(start(engine, keys=(b"right",)))
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    dialog.get_by_label("Key").fill("wrong")
    page.keyboard.press("Enter")
    dialog.get_by_text("was refused").wait_for()
    dialog.get_by_label("Key").fill("right")
    page.keyboard.press("Enter")
    page.locator("#ranks").get_by_text("Rank 1").wait_for()
    say(page, "Add")
    ended(page, "return a + b")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(look: Any, start: Any, engine: FakeEngine, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def check(page: Page) -> None:
        found = axe.run(page).response["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert serious == [], msgspec.json.encode(serious).decode()

    page = look(start(engine), color_scheme=scheme, reduced_motion="reduce")
    page.keyboard.press("Tab")
    page.locator("#ranks").get_by_text("Rank 1").wait_for()
    check(page)
    say(page, "Add")
    ended(page)
    check(page)
    engine.recovering = Recovering(1, "rank 1 is lost.")
    page.locator("#ranks li.bad").wait_for()
    page.get_by_role("button", name="Settings").click()
    check(page)
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    opener = page.get_by_role("button", name="rank 1 lost")
    opener.press("Enter")
    page.get_by_role("button", name="Close the ring").wait_for()
    check(page)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "show-ring"
    page.get_by_role("button", name="Chats", exact=True).press("Enter")
    check(page)
    theme = page.get_by_role("button", name="Dark colours")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    theme.press("Enter")
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_a_rank_is_killed_and_returns_while_it_answers(look: Any) -> None:
    with serving("--threads", "1", restarts=1) as (launcher, url):
        page = look(url.removesuffix("v1"))
        page.locator("#ranks").get_by_text("Rank 1").wait_for()
        endless = {"ignore_eos": True, "max_tokens": 4000}
        page.route(
            "**/v1/chat/completions", lambda route: route.continue_(post_data=route.request.post_data_json | endless)
        )
        say(page, "Count from one to three hundred, in words.")
        page.locator(".assistant.busy .text p").wait_for()
        page.locator("#drawing .flows").first.wait_for()
        ranks = psutil.Process(launcher.pid).children()
        os.kill(next(rank.pid for rank in ranks if rank.environ().get("RING_RANK") == "1"), signal.SIGKILL)
        page.locator("#ranks li.bad", has_text="Rank 1").wait_for()
        assert page.locator("#drawing .node.lost").count() == 1
        page.locator(".assistant.busy .status", has_text="waiting for rank 1").wait_for()
        before = page.locator(".assistant .text").inner_text()
        page.locator("#ranks li.good", has_text="Rank 1").wait_for(timeout=90_000)
        page.locator("#ring-state", has_text="formed again once").wait_for()
        page.wait_for_function(
            "before => document.querySelector('.assistant .text').innerText.length > before", arg=len(before) + 5
        )
        assert page.locator(".assistant .text").inner_text().startswith(before.rstrip())
        page.get_by_role("button", name="Stop the answer").click()
