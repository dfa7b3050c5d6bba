from __future__ import annotations

import pytest
import torch

from moray.kernels.rope import apply_rope, inverse_frequencies, rope_reference, rotation_table

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rotation(tokens: int, dim: int, device: torch.device) -> torch.Tensor:
    return rotation_table(inverse_frequencies(dim, 10000.0), 4000 + tokens, 1.25)[4000:].to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 128, 64), (3, 3, 10), (4, 1, 2), (5, 64), (0, 4, 64)], ids=str)
def test_the_bits_of_torch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(sum(shape))
    x = torch.randn(shape, device=device).to(dtype)
    turn = rotation(shape[0], shape[-1], device)
    found = apply_rope(x, turn)
    assert found.shape == x.shape
    assert torch.equal(found, rope_reference(x, turn))


def test_a_slice_of_each_head(device: torch.device) -> None:
    """What comes before and after the slice is not read."""
    wide = torch.full((3, 5, 40), float("nan"), dtype=torch.bfloat16, device=device)
    wide[..., 17:33] = torch.randn(3, 5, 16, device=device).bfloat16()
    x, turn = wide[..., 17:33], rotation(3, 16, device)
    assert torch.equal(apply_rope(x, turn), rope_reference(x.clone(), turn))
    every_other = torch.randn(3, 4, 32, device=device)[..., ::2]
    assert torch.equal(apply_rope(every_other, turn), rope_reference(every_other, turn))


def test_nan_stays_in_its_pair(device: torch.device) -> None:
    x = torch.ones(2, 3, 8, device=device)
    x[1, 2, 5] = float("nan")
    assert apply_rope(x, rotation(2, 8, device)).isnan().nonzero().tolist() == [[1, 2, 4], [1, 2, 5]]
