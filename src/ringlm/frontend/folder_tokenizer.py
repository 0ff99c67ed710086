"""The tokenizer in a Hugging Face folder, by transformers; nothing in the folder is executed. Loads no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringlm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read(folder: Path) -> PreTrainedTokenizerFast | None:
    """None for a folder that has none. Raises ModelError for one that cannot be read."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    with _quiet_transformers() as transformers:
        try:
            if (folder / "tokenizer.json").is_file():
                fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            else:
                fast = _converted(folder, transformers)
        except ModelError:
            raise
        except Exception as error:  # the Rust library raises bare Exception
            raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error
    older = folder / "chat_template.json"  # which transformers reads for processors only
    if not fast.chat_template and older.is_file():
        fast.chat_template = _setting(older, "chat_template")
    return fast


def _converted(folder: Path, transformers: Any) -> PreTrainedTokenizerFast:
    """SentencePiece's tokenizer.model, by the packages that read it."""
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if missing:
        raise ModelError(
            f"{folder} has tokenizer.model but no tokenizer.json, and it takes the packages sentencepiece and protobuf "
            "to read that: pip install sentencepiece protobuf"
        )
    # AutoTokenizer would load torch. Only a class of transformers' own is taken, whatever the folder names.
    name = _setting(folder / "tokenizer_config.json", "tokenizer_class").removesuffix("Fast")
    kind: Any = getattr(transformers, name, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerFast)
    if not known:
        raise ModelError(
            f"{folder}: tokenizer_config.json names no tokenizer_class of transformers to read tokenizer.model by; "
            "save the tokenizer with transformers, which writes tokenizer.json."
        )
    return kind.from_pretrained(folder, local_files_only=True)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def _setting(path: Path, key: str) -> str:
    """The text `key` of a JSON file; ModelError where there is none."""
    try:
        return str(json.loads(path.read_bytes())[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: holds no {key}: {error}.") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """transformers, without its advice on stderr."""
    import transformers

    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield transformers
    finally:
        logging.set_verbosity(before)
