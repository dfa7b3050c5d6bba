"""How nodes are described to `moray plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moray.cluster.planning.gpu_kinds import GPU_KINDS, gpu_kind
from moray.cluster.planning.nodes import GIB, load_nodes, nodes_of, parse_nodes, with_figures
from moray.cluster.planning.ray_nodes import groups_of, read_cluster
from moray.configs.errors import ClusterError, ConfigError
from moray.kernels.launch import ARCHITECTURES


def test_a_list_of_nodes() -> None:
    groups = parse_nodes("3x8xL40S, 1x2xRTX 4090,2xcpu:512,1xcpu")
    assert [str(group) for group in groups] == ["3x8xL40S", "1x2xRTX4090", "2xcpu", "1xcpu"]
    assert [group.memory_bytes for group in groups] == [None, None, 512 * GIB, None]
    names = [node.name for node in nodes_of(groups)]
    assert len(set(names)) == len(names) == 7


@pytest.mark.parametrize("text", ["", "3x8", "x8xL40S", "3x8xL40S,", "0x8xL40S", "1x0xL40S", "2xcpu:much", "3*8*L40S"])
def test_what_is_no_list_of_nodes(text: str) -> None:
    with pytest.raises(ConfigError, match="--nodes"):
        parse_nodes(text)


def test_an_unknown_gpu_names_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"GPU 'V100' is not known; one of .*L40S.* is, or describe it in a file"):
        parse_nodes("1x8xV100")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("l40s", "L40S"),
        ("NVIDIA L40S", "L40S"),
        ("A100", "A100-80G"),
        ("A100-40G", "A100-40G"),
        ("geforce rtx 4090", "RTX4090"),
    ],
)
def test_names_of_gpus(written: str, name: str) -> None:
    assert gpu_kind(written).name == name


def test_the_table_of_gpus_is_plausible() -> None:
    for kind in GPU_KINDS.values():
        assert kind.architecture in ARCHITECTURES
        assert 20 * GIB < kind.memory_bytes < 200 * GIB
        assert 2e11 < kind.bandwidth < 1e13
        assert ("fp8" in kind.flops) == (kind.architecture >= 89)
        assert kind.peak("fp8") >= kind.peak("fp16")


FILE = """
nodes:
  - {name: rack, count: 3, gpus: 8, gpu: L40S, memory_gib: 512, network_gbit_s: 100, disk_gb_s: 5, price_per_hour: 9}
  - {count: 1, gpus: 1, gpu: {name: Own, memory_gib: 64, bandwidth_gb_s: 1000, fp16_tflops: 200}}
  - {count: 2, memory_gib: 256, memory_bandwidth_gb_s: 200, cpu_tflops: 2}
"""


def test_a_file_of_nodes(tmp_path: Path) -> None:
    (tmp_path / "nodes.yaml").write_text(FILE)
    rack, own, plain = load_nodes(tmp_path / "nodes.yaml")
    assert (rack.name, rack.count, rack.gpus, rack.gpu) == ("rack", 3, 8, GPU_KINDS["L40S"])
    assert (rack.memory_bytes, rack.network, rack.disk, rack.price) == (512 * GIB, 12.5e9, 5e9, 9)
    assert own.gpu is not None
    assert (own.gpu.name, own.gpu.memory_bytes, own.gpu.bandwidth) == ("Own", 64 * GIB, 1e12)
    assert own.gpu.peak("fp8") == own.gpu.peak("fp16") == 2e14
    assert (plain.gpu, plain.memory_bandwidth, plain.cpu_flops) == (None, 2e11, 2e12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: []", "nodes"),
        ("nodes: [{gpus: 8}]", "gpus = 8 and gpu = None: give both, or none of them"),
        ("nodes: [{gpu: L40S}]", "give both"),
        ("nodes: [{count: 0}]", "nodes.0.count = 0"),
        ("nodes: [{colour: red}]", "nodes.0.colour"),
        ("nodes: [{name: a}, {name: a}]", "must have one of its own"),
        ("[", "cannot be read as YAML"),
    ],
)
def test_what_is_no_file_of_nodes(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "nodes.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"nodes.yaml.*") as caught:
        load_nodes(tmp_path / "nodes.yaml")
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_nodes(tmp_path / "none.yaml")


def test_flags_count_for_every_node() -> None:
    groups = with_figures(parse_nodes("3x8xL40S,1x8xL4"), memory_gib=64, network_gbit_s=8, disk_gb_s=2, price=8)
    for group in groups:
        assert (group.memory_bytes, group.network, group.disk, group.price) == (64 * GIB, 1e9, 2e9, 2)


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    named = {name.replace("__", ":"): value for name, value in resources.items()}
    return {"Alive": alive, "NodeManagerAddress": "10.0.0.1", "Resources": named}


CLUSTER = [
    node(CPU=8, memory=30.5 * GIB),
    node(CPU=64, GPU=8, memory=200 * GIB, accelerator_type__L40S=1),
    node(CPU=64, GPU=8, memory=200 * GIB + 12345, accelerator_type__L40S=1),
    node(alive=False, CPU=64, GPU=8, accelerator_type__H100=1),
]


def test_the_nodes_of_a_ray_cluster() -> None:
    gpus, head = groups_of(CLUSTER)
    assert (str(gpus), gpus.memory_bytes) == ("2x8xL40S", 200 * GIB)
    assert (str(head), head.memory_bytes) == ("1xcpu", 30 * GIB)


def test_nodes_that_ray_does_not_describe() -> None:
    with pytest.raises(ConfigError, match=r"node 10.0.0.1: Ray knows of 4 GPUs, but not of which kind"):
        groups_of([node(GPU=4)])
    with pytest.raises(ClusterError, match="no node that is alive"):
        groups_of([node(alive=False)])


def test_reading_a_cluster_leaves_ray_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    ray = SimpleNamespace(
        init=lambda **options: calls.append(options["address"]),
        nodes=lambda: CLUSTER,
        shutdown=lambda: calls.append("shutdown"),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert [str(group) for group in read_cluster("10.0.0.9:6379")] == ["2x8xL40S", "1xcpu"]
    assert calls == ["10.0.0.9:6379", "shutdown"]


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(ClusterError, match="Ray at auto cannot be reached: nobody answers"):
        read_cluster("auto")
