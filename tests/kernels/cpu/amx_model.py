"""The CPU kernels for AMX with its instructions in software (kernels/cpu/native/amx.h), for machines that have none."""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moray.kernels.cpu import library as module
from moray.kernels.cpu.library import Instructions, NativeLibrary, native

SOURCES = Path(__file__).parents[3] / "kernels" / "cpu" / "native"


@functools.cache
def amx_model(*, wrong: bool = False) -> NativeLibrary:
    """The library, built once a process; `wrong`: whose products miss every odd column.

    The rest of it needs AVX512-BF16, as every machine with AMX has.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None, "no C++ compiler: these tests build a library"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "amx_model.so"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-std=c++17", "-ffp-contract=off", "-w", "-pthread"]
            + [f"-DMORAY_AMX_MODEL={2 if wrong else 1}", "-o", str(path)]
            + [str(source) for source in sorted(SOURCES.glob("*.cpp"))],
            check=True,
            timeout=300,
        )
        return NativeLibrary(str(path))


@contextlib.contextmanager
def library_with(wanted: Instructions | None) -> Iterator[NativeLibrary]:
    """What these instructions can be tested with: the library, or the model where it is AMX that is missing. Whatever computes
    uses it meanwhile; its instructions and threads are afterwards what they were.
    """
    found = native()
    assert found is not None, "the package was installed without its CPU kernels: is there a C++ compiler?"
    if wanted is Instructions.AMX and found.best is Instructions.AVX512_BF16:
        found = amx_model()
    used, threads = found.used, found.threads
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may have changed `found` by another
        patch.setattr(module, "_load", lambda: found)
        try:
            yield found
        finally:
            found.use(used)
            found.set_threads(threads)
