"""What `ringlm serve` is told on the command line. Knows no server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

_SERVER: Any = {"rich_help_panel": "Server"}


@dataclass(frozen=True)
class ServeOptions:
    """How to serve; the options as they are named there."""

    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.", **_SERVER)] = "127.0.0.1"
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.", **_SERVER)] = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", envvar="RINGLM_API_KEY", help="Who asks must have it, or another.", **_SERVER),
    ] = None
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Such keys, one a line; # begins a comment.", **_SERVER)
    ] = None
    served_model_name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="The model's id; given again, others for it.", **_SERVER)
    ] = None
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A web page that may ask, or *.", **_SERVER)
    ] = None
    max_body: Annotated[int, typer.Option(metavar="MB", min=1, help="The largest request.", **_SERVER)] = 4
    drain_timeout: Annotated[
        int, typer.Option(metavar="S", min=0, help="How long answers under way have at the end.", **_SERVER)
    ] = 30
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A Jinja template in place of the model's.", **_SERVER)
    ] = None
    tool_format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help="How the model calls tools, in place of what its template says: hermes, glm, … (docs/tools.md).",
            **_SERVER,
        ),
    ] = None
    world_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Wait until N-1 others have come by 'ringlm join'.", **_SERVER),
    ] = None
    log_json: Annotated[bool, typer.Option("--log-json", metavar="", help="Log in JSON.", **_SERVER)] = False
    log_level: Annotated[str, typer.Option(metavar="debug|info|warning|error", help="What to log.", **_SERVER)] = "info"
