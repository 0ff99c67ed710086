"""What each rank would hold, in bytes, from the files' headers and the shard plan: torch-free, no weight is read.

Knows layers by their names, which tell how they are divided, and no family. A test holds it against loaded models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from ringlm.models.config import ModelConfig, read_config
from ringlm.parallel.shard import UNIT, Range, RankShard, ShardPlan
from ringlm.weights.files import ModelFiles
from ringlm.weights.source import Form

# Old checkpoints hold rotary frequencies, which are computed; some tied ones repeat the head.
IGNORED: Final = (".rotary_emb.inv_freq", "lm_head.weight")
BLOCK: Final = 64  # positions of a block of the cache
_DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


class _Cut(NamedTuple):
    """A layer is divided in proportion to these ranges of a shard: by rows (what comes out; the bias, too), or by
    columns (what goes in; the bias is whole)."""

    by_rows: bool
    ranges: Callable[[RankShard], tuple[Range, ...]]


def _rows(*fields: str) -> _Cut:
    return _Cut(True, lambda shard: tuple(getattr(shard, field) for field in fields))


def _columns(field: str) -> _Cut:
    return _Cut(False, lambda shard: (getattr(shard, field),))


_CUTS: Final[Mapping[str, _Cut]] = {  # by the last two words of a layer's name; the others are whole on every rank
    "model.embed_tokens": _rows("vocabulary"),
    "lm_head": _rows("vocabulary"),
    "self_attn.q_proj": _rows("query_heads"),
    "self_attn.k_proj": _rows("kv_heads"),
    "self_attn.v_proj": _rows("kv_heads"),
    "self_attn.qkv_proj": _rows("query_heads", "kv_heads", "kv_heads"),
    "self_attn.q_norm": _rows("query_heads"),
    "self_attn.k_norm": _rows("kv_heads"),
    "self_attn.o_proj": _columns("query_heads"),
    "self_attn.dense": _columns("query_heads"),
    "mlp.gate_proj": _rows("columns"),
    "mlp.up_proj": _rows("columns"),
    "mlp.gate_up_proj": _rows("columns", "columns"),
    "mlp.down_proj": _columns("columns"),
    "mlp.c_fc": _rows("columns"),
    "mlp.c_proj": _columns("columns"),
    "mlp.fc1": _rows("columns"),
    "mlp.fc2": _columns("columns"),
    "experts.gate_proj": _rows("expert_columns"),
    "experts.up_proj": _rows("expert_columns"),
    "experts.down_proj": _columns("expert_columns"),
    "experts.w1": _rows("expert_columns"),
    "experts.w3": _rows("expert_columns"),
    "experts.w2": _columns("expert_columns"),
}
_VOCABULARY: Final = ("model.embed_tokens", "lm_head")  # packed in 8 bits where the file has floats


class Holding(NamedTuple):
    """One rank's bytes: its weights as they are held, one block of the cache, and what of the weights a step of one
    token reads."""

    weights: int
    block: int
    step: int = 0

    def total(self, blocks: int) -> int:
        """With a cache of so many."""
        return self.weights + blocks * self.block


def blocks_for(positions: int) -> int:
    """How many blocks hold so many positions of a sequence."""
    return -(-positions // BLOCK)


def holdings(
    files: ModelFiles, plan: ShardPlan, devices: Sequence[str], *, dtype: str, bits: int | None
) -> list[Holding]:
    """By rank, what `load_model` would hold on its device, and a block of the cache."""
    config, tensors = read_config(files.config), files.tensors
    ignored = tuple(name for name in IGNORED if config.tied or name != "lm_head.weight")
    named = [_Named.of(name, files, config, bits) for name in tensors.names() if not name.endswith(ignored)]
    layers = {} if files.adapter is None else files.adapter.layers
    adapted = [(_Named.of(f"{layer}.weight", files, config, bits), low.rank) for layer, low in layers.items()]
    item, whole = _DTYPE_BYTES[dtype], _whole(plan)
    found = []
    for shard, device in zip(plan.ranks, devices, strict=True):
        dense, read = 0, 0.0
        packed: Counter[tuple[str, int, Form]] = Counter()  # rows that lie together, by module, blocks of a row, form
        for tensor in named:
            rows, columns = tensor.part(shard, whole)
            if tensor.form is None:
                nbytes = len(rows) * len(columns) * (4 if tensor.exact else item)
                dense, read = dense + nbytes, read + nbytes * _used(tensor.module, config)
            else:
                packed[tensor.module, -(-columns.stop // UNIT) - columns.start // UNIT, tensor.form] += len(rows)
        for tensor, rank in adapted:  # A has the layer's columns, B its rows
            nbytes = rank * sum(map(len, tensor.part(shard, whole))) * item
            dense, read = dense + nbytes, read + nbytes
        lanes, held = _lanes(device), 0
        for (module, blocks, form), count in packed.items():
            nbytes = -(-count // lanes) * lanes * blocks * form.nbytes
            held, read = held + nbytes, read + nbytes * _used(module, config)
        vectors = 2 * len(shard.layers) * len(shard.kv_heads) * BLOCK
        found.append(Holding(dense + held, vectors * config.head_dim * item, int(read)))
    return found


def _used(module: str, config: ModelConfig) -> float:
    """The part of a module that a step of one token reads: its experts of a mixture, a row of the embedding."""
    if ".experts" in module and config.mixture is not None:
        return config.mixture.chosen / config.mixture.experts
    return 0.0 if module in ("model", "model.embed_tokens") and not config.tied else 1.0


class _Named(NamedTuple):
    """What a tensor's name and shape tell."""

    module: str  # matrices that lie together
    rows: Range
    columns: Range
    cut: _Cut | None
    form: Form | None  # as it is packed
    exact: bool  # in float32 whatever the dtype

    @classmethod
    def of(cls, name: str, files: ModelFiles, config: ModelConfig, bits: int | None) -> _Named:
        layer, _, kind = name.rpartition(".")
        shape = files.tensors.shape(name)
        words = [word for word in layer.split(".") if not word.isdigit()]
        cut = _CUTS.get(".".join(words[-2:]))
        if layer.endswith("_norm") and shape == (config.head_dim,):
            cut = None  # every head's, whichever rank has it
        elif kind == "bias" and cut is not None and not cut.by_rows:
            cut = None
        form = None
        if bits is not None and cut is not None and len(shape) > 1:
            fewest = 8 if layer.endswith(_VOCABULARY) else bits
            form = files.tensors.form(name) or Form(fewest, minimums=fewest == 4)
        return cls(
            # Layers of one input are stacked, but not in transformers' code.
            module=layer.rpartition(".")[0] if cut is not None and cut.by_rows and not config.foreign else layer,
            rows=Range(0, shape[0]),
            columns=Range(0, shape[-1] if len(shape) > 1 else 1),
            cut=cut,
            form=form,
            exact=bool(config.norm_offset) and layer.endswith("norm"),
        )

    def part(self, shard: RankShard, whole: RankShard) -> tuple[Range, Range]:
        """The rows and columns of it that a rank has."""
        if self.cut is None:
            return self.rows, self.columns
        mine, every = self.cut.ranges(shard), self.cut.ranges(whole)
        if self.cut.by_rows:
            return _scaled(self.rows, mine, every), self.columns
        return self.rows, _scaled(self.columns, mine, every)


def _whole(plan: ShardPlan) -> RankShard:
    """The shard of a rank that held everything."""
    every = {field: max(getattr(shard, field).stop for shard in plan.ranks) for field in RankShard.__struct_fields__}
    return RankShard(**{field: Range(0, stop) for field, stop in every.items()})


def _scaled(size: Range, mine: tuple[Range, ...], whole: tuple[Range, ...]) -> Range:
    """The part of rows or columns that is `mine`; where several ranges lie behind one another, only its length."""
    unit = len(size) // sum(map(len, whole))
    start = mine[0].start
    return Range(start, start + sum(map(len, mine))) * unit


def _lanes(device: str) -> int:
    """Packed rows come in multiples of it."""
    if device != "cpu":
        return 1
    from ringlm.parallel.kernels.instructions import ROWS

    return ROWS
