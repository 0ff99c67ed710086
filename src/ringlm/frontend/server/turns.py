"""A conversation's next turn, as every API that has conversations asks for it: in the fields of /v1/chat/completions.
Knows no API's answers."""

from __future__ import annotations

from typing import Any, NamedTuple

from ringlm.frontend.generation import Generation
from ringlm.frontend.server.chat_schema import ChatRequest
from ringlm.frontend.server.service import Service


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

    @property
    def calls(self) -> int | None:
        """How many calls of tools are told; None for all."""
        return 1 if self.asked.parallel_tool_calls is False else None

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
            tool_choice="none" if asked.tool_choice == "none" else "auto",
            **(asked.chat_template_kwargs or {}),
        )
