"""The names, shapes and roles of every tensor in a published checkpoint, as one table.

Nothing else in the project spells a checkpoint name. A row of the table is `(suffix, shape, role)`; a shape is written
in the sizes of `_sizes`, so that a row reads as in the paper. Matrices are `[out, in]`, as `torch.nn.Linear` has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from .config import ModelConfig

SCALE_SUFFIX = "_scale_inv"
"""A linear stored in FP8 as `X.weight` has its block scales in `X.weight_scale_inv`."""


class Role(Enum):
    """What a tensor is, which decides how it may be stored."""

    LINEAR = "linear"
    """A matrix: FP8 with block scales, or plain (BF16, FP16, FP32), whatever its neighbours are."""
    EMBEDDING = "embedding"
    """The token embedding: plain."""
    NORM = "norm"
    """The gain of an RMSNorm: plain."""
    GATE_BIAS = "gate bias"
    """The gate's selection bias: plain (published in FP32)."""


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """One tensor the model needs: its full name, logical shape and role."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def scale_name(self) -> str:
        """Name of the block scales that belong to this tensor when it is stored in FP8."""
        return self.name + SCALE_SUFFIX


_Row = tuple[str, tuple[str, ...], Role]

_EMBEDDING: tuple[_Row, ...] = (("model.embed_tokens.weight", ("vocab", "hidden"), Role.EMBEDDING),)
_FINAL_NORM: tuple[_Row, ...] = (("model.norm.weight", ("hidden",), Role.NORM),)
_LM_HEAD: tuple[_Row, ...] = (("lm_head.weight", ("vocab", "hidden"), Role.LINEAR),)

# What follows is relative to `model.layers.{layer}.`
_BLOCK_NORMS: tuple[_Row, ...] = (
    ("input_layernorm.weight", ("hidden",), Role.NORM),
    ("post_attention_layernorm.weight", ("hidden",), Role.NORM),
)
_QUERY_LOW_RANK: tuple[_Row, ...] = (
    ("self_attn.q_a_proj.weight", ("q_rank", "hidden"), Role.LINEAR),
    ("self_attn.q_a_layernorm.weight", ("q_rank",), Role.NORM),
    ("self_attn.q_b_proj.weight", ("heads*qk", "q_rank"), Role.LINEAR),
)
_QUERY_DIRECT: tuple[_Row, ...] = (("self_attn.q_proj.weight", ("heads*qk", "hidden"), Role.LINEAR),)
_KEY_VALUE_OUTPUT: tuple[_Row, ...] = (
    ("self_attn.kv_a_proj_with_mqa.weight", ("latent", "hidden"), Role.LINEAR),
    ("self_attn.kv_a_layernorm.weight", ("kv_rank",), Role.NORM),
    ("self_attn.kv_b_proj.weight", ("heads*(nope+v)", "kv_rank"), Role.LINEAR),
    ("self_attn.o_proj.weight", ("hidden", "heads*v"), Role.LINEAR),
)
_DENSE_MLP: tuple[_Row, ...] = (
    ("mlp.gate_proj.weight", ("intermediate", "hidden"), Role.LINEAR),
    ("mlp.up_proj.weight", ("intermediate", "hidden"), Role.LINEAR),
    ("mlp.down_proj.weight", ("hidden", "intermediate"), Role.LINEAR),
)
_GATE: tuple[_Row, ...] = (("mlp.gate.weight", ("experts", "hidden"), Role.LINEAR),)
_CORRECTION_BIAS: tuple[_Row, ...] = (("mlp.gate.e_score_correction_bias", ("experts",), Role.GATE_BIAS),)
_SHARED_EXPERTS: tuple[_Row, ...] = (
    ("mlp.shared_experts.gate_proj.weight", ("shared_intermediate", "hidden"), Role.LINEAR),
    ("mlp.shared_experts.up_proj.weight", ("shared_intermediate", "hidden"), Role.LINEAR),
    ("mlp.shared_experts.down_proj.weight", ("hidden", "shared_intermediate"), Role.LINEAR),
)
_ROUTED_EXPERT: tuple[_Row, ...] = (  # relative to `model.layers.{layer}.mlp.experts.{expert}.`
    ("gate_proj.weight", ("moe_intermediate", "hidden"), Role.LINEAR),
    ("up_proj.weight", ("moe_intermediate", "hidden"), Role.LINEAR),
    ("down_proj.weight", ("hidden", "moe_intermediate"), Role.LINEAR),
)
_MTP: tuple[_Row, ...] = (  # beside the block of layer `num_hidden_layers`
    ("enorm.weight", ("hidden",), Role.NORM),
    ("hnorm.weight", ("hidden",), Role.NORM),
    ("eh_proj.weight", ("hidden", "2*hidden"), Role.LINEAR),
    ("shared_head.norm.weight", ("hidden",), Role.NORM),
)
_MTP_REPEATS: tuple[_Row, ...] = (  # the model's own embedding and head once more, which nobody reads
    ("embed_tokens.weight", ("vocab", "hidden"), Role.EMBEDDING),
    ("shared_head.head.weight", ("vocab", "hidden"), Role.LINEAR),
)
_KNOWN_LEFTOVERS = ("self_attn.rotary_emb.inv_freq",)
"""Buffers some exporters wrote that follow from the configuration."""


def _sizes(config: ModelConfig) -> dict[str, int]:
    heads = config.num_attention_heads
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "2*hidden": 2 * config.hidden_size,
        "q_rank": config.q_lora_rank or 0,
        "kv_rank": config.kv_lora_rank,
        "latent": config.latent_dim,
        "heads*qk": heads * config.qk_head_dim,
        "heads*(nope+v)": heads * (config.qk_nope_head_dim + config.v_head_dim),
        "heads*v": heads * config.v_head_dim,
        "intermediate": config.intermediate_size,
        "experts": config.n_routed_experts,
        "moe_intermediate": config.moe_intermediate_size,
        "shared_intermediate": config.moe_intermediate_size * config.n_shared_experts,
    }


class TensorNames:
    """The table applied to one model."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._sizes = _sizes(config)

    def global_tensors(self) -> tuple[ExpectedTensor, ...]:
        """Embedding, final norm and, unless tied to the embedding, the head."""
        head = () if self.config.tie_word_embeddings else _LM_HEAD
        return self._expect("", _EMBEDDING + _FINAL_NORM + head)

    def dense_layer(self, layer: int) -> tuple[ExpectedTensor, ...]:
        """Everything of `layer` but its routed experts; `layer` may be `num_hidden_layers`, the MTP module's block."""
        return self._expect(layer_prefix(layer), self._block_rows(has_experts=layer in self._layers_with_experts))

    def expert(self, layer: int, expert: int) -> tuple[ExpectedTensor, ExpectedTensor, ExpectedTensor]:
        """Gate, up and down projection of one routed expert, in this order.

        Raises:
            ValueError: there is no such expert; only layers from `first_k_dense_replace` on have any.
        """
        layers, experts = self._layers_with_experts, self.config.n_routed_experts
        if layer not in layers or not 0 <= expert < experts:
            raise ValueError(
                f"no routed expert {expert} in layer {layer}: layers {layers.start} to {layers.stop - 1} have experts "
                f"0 to {experts - 1}"
            )
        gate, up, down = self._expect(f"{layer_prefix(layer)}mlp.experts.{expert}.", _ROUTED_EXPERT)
        return gate, up, down

    def dense(self) -> Iterator[ExpectedTensor]:
        """All a router holds: the globals and each layer without its routed experts; the MTP layer only where it is served."""
        yield from self.global_tensors()
        for layer in range(self.config.num_hidden_layers):
            yield from self.dense_layer(layer)
        if self.config.draft_layers:
            yield from self.draft_layer()

    def draft_layer(self) -> Iterator[ExpectedTensor]:
        """What a router holds of the MTP layer: all but its routed experts, and its copies of embedding and head."""
        layer = self.config.num_hidden_layers
        yield from self._expect(layer_prefix(layer), _MTP)
        yield from self.dense_layer(layer)

    def routed_experts(self) -> Iterator[ExpectedTensor]:
        """All expert hosts hold together; those of the MTP layer only where it is served."""
        for layer in self.config.moe_layers:
            for expert in range(self.config.n_routed_experts):
                yield from self.expert(layer, expert)

    def mtp(self) -> Iterator[ExpectedTensor]:
        """The MTP module, stored as layer `num_hidden_layers`; nothing where the model has none."""
        if not self.config.num_nextn_predict_layers:
            return
        layer = self.config.num_hidden_layers
        yield from self._expect(layer_prefix(layer), _MTP_REPEATS)
        yield from self.draft_layer()
        for expert in range(self.config.n_routed_experts):
            yield from self.expert(layer, expert)

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor that `dense` and `routed_experts` do not name is left unread knowingly."""
        if name.endswith(_KNOWN_LEFTOVERS):
            return True
        if name in ("lm_head.weight", "lm_head.weight" + SCALE_SUFFIX):
            return self.config.tie_word_embeddings  # some exporters store the tied head again
        first_mtp = self.config.num_hidden_layers
        count = max(1, self.config.num_nextn_predict_layers)
        return name.startswith(tuple(layer_prefix(first_mtp + index) for index in range(count)))

    @property
    def _layers_with_experts(self) -> range:
        """The MoE layers and the MTP layer, where there is one."""
        mtp = 1 if self.config.num_nextn_predict_layers else 0
        return range(self.config.first_k_dense_replace, self.config.num_hidden_layers + mtp)

    def _block_rows(self, *, has_experts: bool) -> tuple[_Row, ...]:
        config = self.config
        query = _QUERY_DIRECT if config.q_lora_rank is None else _QUERY_LOW_RANK
        if has_experts:
            bias = _CORRECTION_BIAS if config.has_correction_bias else ()
            mlp = _GATE + bias + (_SHARED_EXPERTS if config.n_shared_experts else ())
        else:
            mlp = _DENSE_MLP
        return _BLOCK_NORMS + query + _KEY_VALUE_OUTPUT + mlp

    def _expect(self, prefix: str, rows: tuple[_Row, ...]) -> tuple[ExpectedTensor, ...]:
        sizes = self._sizes
        return tuple(
            ExpectedTensor(prefix + name, tuple(sizes[size] for size in shape), role) for name, shape, role in rows
        )


def layer_prefix(layer: int) -> str:
    """What the names of all tensors of `layer` begin with."""
    return f"model.layers.{layer}."
