"""The commands about several machines; a part of `cli.py`. Knows no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


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
    url: Annotated[str, typer.Argument(metavar="[URL]", help="Where it listens.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="RINGLM_API_KEY", help="What the server asks for.")
    ] = None,
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
    url: Annotated[str, typer.Argument(metavar="[URL]", help="Where it listens.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="RINGLM_API_KEY", help="What the server asks for.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object, and only that.")] = False,
) -> None:
    from ringlm.frontend.status import StatusOptions
    from ringlm.frontend.status import status as status_command

    status_command(StatusOptions(url, api_key, json))
