"""Engines that have no benchmark of their own, each measured in a process of its own, which benchmarks/peers.py starts:

    python drivers.py transformers FOLDER PROMPT TOKENS DTYPE                 # under torchrun, in its ring of gloo
    python drivers.py mistralrs FILE.gguf PROMPT TOKENS
    python drivers.py distributed-llama BINARY FILE.m NODES PROMPT TOKENS

The last line on stdout is {"version", "prefill", "decode", "commands"}: tokens per second of a prompt of PROMPT tokens,
and of TOKENS tokens of an answer to a short prompt, None for 0. Imports nothing that not every engine has.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shlex
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

_SHORT = 4  # tokens of the prompt before an answer
_ROUNDS = 2  # of which the last counts


def transformers(folder: str, prompt: str, tokens: str, dtype: str) -> dict[str, Any]:
    """Tensor parallel by transformers' own plan over gloo, one process a rank; greedy, without generate()'s extras."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), tp_plan="auto")
    draw = torch.Generator().manual_seed(0)

    def answer(length: int, count: int) -> tuple[float, float]:
        """Seconds of the prompt and its first token, and of `count` further tokens."""
        ids = torch.randint(0, model.config.vocab_size, (1, length), generator=draw)
        started = time.perf_counter()
        found = model(ids, use_cache=True, logits_to_keep=1)
        token = found.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(count):
            found = model(token, past_key_values=found.past_key_values, use_cache=True)
            token = found.logits[:, -1].argmax(-1, keepdim=True)
        return first - started, time.perf_counter() - first

    speeds: dict[str, float | None] = {"prefill": None, "decode": None}
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            if int(prompt):
                speeds["prefill"] = int(prompt) / answer(int(prompt), 0)[0]
            if int(tokens):
                speeds["decode"] = int(tokens) / answer(_SHORT, int(tokens))[1]
    if torch.distributed.is_initialized():
        if torch.distributed.get_rank():
            sys.exit()
    elif int(prompt) or int(tokens):
        raise RuntimeError("transformers did not split the model")
    return {"version": f"transformers {version('transformers')}, torch {version('torch')}", **speeds}


def mistralrs(file: str, prompt: str, tokens: str) -> dict[str, Any]:
    """One process; it takes text, so the prompt has about that many tokens, and its own count and times are used."""
    import mistralrs as engine

    path = Path(file)
    runner = engine.Runner(engine.Which.GGUF(str(path.parent), path.name), prefix_cache_n=0)
    text = (Path(__file__).with_name("text.txt")).read_text()

    def usage(characters: int, count: int) -> Any:
        request = engine.CompletionRequest(
            model="default", prompt=text[:characters], max_tokens=count, temperature=0.0, ignore_eos=True
        )
        return runner.send_completion_request(request).usage

    speeds: dict[str, float | None] = {"prefill": None, "decode": None}
    characters = 4 * int(prompt)
    for _ in range(_ROUNDS):
        if int(prompt):
            found = usage(characters, 1)
            speeds["prefill"] = found.prompt_tokens / found.total_prompt_time_sec
            characters = characters * int(prompt) // found.prompt_tokens
        if int(tokens):
            found = usage(4 * _SHORT, int(tokens))
            speeds["decode"] = found.completion_tokens / found.total_completion_time_sec
    return {"version": f"mistralrs {version('mistralrs')}", **speeds}


def distributed_llama(binary: str, file: str, nodes: str, prompt: str, tokens: str) -> dict[str, Any]:
    """Nodes of one thread on loopback, by its own times, which leave out sampling; the weights travel each time."""
    ports = [_free_port() for _ in range(int(nodes) - 1)]
    workers = [[binary, "worker", "--host", "127.0.0.1", "--port", str(port), "--nthreads", "1"] for port in ports]
    root = [binary, "inference", "--model", file, "--tokenizer", str(Path(file).with_suffix(".t")), "--nthreads", "1"]
    root += ["--buffer-float-type", "q80", "--temperature", "0"]
    if ports:
        root += ["--workers", *(f"127.0.0.1:{port}" for port in ports)]
    commands = [shlex.join(worker) for worker in workers]

    def measured(name: str, length: int, steps: int) -> float:
        # A letter is a token, and BOS is one more, which is how many it does not evaluate.
        command = [*root, "--max-seq-len", str(steps + 1), "--steps", str(steps), "--prompt", "a" * length]
        commands.append(shlex.join(command))
        out = subprocess.run(command, check=False, stdout=subprocess.PIPE, errors="replace").stdout
        found = re.search(name + r"\s(?:.*\n)+?\s*tokens/s: ([\d.]+)", out)
        if found is None:
            raise RuntimeError(" ".join(out.splitlines()[-1:]) or "it printed nothing")
        return float(found[1])

    with contextlib.ExitStack() as stack:
        for worker in workers:
            process = stack.enter_context(subprocess.Popen(worker, stdout=subprocess.DEVNULL))
            stack.callback(process.kill)
        for port in ports:
            _await_listener(port)
        return {
            "version": _commit(Path(binary).parent),
            "prefill": measured("Evaluation", int(prompt), int(prompt) + 1) if int(prompt) else None,
            "decode": measured("Prediction", _SHORT, _SHORT + int(tokens)) if int(tokens) else None,
            "commands": commands,
        }


def _free_port() -> int:
    """One that nobody listens on, outside the range from which the kernel picks."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def _await_listener(port: int) -> None:
    """Until somebody listens there; asked of the kernel, as a connection would be taken for the root's."""
    wanted = f":{port:04X} "
    for _ in range(200):
        tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
        if not any(table.exists() for table in tables):
            time.sleep(2.0)  # no such tables here
            return
        for line in (line for table in tables if table.exists() for line in table.read_text().splitlines()[1:]):
            _, local, _, state = line.split()[:4]
            if state == "0A" and f":{local.rpartition(':')[2]} " == wanted:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the worker did not listen on port {port} within 10 s")


def _commit(folder: Path) -> str:
    found = subprocess.run(
        ["git", "-C", str(folder), "log", "-1", "--format=%h of %cs"], check=False, capture_output=True, text=True
    )
    return f"distributed-llama {found.stdout.strip() or 'of unknown version'}"


if __name__ == "__main__":
    drivers = {"transformers": transformers, "mistralrs": mistralrs, "distributed-llama": distributed_llama}
    print(json.dumps(drivers[sys.argv[1]](*sys.argv[2:])), flush=True)
