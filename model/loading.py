"""Weights in memory: what a router and an expert host read from a checkpoint, in the form it is stored in.

Nothing is half-built: each class below is complete when it exists. Matrices stay as stored, FP8 with their scales;
`StoredLinear.decoded` turns one into a plain tensor.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from ..configs.errors import CheckpointError
from ..kernels.fp8 import dequantize_blocks
from .checkpoint import Checkpoint, StoredTensor, total_bytes
from .config import ModelConfig
from .progress import Progress, default_progress
from .reader import DEFAULT_THREADS, Check, go_on, read_tensors, scan_tensors
from .reader import BytesRead as BytesRead  # part of what this module's functions return
from .safetensors_file import TensorEntry
from .tensor_names import ExpectedTensor, TensorNames, layer_prefix

AUTO_SCAN_BYTES = 16 * 10**9
"""`open_model(verify="auto")` reads a checkpoint of up to this size in full: some seconds from a local disk. Above it
the headers are checked up front and the data as each process reads its slices."""

Verify = Literal["auto", "full", "headers"]

Drafts = Literal["off", "auto", "on"]
"""Whether the MTP layer is served: no, where the checkpoint has one, or it must have one."""


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """A matrix as the checkpoint stores it.

    Attributes:
        weight: [out, in] fp32, bf16, fp16 or float8_e4m3fn.
        scale_inv: [ceil(out/128), ceil(in/128)] fp32 when the weight is float8_e4m3fn, else None.
    """

    weight: torch.Tensor
    scale_inv: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes it takes, in memory as on disk."""
        return self.weight.nbytes + (0 if self.scale_inv is None else self.scale_inv.nbytes)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The plain matrix [out, in] in `dtype`; FP8 is multiplied out in fp32 and rounded once."""
        if self.scale_inv is None:
            return self.weight.to(dtype)
        return dequantize_blocks(self.weight, self.scale_inv, dtype)


@dataclass(frozen=True, slots=True)
class StoredMlp:
    """A gated MLP: gate_proj and up_proj [N, H], down_proj [H, N]."""

    gate_proj: StoredLinear
    up_proj: StoredLinear
    down_proj: StoredLinear

    @property
    def nbytes(self) -> int:
        """Bytes of the three matrices with their scales."""
        return self.gate_proj.nbytes + self.up_proj.nbytes + self.down_proj.nbytes


ExpertWeights: TypeAlias = StoredMlp
"""One routed expert."""


@dataclass(frozen=True, slots=True)
class LowRankQuery:
    """The query projection through `q_lora_rank` R: q_a_proj [R, H], q_a_layernorm [R], q_b_proj [heads * qk, R]."""

    q_a_proj: StoredLinear
    q_a_layernorm: torch.Tensor
    q_b_proj: StoredLinear


@dataclass(frozen=True, slots=True)
class StoredAttention:
    """MLA of one layer. Norms are in their stored dtype.

    Attributes:
        query: low-rank, or q_proj [heads * qk, H] where the model has no `q_lora_rank`.
        kv_a_proj_with_mqa: [kv_rank + rope, H].
        kv_a_layernorm: [kv_rank].
        kv_b_proj: [heads * (nope + v), kv_rank].
        o_proj: [H, heads * v].
    """

    query: LowRankQuery | StoredLinear
    kv_a_proj_with_mqa: StoredLinear
    kv_a_layernorm: torch.Tensor
    kv_b_proj: StoredLinear
    o_proj: StoredLinear


@dataclass(frozen=True, slots=True)
class StoredMoe:
    """What a router keeps of an MoE layer.

    Attributes:
        gate: [E, H].
        e_score_correction_bias: [E] in its stored dtype, or None where the gate has none.
        shared_experts: all shared experts as one MLP of n_shared_experts * N, or None where there are none.
    """

    gate: StoredLinear
    e_score_correction_bias: torch.Tensor | None
    shared_experts: StoredMlp | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer without its routed experts; `mlp` says whether it has any."""

    input_layernorm: torch.Tensor
    attention: StoredAttention
    post_attention_layernorm: torch.Tensor
    mlp: StoredMlp | StoredMoe


