"""One computation ahead of the first request: what is set up lazily, from thread pools to compiled kernels, is there then."""

from __future__ import annotations

import torch

from ..kernels.experts import ExpertWeights, grouped_mlp
from ..kernels.fp8 import scale_shape
from ..model.compute import Compute
from ..model.config import ModelConfig
from ..model.loading import StoredLinear, StoredMlp
from ..model.weights import mlp_weights

_TOKENS = (1, 16, 32, 64)
"""For one expert: each of the tiles that `grouped_gemm.token_tile` chooses among, hence each of its kernels."""


def warm_up(config: ModelConfig, compute: Compute) -> None:
    """Run an expert of the model's shape, all of zeros, as loading and serving would."""
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size

    def linear(rows: int, columns: int) -> StoredLinear:
        if not config.weights_are_fp8:
            return StoredLinear(torch.zeros(rows, columns, dtype=compute.dtype), None)
        codes = torch.zeros(rows, columns, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return StoredLinear(codes, torch.ones(scale_shape(rows, columns)))

    mlp = StoredMlp(linear(intermediate, hidden), linear(intermediate, hidden), linear(hidden, intermediate))
    with torch.inference_mode():
        experts = ExpertWeights({0: mlp_weights(mlp, compute)})
        for tokens in _TOKENS:
            hidden_states = torch.zeros(tokens, hidden, dtype=compute.dtype, device=compute.device)
            rows = torch.arange(tokens, dtype=torch.int32, device=compute.device)
            grouped_mlp(hidden_states, rows, torch.zeros_like(rows), experts)
