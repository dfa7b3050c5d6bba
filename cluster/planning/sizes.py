"""Parameters and bytes of a model, on disk and in memory, from its `config.json` alone.

What is on disk follows from the table of tensors; what is in memory from the functions that the processes themselves turn
weights into their working form with, run on tensors without data (torch's meta device). So neither can drift from what is
loaded: a change of the form changes the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, lru_cache

import torch

from ...kernels.fp8 import BlockWeight, scale_shape
from ...kernels.kv_pages import KvFormat
from ...kernels.packed import PackedWeight
from ...model.compute import Compute
from ...model.config import ModelConfig
from ...model.loading import (
    DenseWeights,
    LayerWeights,
    LowRankQuery,
    StoredAttention,
    StoredDraftLayer,
    StoredLinear,
    StoredMlp,
    StoredMoe,
)
from ...model.tensor_names import ExpectedTensor, Role, TensorNames, layer_prefix
from ...model.weights import mlp_weights, router_weights

_NEVER_FP8 = ("lm_head.weight", "mlp.gate.weight", "eh_proj.weight", "shared_head.head.weight")
"""Matrices that published FP8 checkpoints keep in BF16."""

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """Bytes of some tensors: of their numbers, and of the scales beside FP8 numbers."""

    weights: int = 0
    scales: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.scales

    def __add__(self, other: TensorBytes) -> TensorBytes:
        return TensorBytes(self.weights + other.weights, self.scales + other.scales)

    def __mul__(self, count: int) -> TensorBytes:
        return TensorBytes(self.weights * count, self.scales * count)


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many parameters a model has; the scales of FP8 weights are none.

    Attributes:
        main: all but the MTP module: the 671B of DeepSeek-R1.
        mtp: the MTP module, with its copies of embedding and head, as it is in the files.
        active: those that one token is multiplied with: of the routed experts its top-k, and the head, but not the embedding,
            of which one row is looked up. The published count: 36.6B of DeepSeek-R1, "including 0.9B for the output head".
        active_with_embedding: with the whole embedding.
    """

    main: int
    mtp: int
    active: int
    active_with_embedding: int


@dataclass(frozen=True, slots=True)
class RouterBytes:
    """What a router holds of the model, in working form.

    Attributes:
        attention: of one layer, its norms included.
        dense_mlp: of one layer without routed experts.
        gate: of one MoE layer, with its bias, in fp32.
        shared_experts: of one MoE layer.
        embedding: and what else is not read by every step: one row a token is.
        head: the head and the final norm; the embedding's own where they are tied, which takes no memory again.
        draft: the MTP layer, where it is served: all but its routed experts.
        total: of everything.
    """

    attention: TensorBytes
    dense_mlp: TensorBytes
    gate: TensorBytes
    shared_experts: TensorBytes
    embedding: TensorBytes
    head: TensorBytes
    draft: TensorBytes
    total: TensorBytes


