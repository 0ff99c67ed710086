"""The `ringlm` command: its sub-commands, and errors as one line with an exit status. Starts fast: no torch."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ringlm import __version__, logs
from ringlm.cluster.parent import watch_parent
from ringlm.errors import RingLMError
from ringlm.frontend import console, machines
from ringlm.frontend.options import EngineOptions, engine_options
from ringlm.frontend.server.options import ServeOptions


class Commands(TyperGroup):
    """Commands, some of two words: `bench comm` is looked for before `bench`, whose first argument is a format."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = " ".join(args[:2])
        if name in self.commands:
            return name, self.commands[name], args[2:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="ringlm",
    cls=Commands,
    help="One language model across the machines you already have.",
    epilog="Example: ringlm launch -n 2 -- run -m demo -i",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PROMPT: Any = {"rich_help_panel": "Answer"}
_BENCH: Any = {"rich_help_panel": "Measurement"}


@app.callback(invoke_without_command=True)
def ringlm(
    version: Annotated[
        bool, typer.Option("--version", metavar="", is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    if version:
        print(f"ringlm {__version__}")
        raise typer.Exit


@app.command(
    help="Answer a prompt, or chat, on this machine or as one rank of a ring.\n\n"
    "Without --prompt and -i it chats on a terminal and else answers what is on stdin. In a ring (RING_*, "
    "a launcher's variables, --nodes or --config) every rank is started with the same command; those but "
    "rank 0 are daemons, and heed none of the answer's options.",
    epilog='Example: ringlm run -m demo --prompt "What is the capital of France?" --temperature 0',
)
@engine_options
def run(
    engine: EngineOptions,
    interactive: Annotated[bool, typer.Option("-i", "--interactive", metavar="", help="Chat.", **_PROMPT)] = False,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this and leave.", **_PROMPT)] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="The longest answer.", **_PROMPT)] = 1024,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 always takes the likeliest token.", **_PROMPT)
    ] = 0.7,
    top_k: Annotated[int, typer.Option(metavar="K", help="Choose among the K likeliest; 0: all.", **_PROMPT)] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Choose among the likeliest that make up P.", **_PROMPT)
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Leave out what is below P of the likeliest.", **_PROMPT)
    ] = 0.0,
    typical_p: Annotated[
        float, typer.Option(metavar="P", help="Choose among the most typical that make up P.", **_PROMPT)
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1: avoid what is in the prompt or the answer.", **_PROMPT)
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 0: avoid what is in the answer.", **_PROMPT)
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(metavar="X", help="The same, for each time that it is there.", **_PROMPT)
    ] = 0.0,
    min_tokens: Annotated[int, typer.Option(metavar="N", help="The shortest answer.", **_PROMPT)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.", **_PROMPT)
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="The same seed, the same answer.", **_PROMPT)] = None,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A Jinja template in place of the model's.", **_PROMPT)
    ] = None,
    throughput: Annotated[
        bool, typer.Option("--throughput", metavar="", help="Show tokens per second.", **_PROMPT)
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.", **_PROMPT)
    ] = False,
) -> None:
    from ringlm.engine.request import SamplingParams
    from ringlm.frontend.run import RunOptions
    from ringlm.frontend.run import run as run_command

    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=stop or (),
        seed=seed,
    )
    run_command(engine, RunOptions(prompt, interactive, json, throughput, chat_template), params)


@app.command(
    help="Serve the OpenAI API over HTTP, on this machine or as rank 0 of a ring.\n\n"
    "In a ring every rank is started with the same command; those but rank 0 are daemons and heed none of the "
    "server's options. Ctrl-C or SIGTERM ends it after the answers under way, and a second one at once.",
    epilog="Example: ringlm launch -n 2 -- serve -m demo --port 8000",
)
@engine_options
def serve(engine: EngineOptions, options: ServeOptions) -> None:
    from ringlm.frontend.server.lifecycle import serve as serve_command

    serve_command(engine, options)


@app.command(
    help="Measure tokens per second, on this machine or as one rank of a ring.\n\n"
    "In llama-bench's words: pp512 is a prompt of 512 random tokens, tg128 an answer of 128. In a ring every rank is "
    "started with the same command; rank 0 measures. With --url it measures a server that speaks OpenAI's API, "
    "ringlm's or another's: pp512+tg128 is a whole request. 'ringlm bench comm' measures the links alone.",
    epilog="Examples: ringlm launch -n 2 -- bench -m model.gguf --quant int4 --concurrency 1,4\n\n"
    "ringlm bench --url http://127.0.0.1:8000/v1 --concurrency 1,4,16",
)
@engine_options
def bench(
    engine: EngineOptions,
    prompt: Annotated[int, typer.Option("-p", metavar="N", help="Tokens of the prompt; 0: none.", **_BENCH)] = 512,
    tokens: Annotated[int, typer.Option("-n", metavar="N", help="Tokens of the answer; 0: none.", **_BENCH)] = 128,
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,…", help="Requests at the same time, a row for each.", **_BENCH)
    ] = "1",
    repeat: Annotated[int, typer.Option("-r", metavar="N", help="Rounds after a warm-up.", **_BENCH)] = 5,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Measure the server whose API begins here; -m is its model's id.", **_BENCH),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="RINGLM_API_KEY", help="What that server asks for.", **_BENCH)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the rows: a PNG or SVG file.", **_BENCH)
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.", **_BENCH)
    ] = False,
) -> None:
    from ringlm.frontend.bench import BenchOptions
    from ringlm.frontend.bench import bench as bench_command

    bench_command(engine, BenchOptions(prompt, tokens, concurrency, repeat, url, api_key, plot, json))


