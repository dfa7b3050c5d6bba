from __future__ import annotations

import numpy as np
import pytest
import torch

from moray.kernels.combine import combine_parts, combine_reference
from moray.kernels.cpu.library import Instructions, NativeLibrary


@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 8, 200), (5, 3, 7), (40, 8, 1024), (0, 8, 16)])
def test_the_bits_are_those_of_the_definition(
    instructions: Instructions, library: NativeLibrary, tokens: int, top_k: int, width: int
) -> None:
    """Out of two places, in whatever order the rows lie there."""
    generator = torch.Generator().manual_seed(width)
    outputs = torch.randn(tokens * top_k, width, generator=generator).bfloat16()
    outputs[:1, :3] = torch.tensor([float("nan"), float("inf"), -0.0])[: outputs[:1, :3].shape[1]]
    weights = torch.rand(tokens, top_k, generator=generator)
    order = torch.randperm(tokens * top_k, generator=generator).numpy()
    half = len(order) // 2
    parts = [(order[:half], outputs[order[:half]]), (order[half:], outputs[order[half:]])]
    expected = combine_reference(outputs.view(tokens, top_k, width), weights)
    for threads in (1, 2):
        library.set_threads(threads)
        found = combine_parts(parts, weights, like=outputs)
        assert np.array_equal(found.numpy(), expected.numpy(), equal_nan=True)
