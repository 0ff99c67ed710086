"""The commands about several machines; a part of `cli.py`. Knows no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


_Url = Annotated[str, typer.Argument(metavar="[URL]", help="Where it listens.")]
_ApiKey = Annotated[str | None, typer.Option(metavar="KEY", envvar="RINGLM_API_KEY", help="What the server asks for.")]


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    help="Start all ranks of a ring from one terminal, on this machine or on others.\n\n"
    "With --hosts rank i runs on the i-th, over the system's ssh, which must need no password; this machine, by a name "
    "or address of its own, needs none. ringlm must be there, at the same path or where --python says, and the model, "
    "too. Rank 0 has the terminal; the others' messages go to stderr, each behind its rank. Ctrl-C ends all.",
    epilog='Example: ringlm launch -n 2 -- run -m demo --prompt "Why is the sky blue?"\n\n'
    "Example: ringlm launch --hosts mac-a.local,me@box.local --restarts 5 -- serve -m MODEL",
)
def launch(
    subcommand: Annotated[list[str], typer.Argument(metavar="-- SUBCOMMAND …", help="What every rank runs.")],
    world_size: Annotated[
        int | None, typer.Option("-n", "--world-size", metavar="N", help="How many ranks; as many as there are hosts.")
    ] = None,
    hosts: Annotated[
        str | None, typer.Option(metavar="[USER@]HOST,…", help="Where the ranks run; else all on this machine.")
    ] = None,
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="The ring's on every host.")] = 7600,
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="A Python with ringlm on the hosts, if not as here.")
    ] = None,
    restarts: Annotated[int, typer.Option(metavar="N", help="How often a daemon that fails is started again.")] = 0,
) -> None:
    from ringlm.cluster.launch import LaunchOptions
    from ringlm.cluster.launch import launch as launch_ranks

    if world_size is None and hosts is None:
        raise typer.BadParameter("how many ranks, or on which machines? Give -n or --hosts.")
    raise typer.Exit(launch_ranks(subcommand, LaunchOptions(world_size, hosts, port, python, restarts)))


@app.command(
    help="Become a daemon of the ring whose rank 0 runs 'ringlm serve --world-size N'.\n\n"
    "It stays until Ctrl-C, also where rank 0 ends and starts again. Who comes when the ring has all its ranks waits, "
    "and takes the place of one that is lost. Rank 0 tells its user the secret; it is read from --secret-file, "
    "RING_SECRET or RING_SECRET_FILE, or else asked for.",
    epilog="Example: ringlm join 192.168.1.11 -m MODEL --secret-file ring.secret",
)
def join(
    rank0: Annotated[str, typer.Argument(metavar="HOST[:PORT]", help="Rank 0, and its ring's port; 7600 if left out.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="MODEL", help="Where it is here, if not as on rank 0.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="Where this rank computes.")] = "auto",
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads of this rank.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A LoRA adapter that PEFT has saved.")] = None,
    interface: Annotated[
        str | None, typer.Option(metavar="NAME", help="The network interface or address to listen on.")
    ] = None,
    secret_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Holds what all ranks share.")] = None,
    seal: Annotated[
        str | None, typer.Option(metavar="on|auth|off", help="Encrypt links, or only authenticate what they carry.")
    ] = None,
) -> None:
    from ringlm.frontend.join import JoinOptions
    from ringlm.frontend.join import join as join_command

    join_command(JoinOptions(rank0, model, device, threads, adapter, interface, secret_file, seal))


@app.command(
    help="Watch the ring of a server that runs: speed, where a step's time goes, ranks and links, every second.\n\n"
    "Ctrl-C ends it. In a pipe it shows the ring once.",
    epilog="Example: ringlm top http://192.168.1.11:8000",
)
def top(
    url: _Url = "http://127.0.0.1:8000",
    api_key: _ApiKey = None,
    once: Annotated[bool, typer.Option("--once", metavar="", help="Show it once.")] = False,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print what /v1/ring says, and only that.")] = False,
) -> None:
    from ringlm.frontend.top import TopOptions
    from ringlm.frontend.top import top as top_command

    top_command(TopOptions(url, api_key, once, json))


@app.command(
    help="Show the ring of a server that runs: ranks, devices, memory, links and speed.\n\n"
    "The exit status is 0 while every rank is well, and 1 when one is not or no server answers.",
    epilog="Example: ringlm status http://192.168.1.11:8000",
)
def status(
    url: _Url = "http://127.0.0.1:8000",
    api_key: _ApiKey = None,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.")] = False,
) -> None:
    from ringlm.frontend.status import StatusOptions
    from ringlm.frontend.status import status as status_command

    status_command(StatusOptions(url, api_key, json))


@app.command(
    help="Examine machines and the links between them: versions, devices, ports, speed, and what a model could do "
    "there at best.\n\n"
    "Alone it examines this machine. 'ringlm doctor -n N' waits for N-1 others, on each of which 'ringlm doctor HOST' "
    "is typed, as with serve and join and with the same secret; --nodes or --config with --node-rank, on every one, do "
    "the same. It stops at the first thing that must be mended.",
    epilog="Example: ringlm doctor -n 2 -m model.gguf --quant int4",
)
def doctor(
    rank0: Annotated[
        str | None, typer.Argument(metavar="[HOST[:PORT]]", help="Where 'ringlm doctor -n N' waits for this machine.")
    ] = None,
    world_size: Annotated[
        int | None, typer.Option("-n", "--world-size", metavar="N", help="How many machines, this one included.")
    ] = None,
    nodes: Annotated[str | None, typer.Option(metavar="HOST:PORT,…", help="All, in order, with --node-rank.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A cluster file, with --node-rank.")] = None,
    node_rank: Annotated[int | None, typer.Option(metavar="R", help="Which of the nodes this is.")] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="MODEL", help="Tell what it would do here; on rank 0's.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(metavar="plain|gguf", help="What the model is; detected when left out.")
    ] = None,
    quant: Annotated[str, typer.Option(metavar="none|int8|int4", help="How its weights are packed.")] = "none",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="What to compute in; auto suits all ranks.")
    ] = "auto",
    split: Annotated[str | None, typer.Option(metavar="W,W,…", help="The share of each rank, such as 2,1.")] = None,
    context: Annotated[int | None, typer.Option(metavar="N", help="Tokens of prompt and answer together.")] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="Where this machine computes.")] = "auto",
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads of this machine.")] = None,
    interface: Annotated[
        str | None, typer.Option(metavar="NAME", help="The network interface or address to listen on.")
    ] = None,
    secret_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Holds what all ranks share.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.")] = False,
) -> None:
    from ringlm.frontend.doctor import DoctorOptions
    from ringlm.frontend.doctor import doctor as doctor_command

    doctor_command(
        DoctorOptions(
            rank0,
            world_size,
            nodes,
            config,
            node_rank,
            format,
            model,
            quant,
            dtype,
            split,
            context,
            device,
            threads,
            interface,
            secret_file,
            json,
        )
    )