@dataclass(frozen=True, slots=True)
class StoredDraftLayer:
    """The MTP layer without its routed experts; embedding and head are the model's own.

    Attributes:
        enorm, hnorm: [H], norms of the next token's embedding and of the hidden state.
        eh_proj: [H, 2 H], from both, the embedding first.
        layer: the block.
        norm: [H], before the head.
    """

    enorm: torch.Tensor
    hnorm: torch.Tensor
    eh_proj: StoredLinear
    layer: LayerWeights
    norm: torch.Tensor


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Everything a router holds.

    Attributes:
        embed_tokens: [vocab, H] in its stored dtype.
        layers: in order, the MTP layer left out.
        norm: [H].
        lm_head: [vocab, H]; shares the embedding's memory where the checkpoint ties them.
        draft: the MTP layer, where it is served.
    """

    embed_tokens: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: StoredLinear
    draft: StoredDraftLayer | None = None


def open_model(
    path: Path,
    *,
    verify: Verify = "auto",
    drafts: Drafts = "off",
    threads: int = DEFAULT_THREADS,
    progress: Progress | None = None,
) -> tuple[ModelConfig, Checkpoint]:
    """Open a checkpoint and refuse it here, before anything is started, if it cannot be served.

    Args:
        path: the checkpoint directory.
        verify: "headers" checks every file's size and every tensor's name, shape, dtype and scales, and reads no data;
            "full" also reads the whole model once to find NaN; "auto" is "full" up to `AUTO_SCAN_BYTES`. Processes
            check the slices they read in any case.
        drafts: whether the MTP layer is to be served; the configuration that is returned says what came of it.
        threads: reads in flight.
        progress: where to show a full read; by default a bar on a terminal, else a log line now and then.

    Raises:
        CheckpointError: names the file, the tensor and what to do.
    """
    config = ModelConfig.load(path)
    checkpoint = Checkpoint.open(path)
    config = with_drafts(config, drafts, checkpoint.tensors)
    checkpoint.validate(config)
    if verify != "headers":
        entries = checkpoint.model_entries(config)
        if verify == "full" or total_bytes(entries) <= AUTO_SCAN_BYTES:
            scan_tensors(
                entries, threads=threads, progress=progress or default_progress(), description=f"checking {path.name}"
            )
    return config, checkpoint


def with_drafts(config: ModelConfig, drafts: Drafts, tensors: Container[str] | None) -> ModelConfig:
    """The configuration that is served of a model with these tensors, with the MTP layer or without. Where nobody knows the
    tensors yet (None), `auto` is `off`: exporters drop the layer and leave config.json as it was.

    Raises:
        CheckpointError: it must have an MTP layer, and has none.
    """
    if drafts == "off" or (drafts == "auto" and not config.num_nextn_predict_layers):
        return config
    drafting = config.with_draft_layer()
    wanted = [tensor.name for tensor in TensorNames(drafting).draft_layer()]
    missing = wanted if tensors is None else [name for name in wanted if name not in tensors]
    if not missing or (tensors is None and drafts == "on"):
        return drafting
    if drafts == "auto":
        return config
    raise CheckpointError(
        f"tensor {missing[0]} is missing: the checkpoint is without the MTP layer that its config.json describes; use "
        "routers.speculate: auto or off, or the published checkpoint"
    )


def load_dense(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    threads: int = DEFAULT_THREADS,
    progress: Progress | None = None,
    description: str = "dense weights",
) -> tuple[DenseWeights, BytesRead]:
    """Read everything but the routed experts into CPU memory; of the MTP layer too where it is served.

    Args:
        checkpoint: where to read from.
        config: of the model.
        threads: reads in flight.
        progress: where to show how far it is; by default a bar on a terminal, else a log line now and then.
        description: what the progress calls it.

    Raises:
        CheckpointError: a tensor is missing, does not fit or is damaged.
    """
    names = TensorNames(config)
    read, bytes_read = _read(checkpoint, config, names.dense(), threads, progress, description)
    embed_tokens = read.plain("model.embed_tokens.weight")
    dense = DenseWeights(
        embed_tokens=embed_tokens,
        layers=tuple(_layer(read, config, layer) for layer in range(config.num_hidden_layers)),
        norm=read.plain("model.norm.weight"),
        lm_head=StoredLinear(embed_tokens, None) if config.tie_word_embeddings else read.linear("lm_head.weight"),
        draft=_draft_layer(read, config) if config.draft_layers else None,
    )
    return dense, bytes_read


def load_experts(
    checkpoint: Checkpoint,
    config: ModelConfig,
    slots: Sequence[tuple[int, int]],
    *,
    threads: int = DEFAULT_THREADS,
    progress: Progress | None = None,
    description: str = "experts",
    check: Check = go_on,
) -> tuple[dict[tuple[int, int], ExpertWeights], BytesRead]:
    """Read routed experts into CPU memory: exactly their byte ranges.

    Args:
        checkpoint: where to read from.
        config: of the model.
        slots: (layer, logical expert); one that occurs more than once is read once.
        threads: reads in flight.
        progress: where to show how far it is; by default a bar on a terminal, else a log line now and then.
        description: what the progress calls it.
        check: ends the read by raising.

    Raises:
        CheckpointError: a tensor is missing, does not fit or is damaged.
        ValueError: there is no such expert.
    """
    names = TensorNames(config)
    wanted = {slot: names.expert(*slot) for slot in slots}
    tensors = [tensor for expert in wanted.values() for tensor in expert]
    read, bytes_read = _read(checkpoint, config, tensors, threads, progress, description, check)
    experts = {slot: StoredMlp(*(read.linear(tensor.name) for tensor in expert)) for slot, expert in wanted.items()}
    return experts, bytes_read


def expert_layout(checkpoint: Checkpoint, config: ModelConfig, layer: int, expert: int) -> ExpertWeights:
    """What `load_experts` would give for one expert, without data: tensors on the meta device.

    Raises:
        CheckpointError: a tensor is missing or does not fit.
        ValueError: there is no such expert.
    """

    def empty(entry: TensorEntry) -> torch.Tensor:
        return torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")

    def linear(tensor: ExpectedTensor) -> StoredLinear:
        stored = checkpoint.locate(tensor, config)
        return StoredLinear(empty(stored.weight), None if stored.scale_inv is None else empty(stored.scale_inv))

    return StoredMlp(*(linear(tensor) for tensor in TensorNames(config).expert(layer, expert)))


@dataclass(frozen=True, slots=True)
class _ReadTensors:
    """Tensors that were read together, by name, and how each was stored."""

    stored: Mapping[str, StoredTensor]
    tensors: Mapping[str, torch.Tensor]

    def plain(self, name: str) -> torch.Tensor:
        """A tensor that is never quantised."""
        return self.tensors[name]

    def linear(self, name: str) -> StoredLinear:
        """A matrix, with its scales if it has any."""
        scale = self.stored[name].scale_inv
        return StoredLinear(self.tensors[name], None if scale is None else self.tensors[scale.name])

    def mlp(self, prefix: str) -> StoredMlp:
        """The three matrices of a gated MLP."""
        gate, up, down = (self.linear(f"{prefix}{name}.weight") for name in ("gate_proj", "up_proj", "down_proj"))
        return StoredMlp(gate, up, down)


def _read(
    checkpoint: Checkpoint,
    config: ModelConfig,
    expected: Iterable[ExpectedTensor],
    threads: int,
    progress: Progress | None,
    description: str,
    check: Check = go_on,
) -> tuple[_ReadTensors, BytesRead]:
    stored = {tensor.name: checkpoint.locate(tensor, config) for tensor in expected}
    entries = [entry for tensor in stored.values() for entry in tensor.entries]
    tensors, data = read_tensors(
        entries, threads=threads, progress=progress or default_progress(), description=description, check=check
    )
    return _ReadTensors(stored, tensors), BytesRead(data=data, headers=checkpoint.header_bytes)


def _layer(read: _ReadTensors, config: ModelConfig, layer: int) -> LayerWeights:
    prefix = layer_prefix(layer)
    return LayerWeights(
        input_layernorm=read.plain(prefix + "input_layernorm.weight"),
        attention=_attention(read, config, prefix + "self_attn."),
        post_attention_layernorm=read.plain(prefix + "post_attention_layernorm.weight"),
        mlp=_moe(read, config, prefix + "mlp.") if layer in config.moe_layers else read.mlp(prefix + "mlp."),
    )


def _draft_layer(read: _ReadTensors, config: ModelConfig) -> StoredDraftLayer:
    prefix = layer_prefix(config.num_hidden_layers)
    return StoredDraftLayer(
        enorm=read.plain(prefix + "enorm.weight"),
        hnorm=read.plain(prefix + "hnorm.weight"),
        eh_proj=read.linear(prefix + "eh_proj.weight"),
        layer=_layer(read, config, config.num_hidden_layers),
        norm=read.plain(prefix + "shared_head.norm.weight"),
    )


def _attention(read: _ReadTensors, config: ModelConfig, prefix: str) -> StoredAttention:
    query: LowRankQuery | StoredLinear
    if config.q_lora_rank is None:
        query = read.linear(prefix + "q_proj.weight")
    else:
        query = LowRankQuery(
            q_a_proj=read.linear(prefix + "q_a_proj.weight"),
            q_a_layernorm=read.plain(prefix + "q_a_layernorm.weight"),
            q_b_proj=read.linear(prefix + "q_b_proj.weight"),
        )
    return StoredAttention(
        query=query,
        kv_a_proj_with_mqa=read.linear(prefix + "kv_a_proj_with_mqa.weight"),
        kv_a_layernorm=read.plain(prefix + "kv_a_layernorm.weight"),
        kv_b_proj=read.linear(prefix + "kv_b_proj.weight"),
        o_proj=read.linear(prefix + "o_proj.weight"),
    )


def _moe(read: _ReadTensors, config: ModelConfig, prefix: str) -> StoredMoe:
    bias = read.plain(prefix + "gate.e_score_correction_bias") if config.has_correction_bias else None
    return StoredMoe(
        gate=read.linear(prefix + "gate.weight"),
        e_score_correction_bias=bias,
        shared_experts=read.mlp(prefix + "shared_experts.") if config.n_shared_experts else None,
    )
