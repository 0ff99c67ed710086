"""An adapter as a user gives it: on the command line and in Python, and to ranks that do not have the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ringlm import LLM, SamplingParams
from ringlm.cluster.local import free_ports
from tests.models.reference import Greedy, expected
from tests.tiny import save_speaking_llama
from tests.weights.write_adapter import merge, save_adapter

PROMPT = [5, 90, 17, 33]
COUNT = 16


class Files(NamedTuple):
    """The folders, and what the merged model says."""

    model: Path
    adapter: Path
    answer: Greedy


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("adapter")
    model = save_speaking_llama(root / "model")
    adapter = save_adapter(root / "style", model)
    (answer,) = expected(merge(root / "merged", model, adapter, 1.5), [PROMPT], COUNT)
    return Files(model, adapter, answer)


def ringlm(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "ringlm", *arguments]
    return subprocess.Popen(command, env=os.environ | environment, text=True, **pipes)


def ask(model: Path, adapter: Path | None) -> list[str]:
    prompt = " ".join(f"w{token}" for token in PROMPT)
    asked = ["run", "-m", str(model), "--dtype", "float32", "--prompt", prompt, "--json", "--temperature", "0"]
    return [*asked, "--max-tokens", str(COUNT), *([] if adapter is None else ["--adapter", str(adapter)])]


def test_launched_ranks_say_what_the_merged_model_says(files: Files) -> None:
    process = ringlm("launch", "-n", "2", "--", *ask(files.model, files.adapter))
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert (answer["world_size"], answer["prompt_tokens"]) == (2, len(PROMPT))
    assert answer["token_ids"] == files.answer.tokens


def test_in_python(files: Files) -> None:
    with LLM(str(files.model), tensor_parallel=2, dtype="float32", adapter=files.adapter) as llm:
        (out,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=COUNT))
    assert list(out.token_ids) == files.answer.tokens


@pytest.mark.parametrize("other", ["of the same name", "none"])
def test_ranks_that_do_not_have_the_same_are_refused(files: Files, other: str, tmp_path: Path) -> None:
    theirs = save_adapter(tmp_path / "style", files.model, seed=1) if other != "none" else None
    left, right = map(str, free_ports(2))
    world = {"RING_WORLD_SIZE": "2"}
    daemon = ringlm(*ask(files.model, theirs), RING_RANK="1", RING_PORT=right, RING_RIGHT=left, **world)
    first = ringlm(*ask(files.model, files.adapter), RING_RANK="0", RING_PORT=left, RING_RIGHT=right, **world)
    try:
        for process in (first, daemon):
            out, err = process.communicate(timeout=90)
            assert (process.returncode, out) == (1, "")
            assert "model with the adapter style" in err
            assert "adapter's weights differ" in err
            assert err.splitlines()[-1].count("with the adapter style") == (1 if theirs is None else 2)
    finally:
        for process in (first, daemon):
            process.kill()


def test_one_that_does_not_fit_is_refused_in_one_line(files: Files, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "style", files.model, use_dora=True)
    process = ringlm(*ask(files.model, adapter))
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("ringlm: ModelError: adapter_config.json: use_dora True is not supported.")
    assert err.count("\n") == 1
