"""Every launch of every kernel, at DeepSeek-R1's sizes, compiled for six GPU generations and read back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from moray.kernels.cases import Case
from moray.kernels.catalogue import all_cases, compiling
from moray.kernels.codegen import MachineCode
from moray.kernels.gpus import GPUS
from moray.kernels.launch import ARCHITECTURES

CASES = {str(case): case for architecture in ARCHITECTURES for case in all_cases(architecture)}


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Future[MachineCode]]]:
    with compiling() as cases:
        yield {str(case): future for case, future in cases}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_machine_code(case: Case, compiled: dict[str, Future[MachineCode]]) -> None:
    code = compiled[str(case)].result()
    limit = GPUS[case.architecture].shared_memory
    assert code.shared_memory <= limit, (
        f"{code.shared_memory} bytes of shared memory, sm_{case.architecture} has {limit}"
    )
    assert case.may_spill or code.spills == 0, f"{code.spills} spill instructions"
    if case.tensor_core is not None:
        assert any(name.startswith(case.tensor_core) for name in code.tensor_core), f"uses {code.tensor_core}"
    assert code.loop_instructions <= case.max_loop_instructions
    # A bound of twice what is there would let the loop double unseen.
    assert code.loop_instructions > 0.5 * case.max_loop_instructions, (
        f"only {code.loop_instructions}: tighten the bound"
    )
