"""How each layer of a model attends, from config.json: its window, its rope, what becomes of scores. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from ringlm.errors import ModelError

FULL: Final = "full_attention"  # transformers' words for kinds of layers
SLIDING: Final = "sliding_attention"
_ROPES: Final = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "factors")

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True)
class Rope:
    """Rotary positions. `kind` is one of transformers' rope types, or factors: each frequency over its own factor."""

    theta: float
    kind: str = "default"
    partial: float = 1.0  # of each head, from its first dimension on; the rest does not turn
    factor: float = 1.0
    low_turns: float = 1.0  # frequencies that turn less often within the original context are stretched
    high_turns: float = 4.0  # those that turn more often stay
    truncate: bool = True  # yarn's blend begins and ends at whole dimensions
    original_context: int = 8192  # positions
    factors: tuple[float, ...] = ()  # (rotary dimensions / 2,); longrope's within the original context
    long_factors: tuple[float, ...] = ()  # longrope's beyond it
    magnitude: float = 1.0  # of cosines and sines


@dataclass(frozen=True)
class AttentionKind:
    """How layers attend."""

    rope: Rope
    scale: float  # of queries times keys
    window: int | None = None  # positions that a token sees, its own included; None: all up to its own
    soft_cap: float | None = None  # scores become soft_cap * tanh(score / soft_cap)


NO_ROPE: Final = Rope(1.0, partial=0.0)


class _Rope(msgspec.Struct):
    """rope_scaling, and transformers 5's rope_parameters, which holds theta as well."""

    rope_type: str | None = None
    type: str | None = None  # rope_type, before it was renamed
    rope_theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0  # yarn's low_freq_factor
    beta_fast: float = 32.0
    truncate: bool = True
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    factors: tuple[float, ...] = ()  # ours, for GGUF
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


class _Attention(msgspec.Struct):
    """The fields of config.json that are used here."""

    rope_theta: float | None = None
    rope_local_base_freq: float | None = None  # theta of layers with a window
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None  # of all layers, or by kind of layer
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Count | None = None
    use_sliding_window: bool = False
    sliding_window: Count | None = None
    layer_types: tuple[str, ...] | None = None
    max_window_layers: int = 0  # as many first layers have no window
    sliding_window_pattern: int | None = None  # every so many layers one has no window
    no_rope_layers: tuple[int, ...] | None = None  # 0: this layer has no rope
    no_rope_layer_interval: int | None = None  # every so many layers one has no rope
    query_pre_attn_scalar: Positive | None = None
    attn_logit_softcapping: Positive | None = None


def read_kinds(config: Mapping[str, Any], layers: int, head_dim: int, context: int) -> list[AttentionKind]:
    """How each of `layers` attends in a model for `context` positions. ModelError names what is unknown or
    contradictory, msgspec.ValidationError what has the wrong type."""
    raw = msgspec.convert(config, _Attention)
    for name in ("layer_types", "no_rope_layers"):
        found = getattr(raw, name)
        if found is not None and len(found) < layers:
            raise ModelError(f"config.json: {len(found)} {name} for {layers} layers.")
    turned = [_has_rope(raw, layer) for layer in range(layers)]
    windowed = [_has_window(raw, layer) for layer in range(layers)]
    ropes = {kind: _rope(raw, kind, head_dim, context) for kind in (FULL, SLIDING)}
    scale = (raw.query_pre_attn_scalar or head_dim) ** -0.5
    return [
        AttentionKind(
            rope=ropes[SLIDING if window else FULL] if rope else NO_ROPE,
            scale=scale,
            window=raw.sliding_window if window and raw.use_sliding_window else None,
            soft_cap=raw.attn_logit_softcapping,
        )
        for rope, window in zip(turned, windowed, strict=True)
    ]


def _has_rope(raw: _Attention, layer: int) -> bool:
    if raw.no_rope_layers is not None:
        return bool(raw.no_rope_layers[layer])
    return not raw.no_rope_layer_interval or (layer + 1) % raw.no_rope_layer_interval != 0


