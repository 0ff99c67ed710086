"""What `ringlm serve` is told on the command line. Knows no server."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

_server: Any = partial(typer.Option, rich_help_panel="Server")


@dataclass(frozen=True)
class ServeOptions:
    """How to serve; the options as they are named there."""

    host: Annotated[str, _server(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1"
    port: Annotated[int, _server(metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8000
    api_key: Annotated[
        list[str] | None, _server(metavar="KEY", envvar="RINGLM_API_KEY", help="Who asks must have it, or another.")
    ] = None
    api_key_file: Annotated[Path | None, _server(metavar="FILE", help="Such keys, one a line; # begins a comment.")] = (
        None
    )
    served_model_name: Annotated[
        list[str] | None, _server(metavar="NAME", help="The model's id; given again, others for it.")
    ] = None
    allow_origin: Annotated[list[str] | None, _server(metavar="URL", help="A web page that may ask, or *.")] = None
    max_body: Annotated[int, _server(metavar="MB", min=1, help="The largest request.")] = 4
    drain_timeout: Annotated[int, _server(metavar="S", min=0, help="How long answers under way have at the end.")] = 30
    chat_template: Annotated[Path | None, _server(metavar="FILE", help="A Jinja template in place of the model's.")] = (
        None
    )
    tool_format: Annotated[
        str | None,
        _server(
            metavar="NAME|FILE.toml",
            help="How the model calls tools, in place of what its template says: hermes, glm, … (docs/tools.md).",
        ),
    ] = None
    world_size: Annotated[
        int | None, _server(metavar="N", min=1, help="Wait until N-1 others have come by 'ringlm join'.")
    ] = None
    log_json: Annotated[bool, _server("--log-json", metavar="", help="Log in JSON.")] = False
    log_level: Annotated[str, _server(metavar="debug|info|warning|error", help="What to log.")] = "info"
