"""The house rules that a machine can hold: which room imports which, what is exported, what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ringlm

SOURCE = Path(ringlm.__file__).parent
BELOW = {
    "frontend": {"cluster", "engine", "models", "weights", "parallel", "ring"},
    "cluster": {"engine", "models", "weights", "parallel", "ring"},
    "engine": {"models", "weights", "parallel"},
    "models": {"weights", "parallel"},
    "weights": set(),
    "parallel": set(),
    "torch": {"ring"},
    "ring": set(),
}
ANYWHERE = {"errors", "logs", "paths"}


def imports(path: Path) -> set[str]:
    """The rooms and modules of ringlm that a file imports, at any depth of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "ringlm" else str(node.module) for alias in node.names
            ]
        found |= {name.split(".")[1] for name in names if name.startswith("ringlm.")}
    return found


@pytest.mark.parametrize("room", BELOW)
def test_imports_point_one_way(room: str) -> None:
    allowed = BELOW[room] | ANYWHERE | {room}
    for path in (SOURCE / room).rglob("*.py"):
        extra = imports(path) - allowed - ({"__version__"} if room == "frontend" else set())
        assert not extra, f"{path.relative_to(SOURCE)} imports {sorted(extra)}"


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that are loaded after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_ringlm_loads_nothing_heavy() -> None:
    assert not loaded_by("import ringlm; ringlm.RingConfig; ringlm.SamplingParams") & {"torch", "numpy", "transformers"}


@pytest.mark.parametrize("module", ["cli", "api", "comm", "join", "plan", "session", "status", "tokenizer", "top"])
def test_the_frontend_is_free_of_torch(module: str) -> None:
    assert "torch" not in loaded_by(f"import ringlm.frontend.{module}")


def test_an_engine_process_is_free_of_transformers() -> None:
    assert not loaded_by("import ringlm.cluster.worker") & {"transformers", "tokenizers", "typer"}


def test_the_exported_names() -> None:
    assert set(ringlm.__all__) >= {"LLM", "SamplingParams", "RingConfig", "StopReason"}
    for name in ringlm.__all__:
        assert getattr(ringlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ringlm.Nothing


def test_nothing_off_the_wire_is_run() -> None:
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not calls & {"eval", "exec"}, path
        assert not modules & {"pickle", "marshal", "shelve"}, path
