"""Writes the checkpoints that speeds are compared on: random weights in the published layout.

    python tests/bench/make_checkpoint.py mid --fp8 --out build/mid-fp8
    python tests/bench/make_checkpoint.py mid --out build/mid-bf16
    python tests/bench/make_checkpoint.py tiny --fp8 --out build/tiny-fp8

`mid` has 1.4 billion parameters, 305 million of which work on a token; `tiny` has tiny-r1's shape, 10 million with its MTP
layer. A BF16 checkpoint holds the decoded values of the FP8 one. Activations stay near one and greedy answers do not fall into
one token, so that as many experts are asked as in a trained model. `--set KEY=VALUE` changes `config.json`: vLLM on CPUs takes
`tiny` only with `--set kv_lora_rank=512 --set qk_rope_head_dim=64`. The tokenizer is a byte-level BPE without a gap: every id
is some text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moray.configs.errors import MorayError
from moray.model.config import ModelConfig
from moray.model.testing import WeightDtype, write_random_checkpoint
from moray.model.tokenizer import Tokenizer

SHARDS = {"mid": 8, "tiny": 1}
"""Files. One is held in memory at a time, with what it is made of: below 2 GB for `mid`."""


def yarn(factor: float, original: int) -> dict[str, Any]:
    """`rope_scaling` as DeepSeek publishes it."""
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


COMMON: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}

MODELS: Mapping[str, Mapping[str, Any]] = {
    "mid": {
        **COMMON,
        "vocab_size": 32000,
        "hidden_size": 1024,
        "num_hidden_layers": 13,
        "intermediate_size": 4096,
        "moe_intermediate_size": 512,
        "n_routed_experts": 64,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 512,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "rope_scaling": yarn(40, 4096),
    },
    "tiny": {
        **COMMON,
        "vocab_size": 512,
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "max_position_embeddings": 2048,
        "rope_scaling": yarn(4, 512),
    },
}


def make_checkpoint(
    name: str, out: Path, *, fp8: bool, seed: int = 0, changes: Mapping[str, Any] | None = None
) -> Path:
    """Write one of `MODELS`, with tokenizer and generation settings.

    Args:
        name: key of `MODELS`.
        out: directory to create.
        fp8: e4m3 with 128x128 scales where the published models have them, else BF16.
        seed: chooses the weights.
        changes: keys of `config.json` to change.

    Returns:
        `out`.
    """
    raw = {**MODELS[name], **(changes or {})}
    dtype: WeightDtype = "fp8" if fp8 else "bfloat16"
    write_random_checkpoint(out, raw, dtype=dtype, shards=SHARDS[name], seed=seed, draw_codes=True)
    add_merges(out, int(raw["vocab_size"]))
    # As tiny-r1's: whoever asks for nothing gets the most likely token.
    settings = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return out


def add_merges(path: Path, vocab_size: int) -> None:
    """Give the byte-level tokenizer at `path` merges of letters until it has `vocab_size` tokens.

    Two letters become one token, then three, with a space before them or not: ordinary text takes two to three characters a
    token, and answers of random tokens are text too.
    """
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    letters, space = string.ascii_lowercase, "Ġ"
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    merges = itertools.chain(
        itertools.product(letters, letters),
        ((space, pair) for pair in pairs),
        itertools.product(pairs, letters),
        ((space + pair, letter) for pair in pairs for letter in letters),
    )
    chosen = [list(merge) for merge in itertools.islice(merges, vocab_size - len(vocab))]
    for left, right in chosen:
        vocab[left + right] = len(vocab)
    if len(vocab) != vocab_size:
        raise SystemExit(f"vocab_size = {vocab_size}: merges of letters reach up to {len(vocab)}; choose at most that")
    tokenizer["model"]["merges"] = chosen
    tokenizer["pre_tokenizer"]["use_regex"] = True  # merges end at the ends of words
    file.write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_change(text: str) -> tuple[str, Any]:
    """KEY=VALUE of `--set`; the value is JSON."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: must be KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: the value must be JSON, as in kv_lora_rank=512") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for, and say what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--fp8", action="store_true", help="FP8 weights as DeepSeek stores them; default BF16")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to create")
    parser.add_argument("--seed", type=int, default=0, help="chooses the weights")
    parser.add_argument(
        "--set", type=parse_change, action="append", default=[], metavar="KEY=VALUE", help="change config.json"
    )
    options = parser.parse_args(arguments)
    if options.out.exists() and any(options.out.iterdir()):
        raise SystemExit(f"{options.out} is not empty; name another directory")
    began = time.perf_counter()
    torch.set_num_threads(
        1
    )  # many small tensors: threads that wait for each other take 30 times as long on a busy machine
    try:
        make_checkpoint(options.model, options.out, fp8=options.fp8, seed=options.seed, changes=dict(options.set))
        config, tokenizer = ModelConfig.load(options.out), Tokenizer.load(options.out)
    except MorayError as error:
        raise SystemExit(str(error)) from None
    size = sum(file.stat().st_size for file in options.out.glob("*.safetensors"))
    print(
        f"{options.out}: {config.num_hidden_layers} layers of {config.hidden_size}, {config.n_routed_experts} experts, "
        f"{tokenizer.vocab_size} tokens, {size / 1e9:.2f} GB, {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
