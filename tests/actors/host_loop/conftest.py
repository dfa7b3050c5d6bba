"""Expert hosts with packed experts: with their native loop, and with Python alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moray.actors.expert_host import ExpertHost
from moray.model.compute import Compute
from moray.model.testing import write_random_checkpoint

from .packed_hosts import EPOCH, SLOTS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("fp8"), dtype="fp8", seed=9)


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Callable[[], ExpertHost]]:
    """Starts hosts with packed experts."""
    with contextlib.ExitStack() as stack:

        def start() -> ExpertHost:
            host = ExpertHost("expert-host-0", compute=Compute.native())
            assert host._loop is not None, (
                "the package was installed without its native host loop: is there a compiler?"
            )
            host.load(checkpoint, SLOTS, epoch=EPOCH)
            stack.callback(host.stop)
            return host

        yield start


@pytest.fixture
def host(start: Callable[[], ExpertHost]) -> ExpertHost:
    return start()


@pytest.fixture
def python(start: Callable[[], ExpertHost]) -> ExpertHost:
    """The same host without its loop."""
    host = start()
    host._loop = None
    return host
