"""A conversation's next turn, as every API that has conversations asks for it: in the fields of /v1/chat/completions.
Knows no API's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from ringlm.frontend.generation import Generation
from ringlm.frontend.server.chat_schema import ChatRequest
from ringlm.frontend.server.errors import APIError
from ringlm.frontend.server.service import Service

_TEXTS = {"text", "input_text", "output_text", "reasoning_text", "summary_text"}


class Part(Protocol):
    """A part of a message."""

    type: str
    text: str | None


def joined(content: str | Sequence[Part] | None, where: str, between: str = "", of_tool: bool = False) -> str:
    """The text of a content or of its parts. Raises APIError for parts of another kind, other than `of_tool`: an agent
    has its pictures read by a tool, sends them ever after, and its model can only be told that it does not see them."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if part.type in _TEXTS and part.text is not None:
            texts.append(part.text)
        elif of_tool:
            texts.append(f"[{part.type}: this model cannot see it, it reads texts only]")
        else:
            raise APIError(400, f"{where}: content of type {part.type!r} cannot be read here; give texts.")
    return between.join(texts)


def one_system(system: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after `system`, as one with those of the system's at their beginning: agents send several, of which
    many templates take only the first."""
    texts, rest = [system] if system else [], list(messages)
    while rest and rest[0]["role"] in ("system", "developer"):
        texts.append(rest.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest] if texts else rest


def function(name: str, **told: Any) -> dict[str, Any]:
    """A tool, with what is told of it: templates show it to the model as it is."""
    return {"type": "function", "function": {"name": name} | {key: told[key] for key in told if told[key] is not None}}


class Turn(NamedTuple):
    """What is asked; messages and tools are as they came, since templates may know more of their fields."""

    asked: ChatRequest
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]

    @classmethod
    def of(cls, asked: ChatRequest, fields: dict[str, Any]) -> Turn:
        """From a body as a struct and as it came. Raises APIError for what cannot be done."""
        asked.check()
        # OpenAI's newer clients call the system a developer, of which no template knows.
        messages = [each | {"role": "system"} if each["role"] == "developer" else each for each in fields["messages"]]
        return cls(asked, messages, fields.get("tools") or [])

    @classmethod
    def translated(cls, fields: dict[str, Any]) -> Turn:
        """From what another API asks, in these fields. Raises APIError."""
        try:
            return cls.of(msgspec.convert(fields, ChatRequest), fields)
        except msgspec.ValidationError as error:
            raise APIError(400, f"{error}.") from None

    @property
    def calls(self) -> int | None:
        """How many calls of tools are told; None for all."""
        return 1 if self.asked.parallel_tool_calls is False else None

    def count(self, service: Service) -> int:
        """The tokens of the prompt. Takes the tokenizer a while. Raises RequestError, ModelError."""
        tools = () if self.asked.tool_choice == "none" else self.tools
        return len(service.session.tokenizer.chat(self.messages, tools, **(self.asked.chat_template_kwargs or {})))

    def begin(self, service: Service) -> Generation:
        """Takes the tokenizer a while. Raises RequestError, ModelError."""
        asked = self.asked
        params = asked.params(
            service.session.ready.context,
            max_tokens=asked.max_completion_tokens or asked.max_tokens,
            logprobs=asked.shown_logprobs,
        )
        return service.session.chat(
            self.messages,
            params,
            tools=self.tools,
            tool_choice=asked.tool_choice or "auto",
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            **(asked.chat_template_kwargs or {}),
        )
