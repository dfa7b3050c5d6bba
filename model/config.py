"""The architecture of one model, read from a published `config.json`.

Field names are those of the published file. Everything the code relies on is checked here, once, so that a model this
project cannot serve is refused by name before anything is started.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..configs.errors import CheckpointError

FP8_BLOCK = 128
"""Rows and columns of one FP8 weight block that shares a scale (`weight_block_size` of every published checkpoint)."""

_ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM")
_TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN context extension (Peng et al., 2023, arXiv:2309.00071) with the parameters DeepSeek publishes."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything about the architecture that the weights do not say themselves. Sizes are in elements."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    topk_method: str
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    weights_are_fp8: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    draft_layers: int = 0
    """MTP layers that are served, to draft tokens: 0, or 1 after `with_draft_layer`. Not of the file."""

    @property
    def qk_head_dim(self) -> int:
        """Query and key size of one head: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements cached per token and layer: the compressed key-value and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> range:
        """Indices of the layers with routed experts; the MTP layer, which is the last, among them only where it is served."""
        return range(self.first_k_dense_replace, self.cached_layers)

    @property
    def cached_layers(self) -> int:
        """Layers with a KV cache: the model's own, and the MTP layer where it is served."""
        return self.num_hidden_layers + self.draft_layers

    @property
    def has_correction_bias(self) -> bool:
        """Whether the gate has a bias that selects experts but does not weigh them: keyed on the method, not the size."""
        return self.topk_method == "noaux_tc"

    def with_draft_layer(self) -> ModelConfig:
        """The same model with its MTP layer, `num_hidden_layers`, served.

        Raises:
            CheckpointError: it has none.
        """
        if not self.num_nextn_predict_layers:
            raise CheckpointError(
                "config.json: num_nextn_predict_layers = 0: the model has no MTP layer that could draft tokens; "
                "use routers.speculate: auto or off"
            )
        return replace(self, draft_layers=1)

    def with_moe_layers(self, count: int) -> ModelConfig:
        """The same with the MTP layer served or not: whichever has so many layers with routed experts.

        Raises:
            CheckpointError: it has no MTP layer, and would have to.
        """
        plain = replace(self, draft_layers=0)
        return plain if count <= len(plain.moe_layers) else plain.with_draft_layer()

    @classmethod
    def load(cls, checkpoint: Path) -> ModelConfig:
        """Read `config.json` of the checkpoint directory.

        Raises:
            CheckpointError: the file is missing or unreadable, or describes a model that cannot be served.
        """
        path = checkpoint / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no such file; the model must be a directory with config.json, tokenizer.json and safetensors"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: holds {type(raw).__name__}, not an object; download it again")
        return cls.from_dict(raw, source=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, source: str = "config.json") -> ModelConfig:
        """Build from the parsed `config.json`; `source` is named in errors."""
        return _Reader(raw, source).model()