class ModelSizes:
    """One model's sizes, as processes that compute with `compute` hold it.

    Args:
        config: of the model. Its plain tensors are taken to be BF16 on disk, and gate biases FP32, as published.
        compute: its device does not matter.
    """

    def __init__(self, config: ModelConfig, compute: Compute) -> None:
        self.config = config
        self.compute = replace(compute, device=_META)
        self._names = TensorNames(config)
        self._main = replace(config, draft_layers=0)

    @cached_property
    def parameters(self) -> Parameters:
        """See `Parameters`."""
        config, names = self._main, TensorNames(self._main)
        dense = _elements(names.dense())
        expert = self.expert_parameters
        layers = len(config.moe_layers)
        embedding = config.vocab_size * config.hidden_size
        multiplied = dense - (0 if config.tie_word_embeddings else embedding)
        active = multiplied + layers * config.num_experts_per_tok * expert
        return Parameters(
            main=dense + layers * config.n_routed_experts * expert,
            mtp=_elements(names.mtp()),
            active=active,
            active_with_embedding=active + dense - multiplied,
        )

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert."""
        return 3 * self.config.hidden_size * self.config.moe_intermediate_size

    # ---- on disk ----------------------------------------------------------------------------------------------------

    @cached_property
    def disk_dense(self) -> TensorBytes:
        """What a router reads."""
        return self._on_disk(self._names.dense())

    @cached_property
    def disk_expert(self) -> TensorBytes:
        """What a host reads of one expert of one layer."""
        if not self.config.moe_layers:
            return TensorBytes()
        return self._on_disk(self._names.expert(self.config.first_k_dense_replace, 0))

    @cached_property
    def disk_total(self) -> TensorBytes:
        """All tensors of the checkpoint, the MTP module included."""
        names = TensorNames(self._main)
        experts = self.disk_expert * (len(self._main.moe_layers) * self.config.n_routed_experts)
        return self._on_disk(names.dense()) + experts + self._on_disk(names.mtp())

    # ---- in memory --------------------------------------------------------------------------------------------------

    @cached_property
    def expert(self) -> TensorBytes:
        """One routed expert of one layer on an expert host."""
        if not self.config.moe_layers:
            return TensorBytes()
        tensors = self._names.expert(self.config.first_k_dense_replace, 0)
        return held_bytes(mlp_weights(StoredMlp(*(self._linear(tensor) for tensor in tensors)), self.compute))

    @cached_property
    def router(self) -> RouterBytes:
        """A router's weights."""
        config = self.config
        dense_layers, moe_layers = config.first_k_dense_replace, len(self._main.moe_layers)
        kinds = [layers[0] for layers in (range(dense_layers), config.moe_layers) if layers]
        # Layers of one kind are alike: one of each stands for all.
        weights = router_weights(config, self._dense_layout(kinds), self.compute)
        gate = held_bytes(tuple(block.gate for block in weights.blocks))
        dense_mlp = held_bytes(tuple(block.mlp for block in weights.blocks if block.gate is None))
        shared = held_bytes(tuple(block.mlp for block in weights.blocks if block.gate is not None))
        first = weights.blocks[0]
        attention = held_bytes((first.attention_norm, first.attention, first.feed_forward_norm))
        embedding, norm = held_bytes(weights.embedding), held_bytes(weights.norm)
        own_head = TensorBytes() if weights.head is weights.embedding else held_bytes(weights.head)
        layers = attention * config.num_hidden_layers + dense_mlp * dense_layers + (gate + shared) * moe_layers
        draft = held_bytes(weights.draft)
        return RouterBytes(
            attention=attention,
            dense_mlp=dense_mlp,
            gate=gate,
            shared_experts=shared,
            embedding=embedding,
            head=held_bytes(weights.head) + norm,
            draft=draft,
            total=layers + embedding + own_head + norm + draft,
        )

    @cached_property
    def kv_token_bytes(self) -> int:
        """One cached token in all layers."""
        stored = torch.uint8 if self.compute.fp8_kv else self.compute.dtype
        form = KvFormat(self.config.kv_lora_rank, self.config.qk_rope_head_dim, stored)
        return self.config.cached_layers * form.row_bytes

    def rotation_bytes(self, positions: int) -> int:
        """The table of RoPE's rotations for so many positions: a cosine and a sine in fp32 for each pair of columns."""
        return positions * self.config.qk_rope_head_dim * 4

    # ---- tensors without data ---------------------------------------------------------------------------------------

    def _stored_dtype(self, tensor: ExpectedTensor) -> torch.dtype:
        if tensor.role is Role.GATE_BIAS:
            return torch.float32
        if self.config.weights_are_fp8 and tensor.role is Role.LINEAR and not tensor.name.endswith(_NEVER_FP8):
            return torch.float8_e4m3fn
        return torch.bfloat16

    def _on_disk(self, tensors: Iterable[ExpectedTensor]) -> TensorBytes:
        weights = scales = 0
        for tensor in tensors:
            dtype = self._stored_dtype(tensor)
            weights += math.prod(tensor.shape) * dtype.itemsize
            if dtype == torch.float8_e4m3fn:
                scales += 4 * math.prod(scale_shape(tensor.shape[0], tensor.shape[1]))
        return TensorBytes(weights, scales)

    def _plain(self, tensor: ExpectedTensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=self._stored_dtype(tensor), device=_META)

    def _linear(self, tensor: ExpectedTensor) -> StoredLinear:
        weight = self._plain(tensor)
        if weight.dtype != torch.float8_e4m3fn:
            return StoredLinear(weight, None)
        scale = torch.empty(scale_shape(weight.shape[0], weight.shape[1]), dtype=torch.float32, device=_META)
        return StoredLinear(weight, scale)

    def _dense_layout(self, layers: Sequence[int]) -> DenseWeights:
        """What `load_dense` would give of these layers, without data."""
        globals_ = {tensor.name: tensor for tensor in self._names.global_tensors()}
        embedding = self._plain(globals_["model.embed_tokens.weight"])
        head = globals_.get("lm_head.weight")
        return DenseWeights(
            embed_tokens=embedding,
            layers=tuple(self._layer(layer) for layer in layers),
            norm=self._plain(globals_["model.norm.weight"]),
            lm_head=StoredLinear(embedding, None) if head is None else self._linear(head),
            draft=self._draft_layer() if self.config.draft_layers else None,
        )

    def _draft_layer(self) -> StoredDraftLayer:
        prefix = layer_prefix(self.config.num_hidden_layers)
        named = {tensor.name.removeprefix(prefix): tensor for tensor in self._names.draft_layer()}
        return StoredDraftLayer(
            enorm=self._plain(named["enorm.weight"]),
            hnorm=self._plain(named["hnorm.weight"]),
            eh_proj=self._linear(named["eh_proj.weight"]),
            layer=self._layer(self.config.num_hidden_layers),
            norm=self._plain(named["shared_head.norm.weight"]),
        )

    def _layer(self, layer: int) -> LayerWeights:
        prefix = layer_prefix(layer)
        named = {tensor.name.removeprefix(prefix): tensor for tensor in self._names.dense_layer(layer)}

        def linear(name: str) -> StoredLinear:
            return self._linear(named[f"{name}.weight"])

        def norm(name: str) -> torch.Tensor:
            return self._plain(named[f"{name}.weight"])

        def mlp(of: str) -> StoredMlp:
            return StoredMlp(*(linear(f"{of}.{part}") for part in ("gate_proj", "up_proj", "down_proj")))

        if self.config.q_lora_rank is None:
            query: LowRankQuery | StoredLinear = linear("self_attn.q_proj")
        else:
            query = LowRankQuery(
                linear("self_attn.q_a_proj"), norm("self_attn.q_a_layernorm"), linear("self_attn.q_b_proj")
            )
        bias = named.get("mlp.gate.e_score_correction_bias")
        return LayerWeights(
            input_layernorm=norm("input_layernorm"),
            attention=StoredAttention(
                query=query,
                kv_a_proj_with_mqa=linear("self_attn.kv_a_proj_with_mqa"),
                kv_a_layernorm=norm("self_attn.kv_a_layernorm"),
                kv_b_proj=linear("self_attn.kv_b_proj"),
                o_proj=linear("self_attn.o_proj"),
            ),
            post_attention_layernorm=norm("post_attention_layernorm"),
            mlp=StoredMoe(
                gate=linear("mlp.gate"),
                e_score_correction_bias=None if bias is None else self._plain(bias),
                shared_experts=mlp("mlp.shared_experts") if self.config.n_shared_experts else None,
            )
            if layer in self.config.moe_layers
            else mlp("mlp"),
        )


@lru_cache(maxsize=16)
def model_sizes(config: ModelConfig, compute: Compute) -> ModelSizes:
    """`ModelSizes`, which compute what they are asked for once, shared by all who ask for the same."""
    return ModelSizes(config, compute)


def _elements(tensors: Iterable[ExpectedTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def held_bytes(weights: object) -> TensorBytes:
    """Bytes of every tensor in `weights`: a tensor, a dataclass or a tuple of such, or None."""
    if isinstance(weights, torch.Tensor):
        return TensorBytes(weights.nbytes)
    if isinstance(weights, PackedWeight):
        return TensorBytes(weights.tiles.nbytes, 0 if weights.scale_inv is None else weights.scale_inv.nbytes)
    if isinstance(weights, BlockWeight):
        return TensorBytes(weights.codes.nbytes, weights.scale_inv.nbytes)
    if isinstance(weights, tuple):
        return sum((held_bytes(part) for part in weights), start=TensorBytes())
    if is_dataclass(weights):
        return sum((held_bytes(getattr(weights, field.name)) for field in fields(weights)), start=TensorBytes())
    assert weights is None, type(weights)
    return TensorBytes()
