"""What commands are told: each option once, with its default and its help, as the fields of one frozen dataclass a
command. `options.command_options` makes them a command's parameters. Knows no command, and imports little.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ringlm.engine.request import SamplingParams

_PROMPT: Any = {"rich_help_panel": "Answer"}
_BENCH: Any = {"rich_help_panel": "Measurement"}
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


@dataclass(frozen=True)
class RunOptions:
    """What to answer and how, and how to show it. `prompt` None and not `interactive`: by what stdin is."""

    interactive: Annotated[bool, typer.Option("-i", "--interactive", metavar="", help="Chat.", **_PROMPT)] = False
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this and leave.", **_PROMPT)] = None
    max_tokens: Annotated[int, typer.Option(metavar="N", help="The longest answer.", **_PROMPT)] = 1024
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token every time.", **_PROMPT)
    ] = 0.7
    top_k: Annotated[int, typer.Option(metavar="K", help="Choose among the K likeliest; 0: all.", **_PROMPT)] = 0
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Choose among those likeliest that make up P.", **_PROMPT)
    ] = 1.0
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Leave out what is below P of the likeliest.", **_PROMPT)
    ] = 0.0
    typical_p: Annotated[
        float, typer.Option(metavar="P", help="Choose among the most typical that make up P.", **_PROMPT)
    ] = 1.0
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1: avoid what is in the prompt or the answer.", **_PROMPT)
    ] = 1.0
    presence_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 0: avoid what is in the answer.", **_PROMPT)
    ] = 0.0
    frequency_penalty: Annotated[
        float, typer.Option(metavar="X", help="The same, for each time that it is there.", **_PROMPT)
    ] = 0.0
    min_tokens: Annotated[int, typer.Option(metavar="N", help="The shortest answer.", **_PROMPT)] = 0
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.", **_PROMPT)
    ] = None
    seed: Annotated[int | None, typer.Option(metavar="S", help="The same seed, the same answer.", **_PROMPT)] = None
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A Jinja template in place of the model's.", **_PROMPT)
    ] = None
    throughput: Annotated[bool, typer.Option("--throughput", metavar="", help="Show tokens per second.", **_PROMPT)] = (
        False
    )
    json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.", **_PROMPT)
    ] = False

    def params(self) -> SamplingParams:
        """How to draw the answer."""
        from ringlm.engine.request import SamplingParams

        return SamplingParams(stop=self.stop or (), **{name: getattr(self, name) for name in _SAMPLING})


@dataclass(frozen=True)
class BenchOptions:
    """What to measure: `prompt` tokens in, `tokens` out, at each of `concurrency`, `repeat` times after a warm-up."""

    prompt: Annotated[int, typer.Option("-p", metavar="N", help="Tokens of the prompt; 0: none.", **_BENCH)] = 512
    tokens: Annotated[int, typer.Option("-n", metavar="N", help="Tokens of the answer; 0: none.", **_BENCH)] = 128
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,…", help="Requests at the same time, a row for each.", **_BENCH)
    ] = "1"
    repeat: Annotated[int, typer.Option("-r", metavar="N", help="Rounds after a warm-up.", **_BENCH)] = 5
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Measure the server whose API begins here; -m is its model's id.", **_BENCH),
    ] = None
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="RINGLM_API_KEY", help="What that server asks for.", **_BENCH)
    ] = None
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the rows: a PNG or SVG file.", **_BENCH)] = (
        None
    )
    json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.", **_BENCH)
    ] = False


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
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.")] = False


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
    split: Annotated[str | None, typer.Option(metavar="W,W,…", help="The share of each rank, such as 2,1.")] = None
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
    adapter: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A LoRA adapter that PEFT has saved.")] = None
    context: Annotated[int | None, typer.Option(metavar="N", help="Tokens of prompt and answer together.")] = None
    max_seqs: Annotated[int | None, typer.Option(metavar="N", help="Requests at the same time.")] = None
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.")] = False
