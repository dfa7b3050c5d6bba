"""Random checkpoints in the published layout, for tests and benchmarks of Moray and of whatever runs on top of it.

Values depend on the seed and the tensor's name alone, so the same model can be written in any dtype and any number of
shards, and an FP8 checkpoint can be turned into an FP32 one of exactly equal values for another implementation to load.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..kernels.fp8 import dequantize_blocks, quantize_blocks, scale_shape
from .config import FP8_BLOCK, ModelConfig
from .tensor_names import SCALE_SUFFIX, ExpectedTensor, Role, TensorNames, layer_prefix

WeightDtype = Literal["float32", "bfloat16", "fp8"]

SMALL_CONFIG: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 320,
    "kv_lora_rank": 64,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 160,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 272,
}
"""`config.json` of the default model, 2M parameters. Nearly every matrix has ragged 128x128 blocks, on purpose."""

LOGIT_SCALE = 4.0
"""Standard deviation of the logits: rounding rarely changes the greedy token, and sampling still has a choice."""

SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
"""DeepSeek's special tokens in the order of their ids, from 0; the 256 bytes follow."""

_CODES_RMS = 100.0577
"""Root mean square of the finite e4m3 values, each as often as any other."""

_VISIBLE_SPECIAL_TOKENS = ("<think>", "</think>")

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def write_random_checkpoint(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    dtype: WeightDtype = "float32",
    shards: int = 1,
    seed: int = 0,
    tied: bool = False,
    mtp: bool = False,
    draw_codes: bool = False,
) -> Path:
    """Write a random model of DeepSeek-V3's architecture, with a byte-level tokenizer, ready to be served.

    Args:
        path: directory to create.
        overrides: keys of `config.json` to change from `SMALL_CONFIG`. For a V2 gate give `architectures`,
            `model_type`, `topk_method` and `scoring_func`.
        dtype: "fp8" stores as DeepSeek does: e4m3 with 128x128 scales; gates, embedding, head and norms in BF16; the
            correction bias in FP32 (which it is in a "bfloat16" checkpoint too).
        shards: 1 writes `model.safetensors`, more write an index beside them.
        seed: chooses the values, with the tensor's name.
        tied: the head is the embedding.
        mtp: add one MTP module, stored as layer `num_hidden_layers`.
        draw_codes: draw e4m3 codes and scales themselves: other values, as large, and written several times as fast, which
            counts for layers of DeepSeek-R1's width. A "bfloat16" checkpoint then holds the decoded values of the "fp8" one.

    Returns:
        `path`.
    """
    raw = dict(SMALL_CONFIG) | {"tie_word_embeddings": tied, "num_nextn_predict_layers": int(mtp)}
    raw["torch_dtype"] = "float32" if dtype == "float32" else "bfloat16"
    if dtype == "fp8":
        raw["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    raw |= dict(overrides or {})
    config = ModelConfig.from_dict(raw)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", raw)
    write_byte_tokenizer(path, vocab_size=config.vocab_size, context=config.max_position_embeddings)

    names = TensorNames(config)
    expected = [*names.dense(), *names.routed_experts(), *names.mtp()]
    writer = _ShardWriter(path, shards)
    elements_left, shards_left = sum(math.prod(tensor.shape) for tensor in expected), shards
    batch: dict[str, torch.Tensor] = {}
    in_batch = 0
    for tensor in expected:
        if draw_codes and dtype != "float32" and _is_fp8(tensor, "fp8"):
            drawn = _random_codes(tensor, seed)
            batch |= drawn if dtype == "fp8" else {tensor.name: _decoded(tensor, drawn)}
        else:
            batch |= _stored(tensor, _random_values(tensor, seed, tied=config.tie_word_embeddings), dtype)
        in_batch += math.prod(tensor.shape)
        if shards_left > 1 and in_batch * shards_left >= elements_left:
            writer.write(batch)
            elements_left, shards_left = elements_left - in_batch, shards_left - 1
            batch, in_batch = {}, 0
    writer.write(batch)
    writer.finish()
    return path


def dequantized_copy(source: Path, target: Path, *, mtp: bool = False) -> Path:
    """Write the checkpoint at `source` again in FP32, every element exactly equal to its decoded value.

    The copy is what a reference implementation without FP8 kernels loads. Read with the `safetensors` package rather
    than with Moray's own reader, so that a fault in one does not hide in the other.

    Args:
        source: a checkpoint directory of one or more shards.
        target: directory to create; one file.
        mtp: keep the MTP module, which reference implementations do not expect.

    Returns:
        `target`.
    """
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw.pop("quantization_config", None)
    raw["torch_dtype"] = "float32"
    layers = int(raw["num_hidden_layers"])
    if not mtp:
        raw["num_nextn_predict_layers"] = 0
    stored = {name: tensor for name, tensor in _read_all(source) if mtp or not name.startswith(layer_prefix(layers))}
    plain = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        scale_inv = stored.get(name + SCALE_SUFFIX)
        plain[name] = tensor.to(torch.float32) if scale_inv is None else dequantize_blocks(tensor, scale_inv)
    target.mkdir(parents=True, exist_ok=True)
    for other in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / other).exists():
            shutil.copyfile(source / other, target / other)
    _write_json(target / "config.json", raw)
    save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    return target


