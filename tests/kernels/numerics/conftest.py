"""The numbers of every Triton kernel: interpreted on CPU tensors (`TRITON_INTERPRET=1`), or on a real GPU where there is one.

One set of tests, two ways to run it: `make test` starts a process of its own for the first, and the second is the `gpu`
suite. In a process that can do neither, nothing here is collected; `make test` never relies on that process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moray.kernels import interpreter, launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker("gpu")


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where a kernel's tensors live. Afterwards the CPU path is in force again for CPU tensors."""
    if not INTERPRETED:
        yield torch.device("cuda")
        return
    interpreter.install()
    yield torch.device("cpu")
    launch.interpreted_architecture = None


@pytest.fixture
def as_architecture(device: torch.device) -> Callable[[int], None]:
    """Interpret as one GPU generation would; on a real device, skip what it is not."""

    def choose(architecture: int) -> None:
        if INTERPRETED:
            interpreter.install(architecture)
        elif launch.architecture(device) != architecture:
            pytest.skip(f"this device is sm_{launch.architecture(device)}, the test is for sm_{architecture}")

    return choose