@app.command(
    "bench comm",
    help="Measure all-reduce between ranks on this machine, by size; no model is needed.\n\n"
    "A process of one thread is started for each rank, over loopback. Blocks of calls alternate between the ring and "
    "what it is compared to, all sizes and all numbers of ranks. Times are rank 0's, of one call.",
    epilog="Example: ringlm bench comm --sizes 1K,6K,1M --world-size 2,3 --against gloo",
)
def bench_comm(
    sizes: Annotated[str, typer.Option(metavar="N,N,…", help="Bytes, with K, M or G.")] = "1K,6K,1M,32M",
    world_size: Annotated[str, typer.Option(metavar="N,N,…", help="How many ranks; rows for each.")] = "2",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16|float16", help="What is summed.")] = "float32",
    against: Annotated[str | None, typer.Option(metavar="gloo|nccl", help="Measure this, too.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="Where the tensors are; on cuda ranks share the first GPU.")
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", help="For each row, roughly.")] = 1.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the rows: a PNG or SVG file.")] = None,
    algorithms: Annotated[
        bool, typer.Option("--algorithms", metavar="", help="Show which algorithm carries what, and measure nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.")] = False,
) -> None:
    from ringlm.frontend.comm import CommOptions
    from ringlm.frontend.comm import bench_comm as bench_comm_command

    bench_comm_command(CommOptions(sizes, world_size, dtype, device, against, seconds, plot, algorithms, json))


@app.command(
    help="Show which rank would hold what of a model, in heads, columns and bytes, and whether it fits.\n\n"
    "Only the headers of the files are read. What does not fit is refused here and when a ring starts, in the "
    "same words.",
    epilog="Example: ringlm plan -m model.gguf --quant int4 --world-size 2 --split 2,1 --memory 16G,8G",
)
def plan(
    model: Annotated[
        str,
        typer.Option("-m", "--model", metavar="MODEL", help="A Hugging Face folder, a GGUF file, a hub id, or demo."),
    ],
    format: Annotated[
        str | None, typer.Argument(metavar="plain|gguf", help="What the model is; detected when left out.")
    ] = None,
    world_size: Annotated[int, typer.Option("-n", "--world-size", metavar="N", help="How many ranks.")] = 1,
    split: Annotated[str | None, typer.Option(metavar="W,W,…", help="The share of each rank, such as 2,1.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,…", help="What each rank has free, such as 16G; else all share what this machine has."
        ),
    ] = None,
    quant: Annotated[str, typer.Option(metavar="none|int8|int4", help="How weights are packed.")] = "none",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="What to compute in; auto as this CPU would.")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="cpu|cuda|mps", help="What all ranks compute on.")] = "cpu",
    adapter: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A LoRA adapter that PEFT has saved.")] = None,
    context: Annotated[int | None, typer.Option(metavar="N", help="Tokens of prompt and answer together.")] = None,
    max_seqs: Annotated[int | None, typer.Option(metavar="N", help="Requests at the same time.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.")] = False,
) -> None:
    from ringlm.frontend.plan import PlanOptions
    from ringlm.frontend.plan import plan as plan_command

    plan_command(
        PlanOptions(format, model, world_size, split, context, max_seqs, quant, dtype, device, memory, adapter, json)
    )


app.add_typer(machines.app)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 a failure, 2 a mistake of the user's, 130 Ctrl-C."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what cannot be decoded or shown ends nothing
    watch_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    # BadParameter is public; the bases are not, and where they live depends on typer's version.
    usage_error: Any = typer.BadParameter.__mro__[1]
    try:
        if logs.as_json():
            logs.inherit()
        status = app(args=arguments, prog_name="ringlm", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except usage_error as error:
        return _usage(error)
    except RingLMError as error:
        console.fail(type(error).__name__, str(error))
        return error.exit_status
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # Nobody reads any more. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001  # the last resort: one line, and the rest on demand
        if os.environ.get("RINGLM_DEBUG"):
            traceback.print_exc()
        console.fail(type(error).__name__, f"{error or 'no message'} (RINGLM_DEBUG=1 shows where)")
        return 1


def _terminate(signum: int, frame: FrameType | None) -> None:
    """End as by an exception: whoever holds a ring ends it in order."""
    raise SystemExit(128 + signum)


def _usage(error: Any) -> int:
    """A usage error as one line. Asking for help by giving nothing is one too, and has been shown already."""
    message = error.format_message()
    command = error.ctx.command_path if error.ctx is not None else "ringlm"
    if message:
        console.fail("", f"{message.rstrip('.')}. Try '{command} --help'.")
    return int(error.exit_code)
