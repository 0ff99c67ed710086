"""The commands about several machines; a part of `cli.py`. Knows no model."""

from __future__ import annotations

from typing import Annotated

import typer

from ringlm.frontend.command_options import DoctorOptions, JoinOptions, StatusOptions, TopOptions
from ringlm.frontend.options import command_options

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
@command_options
def join(options: JoinOptions) -> None:
    from ringlm.frontend.join import join as join_command

    join_command(options)


@app.command(
    help="Watch the ring of a server that runs: speed, where a step's time goes, ranks and links, every second.\n\n"
    "Ctrl-C ends it. In a pipe it shows the ring once.",
    epilog="Example: ringlm top http://192.168.1.11:8000",
)
@command_options
def top(options: TopOptions) -> None:
    from ringlm.frontend.top import top as top_command

    top_command(options)


@app.command(
    help="Show the ring of a server that runs: ranks, devices, memory, links and speed.\n\n"
    "The exit status is 0 while every rank is well, and 1 when one is not or no server answers.",
    epilog="Example: ringlm status http://192.168.1.11:8000",
)
@command_options
def status(options: StatusOptions) -> None:
    from ringlm.frontend.status import status as status_command

    status_command(options)


@app.command(
    help="Examine machines and the links between them: versions, devices, ports, speed, and what a model could do "
    "there at best.\n\n"
    "Alone it examines this machine. 'ringlm doctor -n N' waits for N-1 others, on each of which 'ringlm doctor HOST' "
    "is typed, as with serve and join and with the same secret; --nodes or --config with --node-rank, on every one, do "
    "the same. It stops at the first thing that must be mended.",
    epilog="Example: ringlm doctor -n 2 -m model.gguf --quant int4",
)
@command_options
def doctor(options: DoctorOptions) -> None:
    from ringlm.frontend.doctor import doctor as doctor_command

    doctor_command(options)
