"""Log lines on stderr: `ringlm: what happened key=value` for people, one JSON object a line for machines.

Modules log by the standard library, with what belongs to a line as `extra`; `structlog.contextvars` adds what belongs
to all lines of a request, such as `request_id`. A process sets it up once; its children learn the same by RINGLM_LOG
(the level) and RINGLM_LOG_JSON. Knows no module that logs.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING

from ringlm.errors import ConfigError

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor

LEVELS = ("debug", "info", "warning", "error")
VARIABLES = _LEVEL, _JSON = "RINGLM_LOG", "RINGLM_LOG_JSON"
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # would command a terminal, or make two lines of one


def configure(json: bool, level: str, rank: int | None = None) -> None:
    """Send this process's log to stderr, ringlm's from `level` on and other modules' warnings; children do likewise.

    `rank` is whose lines these are, where that is known.
    Raises ConfigError for a level that is none of LEVELS.
    """
    if level.lower() not in LEVELS:
        raise ConfigError(f"log level {level!r} is not known; --log-level and {_LEVEL} take {', '.join(LEVELS)}.")
    os.environ |= {_LEVEL: level.lower(), _JSON: "1" if json else ""}
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter(json, rank))
    logging.getLogger().handlers = [handler]
    logging.getLogger("ringlm").setLevel(level.upper())


def inherit(rank: int | None = None) -> None:
    """`configure` by the environment."""
    configure(as_json(), os.environ.get(_LEVEL) or "warning", rank)


def as_json() -> bool:
    """Whether all that goes to stderr is to be JSON."""
    return bool(os.environ.get(_JSON))


def _formatter(json: bool, rank: int | None) -> logging.Formatter:
    import structlog

    def with_rank(_: object, __: str, fields: EventDict) -> EventDict:
        return fields if rank is None else {"rank": rank, **fields}

    of_record: list[Processor] = [structlog.contextvars.merge_contextvars, structlog.stdlib.ExtraAdder()]
    if json:
        of_record += [
            with_rank,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", key="time"),
        ]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*of_record, structlog.processors.format_exc_info],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer() if json else _line,
        ],
    )


def _line(_: object, __: str, fields: EventDict) -> str:
    """What people read; a traceback follows on lines of its own."""
    event, trace = fields.pop("event"), fields.pop("exception", None)
    words = [f"ringlm: {event}", *(f"{name}={value}" for name, value in fields.items())]
    line = _CONTROLS.sub(" ", " ".join(words))
    return line if trace is None else f"{line}\n{trace}"
