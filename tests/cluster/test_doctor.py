"""`moray doctor` as a user calls it, on this machine; and which path kernels take, also with GPUs that answer as CUDA would."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from moray.cluster.cli import main
from moray.cluster.diagnosis.examination import Examination
from moray.cluster.diagnosis.findings import ok, warn
from moray.cluster.diagnosis.kernel_paths import kernel_paths
from moray.cluster.diagnosis.link_meter import LinkSpeed
from moray.cluster.diagnosis.report import show
from moray.kernels import launch
from moray.kernels.catalogue import MODULES
from moray.kernels.cpu.library import native

from .doctor_facts import cpu_node

KERNELS = {module.__name__.rsplit(".", 1)[-1] for module in MODULES}


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["doctor", *arguments])
    return status, capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_everything_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text("{model: tiny-r1, device: cuda}")
    status, out = doctor(capsys, "--json", "--config", str(file))
    report = json.loads(out)
    assert set(report) == {"failed", "findings", "nodes", "links", "link_failures", "kernels"}
    assert set(report["findings"][0]) == {"check", "level", "what", "what_to_do", "node"}
    assert report["nodes"][0]["versions"]["torch"] == torch.__version__
    assert report["nodes"][0]["model"]["problem"] == ""
    assert {entry["kernel"] for entry in report["kernels"]} == KERNELS | {"cpu"}
    assert {entry["path"] for entry in report["kernels"] if entry["kernel"] in KERNELS} == {"torch"}
    assert (status, report["failed"]) == (1, True)
    (gpus,) = [finding for finding in report["findings"] if finding["check"] == "deployment"]
    assert (gpus["level"], gpus["what"]) == ("fail", "device = 'cuda', and there is no GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = doctor(capsys)
    lines = out.splitlines()
    for check in (
        "versions",
        "gpus",
        "cpus",
        "memory",
        "shared memory",
        "ulimits",
        "scratch space",
        "ports",
        "network",
    ):
        assert any(line.split(None, 1)[1:] and line.split(None, 1)[1].startswith(check) for line in lines), check
    assert f"{len(MODULES)} kernels take the torch path on cpu" in out
    _, out = doctor(capsys, "--kernels")
    assert all(kernel in out for kernel in KERNELS)


def test_warnings_alone_are_no_failure() -> None:
    assert not Examination((), (warn("ulimits", "20000 open files", "raise it"),)).failed


def printed(examination: Examination) -> str:
    out = io.StringIO()
    show(examination, Console(file=out, width=120))
    return out.getvalue()


def test_findings_name_their_node_and_what_to_do_where_there_are_several() -> None:
    nodes = (cpu_node("10.0.0.1"), cpu_node("10.0.0.2"))
    out = printed(Examination(nodes, (warn("access", "no token", "make one"), ok("links", "90 Gbit/s"))))
    assert "-> make one" in out
    assert "0 to mend, 1 to consider, 1 fine" in out
    assert "no problems found" in printed(Examination(nodes, (ok("links", "90 Gbit/s"),)))


def test_links_as_a_matrix() -> None:
    nodes = (cpu_node("10.0.0.1"), cpu_node("10.0.0.2"))
    links = (LinkSpeed("10.0.0.1", "10.0.0.2", 45e-6, 40e-6, 0.0, 90e9 / 8),)
    out = printed(Examination(nodes, (), links))
    (row,) = [line for line in out.splitlines() if "1 10.0.0.1" in line]
    assert "90, 45 us" in row
    (row,) = [line for line in out.splitlines() if "2 10.0.0.2" in line]
    assert "│ - " in row


def test_of_many_nodes_the_slowest_links_are_listed() -> None:
    nodes = tuple(cpu_node(f"n{index}") for index in range(20))
    links = tuple(LinkSpeed("n0", f"n{index}", 45e-6, 40e-6, 0.0, index * 1e9) for index in range(1, 20))
    out = printed(Examination(nodes, (), links))
    assert "the 10 slowest links" in out
    assert " n1 " in out
    assert " n19 " not in out


def test_a_cluster_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--address", "127.0.0.1:1"]) == 1
    assert "Ray at 127.0.0.1:1 cannot be reached" in capsys.readouterr().err
    assert main(["doctor", "--address", "nonsense"]) == 1
    assert "write host:port" in capsys.readouterr().err


# ---- kernels --------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(launch, "_device_architecture", launch._device_architecture.__wrapped__)
    return properties


@pytest.mark.parametrize(
    ("major", "minor", "code", "cores"), [(9, 0, 90, "QGMMA"), (10, 3, 100, "UTCQMMA"), (8, 7, 86, "HMMA")]
)
def test_each_gpu_takes_the_newest_code_it_can_run(
    major: int, minor: int, code: int, cores: str, gpu: SimpleNamespace
) -> None:
    gpu.major, gpu.minor = major, minor
    *paths, on_cpus = kernel_paths()
    assert on_cpus.kernel == "cpu"
    assert {entry.path for entry in paths} == {"Triton"}
    assert {entry.device for entry in paths} == {f"cuda:0 NVIDIA H100 (sm_{major}{minor}, 80 GiB)"}
    (gemm,) = (entry for entry in paths if entry.kernel == "grouped_gemm")
    assert f"code for sm_{code}" in gemm.why
    assert cores in gemm.why


def test_a_gpu_that_is_too_old_takes_no_kernel(gpu: SimpleNamespace) -> None:
    gpu.name, gpu.major, gpu.minor = "Tesla V100", 7, 0
    *paths, _ = kernel_paths()
    assert {entry.path for entry in paths} == {"torch"}
    assert "Tesla V100 is sm_70; Moray's kernels need sm_80 (A100) or newer" in paths[0].why


def test_what_cpus_compute_with(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native()
    assert library is not None
    found = kernel_paths()[-1]
    assert (found.kernel, found.path) == ("cpu", "native")
    assert library.best.name in found.why
    assert "loop" not in found.why
    monkeypatch.setattr("moray.cluster.diagnosis.kernel_paths.actors_library", lambda: None)
    assert "without the native half of routers and expert hosts" in kernel_paths()[-1].why
    monkeypatch.setattr("moray.cluster.diagnosis.kernel_paths.native", lambda: None)
    found = kernel_paths()[-1]
    assert (found.path, "install one, then Moray again" in found.why) == ("torch", True)
