"""`moray doctor`: what is read off a machine: this one, and files and answers as others have them."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import stat
import sys
from pathlib import Path

import pytest
import torch

import moray
from moray.cluster.diagnosis import disk, gpu_facts
from moray.cluster.diagnosis.collect import (
    SCRATCH,
    SHM,
    Wish,
    code_digest,
    collect,
    network_facts,
    own_address,
    taken_ports,
)
from moray.cluster.diagnosis.container import cpu_limit, memory_limit
from moray.cluster.diagnosis.disk import BLOCK_BYTES, measure_disk
from moray.cluster.diagnosis.facts import GpuFacts
from moray.cluster.diagnosis.gpu_facts import find_gpus, parse_smi, parse_torch
from moray.cluster.diagnosis.model_facts import model_facts

TINY = Path(moray.__file__).resolve().parent / "model" / "tiny_r1"
MIB = 1 << 20


def test_this_machine() -> None:
    facts = collect(Wish("here", model="tiny-r1"))
    assert facts.node == "here"
    assert facts.versions["torch"] == torch.__version__
    assert facts.versions["moray"] == moray.__version__
    assert facts.memory.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < facts.memory.available <= facts.memory.total
    assert facts.cpu.count == len(os.sched_getaffinity(0))
    assert facts.limits["nofile"] in (resource.getrlimit(resource.RLIMIT_NOFILE)[0], None)
    assert facts.network.address == own_address()
    assert {SHM, SCRATCH} <= set(facts.spaces)
    assert facts.model is not None
    assert facts.model.path == str(TINY)
    assert facts.model.total_bytes == sum(path.stat().st_size for path in TINY.glob("*.safetensors"))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "/no/such/model" in model_facts("/no/such/model").problem
    assert "config.json" in model_facts(str(tmp_path)).problem
    (tmp_path / "config.json").write_text("{}")
    assert "no .safetensors file" in model_facts(str(tmp_path)).problem


def test_two_copies_of_a_model_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(TINY, tmp_path / name, ignore=shutil.ignore_patterns("training", "__pycache__"))
    one, two = model_facts(str(tmp_path / "one")), model_facts(str(tmp_path / "two"))
    assert (one.config_digest, one.listing_digest) == (two.config_digest, two.listing_digest)
    (tmp_path / "two" / "config.json").write_text("{}")
    os.truncate(next((tmp_path / "two").glob("*.safetensors")), 1000)
    two = model_facts(str(tmp_path / "two"))
    assert one.config_digest != two.config_digest
    assert one.listing_digest != two.listing_digest


def test_a_url_nobody_answers_for() -> None:
    assert "hf://nowhere" in model_facts("hf://nowhere").problem


def test_disks_are_read_by_whole_blocks_up_to_the_limit(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(bytes(3 * BLOCK_BYTES + 1000))
    found = measure_disk(files, min_bytes=BLOCK_BYTES)
    assert found.read_bytes == 6 * BLOCK_BYTES
    assert found.bytes_per_s > 0
    assert found.how in ("direct", "dropped")
    assert measure_disk(files, max_bytes=4 * BLOCK_BYTES, min_bytes=BLOCK_BYTES).read_bytes == 4 * BLOCK_BYTES
    assert measure_disk(files, max_seconds=0.0, min_bytes=BLOCK_BYTES).read_bytes == 0


def test_a_file_system_without_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(2 * BLOCK_BYTES))
    monkeypatch.setattr(disk, "_way", lambda path: "dropped")
    found = measure_disk([tmp_path / "a"], min_bytes=BLOCK_BYTES)
    assert (found.read_bytes, found.how) == (2 * BLOCK_BYTES, "dropped")


def test_disks_that_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x")
    assert "too little" in measure_disk([tmp_path / "small"]).problem
    assert "cannot be read" in measure_disk([tmp_path / "missing"]).problem


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def limits(root: Path) -> tuple[float | None, int | None]:
    return cpu_limit(root, root / "membership"), memory_limit(1024 * MIB, root, root / "membership")


def test_limits_of_a_container_of_the_second_version(tmp_path: Path) -> None:
    write(tmp_path / "membership", "0::/a/b")
    assert limits(tmp_path) == (None, None)
    write(tmp_path / "cpu.max", "max 100000")
    write(tmp_path / "memory.max", "max")
    assert limits(tmp_path) == (None, None)
    write(tmp_path / "a" / "cpu.max", "150000 100000")
    write(tmp_path / "a" / "memory.max", f"{512 * MIB}")
    write(tmp_path / "a" / "b" / "memory.max", f"{800 * MIB}")
    write(tmp_path / "c" / "memory.max", f"{MIB}")
    assert limits(tmp_path) == (1.5, 512 * MIB)


def test_limits_of_a_container_of_the_first_version(tmp_path: Path) -> None:
    write(tmp_path / "membership", "4:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n0::/")
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", "-1")
    write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000")
    write(tmp_path / "memory" / "memory.limit_in_bytes", f"{2**63 - 4096}")
    assert limits(tmp_path) == (None, None)
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", "200000")
    write(tmp_path / "memory" / "docker" / "x" / "memory.limit_in_bytes", f"{256 * MIB}")
    assert limits(tmp_path) == (2.0, 256 * MIB)


def test_a_kernel_without_control_groups(tmp_path: Path) -> None:
    assert limits(tmp_path) == (None, None)


def test_who_holds_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = taken_ports({port: "a test"})
    assert (found.port, found.purpose) == (port, "a test")
    assert f"(pid {os.getpid()})" in found.holder
    assert taken_ports({port: "a test"}) == ()


def test_interfaces_by_their_address() -> None:
    loopback = network_facts("127.0.0.1")
    assert loopback.interface == "lo"
    assert loopback.mtu > 0
    assert network_facts("203.0.113.1").interface == ""


def test_the_digest_of_the_code_changes_with_the_code(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "a.py"
    file.write_text("a = 1\n")
    before = code_digest(tmp_path)
    assert code_digest(tmp_path) == before
    file.write_text("a = 2\n")
    assert code_digest(tmp_path) != before


# ---- GPUs -----------------------------------------------------------------------------------------------------------

H100 = "NVIDIA H100 80GB HBM3, 9.0, 81559, 81000, Enabled, 2, 570.86\n"
OTHERS = "NVIDIA GeForce RTX 4090, 8.9, 24564, 20000, Disabled, [N/A], 570.86\nOdd, [N/A], [N/A], [N/A], [N/A], [N/A], 570.86\n"


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_what_the_driver_tells() -> None:
    gpus, driver = parse_smi(H100 + OTHERS)
    assert driver == "570.86"
    assert gpus == [
        GpuFacts("NVIDIA H100 80GB HBM3", 90, 81559 * MIB, 81000 * MIB, True, 2),
        GpuFacts("NVIDIA GeForce RTX 4090", 89, 24564 * MIB, 20000 * MIB, False, None),
        GpuFacts("Odd", 0, 0, 0, None, None),
    ]
    with pytest.raises(ValueError, match="not enough values"):
        parse_smi("No devices were found\n")


def test_what_torch_tells() -> None:
    assert parse_torch('a library greets\n[["NVIDIA L4", 89, 100, 90]]\n') == [GpuFacts("NVIDIA L4", 89, 100, 90)]


def test_gpus_of_a_machine_whose_driver_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answer").write_text(H100)
    tool(tmp_path, "nvidia-smi", f"cat {tmp_path}/answer")
    tool(tmp_path, "python", 'echo "[[\\"$CUDA_VISIBLE_DEVICES\\", 90, 2, 1]]"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = find_gpus(torch_has_cuda=True, hidden_by_ray=True)
    assert [gpu.name for gpu in found.gpus] == ["NVIDIA H100 80GB HBM3"]
    assert (found.torch_gpus, found.driver, found.problem) == (1, "570.86", "")
    assert find_gpus(torch_has_cuda=False, hidden_by_ray=False).torch_gpus == 0


def test_gpus_of_a_machine_whose_driver_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "nvidia-smi", 'echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = find_gpus(torch_has_cuda=False, hidden_by_ray=False)
    assert found.gpus == ()
    assert found.problem == "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch"


def test_gpus_of_a_machine_whose_driver_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "nvidia-smi", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu_facts, "_SMI_TIMEOUT_S", 0.2)
    assert find_gpus(torch_has_cuda=False, hidden_by_ray=False).problem == "nvidia-smi fails: no answer within 0 s"
