"""How each engine is measured: whether it is here, which models it takes, its command, and what it prints.

Every engine is one child process and its children, with a deadline; nothing is imported from it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import make_model

from ringlm.frontend.model import resolve

DRIVERS = Path(__file__).with_name("drivers.py")
GGUF_TYPES = {"int4": "Q4_0", "int8": "Q8_0", "none": "F16"}


@dataclass(frozen=True)
class Task:
    """What all engines do: `ranks` threads in all, a prompt of `prompt` tokens, an answer of `tokens`."""

    ranks: int
    prompt: int
    tokens: int
    quant: str
    dtype: str
    timeout_s: float
    prefix: tuple[str, ...]


class Result(NamedTuple):
    """Tokens per second, None for what was not asked for; the engine's version and every command it ran by."""

    prefill: float | None
    decode: float | None
    version: str
    commands: list[str]


class Model:
    """A shape of make_model.py with random weights, in whichever form an engine wants, written under `folder` at its
    first use; or `demo`, which is real and a GGUF file only."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder

    @property
    def real(self) -> bool:
        return self.name == "demo"

    def gguf(self, kind: str) -> Path:
        if self.real:
            return resolve("demo").path
        return self._made(
            f"{self.name}.{kind}.gguf", lambda shape, path: make_model.write_gguf(shape, path, kind, self.name)
        )

    def plain(self) -> Path:
        return self._made(self.name, make_model.write_folder)

    def dllama(self) -> Path:
        return self._made(f"{self.name}.m", make_model.write_dllama)

    def _made(self, name: str, write: Callable[[make_model.Shape, Path], None]) -> Path:
        path = self._folder / name
        if not path.exists():
            print(f"writing {path} …", file=sys.stderr, flush=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"partial-{name}")
            write(make_model.SHAPES[self.name], partial)
            if name.endswith(".m"):
                partial.with_suffix(".t").rename(path.with_suffix(".t"))
            partial.rename(path)
        return path


class Failed(Exception):
    """An engine was started and gave no figures; the text says why."""


class Ringlm:
    name = "ringlm"

    def setup(self, task: Task) -> str:
        return f"{task.ranks} ranks of 1 thread"

    def missing(self) -> str | None:
        return None

    def refuses(self, model: Model, task: Task) -> str | None:
        return None

    def measure(self, model: Model, task: Task) -> Result:
        path = model.plain() if task.quant == "none" and not model.real else model.gguf(GGUF_TYPES[task.quant])
        command = [str(Path(sys.executable).with_name("ringlm")), "launch", "-n", str(task.ranks), "--", "bench"]
        command += ["-m", str(path), "--quant", task.quant, "--dtype", task.dtype, "--threads", "1"]
        command += ["-p", str(task.prompt), "-n", str(task.tokens), "-r", "1", "--json"]
        rows = {row["test"][:2]: row["tokens_per_s"] for row in json.loads(_run(command, task))["rows"]}
        number = f"ringlm {version('ringlm')}, torch {version('torch')}"
        return Result(rows.get("pp"), rows.get("tg"), number, [shlex.join(command)])


@dataclass(frozen=True)
class LlamaCpp:
    binary: str
    name: str = "llama.cpp"

    def setup(self, task: Task) -> str:
        return f"1 process of {task.ranks} threads"

    def missing(self) -> str | None:
        return None if shutil.which(self.binary) else "no llama-bench; give its path with --llama-bench"

    def refuses(self, model: Model, task: Task) -> str | None:
        return None

    def measure(self, model: Model, task: Task) -> Result:
        command = [self.binary, "-m", str(model.gguf(GGUF_TYPES[task.quant])), "-t", str(task.ranks)]
        command += ["-p", str(task.prompt), "-n", str(task.tokens), "-r", "1", "-o", "json"]
        rows: list[dict[str, Any]] = json.loads(_run(command, task))
        speeds = {"tg" if row["n_gen"] else "pp": row["avg_ts"] for row in rows}
        number = f"llama.cpp {rows[0]['build_commit']} ({rows[0]['build_number']})"
        return Result(speeds.get("pp"), speeds.get("tg"), number, [shlex.join(command)])


@dataclass(frozen=True)
class DistributedLlama:
    binary: str
    name = "distributed-llama"

    def setup(self, task: Task) -> str:
        return f"{task.ranks} nodes of 1 thread"

    def missing(self) -> str | None:
        return None if shutil.which(self.binary) else "no dllama; give its path with --dllama"

    def refuses(self, model: Model, task: Task) -> str | None:
        if model.real or task.quant != "int4":
            return "only shapes of random weights in int4 are written for it"
        shape = make_model.SHAPES[model.name]
        if shape.architecture[0] != "llama":
            return "only Llamas are written for it"
        if shape.heads % task.ranks or shape.kv_heads % task.ranks:
            return f"{shape.heads} heads, {shape.kv_heads} of keys, do not divide by {task.ranks} nodes"
        return None

    def measure(self, model: Model, task: Task) -> Result:
        sizes = [str(task.ranks), str(task.prompt), str(task.tokens)]
        return _driven([sys.executable, str(DRIVERS), self.name, self.binary, str(model.dllama()), *sizes], task)


class Transformers:
    name = "transformers"

    def setup(self, task: Task) -> str:
        return f"{task.ranks} processes of 1 thread, gloo"

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("accelerate") else "accelerate is missing; pip install accelerate"

    def refuses(self, model: Model, task: Task) -> str | None:
        if model.real or task.quant != "none":
            return "its tensor parallelism takes folders of floats: --quant none"
        return None

    def measure(self, model: Model, task: Task) -> Result:
        dtype = "float32" if task.dtype == "auto" else task.dtype
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(task.ranks)]
        command += ["--master-addr", "127.0.0.1", "--standalone", str(DRIVERS), self.name, str(model.plain())]
        return _driven([*command, str(task.prompt), str(task.tokens), dtype], task)


@dataclass(frozen=True)
class MistralRs:
    python: str
    name = "mistral.rs"

    def setup(self, task: Task) -> str:
        return f"1 process of {task.ranks} threads"

    def missing(self) -> str | None:
        check = [self.python, "-c", "import mistralrs"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if not subprocess.run(check, check=False, capture_output=True, timeout=60).returncode:
                return None
        return "no mistralrs; give a Python that has it with --mistralrs-python"

    def refuses(self, model: Model, task: Task) -> str | None:
        return None if model.real else "it needs a GGUF file with a tokenizer: --models demo"

    def measure(self, model: Model, task: Task) -> Result:
        path = str(model.gguf(GGUF_TYPES[task.quant]))
        threads = {"RAYON_NUM_THREADS": str(task.ranks), "OMP_NUM_THREADS": str(task.ranks)}
        command = [self.python, str(DRIVERS), "mistralrs", path, str(task.prompt), str(task.tokens)]
        return _driven(command, task, threads)


Peer = Ringlm | LlamaCpp | DistributedLlama | Transformers | MistralRs


def _driven(command: list[str], task: Task, environment: dict[str, str] | None = None) -> Result:
    """Of one of drivers.py's."""
    environment = {"OMP_NUM_THREADS": "1"} if environment is None else environment
    lines = _run(command, task, environment).splitlines()
    found = json.loads(lines[-1]) if lines else {}
    if not found:
        raise Failed("it printed nothing")
    whole = [shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command])]
    return Result(found["prefill"], found["decode"], found["version"], [*whole, *found.get("commands", [])])


def _run(command: list[str], task: Task, environment: dict[str, str] | None = None) -> str:
    """stdout; Failed with the last line of stderr, or when the time is over, and then nothing is left running."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [*task.prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            errors="replace",
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(timeout=task.timeout_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"no result in {task.timeout_s:.0f} s") from None
        finally:
            _end(process)
        if process.returncode:
            errors.seek(0)
            said = [line.strip() for line in errors.read().splitlines() if line.strip()]
            raise Failed(f"status {process.returncode}: {said[-1] if said else 'without a word'}")
    return out


def _end(process: subprocess.Popen[str]) -> None:
    """The whole group; politely first, as torchrun's workers are in groups of their own."""
    for number, patience_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
