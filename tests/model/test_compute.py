"""What a process computes with: instructions of its CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from moray.configs.errors import ConfigError
from moray.kernels.cpu.library import Instructions, NativeLibrary, native
from moray.model import compute as module
from moray.model.compute import Compute, instructions_used, use_instructions


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    """The library; it then uses what it used before."""
    found = native()
    assert found is not None
    used = found.used
    yield found
    found.use(used)


def asking_for(instructions: str) -> Compute:
    return replace(Compute.native(), instructions=instructions)


def test_what_is_asked_for_is_used_until_something_else_is(library: NativeLibrary) -> None:
    for one in [one for one in Instructions if one <= library.best]:
        use_instructions(asking_for(one.name.lower()))
        assert library.used is one
        assert instructions_used(asking_for("auto")) == one.name.lower()
    use_instructions(asking_for("generic"))
    use_instructions(Compute.on_cpu())
    assert library.used is Instructions.GENERIC, "torch has no say in it"
    use_instructions(Compute.native())
    assert library.used is library.best


def test_torch_and_gpus() -> None:
    assert instructions_used(Compute.on_cpu()) == f"torch {torch.backends.cpu.get_cpu_capability().lower()}"
    assert instructions_used(Compute(torch.device("cuda"), torch.bfloat16)) == ""


@pytest.mark.parametrize("asked", ["avx512_bf16", "one_day"])
def test_what_this_machine_does_not_have_is_refused(
    asked: str, library: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_best", lambda: Instructions.AVX2)
    before = library.used
    with pytest.raises(
        ConfigError,
        match=f"cpu_instructions = '{asked}': the best that .* has are avx2; set cpu_instructions: avx2, or",
    ):
        use_instructions(asking_for(asked))
    assert library.used is before


def test_a_machine_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "native", lambda: None)
    use_instructions(Compute.on_cpu())
    with pytest.raises(ConfigError, match=r"has no CPU kernels, .* install one .* or set dtype: float32"):
        use_instructions(Compute.native())