def _has_window(raw: _Attention, layer: int) -> bool:
    """Whether the layer is of the kind with a window, though the model may have turned windows off."""
    if raw.layer_types is not None:
        if raw.layer_types[layer] not in (FULL, SLIDING):
            raise ModelError(f"config.json: layer_types {raw.layer_types[layer]!r} is not supported.")
        return raw.layer_types[layer] == SLIDING
    if raw.no_rope_layer_interval is not None and _has_rope(raw, layer):
        return False
    if raw.sliding_window_pattern:
        return (layer + 1) % raw.sliding_window_pattern != 0
    return layer >= raw.max_window_layers


def _words(raw: _Attention, layer_type: str) -> dict[str, Any]:
    """What config.json says of the rope of layers of this type, at whichever place."""
    local = layer_type == SLIDING and raw.rope_local_base_freq is not None
    given = raw.rope_parameters or raw.rope_scaling or {}
    if not {FULL, SLIDING}.isdisjoint(given):
        given = given.get(layer_type) or {}
    elif local:
        given = {}  # such layers are not scaled
    theta = raw.rope_local_base_freq if local else raw.rope_theta
    around = {"rope_theta": theta, "partial_rotary_factor": raw.partial_rotary_factor}
    above = {"original_max_position_embeddings": raw.original_max_position_embeddings}  # this one comes first
    said = [{name: value for name, value in words.items() if value is not None} for words in (around, given, above)]
    return said[0] | said[1] | said[2]


def _rope(raw: _Attention, layer_type: str, head_dim: int, context: int) -> Rope:
    """The rope of layers of this type."""
    found = msgspec.convert(_words(raw, layer_type), _Rope)
    kind = found.rope_type or found.type or "default"
    if kind == "su" or (kind == "yarn" and found.short_factor):  # Phi-3's older words
        kind = "longrope"
    if kind not in _ROPES:
        raise ModelError(f"config.json: rope type {kind!r} is not supported; {', '.join(_ROPES[:-1])} are.")
    original = context if kind == "dynamic" else found.original_max_position_embeddings or context
    factor = context / original if found.factor is None else found.factor
    if found.rope_theta <= 1 or factor <= 0:
        raise ModelError("config.json: the rope's theta must be above 1, its factor above 0.")
    partial, size = found.partial_rotary_factor, int(head_dim * found.partial_rotary_factor)
    if not 0 < partial <= 1 or size % 2 or size < (4 if kind == "dynamic" else 2):
        raise ModelError(
            f"config.json: {partial} of {head_dim} dimensions have to be an even number for a {kind} rope."
        )
    low, high = found.low_freq_factor, found.high_freq_factor
    if kind == "yarn":
        low, high = found.beta_slow, found.beta_fast
    if not 0 < low < high:
        raise ModelError("config.json: the rope's low_freq_factor must be below its high_freq_factor (yarn: betas).")
    needed = {"longrope": ("short_factor", "long_factor"), "factors": ("factors",)}
    for name in needed.get(kind, ()):
        factors = getattr(found, name)
        if len(factors) != size // 2 or min(factors) <= 0:
            raise ModelError(
                f"config.json: the rope has {len(factors)} {name} for {size // 2} frequencies; all must be above 0."
            )
    return Rope(
        theta=found.rope_theta,
        kind=kind,
        partial=partial,
        factor=factor,
        low_turns=low,
        high_turns=high,
        truncate=found.truncate,
        original_context=original,
        factors=found.factors or found.short_factor,
        long_factors=found.long_factor,
        magnitude=_magnitude(found, kind, factor, original),
    )


def _magnitude(found: _Rope, kind: str, factor: float, original: int) -> float:
    """What cosines and sines are multiplied by, for scores to stay as sharp over a longer context."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if found.attention_factor is not None:
        return found.attention_factor
    if factor <= 1 or original == 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if found.mscale and found.mscale_all_dim:
        return (0.1 * found.mscale * math.log(factor) + 1) / (0.1 * found.mscale_all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1
