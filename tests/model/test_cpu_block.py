"""Layers over the native CPU kernels: what they compute, and that a token's bits do not depend on its company."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.kernels.attention_plan import Segment
from moray.kernels.cpu.attention import BatchTables
from moray.kernels.cpu.library import Instructions, NativeLibrary
from moray.kernels.cpu.matrix import linear as packed_linear
from moray.kernels.cpu.matrix import pack
from moray.kernels.experts import MlpWeights
from moray.kernels.gate import select_experts_reference
from moray.kernels.packed import PackedWeight
from moray.model.compute import Compute
from moray.model.config import ModelConfig
from moray.model.cpu_block import CpuBlock
from moray.model.loading import load_dense, load_experts, open_model
from moray.model.moe import GateWeights, LocalExperts
from moray.model.reference import reference_logits
from moray.model.testing import WeightDtype, write_random_checkpoint
from moray.model.transformer import ForwardBatch, Transformer
from moray.model.weights import RouterWeights, mlp_weights, router_weights

from ..kernels.cpu.amx_model import library_with

PAGE = 8

V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "q_lora_rank": None,
}

MODELS: Mapping[str, tuple[WeightDtype, Mapping[str, Any]]] = {
    "fp8": ("fp8", {}),
    "fp8, heads of whole blocks": ("fp8", {"qk_nope_head_dim": 128, "v_head_dim": 128, "kv_lora_rank": 144}),
    "bf16, no latent queries, softmax": ("bfloat16", V2),
    "fp32 stored": ("float32", {"moe_intermediate_size": 100, "intermediate_size": 72}),
}
"""`kv_lora_rank` has a ragged block; 100 and 72 no whole tiles."""


@dataclass(frozen=True)
class Model:
    config: ModelConfig
    weights: RouterWeights
    experts: Mapping[int, Mapping[int, MlpWeights]]

    @classmethod
    def load(cls, path: Path, compute: Compute) -> Model:
        config, checkpoint = open_model(path)
        dense, _ = load_dense(checkpoint, config)
        keys = [(layer, expert) for layer in config.moe_layers for expert in range(config.n_routed_experts)]
        loaded, _ = load_experts(checkpoint, config, keys)
        experts: dict[int, dict[int, MlpWeights]] = {}
        for (layer, expert), stored in loaded.items():
            experts.setdefault(layer, {})[expert] = mlp_weights(stored, compute)
        return cls(config, router_weights(config, dense, compute), experts)

    def transformer(self, **settings: Any) -> Transformer:
        experts = LocalExperts(self.experts)
        sizes: dict[str, Any] = {"pages": 40, "page_size": PAGE, "max_context": 160, "compute": Compute.native()}
        return Transformer(self.config, self.weights, experts, **sizes | settings)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dtype, overrides = MODELS[request.param]
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), overrides, dtype=dtype, seed=5)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return Model.load(checkpoint, Compute.native())


@pytest.fixture(params=list(Instructions), ids=lambda one: one.name.lower())
def instructions(request: pytest.FixtureRequest) -> Iterator[NativeLibrary]:
    with library_with(request.param) as library:
        if request.param > library.best:
            pytest.skip(f"this machine has no {request.param.name}")
        library.use(request.param)
        yield library


def prompt(config: ModelConfig, length: int, seed: int) -> list[int]:
    return torch.randint(7, config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(transformer: Transformer, prompts: Sequence[list[int]], chunks: Sequence[int]) -> list[torch.Tensor]:
    """The last logits of every prompt: all in one batch, so many tokens of each at a time, each on pages of its own."""
    tables = [list(range(10 * number, 10 * number + 10)) for number in range(len(prompts))]
    starts, last = [0] * len(prompts), [torch.empty(0)] * len(prompts)
    while any(start < len(ids) for start, ids in zip(starts, prompts, strict=True)):
        token_ids: list[int] = []
        segments, rows, who = [], [], []
        for number, (ids, chunk) in enumerate(zip(prompts, chunks, strict=True)):
            taken = ids[starts[number] : starts[number] + chunk]
            if not taken:
                continue
            segments.append(Segment(len(token_ids), len(taken), starts[number], tables[number]))
            token_ids += taken
            rows.append(len(token_ids) - 1)
            who.append(number)
            starts[number] += len(taken)
        for number, row in zip(who, transformer.forward(ForwardBatch(token_ids, segments, rows)), strict=True):
            last[number] = row
    return last


def test_logits_are_those_of_the_model(instructions: NativeLibrary, checkpoint: Path, model: Model) -> None:
    """Against fp32 throughout; where bf16 decides an expert otherwise, a logit may differ by more, so most must be near."""
    ids = prompt(model.config, 70, 1)
    plain = Model.load(checkpoint, Compute.on_cpu())
    expected = reference_logits(plain.config, plain.weights, plain.experts, ids)
    transformer = model.transformer()
    segment = Segment(0, len(ids), 0, list(range(9)))
    found = transformer.forward(ForwardBatch(ids, [segment], range(len(ids))))
    error = (found - expected).abs().amax(-1) / expected.std()
    assert error.median() < 0.05
    assert error.quantile(0.8) < 0.2


def test_a_sequence_has_the_same_bits_alone_and_in_company(instructions: NativeLibrary, model: Model) -> None:
    """In one go, in chunks around every tile size, token by token, beside others, by one thread and by several."""
    prompts = [prompt(model.config, length, length) for length in (70, 33, 1, 65)]
    instructions.set_threads(1)
    expected = [logits(model.transformer(), [ids], [len(ids)])[0] for ids in prompts]
    for threads in (1, 3):
        instructions.set_threads(threads)
        for chunks in ((70, 33, 1, 65), (9, 8, 1, 13)):
            found = logits(model.transformer(), prompts, chunks)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other), (threads, chunks)


def test_two_parts_of_a_batch_have_the_bits_of_one(model: Model) -> None:
    prompts = [prompt(model.config, length, length) for length in (70, 33, 1)]
    expected = logits(model.transformer(), prompts, (35, 33, 1))
    found = logits(model.transformer(micro_batch_tokens=2), prompts, (35, 33, 1))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def counting_rows(begin: Callable[..., Any], rows: list[int]) -> Callable[..., Any]:
    def counting(hidden_states: torch.Tensor, *rest: Any) -> Any:
        rows.append(hidden_states.shape[0])
        return begin(hidden_states, *rest)

    return counting


@pytest.mark.usefixtures("instructions")
def test_rows_that_are_not_sampled_spare_the_last_layer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks in two halves of a prompt, one of them behind cached rows, beside decoding and drafts that are verified."""
    ids = prompt(model.config, 60, 7)
    tables = [list(range(10 * number, 10 * number + 10)) for number in range(3)]
    begun = ForwardBatch(ids, [Segment(0, 30, 0, tables[0]), Segment(30, 30, 0, tables[1])], ())
    mixed = ForwardBatch(
        ids,
        [Segment(0, 21, 30, tables[0]), Segment(21, 3, 30, tables[1]), Segment(24, 36, 0, tables[2])],
        (20, 21, 22, 23, 59),
    )
    for micro_batch_tokens in (2, 1000):
        spared, whole = (model.transformer(micro_batch_tokens=micro_batch_tokens) for _ in range(2))
        last, entered = spared.blocks[-1], list[int]()
        monkeypatch.setattr(last, "begin", counting_rows(last.begin, entered))
        for batch in (begun, mixed):
            expected = whole.hidden_states(batch)[list(batch.sample_rows)]
            assert torch.equal(spared.sampled_states(batch), expected)
            assert torch.equal(spared.cache, whole.cache)
        assert entered == [5], "what is sampled, and nothing where nothing is"


