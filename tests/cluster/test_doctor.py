"""`moray doctor`, on this machine and on one with a GPU that answers as CUDA would."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from moray.cluster import doctor
from moray.cluster.cli import main
from moray.kernels import launch
from moray.kernels.catalogue import MODULES


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with one such GPU; change its fields to make it another."""
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (properties.major, properties.minor))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(launch, "_device_architecture", launch._device_architecture.__wrapped__)
    return properties


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["torch"] == torch.__version__
    assert "built without CUDA" in report["machine"]["gpus"] or "finds no device" in report["machine"]["gpus"]
    assert {entry["kernel"] for entry in report["kernels"]} == {m.__name__.rsplit(".", 1)[-1] for m in MODULES}
    assert {entry["path"] for entry in report["kernels"]} == {"torch"}
    assert main(["doctor"]) == 0
    assert "no problems found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("major", "minor", "code", "cores"), [(9, 0, 90, "QGMMA"), (10, 3, 100, "UTCQMMA"), (8, 7, 86, "HMMA")]
)
def test_each_gpu_takes_the_newest_code_it_can_run(
    major: int, minor: int, code: int, cores: str, gpu: SimpleNamespace
) -> None:
    gpu.major, gpu.minor = major, minor
    report = doctor.examine()
    assert not report.problems
    assert f"(sm_{major}{minor}, 80 GiB)" in report.machine["gpus"]
    assert {entry.path for entry in report.kernels} == {"Triton"}
    (gemm,) = (entry for entry in report.kernels if entry.kernel == "grouped_gemm")
    assert f"code for sm_{code}" in gemm.why
    assert cores in gemm.why


def test_a_gpu_that_is_too_old(gpu: SimpleNamespace) -> None:
    gpu.name, gpu.major, gpu.minor = "Tesla V100", 7, 0
    report = doctor.examine()
    assert report.problems == [
        "Tesla V100 is sm_70; Moray's kernels need sm_80 (A100) or newer; give this machine's processes `device: cpu`, or "
        "hide the GPU from them"
    ]
    assert {entry.path for entry in report.kernels} == {"torch"}


def test_what_a_gpu_needs_beside_it(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    report = doctor.examine()
    assert [problem.split(":")[0] for problem in report.problems] == [
        "no C compiler",
        "this torch is built without NCCL",
    ]
    assert "nccl" not in report.machine["links"]
