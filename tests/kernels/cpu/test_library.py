from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import pytest

from moray.kernels.cpu import library as module
from moray.kernels.cpu.library import Instructions, NativeLibrary


def test_the_best_instructions_are_used(library: NativeLibrary) -> None:
    assert library.used == library.best >= Instructions.GENERIC


def test_instructions_that_are_not_there_are_refused(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_use", lambda wanted: -1)
    with pytest.raises(ValueError, match=f"AVX512_BF16: this machine's best are {library.best.name}"):
        library.use(Instructions.AVX512_BF16)


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_absurd_numbers_of_threads_are_refused(library: NativeLibrary, threads: int) -> None:
    with pytest.raises(ValueError, match=f"{threads} threads"):
        library.set_threads(threads)


def test_without_a_library_it_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package: None)
    module._load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="moray.kernels"):
            assert module.native() is None
            assert module.native() is None
            module.set_threads(1, packed=False)
    finally:
        module._load.cache_clear()
    assert len(caplog.records) == 1
    assert "Install a compiler" in caplog.records[0].message


def test_a_process_ends_with_threads_asleep() -> None:
    """Idle threads of the pool hold up nothing: not the end of the process, nor a child that was forked."""
    program = """
import os, torch
from moray.kernels.cpu.library import loaded
from moray.kernels.cpu.matrix import linear, pack
loaded().set_threads(3)
x, weight = torch.ones(40, 128, dtype=torch.bfloat16), pack(torch.ones(512, 128))
assert (linear(x, weight, torch.float32) == 128).all()
child = os.fork()
if not child:
    os._exit(0 if (linear(x, weight, torch.float32) == 128).all() else 1)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
