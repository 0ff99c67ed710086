"""GGUF models that lie in several files, NAME-00001-of-00003.gguf and so on: which belong together. Opens none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ringlm.errors import ModelError

PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def parts_of(path: Path) -> list[Path]:
    """All files of the model of which `path` is one, in order. Raises ModelError that names one that is missing."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    name, number, count = match[1], int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise ModelError(f"{path.name}: part {number} of {count} cannot be; its name is not what it was.")
    parts = [path.with_name(f"{name}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise ModelError(f"{part.name}: is missing beside {path.name}; the model is in {count} parts.")
    return parts


def models_in(folder: Path) -> list[Path]:
    """The GGUF models in `folder`; one in several files by the first that is there."""
    firsts: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gguf")):
        firsts.setdefault(gguf_name(path), path)
    return list(firsts.values())


def gguf_name(path: Path) -> str:
    """The file's name without its end, and without the number of a part."""
    match = PART.fullmatch(path.name)
    return path.stem if match is None else match[1]
