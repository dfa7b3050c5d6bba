"""What `make kernels` prints."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moray.kernels import catalogue, table
from moray.kernels.cases import Case
from moray.kernels.catalogue import all_cases
from moray.kernels.codegen import predict


def test_one_generation(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--arch", "90"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert len([row for row in rows if row.split("│")[2].strip() == "90"]) == len(all_cases(90))
    decode = next(row for row in rows if "grouped_gemm gate_up decode" in row).split("│")
    assert "QGMMA" in decode[7]
    assert all("(" in cell for cell in decode[8:11]), "predicted and roofline at 1, 32 and 256 tokens"
    assert "90 H100 SXM" in printed


def test_predictions_are_never_below_the_roofline() -> None:
    with catalogue.compiling([90]) as cases:
        for case, future in cases:
            for tokens in table.TOKENS:
                if case.work is not None and (work := case.work(tokens)) is not None:
                    prediction = predict(case, future.result(), work)
                    assert prediction.seconds >= prediction.roofline > 0, case


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, the others are printed, and the exit status says so."""
    broken = [replace(case, name=f"{case.name} !") for case in all_cases(90)[:1]]
    whole: list[Case] = [*all_cases(90)[:2], *broken]
    monkeypatch.setattr(
        catalogue, "all_cases", lambda architecture: whole
    )  # the processes that compile know no such case
    assert table.main(["--arch", "90"]) == 1
    printed = capsys.readouterr()
    assert f"{broken[0]}: " in printed.err
    assert whole[0].name in printed.out
