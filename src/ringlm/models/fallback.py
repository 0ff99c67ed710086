"""Families that have no file here: transformers' own modelling code over this rank's layers and cache, divided as
transformers' published tensor-parallel plan says. What that plan leaves open is refused, by the layer's name.

Knows no family, and never runs code of a model's folder. Every linear layer is replaced by one of ours; attention is
ours as well (models/attention.py), called where the family calls transformers' attention functions. A rank's heads are
fewer than config.json's: code that a plan divides takes their number from what its products give.
"""

from __future__ import annotations

import re
from typing import Any, Final

import torch
from torch import nn

from ringlm.errors import ConfigError, ModelError
from ringlm.models.causal_lm import CausalLM
from ringlm.models.config import ModelConfig
from ringlm.models.kinds import NO_ROPE
from ringlm.models.loader import ShardLoader
from ringlm.models.registry import FAMILIES
from ringlm.models.rope import RopeTable
from ringlm.models.transformers_lm import Attending, Column, Embedding, Row, TransformersLM, attend
from ringlm.parallel.linear import (
    ColumnParallel,
    VocabularyParallel,
    column_parallel,
    fused,
    row_parallel,
)
from ringlm.parallel.shard import Range, RankShard

_ATTENTION: Final = "ringlm"  # our name among transformers' attention functions
_NOT_READ: Final = ("auto_map", "quantization_config", "dtype", "torch_dtype")  # of config.json
_BY_LENGTH: Final = ("dynamic", "longrope")  # ropes that turn a sequence by how long others of its batch are
_COLUMNS: Final = ("colwise", "colwise_gather_output")
_ROWS: Final = ("rowwise", "rowwise_split_input")


def build(config: ModelConfig, shard: RankShard, load: ShardLoader) -> CausalLM:
    """This rank's part of the model. Raises ModelError that names the layer in the way, ConfigError for a rank without
    heads."""
    if not shard.query_heads:
        raise ConfigError(
            f"--split: rank {load.comm.rank} has no heads, without which {config.architecture} does not run, since "
            "transformers' code runs it: give every rank a weight above 0."
        )
    model = _skeleton(config)
    return _Filling(config, shard, load, model).filled()


def _skeleton(config: ModelConfig) -> Any:
    """transformers' model, without memory for weights."""
    from transformers import CONFIG_MAPPING, AttentionInterface
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    words, name = config.foreign or {}, config.architecture
    kind = str(words.get("model_type"))
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) != name:
        code = " The code that its folder brings along is never run." if "auto_map" in words else ""
        raise ModelError(
            f"config.json: architecture {name!r} of model_type {kind!r} is not known, to transformers neither; known "
            f"are {', '.join(FAMILIES)}.{code}"
        )
    AttentionInterface.register(_ATTENTION, attend)
    told = {key: value for key, value in words.items() if key not in _NOT_READ and "_implementation" not in key}
    try:
        theirs = CONFIG_MAPPING[kind].from_dict(told)
        theirs._attn_implementation = _ATTENTION
        family = MODEL_FOR_CAUSAL_LM_MAPPING[type(theirs)]
        with torch.device("meta"):
            model = family(theirs).eval()
    except Exception as error:  # whatever transformers raises
        reason = " ".join(str(error).split())
        raise ModelError(f"config.json: transformers makes no {name} of it: {reason}") from error
    if not theirs.base_model_tp_plan or not family._supports_attention_backend:
        raise ModelError(f"{name}: transformers has no tensor-parallel plan for it; the model does not run here.")
    return model


