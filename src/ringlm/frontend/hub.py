"""A hub id to files in Hugging Face's cache, downloaded where they are missing: one form of the weights, and only it.

    owner/name              safetensors, or the repository's only GGUF file
    owner/name:Q4_K_M       the GGUF file of that quantization
    owner/name:a/b.gguf     this one
    owner/name@revision     a branch, tag or commit; before the colon

Files are fetched one after another by the thread that calls, so that Ctrl-C ends the download at once; the next call
goes on from there. Knows names and files, reads no weights.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from ringlm.errors import ModelError
from ringlm.weights.gguf_parts import PART

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::([\w./ +-]+))?")
_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_BESIDE = ("*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt")  # of the repository's top folder
_INDEXES = "*.index.json"
_PROJECTOR = "mmproj*"  # for pictures, beside a GGUF file


@dataclasses.dataclass(frozen=True)
class HubId:
    """What a user may write; `choice` is the name or the quantization of a GGUF file."""

    repository: str
    revision: str | None
    choice: str | None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """None for what can be no hub id."""
        match = _ID.fullmatch(text)
        return cls(*match.groups()) if match is not None else None


def fetch(model: HubId) -> Path:
    """The folder, or the GGUF file (of several parts the first), in Hugging Face's cache. Raises ModelError."""
    from huggingface_hub import constants

    folder = _cached(model)
    if folder is not None and (found := _whole(folder, model)) is not None:
        return found
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{model.repository}: no such file or folder here, nor all of it in {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE forbids to download it. Unset that, or give a folder or a GGUF file."
        )
    try:
        return _download(model)
    except ModelError:
        raise
    except Exception as error:  # of the many kinds of the network, the system and the library
        raise ModelError(f"{model.repository}: {_explained(model, error)}") from error


def _download(model: HubId) -> Path:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what fails in the end is said in one line
    if not sys.stderr.isatty():
        disable_progress_bars()
    # Listing the repository's tree would try again for half a minute where there is no network.
    timeout_s = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(model.repository, revision=model.revision, timeout=timeout_s)
    files = [file.rfilename for file in info.siblings or ()]
    if model.choice is not None or not ({_SINGLE, _INDEX} & set(files) and _CONFIG in files):
        return _get(model, _gguf(model, files), model.revision)[0]
    beside = [name for name in files if _is_one_of(name, _BESIDE) and not fnmatch(name, _INDEXES)]
    config = _get(model, [_CONFIG, *beside], model.revision)[0]
    commit = config.parent.name
    weights = _indexed(_get(model, [_INDEX], commit)[0]) if _INDEX in files else [_SINGLE]
    _get(model, weights, commit)
    return config.parent


def _get(model: HubId, files: Iterable[str], revision: str | None) -> list[Path]:
    """These files, all of one commit; only those that the cache lacks are fetched."""
    from huggingface_hub import hf_hub_download

    paths: list[Path] = []
    for name in files:
        path = Path(hf_hub_download(model.repository, name, revision=revision))
        revision = path.parents[name.count("/")].name  # what a branch means may change meanwhile
        paths.append(path)
    return paths


def _cached(model: HubId) -> Path | None:
    """The folder of the revision in the cache, whatever it holds of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(model.repository, revision=model.revision, allow_patterns=[], local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _whole(folder: Path, model: HubId) -> Path | None:
    """What a download would give, if all of it is here; one may have been cut off."""
    if model.choice is None and (folder / _CONFIG).is_file():
        try:
            weights = _indexed(folder / _INDEX) if (folder / _INDEX).is_file() else [_SINGLE]
        except ModelError:
            return None
        if all((folder / name).is_file() for name in weights):
            return folder
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    try:
        first, *others = _gguf(model, files)
    except ModelError:
        return None
    part = PART.fullmatch(first)
    return folder / first if part is None or len(others) + 1 == int(part[3]) else None


def _gguf(model: HubId, files: Iterable[str]) -> list[str]:
    """The GGUF file that is meant, or its parts in order. Raises ModelError unless it is just one."""
    whole: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(files):
        if name.endswith(".gguf") and not fnmatch(name.rpartition("/")[2], _PROJECTOR):
            whole[PART.sub(r"\1.gguf", name)].append(name)
    named = [name for name, parts in whole.items() if model.choice in (None, name, *parts)]
    if model.choice is not None and not named:
        word = re.compile(rf"(?<![a-z0-9_]){re.escape(model.choice)}(?![a-z0-9_])", re.IGNORECASE)
        named = [name for name in whole if word.search(name)]
    if len(named) == 1:
        return whole[named[0]]
    if not whole:
        raise ModelError(f"{model.repository}: the Hugging Face hub has neither {_SINGLE} of it nor a GGUF file.")
    what = f"{len(named)} of its GGUF files could be meant" if named else f"it has no GGUF file {model.choice!r}"
    offered = ", ".join(f"{model.repository}:{name}" for name in named or whole)
    raise ModelError(f"{model.repository}: {what}; say which: {offered}.")


def _indexed(index: Path) -> list[str]:
    """The files that an index of tensors names."""
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: is not an index of tensors ({error}). Delete it and start again.") from error


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)


def _explained(model: HubId, error: Exception) -> str:
    """What kept the hub from giving a model, and what to do."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{model.repository}"
    if isinstance(error, errors.GatedRepoError):
        return f"its owners want their terms accepted first, on {page}; then log in: 'hf auth login', or HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such file or folder here, and no such public model on the Hugging Face hub; check the name, or log in "
            "with 'hf auth login' if it is private."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hugging Face hub has no revision {model.revision!r} of it; look at {page}/tree/main."
    reason = next(iter(str(error).splitlines()), "").rstrip(".") or type(error).__name__
    return (
        f"no such file or folder here, and the Hugging Face hub did not give it ({reason}); check the network and try "
        "again, which goes on from where this ended, or give a folder or a GGUF file."
    )
