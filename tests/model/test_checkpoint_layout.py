"""What is known of experts without reading them, and reads that are ended before they are done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from moray.model import reader
from moray.model.loading import StoredMlp, expert_layout, load_experts, open_model
from moray.model.reader import BytesRead
from moray.model.testing import WeightDtype, write_random_checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_the_layout_of_an_expert_is_what_reading_gives(tmp_path: Path, dtype: WeightDtype) -> None:
    config, checkpoint = open_model(write_random_checkpoint(tmp_path / "model", dtype=dtype), verify="headers")
    read, bytes_read = load_experts(checkpoint, config, [(2, 3)])
    layout = expert_layout(checkpoint, config, 2, 3)
    assert layout.nbytes == read[2, 3].nbytes == bytes_read.data
    for planned, stored in zip(tensors_of(layout), tensors_of(read[2, 3]), strict=True):
        if planned is None or stored is None:
            assert planned is stored is None
        else:
            assert planned.is_meta
            assert (planned.shape, planned.dtype) == (stored.shape, stored.dtype)
    with pytest.raises(ValueError, match="no routed expert 3 in layer 0"):
        expert_layout(checkpoint, config, 0, 3)


def tensors_of(mlp: StoredMlp) -> list[torch.Tensor | None]:
    return [
        part for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj) for part in (linear.weight, linear.scale_inv)
    ]


def test_a_read_can_be_ended_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 4096)
    config, checkpoint = open_model(write_random_checkpoint(tmp_path / "model"), verify="headers")
    reads = 0
    real = os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal reads
        reads += 1
        return real(descriptor, buffers, offset)

    def check() -> None:
        if reads == 3:
            raise RuntimeError("nobody needs it any more")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(RuntimeError, match="nobody needs it any more"):
        load_experts(checkpoint, config, [(1, 0)], threads=1, check=check)
    assert reads == 3


def test_bytes_add_up() -> None:
    assert BytesRead(1, 2) == BytesRead(1, 2, copied=0)
    assert BytesRead(1, 2, 3) + BytesRead(10, 20, 30) == BytesRead(data=11, headers=22, copied=33)