class _Filling:
    """Puts this rank's layers into transformers' model."""

    def __init__(self, config: ModelConfig, shard: RankShard, load: ShardLoader, model: Any) -> None:
        self.config, self.shard, self.load, self.model = config, shard, load, model
        self.attending = Attending(shard, RopeTable(NO_ROPE, config.head_dim, config.context, load.dtype, load.device))
        prefix, plan = model.base_model_prefix, model.config.base_model_tp_plan
        self.plan: dict[str, str] = {f"{prefix}.{name}": style for name, style in plan.items()}

    def filled(self) -> CausalLM:
        """The model with its layers."""
        model, shard, load = self.model, self.shard, self.load
        size = (self.config.vocabulary, self.config.hidden_size)
        names = {id(module): name for name, module in model.named_modules()}
        given, taken = model.get_input_embeddings(), model.get_output_embeddings()
        embed, head = names.get(id(given), "embed_tokens"), names.get(id(taken), "lm_head")
        for name, module, plain in ((embed, given, nn.Embedding), (head, taken, nn.Linear)):
            if type(module) is not plain:
                raise self._refusal(name)
        rows = load.vocabulary(embed, size, shard.vocabulary)
        head_rows = rows if model.config.tie_word_embeddings else load.vocabulary(head, size, shard.vocabulary)
        bias = None if taken.bias is None else load.vector(f"{head}.bias", size[0], shard.vocabulary)
        embedding = VocabularyParallel(rows, shard.vocabulary, load.comm)
        logits = ColumnParallel(head_rows, bias)
        model.set_submodule(embed, Embedding(embedding))
        model.set_submodule(head, Column(logits))
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                model.set_submodule(name, self._linear(name, module))
            elif not isinstance(module, (Column, Embedding)):
                self._whole(name, module)
        return TransformersLM(self.config, shard, self.attending, embedding, logits, model, load.nbytes)

    def _linear(self, name: str, module: nn.Linear) -> nn.Module:
        """The layer divided as the plan says: heads within attention, elsewhere columns of the MLP."""
        parent, _, last = name.rpartition(".")
        block, style = self.model.get_submodule(parent), self._style(name)
        attention = hasattr(block, "layer_idx")
        into, out, bias = module.in_features, module.out_features, module.bias is not None
        size = self.config.head_dim if attention else 1
        if style == "colwise" and (not attention or last in ("q_proj", "k_proj", "v_proj")):
            part = self._units(last if attention else "")
            if out == part[0] * size:
                spec = column_parallel(f"{parent}.", into, bias, **{last: (out, part[1] * size)})
                return Column(self.load.column(spec))
        elif style in _COLUMNS and last == "gate_up_proj" and not attention:
            part = self._units("")
            if out == 2 * part[0]:  # one behind the other
                return Column(self.load.column(fused(name, column_parallel(name, into, bias, gate=part, up=part))))
        elif style in _ROWS and self._divided(parent, style):
            part = self._units("q_proj" if attention else "")
            if into == part[0] * size:
                if attention:
                    block.ringlm = self.attending
                return Row(self.load.row(row_parallel(name, (out, into), part[1] * size, bias)))
        raise self._refusal(name, style)

    def _units(self, name: str) -> tuple[int, Range]:
        """How many heads or columns there are, and this rank's."""
        config, shard = self.config, self.shard
        if name == "q_proj":
            return config.query_heads, shard.query_heads
        return (config.kv_heads, shard.kv_heads) if name else (config.columns, shard.columns)

    def _divided(self, parent: str, style: str) -> bool:
        """Whether what goes into this row-parallel layer comes from layers that leave a rank's part."""
        return style == "rowwise" or self._style(f"{parent}.gate_up_proj") in _COLUMNS

    def _style(self, name: str) -> str | None:
        return self.plan.get(_pattern(name))

    def _whole(self, name: str, module: nn.Module) -> None:
        """What every rank has: vectors of the file, and buffers that the class computes."""
        around = _pattern(name).rpartition(".")[0]
        divided = any(pattern.rpartition(".")[0] == around for pattern in self.plan)
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            # Beside divided layers a vector has to fit every head.
            if parameter.dim() != 1 or (divided and len(parameter) not in (1, self.config.head_dim)):
                raise self._refusal(name, self._style(name))
            vector = self.load.vector(f"{name}.{key}", len(parameter))
            module._parameters[key] = nn.Parameter(vector, requires_grad=False)
        if module._buffers:
            self._compute(name, module)

    def _compute(self, name: str, module: Any) -> None:
        """The frequencies of a rope, which are the only buffers that can be made anew."""
        ropes = getattr(module, "rope_type", None)  # one, or by kind of layer
        if ropes is None or module._parameters:
            raise self._refusal(name)
        for rope in ropes.values() if isinstance(ropes, dict) else [ropes]:
            if rope in _BY_LENGTH:
                raise ModelError(f"{self.config.architecture}: rope type {rope!r} is not supported in this family.")
        if self.load.device.type != "meta":
            self.model.set_submodule(name, type(module)(config=self.model.config).to(self.load.device))

    def _refusal(self, name: str, style: str | None = None) -> ModelError:
        way = "has no place in transformers' tensor-parallel plan"
        if style is not None:
            way = f"is divided in a way ({style}) that is not supported with its shape"
        return ModelError(f"{self.config.architecture}: layer {name!r} {way}; the model does not run here.")


def _pattern(name: str) -> str:
    """A layer's name as plans have it, with * for numbers."""
    return re.sub(r"\.\d+\.", ".*.", name)
