"""Architectures: published ones are read as they are, others are refused by key and value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moray.configs.errors import CheckpointError
from moray.model.config import ModelConfig, YarnScaling
from moray.model.testing import SMALL_CONFIG

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
R1: dict[str, Any] = {
    **SMALL_CONFIG,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
    "rope_scaling": YARN,
    "quantization_config": FP8,
}
V2_LITE: dict[str, Any] = {
    **R1,
    "architectures": ["DeepseekV2ForCausalLM"],
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "quantization_config": None,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}
V2 = {
    **V2_LITE,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
    "q_lora_rank": 1536,
}
KIMI_K2 = {**R1, "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "num_attention_heads": 64, "rope_theta": 5e4}
MOONLIGHT = {**KIMI_K2, "n_routed_experts": 64, "q_lora_rank": None, "rope_scaling": None, "quantization_config": None}


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def test_r1() -> None:
    config = ModelConfig.from_dict(R1)
    assert (config.qk_head_dim, config.latent_dim, config.moe_layers) == (192, 576, range(3, 61))
    assert (config.scoring_func, config.has_correction_bias, config.weights_are_fp8) == ("sigmoid", True, True)
    assert config.rope_scaling == YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert (config.bos_token_id, config.eos_token_ids) == (0, (1,))


@pytest.mark.parametrize("raw", [V2_LITE, V2, KIMI_K2, MOONLIGHT], ids=["v2-lite", "v2", "kimi-k2", "moonlight"])
def test_the_family_is_accepted(raw: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(raw)
    v2 = raw["architectures"] == ["DeepseekV2ForCausalLM"]
    assert config.scoring_func == ("softmax" if v2 else "sigmoid")
    assert config.has_correction_bias is not v2
    assert config.q_lora_rank == raw["q_lora_rank"]
    assert config.n_group == raw["n_group"]


@pytest.mark.parametrize("raw", [R1, V2_LITE, MOONLIGHT], ids=["r1", "v2-lite", "moonlight"])
def test_transformers_5_writes_rope_parameters(raw: dict[str, Any]) -> None:
    new = without(raw, "rope_theta", "rope_scaling")
    scaling = without(raw["rope_scaling"] or {}, "type")
    kind = "yarn" if scaling else "default"
    new["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": raw["rope_theta"]}
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(raw)


def test_greedy_ignores_groups() -> None:
    config = ModelConfig.from_dict({**V2_LITE, "n_group": 8, "topk_group": 3})
    assert (config.n_group, config.topk_group) == (1, 1)


@pytest.mark.parametrize(("eos", "ids"), [(1, (1,)), ([1, 7], (1, 7)), (None, ())], ids=["one", "several", "none"])
def test_end_tokens(eos: Any, ids: tuple[int, ...]) -> None:
    assert ModelConfig.from_dict({**SMALL_CONFIG, "eos_token_id": eos}).eos_token_ids == ids


def test_defaults_where_published_files_are_silent() -> None:
    silent = ("n_shared_experts", "rms_norm_eps", "routed_scaling_factor", "tie_word_embeddings", "eos_token_id")
    config = ModelConfig.from_dict(without(dict(SMALL_CONFIG), *silent))
    assert replace(config, rms_norm_eps=1e-6, routed_scaling_factor=1.0) == config
    assert (config.n_shared_experts, config.tie_word_embeddings, config.eos_token_ids) == (0, False, ())


MISSING = object()

REFUSALS: list[tuple[str, Any]] = [
    ("architectures", ["LlamaForCausalLM"]),
    ("architectures", None),
    ("architectures", [["x"]]),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("moe_layer_freq", 2),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", "3"),
    ("hidden_size", 192.0),
    ("hidden_size", True),
    ("vocab_size", MISSING),
    ("kv_lora_rank", None),
    ("q_lora_rank", 0),
    ("first_k_dense_replace", 4),
    ("first_k_dense_replace", -1),
    ("n_group", 3),
    ("n_group", 8),
    ("topk_group", 5),
    ("num_experts_per_tok", 5),
    ("topk_method", "random"),
    ("scoring_func", "relu"),
    ("qk_rope_head_dim", 15),
    ("routed_scaling_factor", 0),
    ("rms_norm_eps", "small"),
    ("rope_theta", -1),
    ("rope_scaling", {"type": "linear", "factor": 2}),
    ("rope_scaling", {"type": "yarn", "factor": 2}),
    ("rope_scaling", {**YARN, "factor": "big"}),
    ("rope_scaling", "yarn"),
    ("quantization_config", {"quant_method": "gptq"}),
    ("quantization_config", {**FP8, "fmt": "e5m2"}),
    ("quantization_config", {**FP8, "weight_block_size": [64, 64]}),
    ("quantization_config", {**FP8, "weight_block_size": 128}),
    ("quantization_config", "fp8"),
    ("eos_token_id", "one"),
    ("eos_token_id", [1, "two"]),
    ("eos_token_id", -1),
    ("bos_token_id", "zero"),
]


@pytest.mark.parametrize(("key", "value"), REFUSALS, ids=[f"{k}={v if v is not MISSING else ''}" for k, v in REFUSALS])
def test_refusals_name_file_key_and_value(key: str, value: Any) -> None:
    raw = without(dict(SMALL_CONFIG), key)
    if value is not MISSING:
        raw[key] = value
    with pytest.raises(CheckpointError) as refusal:
        ModelConfig.from_dict(raw, source="model/config.json")
    shown = None if value is MISSING else value
    assert str(refusal.value).startswith(f"model/config.json: {key} = {shown!r}: ")


def test_rope_parameters_that_cannot_be_read() -> None:
    raw = without(dict(SMALL_CONFIG), "rope_theta", "rope_scaling")
    with pytest.raises(CheckpointError, match="rope_theta"):
        ModelConfig.from_dict({**raw, "rope_parameters": {"rope_type": "default", "rope_theta": "large"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("{", "cannot be read as JSON"), ("[]", "holds list, not an object")],
    ids=["missing", "broken", "list"],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as refusal:
        ModelConfig.load(tmp_path)
    assert message in str(refusal.value)
    assert str(tmp_path / "config.json") in str(refusal.value)


def test_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(R1))
    assert ModelConfig.load(tmp_path) == ModelConfig.from_dict(R1)
