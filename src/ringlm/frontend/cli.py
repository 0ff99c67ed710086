"""The `ringlm` command: its sub-commands, and errors as one line with an exit status. Starts fast: no torch."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ringlm import __version__, logs
from ringlm.cluster.parent import watch_parent
from ringlm.errors import RingLMError
from ringlm.frontend import console, machines
from ringlm.frontend.command_options import BenchOptions, CommOptions, PlanOptions, RunOptions
from ringlm.frontend.options import EngineOptions, command_options
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
@command_options
def run(engine: EngineOptions, options: RunOptions) -> None:
    from ringlm.frontend.run import run as run_command

    run_command(engine, options)


@app.command(
    help="Serve the OpenAI API over HTTP, on this machine or as rank 0 of a ring.\n\n"
    "In a ring every rank is started with the same command; those but rank 0 are daemons and heed none of the "
    "server's options. Ctrl-C or SIGTERM ends it after the answers under way, and a second one at once.",
    epilog="Example: ringlm launch -n 2 -- serve -m demo --port 8000",
)
@command_options
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
@command_options
def bench(engine: EngineOptions, options: BenchOptions) -> None:
    from ringlm.frontend.bench import bench as bench_command

    bench_command(engine, options)


@app.command(
    "bench comm",
    help="Measure all-reduce between ranks on this machine, by size; no model is needed.\n\n"
    "A process of one thread is started for each rank, over loopback. Blocks of calls alternate between the ring and "
    "what it is compared to, all sizes and all numbers of ranks. Times are rank 0's, of one call.",
    epilog="Example: ringlm bench comm --sizes 1K,6K,1M --world-size 2,3 --against gloo",
)
@command_options
def bench_comm(options: CommOptions) -> None:
    from ringlm.frontend.comm import bench_comm as bench_comm_command

    bench_comm_command(options)


@app.command(
    help="Show which rank would hold what of a model, in heads, columns and bytes, and whether it fits.\n\n"
    "Only the headers of the files are read. What does not fit is refused here and when a ring starts, in the "
    "same words.",
    epilog="Example: ringlm plan -m model.gguf --quant int4 --world-size 2 --split 2,1 --memory 16G,8G",
)
@command_options
def plan(options: PlanOptions) -> None:
    from ringlm.frontend.plan import plan as plan_command

    plan_command(options)


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
        console.fail(error.kind, str(error))
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
