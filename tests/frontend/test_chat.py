"""The chat through a pipe, and in a real terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringlm.engine.request import SamplingParams
from ringlm.frontend.chat import Chat
from ringlm.frontend.session import Session
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import EOS, FakeEngine

ROOT = Path(__file__).parents[2]


class Talk:
    """A chat held through stdin; `engine.submitted` is what the model was shown."""

    def __init__(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
        self.tokenizer = tokenizer
        self.engine = FakeEngine(lambda _: [*tokenizer.encode("Well."), EOS], **changes)  # type: ignore[arg-type]
        self._monkeypatch = monkeypatch

    def hold(self, *lines: str, throughput: bool = False) -> None:
        self._monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        Chat(Session(self.engine, self.tokenizer), SamplingParams(temperature=0), throughput).run()

    @property
    def shown(self) -> list[str]:
        return [self.tokenizer.decode(prompt) for prompt, _ in self.engine.submitted.values()]


@pytest.fixture
def talk(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Talk:
    return Talk(tokenizer, monkeypatch)


def test_the_conversation_is_remembered(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.hold("Hi", "", "And now?", "/clear", "Again")
    assert capsys.readouterr().out == "Well.\n" * 3
    assert talk.shown[1].endswith("user\nHi\nassistant\nWell.\nuser\nAnd now?\nassistant\n")
    assert "Hi" not in talk.shown[2]


def test_commands_change_what_follows(talk: Talk) -> None:
    talk.hold("/temperature 0.5", "/topk 40", "/topp 0.9", "/system Be brief.", "Hi", "/exit", "not reached")
    (params,) = [params for _, params in talk.engine.submitted.values()]
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 40, 0.9)
    assert talk.shown == ["system\nBe brief.\nuser\nHi\nassistant\n"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temperature hot", "'hot' is not a number"),
        ("/temperature -1", "between 0 and 100"),
        ("/temperature nan", "between 0 and 100"),
        ("/topk 1.5", "not a whole number"),
        ("/topp 2", "at most 1"),
        ("/nothing", "no command /nothing; /help lists them"),
        ("/temperature", "temperature is 0"),
        ("/system", "told nothing first"),
        ("/help", "/system TEXT"),
    ],
)
def test_commands_answer_in_a_line(talk: Talk, capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    talk.hold(line, "Hi")
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == "Well.\n"
    assert talk.engine.submitted[1][1] == SamplingParams(temperature=0, stop_token_ids=(EOS,))


def test_a_full_context(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(tokenizer, monkeypatch, context=60)
    talk.hold("Hi", "word " * 40, "/clear", "Hi")
    captured = capsys.readouterr()
    assert captured.out == "Well.\nWell.\n"
    assert "the context holds 60" in captured.err
    assert "Or /clear the conversation." in captured.err
    assert talk.shown[0] == talk.shown[1]


def test_an_answer_that_is_cut_off_says_so(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.engine._answer = lambda _: talk.tokenizer.encode("one two")
    talk.hold("Hi", throughput=True)
    captured = capsys.readouterr()
    assert "cut off after 2 tokens" in captured.err
    assert re.search(r"prompt \d+ tokens, [\d.]+ tok/s · answer 2 tokens, 0.5 tok/s · ring 10% of", captured.out)


def test_control_characters_reach_pipes_as_they_are(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.engine._answer = lambda _: [*talk.tokenizer.encode("a\x1b[31mb"), EOS]
    talk.hold("Hi")
    assert capsys.readouterr().out == "a\x1b[31mb\n"


class Terminal:
    """`ringlm run -i` on a pseudo-terminal."""

    def __init__(self, home: Path, *arguments: str, **environment: str) -> None:
        near, far = pty.openpty()
        command = [sys.executable, "-m", "tests.frontend.fake_cli", "run", "-m", "demo", "-i", *arguments]
        variables = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT / "src"), **environment}
        self.process = subprocess.Popen(
            command, stdin=far, stdout=far, stderr=far, env=variables, cwd=ROOT, start_new_session=True
        )
        os.close(far)
        self._near = near
        self.text = ""

    def until(self, pattern: str, timeout_s: float = 30.0) -> str:
        """Everything since the last call up to `pattern`."""
        deadline = time.monotonic() + timeout_s
        os.set_blocking(self._near, False)
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, f"{pattern!r} not in {self.text!r}"
            try:
                self.text += os.read(self._near, 4096).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # the other end is closed
                raise AssertionError(f"{pattern!r} not in {self.text!r}") from None
            # prompt_toolkit asks where the cursor is, and a terminal answers.
            if "\x1b[6n" in self.text:
                self.text = self.text.replace("\x1b[6n", "")
                self.type("\x1b[1;1R")
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._near, text.encode())

    def status(self) -> int:
        return self.process.wait(90)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._near)


@pytest.fixture
def terminal(home: Path, tokenizer: Tokenizer) -> Iterator[Terminal]:
    opened = Terminal(home, FAKE_DELAY_S="0.05")
    yield opened
    opened.close()


def test_a_talk_in_a_terminal(terminal: Terminal, home: Path) -> None:
    assert "2 ranks (cpu, cpu)" in terminal.until("Ctrl-D leaves")
    terminal.type("Hello \x1b there\r")
    assert "\x1b[31m" not in terminal.until("You said: Hello")
    # Ctrl-C ends the answer and not the program.
    terminal.type("one two three four five six seven eight nine ten eleven twelve\r")
    terminal.until("You said: one two")
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.until(r"\(stopped\)")
    terminal.type("still here\r")
    terminal.until("You said: still here")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.status() == 0
    history = home / "state" / "ringlm" / "history"
    assert "still here" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_twice_at_an_empty_prompt_leaves(terminal: Terminal) -> None:
    terminal.until("Ctrl-D leaves")
    terminal.until("> ")
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.type("\x03")  # clears the line
    terminal.until(re.escape("\x1b[?2004h"))
    terminal.type("\x03")
    terminal.until("Ctrl-C again")
    terminal.type("\x03")
    assert terminal.status() == 0
