"""The command line's shared options, and what they say together: a model and an engine's specification.

Knows flags, the environment and files, in that order of precedence.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ringlm.cluster.spec import EngineSpec
from ringlm.errors import ConfigError
from ringlm.frontend.model import Model, resolve
from ringlm.frontend.secret import secret_to_lead
from ringlm.frontend.settings import engine_spec, lone_ring, ring_from_env
from ringlm.ring.config import DEFAULT_PORT, Node, RingConfig, load_cluster_file, parse_nodes, read_secret

_AS_GIVEN = ("backend", "dtype", "quant", "context", "max_seqs", "threads", "adapter")  # to the engine
_engine: Any = functools.partial(typer.Option, rich_help_panel="Engine")
_ring: Any = functools.partial(typer.Option, rich_help_panel="Ring")


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The options that every command with a model takes; `command_options` puts them into a command's signature."""

    format: Annotated[
        str | None, typer.Argument(metavar="plain|gguf", help="What the model is; detected when left out.")
    ] = None
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", metavar="MODEL", help="A Hugging Face folder, a GGUF file, a hub id, or demo."),
    ] = None
    backend: Annotated[str, _engine(metavar="ring|gloo|nccl", help="What moves the tensors.")] = "ring"
    device: Annotated[str | None, _engine(metavar="auto|cpu|cuda|mps", help="Where this rank computes.")] = None
    dtype: Annotated[
        str, _engine(metavar="auto|float32|bfloat16|float16", help="What to compute in; auto suits all ranks.")
    ] = "auto"
    quant: Annotated[str, _engine(metavar="none|int8|int4", help="Pack the weights: less memory, faster.")] = "none"
    adapter: Annotated[Path | None, _engine(metavar="FOLDER", help="A LoRA adapter that PEFT has saved.")] = None
    context: Annotated[int | None, _engine(metavar="N", help="Tokens of prompt and answer together.")] = None
    max_seqs: Annotated[int | None, _engine(metavar="N", help="Requests at the same time.")] = None
    threads: Annotated[int | None, _engine(metavar="N", help="CPU threads of this rank.")] = None
    split: Annotated[str | None, _ring(metavar="W,W,…", help="The share of each rank, such as 2,1.")] = None
    interface: Annotated[str | None, _ring(metavar="NAME", help="The network interface or address to listen on.")] = (
        None
    )
    nodes: Annotated[str | None, _ring(metavar="HOST:PORT,…", help="All ranks in order, with --node-rank.")] = None
    node_rank: Annotated[int | None, _ring(metavar="R", help="Which of the nodes this is.")] = None
    config: Annotated[Path | None, _ring(metavar="FILE", help="A cluster file, with one node table a rank.")] = None
    secret_file: Annotated[Path | None, _ring("--secret-file", metavar="FILE", help="Holds what all ranks share.")] = (
        None
    )
    seal: Annotated[
        str | None, _ring(metavar="on|auth|off", help="Encrypt links, or only authenticate what they carry.")
    ] = None
    rejoin_timeout: Annotated[
        float | None,
        _ring(
            metavar="S",
            min=0,
            help="How long rank 0 waits for a lost rank, and requests with it; 0: they end. serve: 30, else 0.",
        ),
    ] = None

    def resolve(self, awaits: int | None = None, rejoin_timeout_s: float = 0.0) -> tuple[Model, EngineSpec]:
        """The model's files and the specification of this rank: of rank 0, at whose port others join, where there are
        to be `awaits` ranks and no ring is described. Raises ConfigError and ModelError."""
        if self.format not in (None, "plain", "gguf"):
            raise ConfigError(f"'{self.format}' is neither plain nor gguf; a model is given with -m MODEL.")
        nodes = self._nodes()
        ring = self._ring(nodes)
        if awaits is not None and ring is not None and ring.world_size != awaits:
            raise ConfigError(
                f"--world-size is {awaits}, but the ring that is described has {ring.world_size} ranks; leave one out."
            )
        if ring is not None or awaits == 1:
            awaits = None
        node = nodes[ring.rank] if nodes and ring is not None else None
        name = self.model or (node.model if node else None)
        if not name:
            raise ConfigError("no model; give one with -m: a folder, a GGUF file, a hub id, or demo.")
        split = split_weights(self.split) if self.split is not None else _node_weights(nodes)
        model = resolve(name, self.format)
        if awaits:
            ring = lone_ring(secret_to_lead(self.secret_file), self.interface, self.seal, DEFAULT_PORT)
        spec = engine_spec(
            model,
            ring=ring,
            awaits=awaits,
            rejoin_timeout_s=rejoin_timeout_s if self.rejoin_timeout is None else self.rejoin_timeout,
            asked=name,
            device=self.device or (node.device if node else None) or "auto",
            split=split,
            **{name: getattr(self, name) for name in _AS_GIVEN},
        )
        return model, spec

    def _nodes(self) -> tuple[Node, ...]:
        if self.nodes is not None and self.config is not None:
            raise ConfigError("--nodes and --config both say who is in the ring; give one of them.")
        if self.nodes is not None:
            return parse_nodes(self.nodes)
        return load_cluster_file(self.config) if self.config is not None else ()

    def _ring(self, nodes: tuple[Node, ...]) -> RingConfig | None:
        """The ring of --nodes, else of the environment, else of --config's file; None without any."""
        given = {"interface": self.interface, "seal": self.seal}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.secret_file is not None:
            changes["secret"] = read_secret(os.environ, self.secret_file)
        if self.nodes is None and RingConfig.present(os.environ):
            if nodes and nodes[0].seal and not os.environ.get("RING_SEAL"):
                changes.setdefault("seal", nodes[0].seal)
            ring = RingConfig.from_env(os.environ, **changes)
            if nodes and len(nodes) != ring.world_size:
                raise ConfigError(
                    f"the environment describes a ring of {ring.world_size}, but {self.config} one of {len(nodes)}; "
                    "unset RING_* (or a launcher's variables), or mend the file."
                )
            if self.node_rank not in (None, ring.rank):
                raise ConfigError(
                    f"--node-rank is {self.node_rank}, but the environment says rank {ring.rank}; leave one out."
                )
            return ring
        if not nodes:
            if self.node_rank is not None:
                raise ConfigError("--node-rank needs --nodes or --config, which say where the ranks are.")
            return ring_from_env()
        if self.node_rank is None:
            raise ConfigError(f"which of the {len(nodes)} nodes is this? Give --node-rank 0 to {len(nodes) - 1}.")
        return RingConfig.from_nodes(nodes, self.node_rank, **changes)


