"""Settings every test shares."""

from __future__ import annotations

import os

# Before torch is imported: OpenMP threads that spin while they wait starve the other processes of a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Tests compare bits and drive several processes; the sizes are too small for threads to pay."""
    torch.set_num_threads(1)
