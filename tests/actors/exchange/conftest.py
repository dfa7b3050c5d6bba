"""Dispatches with an exchange and without, over hosts that a test plays and over real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moray.actors import layer_run, native_exchange
from moray.actors.testing import EngineParts
from moray.model.compute import Compute
from moray.model.testing import write_random_checkpoint

from .faulty_runs import Faulty
from .played_hosts import PlayedCluster
from .real_hosts import Pair


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("fp8"), dtype="fp8", seed=4)


@pytest.fixture(scope="package")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four layers with experts."""
    return write_random_checkpoint(tmp_path_factory.mktemp("deep"), {"num_hidden_layers": 5}, dtype="fp8", seed=6)


@pytest.fixture
def faulty(deep: Path) -> Iterator[Callable[..., Faulty]]:
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(contextlib.closing(Faulty(deep, **options)))


@pytest.fixture
def parts(checkpoint: Path) -> Iterator[EngineParts]:
    with contextlib.closing(EngineParts(checkpoint, compute=Compute.native())) as parts:
        yield parts


@pytest.fixture
def play() -> Iterator[Callable[..., PlayedCluster]]:
    """Makes clusters of played hosts."""
    with contextlib.ExitStack() as stack:

        def play(*arguments: Any, **options: Any) -> PlayedCluster:
            return stack.enter_context(contextlib.closing(PlayedCluster(*arguments, **options)))

        yield play


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native waits end when there is something to tell, however slow the machine is: counters do not depend on it."""
    monkeypatch.setattr(native_exchange, "_WAIT_US", 30_000_000)
    monkeypatch.setattr(layer_run, "_WAIT_US", 30_000_000)


@pytest.fixture
def pair(parts: EngineParts) -> Iterator[Callable[..., Pair]]:
    """Makes hosts with packed experts, and two dispatches to them."""
    with contextlib.ExitStack() as stack:
        yield lambda hosts, replicas=1: stack.enter_context(contextlib.closing(Pair(parts, hosts, replicas=replicas)))
