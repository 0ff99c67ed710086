"""`ringlm run`: answer one prompt, or chat. Knows what to print where; the session does the work."""

from __future__ import annotations

import dataclasses
import sys

from ringlm.engine.request import SamplingParams
from ringlm.errors import ConfigError, RequestError
from ringlm.frontend import console
from ringlm.frontend.answer import Completion
from ringlm.frontend.chat import Chat
from ringlm.frontend.command_options import RunOptions
from ringlm.frontend.options import EngineOptions
from ringlm.frontend.progress import StartUp
from ringlm.frontend.session import Session


def run(engine: EngineOptions, options: RunOptions) -> None:
    """The whole command. On a daemon it does not return; its process becomes the engine's."""
    model, spec = engine.resolve()
    if spec.ring is not None and spec.ring.rank != 0:
        from ringlm.cluster.client import serve_rank

        serve_rank(spec)
    prompt, params = _prompt(options), options.params()
    with StartUp() as progress:
        session = Session.start(spec, model, progress.show, options.chat_template)
    with session:
        if prompt is None:
            Chat(session, params, options.throughput).run()
        else:
            _answer(session, prompt, params, options)


def _prompt(options: RunOptions) -> str | None:
    """The one prompt to answer; None to chat. Raises RequestError when there is none."""
    if options.interactive:
        if options.prompt is not None or options.json:
            raise ConfigError(f"-i holds a conversation; leave {'--json' if options.json else '--prompt'} out.")
        return None
    if options.prompt is None and sys.stdin.isatty() and not options.json:
        return None
    prompt = options.prompt if options.prompt is not None else sys.stdin.read().removesuffix("\n")
    if not prompt.strip():
        raise RequestError("the prompt is empty; give one with --prompt TEXT or on stdin, or chat with -i.")
    return prompt


def _answer(session: Session, prompt: str, params: SamplingParams, options: RunOptions) -> None:
    if session.tokenizer.has_chat_template:
        generation = session.chat([{"role": "user", "content": prompt}], params)
    else:
        generation = session.complete(prompt, params)
    with generation:
        if not options.json:
            console.answer(generation.pieces())
            console.write("\n")
        completion = generation.result()
    if options.json:
        print(_json(completion, session), flush=True)
    if options.throughput:
        console.figures(completion, session.ready.world_size, on_stderr=options.json)


def _json(completion: Completion, session: Session) -> str:
    import json

    answer = dataclasses.asdict(completion)
    (choice,) = answer.pop("choices")
    fields = answer | {
        "reasoning": choice["reasoning"],
        "world_size": session.ready.world_size,
        "model": session.ready.model,
    }
    return json.dumps(fields, ensure_ascii=False)
