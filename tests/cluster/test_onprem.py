"""What hosts of an on-premises cluster file find out about themselves, and what Ray's provider is told of them. No Ray runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moray.cluster.onprem import flags_of_this_host, host_groups, is_own_address, main, register
from moray.configs.errors import ConfigError

FILE: dict[str, Any] = {
    "cluster_name": "rack",
    "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3", "10.0.0.4"]},
    "metadata": {
        "groups": {
            "head": {"hosts": ["10.0.0.1"], "resources": {"CPU": 0}},
            "routers": {"hosts": ["10.0.0.2"], "resources": {"CPU": 16, "GPU": 1, "moray_router": 1}},
            "experts": {"hosts": ["10.0.0.3", "10.0.0.4"], "resources": {"moray_expert": 8}},
        }
    },
}


def flags(host: str, config: dict[str, Any] = FILE) -> list[str]:
    return flags_of_this_host(config, source="rack.yaml", is_here=lambda address: address == host)


def changed(path: str, value: object) -> dict[str, Any]:
    config = copy.deepcopy(FILE)
    *sections, key = path.split(".")
    target = config
    for section in sections:
        target = target[section]
    target[key] = value
    return config


def test_flags() -> None:
    assert flags("10.0.0.1") == ["--node-ip-address=10.0.0.1", "--num-cpus=0"]
    assert flags("10.0.0.2") == [
        "--node-ip-address=10.0.0.2",
        "--num-cpus=16",
        "--num-gpus=1",
        '--resources={"moray_router":1}',
    ]
    assert flags("10.0.0.4") == ["--node-ip-address=10.0.0.4", '--resources={"moray_expert":8}']


def test_a_host_must_be_listed_once() -> None:
    with pytest.raises(ConfigError, match=r"none of the addresses of this host are among 10\.0\.0\.1, "):
        flags("10.0.0.9")
    with pytest.raises(ConfigError, match="4 addresses of this host are among"):
        flags_of_this_host(FILE, source="rack.yaml", is_here=lambda address: True)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("provider.worker_ips", ["10.0.0.2", "10.0.0.3"], "10.0.0.4: neither provider.head_ip nor in"),
        ("provider.worker_ips", ["10.0.0.2", "10.0.0.2"], "a host can be there only once"),
        ("provider.worker_ips", ["10.0.0.2", "gpu-3"], "'gpu-3' is no IPv4 address"),
        ("provider.worker_ips", ["10.0.0.2", "fd00::3"], "'fd00::3' is no IPv4 address"),
        ("provider.worker_ips", "10.0.0.2", "provider and metadata: worker_ips = '10.0.0.2': "),
        ("provider", None, "provider and metadata: "),
        ("metadata", {}, "provider and metadata: groups = "),
        ("metadata.groups.routers.hosts", [], "10.0.0.2 is in none of metadata.groups"),
        ("metadata.groups.routers.hosts", ["10.0.0.2", "10.0.0.3"], "10.0.0.3 is in 2 of metadata.groups"),
        ("metadata.groups.head.hosts", ["10.0.0.1", "10.0.0.7"], "10.0.0.7: neither provider.head_ip nor in"),
        ("metadata.groups.experts.resources", {"moray expert": 1}, "experts.resources: 'moray expert' = 1: must"),
        ("metadata.groups.experts.resources", {"moray_expert": -1}, "'moray_expert' = -1: must"),
        (
            "metadata.groups.experts.resources",
            {"moray_expert": 0.5},
            "moray_expert = 0.5: Input should be a valid integer",
        ),
        ("metadata.groups.experts.gpus", 8, "groups.experts.gpus = 8: Extra inputs"),
    ],
)
def test_what_is_refused(path: str, value: object, told: str) -> None:
    with pytest.raises(ConfigError, match=r"^rack\.yaml: ") as refused:
        host_groups(changed(path, value), source="rack.yaml")
    assert told in str(refused.value)


def test_the_head_is_a_group_of_its_own() -> None:
    config = changed("metadata.groups.head.hosts", [])
    config["metadata"]["groups"]["routers"]["hosts"].append("10.0.0.1")
    with pytest.raises(
        ConfigError, match=r"groups\.head\.hosts must be provider\.head_ip, 10\.0\.0\.1, and nothing else"
    ):
        host_groups(config, source="rack.yaml")


def test_own_addresses() -> None:
    assert is_own_address("127.0.0.1")
    assert not is_own_address("192.0.2.1")


def test_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(FILE).replace("10.0.0.3", "127.0.0.1"))
    assert main(["flags", str(path)]) == 0
    assert capsys.readouterr().out == '--node-ip-address=127.0.0.1 --resources={"moray_expert":8}\n'
    path.write_text("- 1")
    assert main(["flags", str(path)]) == 1
    assert capsys.readouterr().err == f"moray: error: {path}: holds list, not a cluster file\n"
    assert main(["register", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml: cannot be read as YAML" in capsys.readouterr().err


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray's provider writes down what it knows of the hosts."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path / "ray" / "cluster-rack.state"


def known(state: Path) -> dict[str, str]:
    return {host: info["state"] for host, info in json.loads(state.read_text()).items()}


def run_everywhere(state: Path) -> None:
    """As if the autoscaler had brought Ray up on each host."""
    hosts = json.loads(state.read_text())
    for info in hosts.values():
        info["state"] = "running"
    state.write_text(json.dumps(hosts))


ray_leaves_files_open = pytest.mark.filterwarnings("ignore::ResourceWarning")  # its provider does


@ray_leaves_files_open
def test_new_hosts_become_known_to_an_autoscaler_that_runs(state: Path) -> None:
    register(FILE, restart=False)
    assert known(state) == dict.fromkeys(("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"), "terminated")
    run_everywhere(state)
    register(changed("provider.worker_ips", ["10.0.0.2", "10.0.0.5"]), restart=False)
    assert known(state) == {"10.0.0.1": "running", "10.0.0.2": "running", "10.0.0.5": "terminated"}


@ray_leaves_files_open
def test_a_new_head_has_no_workers_yet(state: Path) -> None:
    register(FILE, restart=True)
    run_everywhere(state)
    register(FILE, restart=True)
    assert known(state) == {"10.0.0.1": "running"} | dict.fromkeys(("10.0.0.2", "10.0.0.3", "10.0.0.4"), "terminated")
