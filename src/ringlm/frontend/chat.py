"""The conversation at the prompt: `ringlm run -i`. Knows a session and lines of input, no engine.

Ctrl-C ends the answer, not the program; the conversation keeps what was said so far. Lines come from
an editor with history on a terminal, and from stdin otherwise, so that a script can hold the talk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ringlm.engine.request import SamplingParams, StopReason
from ringlm.errors import RequestError
from ringlm.frontend import console
from ringlm.frontend.answer import Completion
from ringlm.frontend.session import Session
from ringlm.paths import state_dir

if TYPE_CHECKING:
    from prompt_toolkit.history import History

_HELP = """\
/clear            forget the conversation
/system TEXT      what the model is told first; without TEXT, shows it
/temperature X    0 always takes the likeliest token
/topk N           choose among the N likeliest tokens; 0 for all
/topp X           choose among the likeliest tokens that make up X of the probability
/exit             leave, as Ctrl-D does
Ctrl-C ends an answer. Alt-Enter begins a new line."""


class Chat:
    """A conversation and the settings that commands change."""

    def __init__(self, session: Session, params: SamplingParams, throughput: bool = False) -> None:
        self._session = session
        self._params = params
        self._throughput = throughput
        self._system = ""
        self._messages: list[dict[str, str]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: console.note(_HELP),
            "/clear": self._clear,
            "/system": self._set_system,
            "/temperature": lambda text: self._set("temperature", float, text),
            "/topk": lambda text: self._set("top_k", int, text),
            "/topp": lambda text: self._set("top_p", float, text),
        }

    def run(self) -> None:
        """Until /exit or the end of input. Raises ModelError for a model that cannot chat."""
        self._session.tokenizer.check_chat_template()
        for line in _lines([*self._commands, "/exit"], self._greeting):
            text = line.strip()
            if text == "/exit":
                return
            if text.startswith("/"):
                self._command(text)
            elif text:
                self._answer(text)

    def _greeting(self) -> str:
        ready = self._session.ready
        ranks = "1 rank" if ready.world_size == 1 else f"{ready.world_size} ranks"
        devices = ", ".join(rank.device for rank in ready.ranks)
        weights = ready.dtype if ready.quant == "none" else f"{ready.quant} weights"
        return (
            f"{ready.model} · {ranks} ({devices}) · {weights} · context {ready.context:,}\n"
            "/help lists the commands, Ctrl-D leaves."
        )

    def _answer(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self._system}] if self._system else []
        try:
            generation = self._session.chat(system + self._messages, self._params)
            with generation:
                try:
                    console.answer(generation.pieces())
                except KeyboardInterrupt:  # ends the answer; the conversation goes on
                    generation.cancel()
                    console.answer(generation.pieces())
                completion = generation.result()
        except RequestError as error:
            self._messages.pop()
            hint = " Or /clear the conversation." if self._messages else ""
            console.fail("", f"{error}{hint}")
            return
        console.write("\n")
        self._remember(completion)
        self._comment(completion)

    def _remember(self, completion: Completion) -> None:
        if completion.text:
            self._messages.append({"role": "assistant", "content": completion.text})
        else:
            self._messages.pop()

    def _comment(self, completion: Completion) -> None:
        if completion.finish_reason == StopReason.CANCELED:
            console.note("(stopped)")
        elif completion.finish_reason == StopReason.LENGTH:
            context = self._session.ready.context
            if completion.prompt_tokens + completion.completion_tokens >= context:
                console.note(f"(the context of {context:,} tokens is full; /clear begins a new conversation)")
            else:
                console.note(f"(cut off after {completion.completion_tokens:,} tokens; see --max-tokens)")
        if self._throughput:
            console.figures(completion, self._session.ready.world_size)

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        command = self._commands.get(name)
        if command is None:
            console.fail("", f"there is no command {name}; /help lists them.")
        else:
            command(argument.strip())

    def _clear(self, _: str) -> None:
        self._messages.clear()
        console.note("(a new conversation)")

    def _set_system(self, text: str) -> None:
        if text:
            self._system = text
            console.note("(the model is told this from the next answer on)")
        else:
            console.note(self._system or "(the model is told nothing first, or what its template says)")

    def _set(self, name: str, kind: type[int] | type[float], text: str) -> None:
        if not text:
            console.note(f"({name} is {getattr(self._params, name)})")
            return
        try:
            self._params = self._params.replace(**{name: kind(text)})
        except ValueError:
            console.fail("", f"{text!r} is not a {'whole ' if kind is int else ''}number.")
        except RequestError as error:
            console.fail("", str(error))
        else:
            console.note(f"({name} is now {getattr(self._params, name)})")


def _lines(commands: list[str], greeting: Callable[[], str]) -> Iterator[str]:
    """What the user types, line by line; Ctrl-C on an empty line asks once more before it ends the lines."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    editor: PromptSession[str] = PromptSession(
        FormattedText([("bold" if "NO_COLOR" in os.environ else "bold ansicyan", "> ")]),
        history=_history(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        prompt_continuation="  ",
    )
    console.note(greeting())
    leaving = False
    while True:
        try:
            yield editor.prompt()
            leaving = False
            console.note("")
        except KeyboardInterrupt:
            if leaving:
                return
            leaving = not editor.default_buffer.text
            if leaving:
                console.note("(Ctrl-C again, or Ctrl-D, to leave)")
        except EOFError:
            return


def _history() -> History:
    """What was typed before, in a file that only the user can read; in memory where there can be none."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = state_dir() / "history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