class _Reader:
    """Typed access to the raw dictionary; every refusal names the file, the key and the value."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def refuse(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key} = {self.raw.get(key)!r}: {why}")

    def integer(self, key: str, *, default: int | None = None, least: int = 1) -> int:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(key, f"must be an integer of at least {least}")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.refuse(key, "must be a number above 0")
        return float(value)

    def one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.raw.get(key, default)
        if value not in allowed:
            raise self.refuse(key, f"not supported; one of {', '.join(allowed)} is")
        return str(value)

    def model(self) -> ModelConfig:
        architectures = self.raw.get("architectures")
        if not isinstance(architectures, list) or not any(name in _ARCHITECTURES for name in architectures):
            raise self.refuse("architectures", f"not supported; Moray serves {' and '.join(_ARCHITECTURES)}")
        v2 = "DeepseekV2ForCausalLM" in architectures
        if self.raw.get("hidden_act", "silu") != "silu":
            raise self.refuse("hidden_act", "not supported; silu is")
        if self.raw.get("attention_bias"):
            raise self.refuse("attention_bias", "attention with biases is not supported")
        if self.raw.get("moe_layer_freq", 1) != 1:
            raise self.refuse("moe_layer_freq", "not supported; 1 (each layer after the dense ones) is")
        layers = self.integer("num_hidden_layers")
        dense = self.integer("first_k_dense_replace", default=0, least=0)
        if dense > layers:
            raise self.refuse("first_k_dense_replace", f"exceeds num_hidden_layers = {layers}")
        experts = self.integer("n_routed_experts")
        method = self.one_of("topk_method", _TOPK_METHODS, "greedy" if v2 else "noaux_tc")
        groups = self.integer("n_group", default=1) if method != "greedy" else 1
        kept = self.integer("topk_group", default=1) if method != "greedy" else 1
        top_k = self.integer("num_experts_per_tok")
        if experts % groups:
            raise self.refuse("n_group", f"does not divide n_routed_experts = {experts}")
        if kept > groups:
            raise self.refuse("topk_group", f"exceeds n_group = {groups}")
        if top_k > experts // groups * kept:
            raise self.refuse("num_experts_per_tok", f"exceeds the {experts // groups * kept} experts the groups leave")
        if method == "noaux_tc" and experts // groups < 2:
            raise self.refuse(
                "n_group", f"leaves {experts // groups} expert a group; groups are scored by their best two"
            )
        rope = self.integer("qk_rope_head_dim")
        if rope % 2:
            raise self.refuse("qk_rope_head_dim", "must be even: RoPE rotates pairs")
        return ModelConfig(
            vocab_size=self.integer("vocab_size"),
            hidden_size=self.integer("hidden_size"),
            num_hidden_layers=layers,
            first_k_dense_replace=dense,
            intermediate_size=self.integer("intermediate_size"),
            moe_intermediate_size=self.integer("moe_intermediate_size"),
            n_routed_experts=experts,
            num_experts_per_tok=top_k,
            n_shared_experts=self.integer("n_shared_experts", default=0, least=0)
            if self.raw.get("n_shared_experts")
            else 0,
            n_group=groups,
            topk_group=kept,
            topk_method=method,
            scoring_func=self.one_of("scoring_func", ("sigmoid", "softmax"), "softmax" if v2 else "sigmoid"),
            norm_topk_prob=bool(self.raw.get("norm_topk_prob", not v2)),
            routed_scaling_factor=self.number("routed_scaling_factor", default=1.0),
            num_attention_heads=self.integer("num_attention_heads"),
            q_lora_rank=None if self.raw.get("q_lora_rank") is None else self.integer("q_lora_rank"),
            kv_lora_rank=self.integer("kv_lora_rank"),
            qk_nope_head_dim=self.integer("qk_nope_head_dim"),
            qk_rope_head_dim=rope,
            v_head_dim=self.integer("v_head_dim"),
            rms_norm_eps=self.number("rms_norm_eps", default=1e-6),
            rope_theta=self._rope_theta(),
            rope_scaling=self._yarn(),
            max_position_embeddings=self.integer("max_position_embeddings"),
            tie_word_embeddings=bool(self.raw.get("tie_word_embeddings", False)),
            num_nextn_predict_layers=self.integer("num_nextn_predict_layers", default=0, least=0),
            weights_are_fp8=self._fp8(),
            bos_token_id=None if self.raw.get("bos_token_id") is None else self.integer("bos_token_id", least=0),
            eos_token_ids=self._eos_token_ids(),
        )

    def _eos_token_ids(self) -> tuple[int, ...]:
        found = self.raw.get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
            raise self.refuse("eos_token_id", "must be a token id, a list of them, or null")
        return tuple(ids)

    def _rope_parameters(self) -> dict[str, Any]:
        """Transformers 5 writes `rope_parameters`; the published files have `rope_theta` and `rope_scaling`."""
        parameters = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            raise self.refuse("rope_scaling", "must be an object or null")
        return parameters

    def _rope_theta(self) -> float:
        if "rope_theta" in self.raw:
            return self.number("rope_theta")
        theta = self._rope_parameters().get("rope_theta", 10000.0)
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
            raise self.refuse("rope_parameters", "rope_theta must be a number above 0")
        return float(theta)

    def _yarn(self) -> YarnScaling | None:
        parameters = self._rope_parameters()
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind == "default":
            return None
        if kind != "yarn":
            raise self.refuse("rope_scaling", f"type {kind!r} is not supported; yarn is")
        try:
            return YarnScaling(
                factor=float(parameters["factor"]),
                original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
                beta_fast=float(parameters.get("beta_fast") or 32.0),
                beta_slow=float(parameters.get("beta_slow") or 1.0),
                mscale=float(parameters.get("mscale") or 1.0),
                mscale_all_dim=float(parameters.get("mscale_all_dim") or 0.0),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self.refuse("rope_scaling", f"is not a complete YaRN description ({error!r})") from error

    def _fp8(self) -> bool:
        quantization = self.raw.get("quantization_config")
        if quantization is None:
            return False
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
            raise self.refuse(
                "quantization_config", "not supported; FP8 e4m3 in 128x128 blocks is, and plain BF16 or FP32"
            )
        if quantization.get("fmt", "e4m3") != "e4m3":
            raise self.refuse("quantization_config", "fmt is not supported; e4m3 is")
        if quantization.get("weight_block_size") != [FP8_BLOCK, FP8_BLOCK]:
            raise self.refuse("quantization_config", f"weight_block_size must be [{FP8_BLOCK}, {FP8_BLOCK}]")
        return True
