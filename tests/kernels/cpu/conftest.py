from __future__ import annotations

from collections.abc import Iterator

import pytest

from moray.kernels.cpu import library as module
from moray.kernels.cpu.library import Instructions, NativeLibrary, native

from .amx_model import library_with


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[NativeLibrary]:
    """The library; its instructions and threads are afterwards what they were. For AMX, where there is none, its model."""
    found = native()
    assert found is not None, "the package was installed without its CPU kernels: is there a C++ compiler?"
    wanted = request.node.callspec.params.get("instructions") if hasattr(request.node, "callspec") else None
    found = library_with(wanted, found)
    used, threads = found.used, found.threads
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may have changed `found` by the other one
        patch.setattr(module, "_load", lambda: found)
        yield found
    found.use(used)
    found.set_threads(threads)


@pytest.fixture(params=list(Instructions), ids=lambda one: one.name.lower())
def instructions(request: pytest.FixtureRequest, library: NativeLibrary) -> Instructions:
    """Each set of instructions that this machine has."""
    wanted: Instructions = request.param
    if wanted > library.best:
        pytest.skip(f"this machine has no {wanted.name}")
    library.use(wanted)
    return wanted
