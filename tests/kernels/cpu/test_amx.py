"""AMX where no processor has it: the model that stands for it, and what is done where it computes what is wrong."""

from __future__ import annotations

import logging

import pytest

from moray.kernels.cpu.library import Instructions, NativeLibrary, native

from .amx_model import amx_model


@pytest.fixture
def avx512() -> NativeLibrary:
    found = native()
    assert found is not None
    if found.best < Instructions.AVX512_BF16:
        pytest.skip("this machine has no AVX512_BF16, which every machine with AMX has")
    return found


def test_amx_is_used_where_its_products_are_right(avx512: NativeLibrary, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="moray.kernels"):
        model = amx_model()
    assert model.used is Instructions.AMX
    assert not caplog.records


def test_amx_that_computes_something_else_is_not_used(avx512: NativeLibrary, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="moray.kernels"):
        wrong = amx_model(wrong=True)
    assert wrong.used is wrong.best is Instructions.AVX512_BF16
    assert [record.message.split(":")[0] for record in caplog.records] == ["event=amx_not_used"]
    with pytest.raises(ValueError, match="AMX: this machine's best are AVX512_BF16"):
        wrong.use(Instructions.AMX)