def test_rows_that_nobody_may_see_are_not_read(model: Model) -> None:
    ids = prompt(model.config, 20, 3)
    clean, poisoned = model.transformer(), model.transformer()
    poisoned.cache.fill_(float("nan"))
    expected = logits(clean, [ids], [6])[0]
    assert torch.equal(logits(poisoned, [ids], [6])[0], expected)
    assert expected.isfinite().all()


def through_gate(
    model: Model, gate: GateWeights, hidden: torch.Tensor, pages: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of tokens [T, H] of one sequence, if this is the first gate: what it is given, and the experts and weights it chooses."""
    transformer, layer = model.transformer(), model.config.first_k_dense_replace
    block = transformer.block(layer, replace(model.weights.blocks[layer], gate=gate), LocalExperts(model.experts))
    assert isinstance(block, CpuBlock)
    positions = transformer.positions([Segment(0, len(hidden), 0, list(pages))])
    assert isinstance(positions, BatchTables)
    normed, ids, weights = block.attention(hidden, positions, transformer.cache[layer])
    assert ids is not None
    assert weights is not None
    return normed, ids, weights


def chosen_by_definition(
    config: ModelConfig, logits: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return select_experts_reference(
        logits,
        top_k=config.num_experts_per_tok,
        scoring=config.scoring_func,
        correction_bias=bias,
        groups=config.n_group,
        kept_groups=config.topk_group,
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )


def first_gate(model: Model) -> GateWeights:
    gate = model.weights.blocks[model.config.first_k_dense_replace].gate
    assert gate is not None
    return gate


def test_the_gate_chooses_as_its_definition_says(instructions: NativeLibrary, model: Model) -> None:
    """Scores may differ in the last bits of exp; ids where two are that near are not compared."""
    gate = first_gate(model)
    assert isinstance(gate.weight, PackedWeight)
    hidden = torch.randn(50, model.config.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    normed, ids, weights = through_gate(model, gate, hidden, range(7))
    expected_ids, expected = chosen_by_definition(
        model.config, packed_linear(normed, gate.weight, torch.float32), gate.correction_bias
    )
    same = (ids == expected_ids).all(-1)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(weights[same], expected[same], rtol=1e-5, atol=0.0)


def test_the_gate_chooses_the_same_of_equals_and_of_what_is_no_number(
    instructions: NativeLibrary, model: Model
) -> None:
    """All scores are equal, so that the biases alone decide: many of them equal, some NaN, infinite, or 0 of either sign."""
    gate, experts, width = first_gate(model), model.config.n_routed_experts, model.config.hidden_size
    zeros = pack(torch.zeros(experts, width, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(2)
    special = torch.tensor([0.0, -0.0, 0.0, 1.0, -1.0, -0.5, math.inf, -math.inf, math.nan])
    hidden = torch.randn(1, width, generator=generator).bfloat16()
    for _ in range(100):
        bias = special[torch.randint(len(special), (experts,), generator=generator)]
        _, ids, _ = through_gate(model, replace(gate, weight=zeros, correction_bias=bias), hidden.clone(), [0])
        expected, _ = chosen_by_definition(model.config, torch.zeros(1, experts), bias)
        assert torch.equal(ids, expected), bias.tolist()


def test_packed_weights_need_bf16_pages() -> None:
    with pytest.raises(ValueError, match="KV pages in bfloat16"):
        Compute(torch.device("cpu"), torch.bfloat16, fp8_kv=True, packed=True)
