"""Logits and greedy tokens against Hugging Face's `DeepseekV3ForCausalLM`, both in float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.kernels.experts import MlpWeights
from moray.kernels.mla import Segment
from moray.model.compute import Compute
from moray.model.loading import load_dense, load_experts, open_model
from moray.model.moe import LocalExperts
from moray.model.reference import reference_logits
from moray.model.testing import WeightDtype, dequantized_copy, write_random_checkpoint
from moray.model.transformer import ForwardBatch, Transformer
from moray.model.weights import RouterWeights, mlp_weights, router_weights

TOLERANCE = 1e-5
"""Of ||logits - oracle|| / ||oracle||, float32."""

PAGE = 16
CONTEXT = 192
STEPS = 64

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@dataclass(frozen=True)
class Shape:
    """One random model: what differs from `SMALL_CONFIG`, and how its weights are stored."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    dtype: WeightDtype = "float32"
    tied: bool = False


SHAPES = [
    Shape("plain"),
    Shape("no-q-lora", {"q_lora_rank": None}),
    Shape("one-group", {"n_group": 1, "topk_group": 1}),
    Shape("groups-4-keep-2", {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
    Shape("no-dense-layers", {"first_k_dense_replace": 0}),
    Shape("two-dense-layers", {"first_k_dense_replace": 2}),
    Shape("three-dense-layers", {"first_k_dense_replace": 3, "num_hidden_layers": 4}),
    Shape("two-shared-experts", {"n_shared_experts": 2}),
    Shape("yarn", {"rope_scaling": YARN}),
    Shape("yarn-no-q-lora-two-shared", {"rope_scaling": YARN, "q_lora_rank": None, "n_shared_experts": 2}),
    Shape("tied-head", tied=True),
    Shape("not-normalised", {"norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    Shape(
        "odd-sizes",
        {
            "hidden_size": 150,
            "intermediate_size": 99,
            "moe_intermediate_size": 51,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "q_lora_rank": 37,
            "kv_lora_rank": 45,
            "qk_nope_head_dim": 22,
            "qk_rope_head_dim": 10,
            "v_head_dim": 18,
            "vocab_size": 389,
            "num_hidden_layers": 2,
        },
    ),
    Shape("fp8-ragged-blocks", {"hidden_size": 200, "moe_intermediate_size": 130, "kv_lora_rank": 72}, dtype="fp8"),
    Shape("fp8-yarn-groups", {"rope_scaling": YARN, "hidden_size": 256, "n_group": 2, "topk_group": 1}, dtype="fp8"),
    Shape("bf16-stored", dtype="bfloat16"),
]


class Model:
    """A checkpoint twice: loaded by Moray, and by Hugging Face from an exactly equal float32 copy."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        from transformers import DeepseekV3ForCausalLM

        source = write_random_checkpoint(
            folder / "source",
            shape.overrides,
            dtype=shape.dtype,
            seed=7,
            tied=shape.tied,
        )
        self.config, checkpoint = open_model(source)
        dense, _ = load_dense(checkpoint, self.config)
        slots = [(layer, e) for layer in self.config.moe_layers for e in range(self.config.n_routed_experts)]
        experts, _ = load_experts(checkpoint, self.config, slots)
        self.weights: RouterWeights = router_weights(self.config, dense, Compute.on_cpu())
        self.experts: dict[int, dict[int, MlpWeights]] = {}
        for (layer, expert), stored in experts.items():
            self.experts.setdefault(layer, {})[expert] = mlp_weights(stored, Compute.on_cpu())
        self.oracle = DeepseekV3ForCausalLM.from_pretrained(
            dequantized_copy(source, folder / "float32"),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        ).eval()

    def transformer(self, pages: int = 64) -> Transformer:
        return Transformer(
            self.config,
            self.weights,
            LocalExperts(self.experts),
            pages=pages,
            page_size=PAGE,
            max_context=CONTEXT,
            compute=Compute.on_cpu(),
        )

    def prompt(self, seed: int, length: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.config.vocab_size, (length,), generator=generator).tolist()

    @torch.inference_mode()
    def oracle_logits(self, token_ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self.oracle(torch.tensor([token_ids])).logits[0]
        return logits

    def oracle_greedy(self, prompt: list[int], continuation: list[int]) -> list[int]:
        """What the oracle would choose at each step of `continuation`.

        If every choice equals the step it follows, `continuation` is the oracle's own greedy answer, step by step; one
        forward pass over all of it tells.
        """
        choices: list[int] = self.oracle_logits(prompt + continuation)[len(prompt) - 1 : -1].argmax(-1).tolist()
        return choices


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp("model"))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def table(index: int) -> list[int]:
    """Pages of sequence `index`, deliberately out of order."""
    per = -(-CONTEXT // PAGE)
    return [index * per + (i * 5) % per for i in range(per)]


def test_readable_form_matches(model: Model) -> None:
    tokens = model.prompt(0, 40)
    found = reference_logits(model.config, model.weights, model.experts, tokens)
    assert relative_error(found, model.oracle_logits(tokens)) <= TOLERANCE


def test_absorbed_paged_form_matches(model: Model) -> None:
    tokens = model.prompt(1, 75)
    batch = ForwardBatch(tokens, [Segment(0, len(tokens), 0, table(1))], range(len(tokens)))
    assert relative_error(model.transformer().forward(batch), model.oracle_logits(tokens)) <= TOLERANCE


def greedy(model: Model, prompts: list[list[int]], chunk: int) -> list[list[int]]:
    """64 greedy tokens for each prompt, all in one batch, prompts fed `chunk` tokens a step."""
    transformer = model.transformer()
    tokens = [list(prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    while any(len(t) < len(p) + STEPS for t, p in zip(tokens, prompts, strict=True)):
        ids: list[int] = []
        segments, rows, sampled = [], [], []
        for i, sequence in enumerate(tokens):
            length = min(chunk, len(sequence) - computed[i])
            segments.append(Segment(len(ids), length, computed[i], table(i)))
            ids += sequence[computed[i] : computed[i] + length]
            computed[i] += length
            if computed[i] == len(sequence):
                rows.append(len(ids) - 1)
                sampled.append(i)
        chosen = transformer.forward(ForwardBatch(ids, segments, rows)).argmax(-1).tolist()
        for i, token in zip(sampled, chosen, strict=True):
            tokens[i].append(token)
    return [t[len(p) : len(p) + STEPS] for t, p in zip(tokens, prompts, strict=True)]


def test_greedy_tokens_match_whole_chunked_and_batched(model: Model) -> None:
    prompts = [model.prompt(seed, length) for seed, length in ((2, 50), (3, 9), (4, 33), (5, 1))]
    together = greedy(model, prompts, chunk=CONTEXT)
    expected = [model.oracle_greedy(prompt, answer) for prompt, answer in zip(prompts, together, strict=True)]
    assert together == expected, "batched with others"
    assert greedy(model, prompts, chunk=13) == expected, "batched and in chunks"
    assert greedy(model, prompts[:1], chunk=CONTEXT) == expected[:1], "one prompt, whole"
    assert greedy(model, prompts[:1], chunk=7) == expected[:1], "one prompt, in chunks"
