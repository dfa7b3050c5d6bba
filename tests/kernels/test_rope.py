"""RoPE and YaRN against transformers' own tables and a rotation written with complex numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moray.kernels.rope import (
    apply_rope,
    inverse_frequencies,
    rotation_table,
    yarn_inverse_frequencies,
    yarn_mscale,
)
from moray.model.attention import rope_rotation, softmax_scale
from moray.model.config import ModelConfig
from moray.model.testing import SMALL_CONFIG

SCALINGS: dict[str, dict[str, Any]] = {
    "r1": {"factor": 40.0, "original_max_position_embeddings": 4096, "dim": 64},
    "kimi": {"factor": 32.0, "original_max_position_embeddings": 4096, "dim": 64, "theta": 50000.0},
    "tiny": {"factor": 4.0, "original_max_position_embeddings": 512, "dim": 32},
    "short": {"factor": 4.0, "original_max_position_embeddings": 32, "dim": 16},
    "fast-and-slow": {"factor": 8.0, "original_max_position_embeddings": 2048, "dim": 48, "fast": 16, "slow": 2},
}


def published(scaling: dict[str, Any]) -> dict[str, Any]:
    return {
        **SMALL_CONFIG,
        "qk_rope_head_dim": scaling["dim"],
        "rope_theta": scaling.get("theta", 10000.0),
        "max_position_embeddings": int(scaling["factor"] * scaling["original_max_position_embeddings"]),
        "rope_scaling": {
            "type": "yarn",
            "factor": scaling["factor"],
            "original_max_position_embeddings": scaling["original_max_position_embeddings"],
            "beta_fast": scaling.get("fast", 32),
            "beta_slow": scaling.get("slow", 1),
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }


@pytest.mark.parametrize("name", SCALINGS)
def test_yarn_frequencies_are_those_of_transformers(name: str) -> None:
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    config = DeepseekV3Config(**{k: v for k, v in published(scaling).items() if k != "architectures"})
    config.head_dim = scaling["dim"]
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    found = yarn_inverse_frequencies(
        scaling["dim"],
        scaling.get("theta", 10000.0),
        factor=scaling["factor"],
        original_context=scaling["original_max_position_embeddings"],
        beta_fast=scaling.get("fast", 32),
        beta_slow=scaling.get("slow", 1),
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    ours = ModelConfig.from_dict(published(scaling))
    first = rope_rotation(ours, 1)[0, 0, 0]
    assert float(first) == pytest.approx(attention_factor), "position 0 is not turned, only scaled"


def test_plain_frequencies() -> None:
    assert inverse_frequencies(8, 10000.0).tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])


@pytest.mark.parametrize(("factor", "mscale", "expected"), [(1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (40.0, 1.0, 1.3688879)])
def test_mscale(factor: float, mscale: float, expected: float) -> None:
    assert yarn_mscale(factor, mscale) == pytest.approx(expected)
    assert yarn_mscale(factor, 0.0) == 1.0


def test_softmax_scale_of_r1() -> None:
    raw = {**published(SCALINGS["r1"]), "qk_nope_head_dim": 128}
    assert softmax_scale(ModelConfig.from_dict(raw)) == pytest.approx(192**-0.5 * 1.3688879454**2)
    assert softmax_scale(ModelConfig.from_dict({**raw, "rope_scaling": None})) == pytest.approx(192**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(), (3,)], ids=["keys", "queries"])
def test_neighbouring_columns_are_rotated_together(heads: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(5, *heads, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    frequencies = inverse_frequencies(8, 100.0)
    found = apply_rope(x, rotation_table(frequencies, 5, 1.5))
    turn = torch.polar(torch.full((5, 4), 1.5), torch.outer(torch.arange(5.0), frequencies))
    turn = turn.view(5, *(1 for _ in heads), 4)
    expected = torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (4, 2))) * turn).flatten(-2)
    assert found.dtype is dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-6)


def test_scores_depend_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, 16, generator=generator)
    table = rotation_table(inverse_frequencies(16, 1000.0), 60, 1.0)

    def score(at: int, other: int) -> float:
        rotated = [apply_rope(x[None], table[p : p + 1]) for x, p in ((query, at), (key, other))]
        return float((rotated[0] * rotated[1]).sum())

    assert score(10, 3) == pytest.approx(score(57, 50), abs=1e-4)
    assert not math.isclose(score(10, 3), score(10, 4), abs_tol=1e-4)
