"""Log lines: what people and machines get, and what children inherit."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from ringlm import logs
from ringlm.errors import ConfigError
from ringlm.frontend.cli import main

log = logging.getLogger("ringlm.tests")


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RINGLM_LOG", "RINGLM_LOG_JSON"):
        monkeypatch.setenv(name, "")
    handlers, level = logging.getLogger().handlers, logging.getLogger("ringlm").level
    yield
    logging.getLogger().handlers = handlers
    logging.getLogger("ringlm").setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_people_get_one_line_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(False, "info", rank=1)
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        log.info("request", extra={"status": 200})
    log.warning("after it, a name from outside: %s", "a\nringlm: \x1b[31mb")
    log.debug("too fine")
    assert capsys.readouterr().err == (
        "ringlm: request request_id=r-1 status=200\nringlm: after it, a name from outside: a ringlm:  [31mb\n"
    )


def test_machines_get_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(True, "info", rank=1)
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        log.info("request", extra={"status": 200, "path": "/v1\n"})
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed")
    request, failed = lines(capsys)
    assert request.pop("time").endswith("Z")
    assert request == {
        "event": "request", "level": "info", "logger": "ringlm.tests", "rank": 1,
        "request_id": "r-1", "status": 200, "path": "/v1\n",
    }  # fmt: skip
    assert failed["level"] == "error"
    assert failed["exception"].endswith("ValueError: two\nlines")
    assert "request_id" not in failed


def test_other_modules_are_heard_from_warnings_on(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(True, "debug")
    logging.getLogger("uvicorn").info("chatter")
    logging.getLogger("uvicorn").warning("%d trouble", 1)
    log.debug("ours")
    assert [(line["logger"], line["event"]) for line in lines(capsys)] == [
        ("uvicorn", "1 trouble"), ("ringlm.tests", "ours")
    ]  # fmt: skip


def test_children_log_likewise() -> None:
    logs.configure(True, "info")
    code = "import logging; from ringlm import logs; logs.inherit(3); logging.getLogger('ringlm').info('here')"
    err = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert {"event": "here", "rank": 3, "level": "info"}.items() <= json.loads(err).items()


@pytest.mark.parametrize("level", ["loud", ""])
def test_an_unknown_level_is_refused(level: str) -> None:
    with pytest.raises(ConfigError, match="take debug, info, warning, error"):
        logs.configure(False, level)


def test_a_commands_error_is_an_object_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGLM_LOG_JSON", "1")
    assert main(["plan", "-m", "/nowhere/at-all"]) == 2
    (line,) = lines(capsys)
    assert line["level"] == "error"
    assert line["event"].startswith(("ConfigError: ", "ModelError: "))
