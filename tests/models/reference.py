"""Tiny models of every family, what transformers makes of them, and what a ring of threads does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringlm.models.batch import Batch
from ringlm.models.causal_lm import CausalLM
from ringlm.models.config import read_config
from ringlm.models.loader import load_model
from ringlm.parallel.communicator import Communicator
from ringlm.parallel.shard import plan_shards
from ringlm.weights import ModelFiles, open_model
from tests.parallel.local import run_ranks

BLOCK = 8  # positions of a cache block
NEAR_TIE = 1e-3  # logits this close may swap under another order of summation


class Greedy(NamedTuple):
    """A greedy continuation and the logits (tokens, vocabulary) that each of its tokens was chosen from."""

    tokens: list[int]
    logits: Tensor


def save(
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    family: str = "Llama",
    **changes: Any,
) -> Path:
    """A seeded model of `family` and of odd sizes, whose norms and biases are random as well."""
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind(kind.config_class(**(fields | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def prompt(length: int, seed: int = 0, vocabulary: int = 131) -> list[int]:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def transformers_greedy(model: Any, tokens: Sequence[int], count: int) -> Greedy:
    """`count` tokens after `tokens`, by argmax, with transformers' own cache."""
    cache, step, chosen, logits = None, torch.tensor([list(tokens)]), [], []
    for _ in range(count):
        out = model(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1].float())
        chosen.append(int(logits[-1].argmax()))
        step = torch.tensor([[chosen[-1]]])
    return Greedy(chosen, torch.stack(logits))


def expected(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> list[Greedy]:
    """transformers' answers in float32."""
    from transformers import AutoModelForCausalLM

    # Not its defaults: one leaves soft caps out, the other wants sizes that are multiples of 4.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager)
    return [transformers_greedy(model, tokens, count) for tokens in prompts]


def load(files: ModelFiles, comm: Communicator, weights: Sequence[float] | None = None, **options: Any) -> CausalLM:
    """This rank's part of `files` in float32 on the CPU, for 1,024 positions."""
    plan = plan_shards(read_config(files.config, files.name), comm.world_size, weights)
    settings = {"device": torch.device("cpu"), "dtype": torch.float32, "context": 1024} | options
    return load_model(files, plan, comm.rank, comm, **settings)


def logits_of(model: CausalLM, comm: Communicator, batch: Batch, cache: Any) -> Tensor:
    """The whole vocabulary's logits on every rank."""
    mine = model.forward(batch, cache)
    widths = [len(part) for part in _bytes_of_all(comm, b"." * mine.shape[1])]
    whole = torch.zeros(len(mine), sum(widths))
    left = sum(widths[: comm.rank])
    whole[:, left : left + mine.shape[1]] = mine
    return comm.all_reduce(whole)


def _bytes_of_all(comm: Communicator, data: bytes) -> list[bytes]:
    gathered = comm.gather_bytes(data)
    joined = None if gathered is None else b"|".join(gathered)
    return comm.broadcast_bytes(joined).split(b"|")


def generate(
    model: CausalLM, comm: Communicator, prompts: Sequence[Sequence[int]], count: int, chunk: int = 1 << 30
) -> list[Greedy]:
    """Greedy continuations of all prompts in shared batches: prefill in chunks, beside those that already decode. The
    first prompt's cache blocks follow one another, those of the others lie between each other's."""
    sizes = [-(-(len(tokens) + count) // BLOCK) for tokens in prompts]
    rest = random.Random(0).sample(range(sizes[0], sum(sizes)), sum(sizes[1:]))
    free = iter([*range(sizes[0]), *rest])
    tables = [[next(free) for _ in range(size)] for size in sizes]
    cache = model.new_cache(sum(sizes), BLOCK)
    todo = [list(tokens) for tokens in prompts]
    done = [0] * len(prompts)
    chosen: list[list[int]] = [[] for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    while active := [index for index in range(len(prompts)) if len(chosen[index]) < count]:
        pieces, wanted, ready, rows = [], [], [], 0
        for index in active:
            piece = todo[index][:chunk]
            pieces.append((piece, done[index], tables[index]))
            rows += len(piece)
            if len(piece) == len(todo[index]):
                ready.append(index)
                wanted.append(rows - 1)
            todo[index], done[index] = todo[index][chunk:], done[index] + len(piece)
        found = logits_of(model, comm, Batch.of(pieces, wanted, model.device), cache)
        for index, row in zip(ready, found, strict=True):
            chosen[index].append(int(row.argmax()))
            logits[index].append(row)
            todo[index] = chosen[index][-1:]
    return [Greedy(tokens, torch.stack(rows)) for tokens, rows in zip(chosen, logits, strict=True)]


def ring_greedy(
    path: Path,
    world_size: int,
    prompts: Sequence[Sequence[int]],
    count: int,
    chunk: int = 1 << 30,
    weights: Sequence[float] | None = None,
) -> list[Greedy]:
    """What `world_size` ranks, as threads, answer together; every rank has found the same."""
    files = open_model(path)
    answers = run_ranks(world_size, lambda comm: generate(load(files, comm, weights), comm, prompts, count, chunk))
    for other in answers[1:]:
        assert [greedy.tokens for greedy in other] == [greedy.tokens for greedy in answers[0]]
    return answers[0]


def assert_same(ours: Sequence[Greedy], theirs: Sequence[Greedy], tolerance: float = 1e-4) -> None:
    """The same tokens and logits, up to the first near tie of the reference."""
    for mine, reference in zip(ours, theirs, strict=True):
        best = reference.logits.topk(2).values
        ties = (best[:, 0] - best[:, 1] < NEAR_TIE).nonzero()
        until = int(ties[0]) if len(ties) else len(reference.tokens)
        assert mine.tokens[:until] == reference.tokens[:until]
        torch.testing.assert_close(mine.logits[:until], reference.logits[:until], atol=tolerance, rtol=tolerance)
        assert until >= min(8, len(reference.tokens)), "a poor seed: the reference nearly ties at once"
