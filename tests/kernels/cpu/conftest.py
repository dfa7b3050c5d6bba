from __future__ import annotations

from collections.abc import Iterator

import pytest

from moray.kernels.cpu.library import Instructions, NativeLibrary, native


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    """The library; its instructions and threads are afterwards what they were."""
    found = native()
    assert found is not None, "the package was installed without its CPU kernels: is there a C++ compiler?"
    used, threads = found.used, found.threads
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
