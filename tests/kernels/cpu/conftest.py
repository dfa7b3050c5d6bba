from __future__ import annotations

from collections.abc import Iterator

import pytest

from moray.kernels.cpu.library import Instructions, NativeLibrary

from .amx_model import library_with


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[NativeLibrary]:
    """The library; its instructions and threads are afterwards what they were. For AMX, where there is none, its model."""
    wanted = request.node.callspec.params.get("instructions") if hasattr(request.node, "callspec") else None
    with library_with(wanted) as found:
        yield found


@pytest.fixture(params=list(Instructions), ids=lambda one: one.name.lower())
def instructions(request: pytest.FixtureRequest, library: NativeLibrary) -> Instructions:
    """Each set of instructions that this machine has."""
    wanted: Instructions = request.param
    if wanted > library.best:
        pytest.skip(f"this machine has no {wanted.name}")
    library.use(wanted)
    return wanted