def write_byte_tokenizer(path: Path, *, vocab_size: int, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`: the special tokens, then one token for each byte.

    Ids from 263 up to `vocab_size` name no token, as the last ids of the published model name none.

    Raises:
        ValueError: `vocab_size` leaves no room for them.
    """
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise ValueError(
            f"vocab_size = {vocab_size} is too small for the byte-level tokenizer, which has {least} tokens"
        )
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *_byte_alphabet()))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token not in _VISIBLE_SPECIAL_TOKENS,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    ]
    _write_json(
        path / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": []},
        },
    )
    _write_json(
        path / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[1],
            "pad_token": SPECIAL_TOKENS[2],
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": _CHAT_TEMPLATE,
        },
    )


class _ShardWriter:
    """Writes `model.safetensors`, or numbered shards and their index when there are to be several."""

    def __init__(self, path: Path, shards: int) -> None:
        self.path = path
        self.shards = shards
        self.written = 0
        self.weight_map: dict[str, str] = {}
        self.total_size = 0

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.written += 1
        several = self.shards > 1
        file = f"model-{self.written:05}-of-{self.shards:06}.safetensors" if several else "model.safetensors"
        save_file(dict(tensors), self.path / file, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, file)
        self.total_size += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        assert self.written == self.shards, (self.written, self.shards)
        if self.shards > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": self.weight_map}
            _write_json(self.path / "model.safetensors.index.json", index)


def _random_values(tensor: ExpectedTensor, seed: int, *, tied: bool) -> torch.Tensor:
    """FP32 values that keep activations near one: the variance of a matrix is 1/in, gains are near 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {tensor.name}".encode()))
    values = torch.randn(tensor.shape, generator=generator)
    if tensor.role is Role.NORM:
        return values.mul_(0.1).add_(1.0)
    if tensor.role is Role.GATE_BIAS:
        return values.mul_(0.1)  # sigmoid scores of these gates spread by 0.2: the bias changes many choices, not all
    if tensor.role is Role.EMBEDDING and not tied:
        return values
    is_head = tensor.role is Role.EMBEDDING or tensor.name.endswith(("lm_head.weight", "shared_head.head.weight"))
    return values.mul_((LOGIT_SCALE if is_head else 1.0) / math.sqrt(tensor.shape[-1]))


def _stored(tensor: ExpectedTensor, values: torch.Tensor, dtype: WeightDtype) -> dict[str, torch.Tensor]:
    """What a checkpoint of `dtype` holds for one tensor, its scales included."""
    if dtype == "float32" or tensor.role is Role.GATE_BIAS:
        return {tensor.name: values}
    if _is_fp8(tensor, dtype):
        codes, scale_inv = quantize_blocks(values)
        return {tensor.name: codes, tensor.scale_name: scale_inv}
    return {tensor.name: values.to(torch.bfloat16)}


def _is_fp8(tensor: ExpectedTensor, dtype: WeightDtype) -> bool:
    plain = ("lm_head.weight", "shared_head.head.weight", "eh_proj.weight", "mlp.gate.weight")
    return dtype == "fp8" and tensor.role is Role.LINEAR and not tensor.name.endswith(plain)


def _random_codes(tensor: ExpectedTensor, seed: int) -> dict[str, torch.Tensor]:
    """Codes of all finite e4m3 values alike, with scales that give the matrix about the variance 1/in."""
    generator = np.random.default_rng(zlib.crc32(f"{seed} {tensor.name}".encode()))
    codes = np.frombuffer(bytearray(generator.bytes(math.prod(tensor.shape))), dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] ^= 1  # the two codes of NaN become those of +-448
    scale = generator.uniform(0.5, 1.5, scale_shape(*tensor.shape)) / (_CODES_RMS * math.sqrt(tensor.shape[-1]))
    return {
        tensor.name: torch.from_numpy(codes).view(torch.float8_e4m3fn).reshape(tensor.shape),
        tensor.scale_name: torch.from_numpy(scale.astype(np.float32)),
    }


def _decoded(tensor: ExpectedTensor, drawn: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return dequantize_blocks(drawn[tensor.name], drawn[tensor.scale_name], torch.bfloat16)


def _read_all(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (not a dictionary)
                yield name, shard.get_tensor(name)


def _byte_alphabet() -> Iterable[str]:
    """GPT-2's printable stand-in for each byte: itself where it is visible, else the next character from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_in = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(stand_in)) for byte in range(256)]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
