"""What commands are told: each option once, with its default and its help, as the fields of one frozen dataclass a
command. `options.command_options` makes them a command's parameters. Knows no command, and imports little.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ringlm.engine.request import SamplingParams

_answer: Any = partial(typer.Option, rich_help_panel="Answer")
_bench: Any = partial(typer.Option, rich_help_panel="Measurement")
_SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


_Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.")]
_Adapter = Annotated[Path | None, typer.Option(metavar="FOLDER", help="A LoRA adapter that PEFT has saved.")]
_Split = Annotated[str | None, typer.Option(metavar="W,W,…", help="The share of each rank, such as 2,1.")]
_Context = Annotated[int | None, typer.Option(metavar="N", help="Tokens of prompt and answer together.")]
_Interface = Annotated[str | None, typer.Option(metavar="NAME", help="The network interface or address to listen on.")]
_SecretFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Holds what all ranks share.")]
_Url = Annotated[str, typer.Argument(metavar="[URL]", help="Where it listens.")]
_ApiKey = Annotated[str | None, typer.Option(metavar="KEY", envvar="RINGLM_API_KEY", help="What the server asks for.")]


@dataclass(frozen=True)
class RunOptions:
    """What to answer and how, and how to show it. `prompt` None and not `interactive`: by what stdin is."""

    interactive: Annotated[bool, _answer("-i", "--interactive", metavar="", help="Chat.")] = False
    prompt: Annotated[str | None, _answer(metavar="TEXT", help="Answer this and leave.")] = None
    max_tokens: Annotated[int, _answer(metavar="N", help="The longest answer.")] = 1024
    temperature: Annotated[float, _answer(metavar="T", help="0 takes the likeliest token every time.")] = 0.7
    top_k: Annotated[int, _answer(metavar="K", help="Choose among the K likeliest; 0: all.")] = 0
    top_p: Annotated[float, _answer(metavar="P", help="Choose among those likeliest that make up P.")] = 1.0
    min_p: Annotated[float, _answer(metavar="P", help="Leave out what is below P of the likeliest.")] = 0.0
    typical_p: Annotated[float, _answer(metavar="P", help="Choose among the most typical that make up P.")] = 1.0
    repetition_penalty: Annotated[
        float, _answer(metavar="X", help="Above 1: avoid what is in the prompt or the answer.")
    ] = 1.0
    presence_penalty: Annotated[float, _answer(metavar="X", help="Above 0: avoid what is in the answer.")] = 0.0
    frequency_penalty: Annotated[float, _answer(metavar="X", help="The same, for each time that it is there.")] = 0.0
    min_tokens: Annotated[int, _answer(metavar="N", help="The shortest answer.")] = 0
    stop: Annotated[list[str] | None, _answer(metavar="TEXT", help="End before this text; may be repeated.")] = None
    seed: Annotated[int | None, _answer(metavar="S", help="The same seed, the same answer.")] = None
    chat_template: Annotated[Path | None, _answer(metavar="FILE", help="A Jinja template in place of the model's.")] = (
        None
    )
    throughput: Annotated[bool, _answer("--throughput", metavar="", help="Show tokens per second.")] = False
    json: Annotated[bool, _answer("--json", metavar="", help="Print one JSON object, and only that.")] = False

    def params(self) -> SamplingParams:
        """How to draw the answer."""
        from ringlm.engine.request import SamplingParams

        return SamplingParams(stop=self.stop or (), **{name: getattr(self, name) for name in _SAMPLING})


@dataclass(frozen=True)
class BenchOptions:
    """What to measure: `prompt` tokens in, `tokens` out, at each of `concurrency`, `repeat` times after a warm-up."""

    prompt: Annotated[int, _bench("-p", metavar="N", help="Tokens of the prompt; 0: none.")] = 512
    tokens: Annotated[int, _bench("-n", metavar="N", help="Tokens of the answer; 0: none.")] = 128
    concurrency: Annotated[str, _bench(metavar="N,N,…", help="Requests at the same time, a row for each.")] = "1"
    repeat: Annotated[int, _bench("-r", metavar="N", help="Rounds after a warm-up.")] = 5
    url: Annotated[
        str | None, _bench(metavar="URL", help="Measure the server whose API begins here; -m is its model's id.")
    ] = None
    api_key: Annotated[
        str | None, _bench(metavar="KEY", envvar="RINGLM_API_KEY", help="What that server asks for.")
    ] = None
    plot: Annotated[Path | None, _bench(metavar="FILE", help="Draw the rows: a PNG or SVG file.")] = None
    json: Annotated[bool, _bench("--json", metavar="", help="Print one JSON object, and only that.")] = False


@dataclass(frozen=True)
class CommOptions:
    """What to measure of the links alone."""

    sizes: Annotated[str, typer.Option(metavar="N,N,…", help="Bytes, with K, M or G.")] = "1K,6K,1M,32M"
    world_size: Annotated[str, typer.Option(metavar="N,N,…", help="How many ranks; rows for each.")] = "2"
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16|float16", help="What is summed.")] = "float32"
    against: Annotated[str | None, typer.Option(metavar="gloo|nccl", help="Measure this, too.")] = None
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="Where the tensors are; on cuda ranks share the first GPU.")
    ] = None
    seconds: Annotated[float, typer.Option(metavar="S", help="For each row, roughly.")] = 1.0
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the rows: a PNG or SVG file.")] = None
    algorithms: Annotated[
        bool, typer.Option("--algorithms", metavar="", help="Show which algorithm carries what, and measure nothing.")
    ] = False
    json: _Json = False


@dataclass(frozen=True)
class PlanOptions:
    """Whose plan to show: of which model, for which ranks."""

    model: Annotated[
        str,
        typer.Option("-m", "--model", metavar="MODEL", help="A Hugging Face folder, a GGUF file, a hub id, or demo."),
    ]
    format: Annotated[
        str | None, typer.Argument(metavar="plain|gguf", help="What the model is; detected when left out.")
    ] = None
    world_size: Annotated[int, typer.Option("-n", "--world-size", metavar="N", help="How many ranks.")] = 1
    split: _Split = None
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,…", help="What each rank has free, such as 16G; else all share what this machine has."
        ),
    ] = None
    quant: Annotated[str, typer.Option(metavar="none|int8|int4", help="How weights are packed.")] = "none"
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="What to compute in; auto as this CPU would.")
    ] = "auto"
    device: Annotated[str, typer.Option(metavar="cpu|cuda|mps", help="What all ranks compute on.")] = "cpu"
    adapter: _Adapter = None
    context: _Context = None
    max_seqs: Annotated[int | None, typer.Option(metavar="N", help="Requests at the same time.")] = None
    json: _Json = False


@dataclass(frozen=True)
class JoinOptions:
    """Whom to join, and what is this rank's own; `model` None takes what rank 0's user named."""

    rank0: Annotated[str, typer.Argument(metavar="HOST[:PORT]", help="Rank 0, and its ring's port; 7600 if left out.")]
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="MODEL", help="Where it is here, if not as on rank 0.")
    ] = None
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="Where this rank computes.")] = "auto"
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads of this rank.")] = None
    adapter: _Adapter = None
    interface: _Interface = None
    secret_file: _SecretFile = None
    seal: Annotated[
        str | None, typer.Option(metavar="on|auth|off", help="Encrypt links, or only authenticate what they carry.")
    ] = None


@dataclass(frozen=True)
class TopOptions:
    """Which server, what it asks for, whether to show it once, and that as JSON."""

    url: _Url = "http://127.0.0.1:8000"
    api_key: _ApiKey = None
    once: Annotated[bool, typer.Option("--once", metavar="", help="Show it once.")] = False
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print what /v1/ring says, and only that.")] = False


@dataclass(frozen=True)
class StatusOptions:
    """Which server, what it asks for, and how to show what it says."""

    url: _Url = "http://127.0.0.1:8000"
    api_key: _ApiKey = None
    json: _Json = False


@dataclass(frozen=True)
class DoctorOptions:
    """Who is examined, and what for; `rank0` where another machine waits for this one."""

    rank0: Annotated[
        str | None, typer.Argument(metavar="[HOST[:PORT]]", help="Where 'ringlm doctor -n N' waits for this machine.")
    ] = None
    world_size: Annotated[
        int | None, typer.Option("-n", "--world-size", metavar="N", help="How many machines, this one included.")
    ] = None
    nodes: Annotated[str | None, typer.Option(metavar="HOST:PORT,…", help="All, in order, with --node-rank.")] = None
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A cluster file, with --node-rank.")] = None
    node_rank: Annotated[int | None, typer.Option(metavar="R", help="Which of the nodes this is.")] = None
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="MODEL", help="Tell what it would do here; on rank 0's.")
    ] = None
    format: Annotated[
        str | None, typer.Option(metavar="plain|gguf", help="What the model is; detected when left out.")
    ] = None
    quant: Annotated[str, typer.Option(metavar="none|int8|int4", help="How its weights are packed.")] = "none"
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="What to compute in; auto suits all ranks.")
    ] = "auto"
    split: _Split = None
    context: _Context = None
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="Where this machine computes.")] = "auto"
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads of this machine.")] = None
    interface: _Interface = None
    secret_file: _SecretFile = None
    json: _Json = False
