"""The settings that all ranks share. Rank 0 decides them (agreement.py); no torch here."""

from __future__ import annotations

import msgspec

from ringlm.errors import ConfigError

BACKENDS = ("ring", "gloo", "nccl")
DTYPES = ("float32", "bfloat16", "float16")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Shared settings. None, or 'auto' for the dtype: not given, rank 0 decides."""

    format: str | None = None
    backend: str = "ring"
    dtype: str = "auto"
    quant: str = "none"
    split: tuple[float, ...] | None = None
    context: int | None = None
    max_seqs: int | None = None
    blocks: int | None = None  # of the cache; always rank 0's decision

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"--backend {self.backend} is not known; choose {', '.join(BACKENDS)}.")
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(f"--dtype {self.dtype} is not known; choose auto, {', '.join(DTYPES)}.")
        if self.quant not in ("none", "int8", "int4"):
            raise ConfigError(f"--quant {self.quant} is not known; choose none, int8 or int4.")
        if self.context is not None and self.context < 1:
            raise ConfigError(f"--context is {self.context}; it must be 1 or more.")
        if self.max_seqs is not None and self.max_seqs < 1:
            raise ConfigError(f"--max-seqs is {self.max_seqs}; it must be 1 or more.")
        if self.split is not None and (any(weight < 0 for weight in self.split) or not any(self.split)):
            raise ConfigError("--split takes one weight a rank, 0 or more and not all 0, such as --split 2,1.")
