"""Text to token ids and back, and chat templates. Knows one model's tokenizer, nothing of engines.

The work is done by Hugging Face's tokenizers and transformers, whose templates render in a sandboxed
Jinja environment. Nothing in a model's folder is executed, and torch is never imported.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringlm.cluster.messages import Vocabulary
from ringlm.engine.request import StructuredOutputsParams
from ringlm.errors import ConfigError, ModelError, RequestError
from ringlm.frontend import folder_tokenizer, gguf_tokenizer
from ringlm.frontend.conversation import (
    Message,
    Tool,
    for_template,
    schemas,
    shows_objects,
    variants,
    with_tools_inside,
    without_last_calls,
)
from ringlm.frontend.detokenizer import Detokenizer
from ringlm.frontend.grammar import Lark, after_reasoning, shaped
from ringlm.frontend.model import Model
from ringlm.frontend.token_bytes import TokenBytes
from ringlm.frontend.tools.enforcing import Choice, call_grammar
from ringlm.frontend.tools.formats import Reasoning, ToolFormat, reasoning, tool_format
from ringlm.frontend.tools.parser import AnswerParser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# After a call: in Llama 3, GPT-OSS, Gemma 4, FunctionGemma and GLM.
_ENDS = ("<|eom_id|>", "<|call|>", "<|tool_response>", "<start_function_response>", "<|observation|>")
_TAIL = 16  # tokens of a prompt, enough for the word at its end


class Tokenizer:
    """The tokenizer of one model."""

    def __init__(
        self,
        fast: PreTrainedTokenizerFast,
        name: str,
        template: str = "its chat template",
        calling: ToolFormat | None = None,
    ) -> None:
        self._fast = fast
        self._name = name
        self._template = template  # where it is, for messages
        self._chosen = calling  # whatever the template says
        self._backend = fast.backend_tokenizer
        self._token_bytes: dict[frozenset[str], TokenBytes] = {}  # by the special tokens that are kept

    @classmethod
    def open(
        cls, model: Model, chat_template: Path | None = None, calling: ToolFormat | None = None
    ) -> Tokenizer | None:
        """The tokenizer in a model's files; None when they hold none, and only token ids can be used. The file
        `chat_template` takes the place of the model's own, `calling` of the format that it is told to have.

        Raises ModelError when there is one that cannot be read, and ConfigError for a template that cannot.
        """
        text = None if chat_template is None else _read_template(chat_template)
        fast = folder_tokenizer.read(model.path) if model.format == "plain" else gguf_tokenizer.read(model.path)
        if fast is None:
            return None
        if text is None:
            return cls(fast, model.name, calling=calling)
        fast.chat_template = text
        return cls(fast, model.name, str(chat_template), calling)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._fast.chat_template)

    def check_chat_template(self) -> None:
        """Raises ModelError for a model that cannot chat."""
        found = self._fast.chat_template if self.has_chat_template else None
        if not found:
            raise ModelError(
                f"{self._name} has no chat template, so it cannot chat; give one with --chat-template FILE. "
                "It can go on from a text: give that with --prompt, or to LLM.generate."
            )
        if isinstance(found, dict) and "default" not in found:
            raise ModelError(
                f"{self._name} has the chat templates {', '.join(sorted(found))} and none by default; "
                "give the file of one with --chat-template FILE."
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, says the tokenizer; the model's configuration may have more."""
        ends = (self._fast.eos_token_id, *map(self._backend.token_to_id, _ENDS))
        return tuple(end for end in ends if end is not None)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`; with `special`, those that begin and end every text are added (such as BOS).

        Raises RequestError for text that is not valid Unicode, such as a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode at character {error.start} ({error.reason}).") from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return ids

    def chat(self, messages: Sequence[Message], tools: Sequence[Tool] = (), **variables: Any) -> list[int]:
        """The ids of a conversation in the model's template, ready for the assistant's answer.

        `tools` and `variables` reach the template. Raises ModelError without a template, RequestError when it
        refuses the messages, and for tools where it knows none or calls of them would not be understood.
        """
        self.check_chat_template()
        offered = schemas(tools)
        plain, text = self._fitting(for_template(messages), tools, variables)
        if offered and text == self._rendered(plain, (), variables):
            inside = with_tools_inside(plain, tools)
            with contextlib.suppress(RequestError):  # of a system message
                text = self._rendered(inside, (), variables)
            if inside[0]["tools"] not in text:
                raise RequestError(
                    f"{self._name}: {self._template} knows no tools; ask without tools, or another model."
                )
        self._calling(tools)
        return self.encode(text, special=False)

    def _fitting(
        self, messages: list[dict[str, Any]], tools: Sequence[Tool], variables: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], str]:
        """The messages as the template takes them, with all earlier calls in sight, and rendered. Raises RequestError
        where it takes them in no way."""
        calling = self._format(tools)
        found: list[tuple[list[dict[str, Any]], str]] = []
        refused: list[RequestError] = []
        for variant in variants(messages, None if calling is None else calling.write):
            try:
                found.append((variant, self._rendered(variant, tools, variables)))
            except RequestError as error:
                refused.append(error)
            else:
                if not shows_objects(*found[-1]) and self._shows_calls(*found[-1], tools, variables):
                    return found[-1]
        if not found:
            raise refused[0]
        return found[0]

    def _shows_calls(
        self, messages: list[dict[str, Any]], text: str, tools: Sequence[Tool], variables: Mapping[str, Any]
    ) -> bool:
        less = without_last_calls(messages)
        try:
            return less == messages or text != self._rendered(less, tools, variables)
        except RequestError:  # results without calls, which some take for a mistake
            return True

    def _rendered(self, messages: list[dict[str, Any]], tools: Sequence[Tool], variables: Mapping[str, Any]) -> str:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        try:
            text: str = self._fast.apply_chat_template(
                messages,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=True,
                **{"xml_tools": list(tools) or None, **variables},  # as SmolLM3 calls them
            )
        except TemplateSyntaxError as error:
            raise ModelError(f"{self._name}: {self._template}, line {error.lineno}: {error.message}.") from error
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            line = _line_of(error)
            raise RequestError(
                f"{self._name}: {self._template}{line} refuses these messages: {error or type(error).__name__}"
            ) from error
        return text

    def answer_parser(self, prompt: Sequence[int], tools: Sequence[Tool] = ()) -> AnswerParser | None:
        """What tells reasoning, text and calls of `tools` apart in one answer to `prompt`, which `chat` has made; None
        where all is text. The detokenizer is to keep its `markers`."""
        calling, marks = self._calling(tools), self._marks(tools)
        if calling is None and marks is None:
            return None
        return AnswerParser(calling, schemas(tools), marks, self._opened(prompt, marks))

    def answer_grammar(
        self, asked: StructuredOutputsParams | None, prompt: Sequence[int], tools: Sequence[Tool], calls: Choice
    ) -> str | None:
        """What an answer to `prompt`, which `chat` has made, may be: of the shape that is `asked` for, or `calls` of
        `tools`, after the model's reasoning; None for anything. Raises RequestError for what cannot be enforced."""
        lark, calling, marks = Lark(self._special), self._calling(tools), self._marks(tools)
        answer = None if asked is None else shaped(asked, lark)
        if calling is not None:
            marks = calling.thoughts or marks
            if answer is not None:
                answer = f"{lark.words(calling.response)} {answer}"
            if tools:
                answer = call_grammar(lark, calling, tools, calls, answer)
        if answer is None:
            return None
        return lark.text(after_reasoning(lark, marks, self._opened(prompt, marks), lark.rule(answer)))

    def text_grammar(self, asked: StructuredOutputsParams) -> str:
        """The same of a text that goes on from a prompt."""
        lark = Lark(self._special)
        return lark.text(shaped(asked, lark))

    def vocabulary(self, count: int) -> Vocabulary:
        """What the tokens of a model with `count` of them stand for."""
        spellings = self._spellings()
        tokens = [spellings[token] for token in range(count)]
        special = [token for token, spelling in enumerate(tokens) if not spelling]
        for token in special:
            tokens[token] = (self._backend.id_to_token(token) or "").encode()
        return Vocabulary(tokens, special, list(self.eos_token_ids))

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        """Special tokens, by name."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special}

    def _opened(self, prompt: Sequence[int], marks: Reasoning | None) -> bool:
        """Whether `prompt` ends in what opens the reasoning."""
        end = self._backend.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip()
        return marks is not None and end.endswith(marks.opening)

    def _calling(self, tools: Sequence[Tool]) -> ToolFormat | None:
        """How this model calls `tools`; None when there are none, unless text is written in that way too. Raises
        RequestError where it cannot."""
        found = self._format(tools)
        if not tools:
            return found if found is not None and found.frames else None
        if found is None:
            raise RequestError(
                f"{self._name}: how {self._template} writes calls of tools is not known here; docs/tools.md lists the "
                "formats that are. Say which one it is with --tool-format, or ask without tools."
            )
        return found

    def _format(self, tools: Sequence[Tool]) -> ToolFormat | None:
        return self._chosen or tool_format(self._template_for(tools))

    def _marks(self, tools: Sequence[Tool]) -> Reasoning | None:
        chosen = None if self._chosen is None else self._chosen.reasoning
        return chosen or reasoning(self._template_for(tools))

    def _template_for(self, tools: Sequence[Tool]) -> str:
        text: str = self._fast.get_chat_template(tools=list(tools) or None)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        detokenizer = self.detokenizer()
        return detokenizer.push(ids) + detokenizer.finish()

    def detokenizer(self, continues: bool = False, keep: frozenset[str] = frozenset()) -> Detokenizer:
        """A stream of text; `continues` when it goes on from a prompt rather than begins a text. Of special tokens it
        has those named in `keep`."""
        return Detokenizer(self._spellings(keep), continues)

    def spelling(self, token: int) -> bytes:
        """The bytes that `token` adds to a text; the name of one that adds none."""
        return self._spellings()[token] or (self._backend.id_to_token(token) or "").encode()

    def _spellings(self, keep: frozenset[str] = frozenset()) -> TokenBytes:
        if keep not in self._token_bytes:
            self._token_bytes[keep] = TokenBytes(self._backend, keep)
        return self._token_bytes[keep]


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path}: cannot be read: {error}.") from error


def _line_of(error: BaseException) -> str:
    """ ", line 7" of the template in which it was raised, where that is known."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return f", line {lines[-1]}," if lines else ""