def command_options(command: Callable[..., None]) -> Callable[..., None]:
    """A typer command whose parameters are dataclasses, with their fields as options of its own; of the first, an
    EngineOptions, format and model come first and the rest last."""
    groups = {each.name: each.annotation for each in inspect.signature(command, eval_str=True).parameters.values()}
    first, *others = [_fields(group) for group in groups.values()]
    shown = [*first[:2], *itertools.chain(*others), *first[2:]]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        command(
            **{
                name: group(**{field.name: values[field.name] for field in dataclasses.fields(group)})
                for name, group in groups.items()
            }
        )

    wrapper.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return wrapper


def _fields(options: Any) -> list[inspect.Parameter]:
    """A dataclass's fields as a command's parameters."""
    types = get_type_hints(options, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=types[field.name],
        )
        for field in dataclasses.fields(options)
    ]


def split_weights(text: str) -> tuple[float, ...]:
    """The weights that --split gives."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--split {text} is not a list of numbers, one a rank, such as 2,1.") from None


def _node_weights(nodes: tuple[Node, ...]) -> tuple[float, ...] | None:
    """A cluster file's weights; a node without one weighs 1."""
    if all(node.weight is None for node in nodes):
        return None
    return tuple(1.0 if node.weight is None else node.weight for node in nodes)
