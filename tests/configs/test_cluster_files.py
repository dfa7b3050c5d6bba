"""The cluster files that ship: Ray takes them, they agree with each other and with the deployments meant for them.

No machine, cloud or Ray cluster is touched: commands run in a home directory of the test's own, beside stand-ins for what
they call.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import moray
from moray.cluster.onprem import host_groups
from moray.configs.deployment import ColdHosts, Deployment, ExpertHosts, Routers

from .serve_schema import ServeDeploySchema

CONFIGS = Path(moray.__file__).parent / "configs"
CLUSTERS = CONFIGS / "clusters"
RAY_UP = ("onprem", "aws", "gcp")
CLOUDS = ("aws", "gcp")

Group = Mapping[str, float]
"""What a node of a group offers."""


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    return config


def load_deployment(name: str) -> Deployment:
    return Deployment.load(CONFIGS / "deployments" / f"{name}.yaml")


def commands_of(config: Mapping[str, Any], *keys: str) -> list[str]:
    return [command for key in keys for command in config.get(key, [])]


def test_every_file_is_looked_at() -> None:
    assert {path.stem for path in CLUSTERS.glob("*.yaml")} == {*RAY_UP, "kuberay"}


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_takes_it(name: str) -> None:
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", CLOUDS)
def test_groups_grow_by_themselves(name: str) -> None:
    config = load(name)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert "GPU" not in types["head"]["resources"]
    assert types["head"]["resources"]["CPU"] == 0
    labels = {"router": "moray_router", "expert": "moray_expert", "cold": "moray_cold"}
    for group, label in labels.items():
        assert types[group]["min_workers"] <= types[group]["max_workers"]
        assert [key for key in types[group]["resources"] if key.startswith("moray_")] == [label]
    assert sum(types[group]["max_workers"] for group in labels) == config["max_workers"]


@pytest.mark.parametrize("name", RAY_UP)
def test_versions_are_those_of_this_package(name: str) -> None:
    text = (CLUSTERS / f"{name}.yaml").read_text()
    assert set(re.findall(r"moray-serve(?:\[\w+\])?==([\d.]+)", text)) == {moray.__version__}
    assert set(re.findall(r"\bmoray (\d+\.[\d.]+)", text)) == {moray.__version__}
    found = re.findall(r"\bray\[serve\]==([\d.]+)|\bversion (\d[\d.]+)|\bray (\d+\.[\d.]+\d)", text)
    assert {version for versions in found for version in versions if version} == {ray.__version__}


def test_nodes_are_set_up_alike() -> None:
    """What each file adds to the setup is all they differ in."""
    of = {
        name: [re.sub(r"moray-serve\[\w+\]", "moray-serve", c) for c in load(name)["setup_commands"]] for name in RAY_UP
    }
    assert [command for command in of["aws"] if command in of["onprem"]] == of["onprem"]
    assert [command for command in of["aws"] if "dlami" not in command] == of["gcp"]


@pytest.mark.parametrize("name", RAY_UP)
def test_commands_are_shell(name: str) -> None:
    keys = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    script = "\n".join(f"( {command}\n)" for command in commands_of(load(name), *keys))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)


class Node:
    """A home directory with stand-ins for the commands that a cluster file calls."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.called = home / "called"
        self._bin = home / "bin"
        self._bin.mkdir(parents=True)
        self.stand_in("moray", f'echo "moray {moray.__version__}"')
        self.stand_in(
            "ray", f'[ "$1" = --version ] && echo "ray, version {ray.__version__}" || echo "$@" >> {self.called}'
        )
        self.stand_in("python", f'exec {sys.executable} "$@"')
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("a" * 64)
        (home / ".bashrc").write_text("# this file's own\n")

    def stand_in(self, name: str, script: str) -> None:
        path = self._bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """As `ray up` does, but for ssh and for the terminal."""
        environment = {
            "HOME": str(self.home),
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "RAY_HEAD_IP": "10.0.0.1",
        }
        return subprocess.run(
            ["bash", "-c", f"source ~/.bashrc; export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore && ({command})"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def run_all(self, commands: list[str]) -> None:
        for command in commands:
            done = self.run(command)
            assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "home")


def test_setup_twice_is_setup_once(node: Node) -> None:
    setup = load("onprem")["setup_commands"]
    (node.home / ".ray" / "auth_token").chmod(0o644)
    node.run_all(setup)
    files = {path: path.read_bytes() for path in node.home.rglob("*") if path.is_file()}
    node.run_all(setup)
    assert {path: path.read_bytes() for path in node.home.rglob("*") if path.is_file()} == files
    assert (node.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    shell = node.run("env").stdout.splitlines()
    assert {"RAY_AUTH_MODE=token", "RAY_worker_niceness=0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0"} <= set(shell)
    assert "RAY_health_check_failure_threshold=3" in shell
    assert (node.home / ".bashrc").read_text().startswith("# this file's own\n")


def test_setup_installs_where_another_version_is(node: Node) -> None:
    node.stand_in("moray", "echo moray 0.0.9")
    pip = node.home / ".moray" / "venv" / "bin" / "pip"
    node.stand_in("pip", f'echo "$@" > {node.called}; echo "echo moray {moray.__version__}" > {node.home}/bin/moray')
    node.stand_in("python3", f"mkdir -p {pip.parent} && ln -s {node.home}/bin/pip {pip}")
    node.run_all(load("onprem")["setup_commands"])
    assert f"moray-serve=={moray.__version__} ray[serve]=={ray.__version__}" in node.called.read_text()


def test_setup_says_what_is_wrong(node: Node) -> None:
    node.stand_in("moray", "echo moray 0.0.9")
    node.stand_in("python3", "mkdir -p ~/.moray/venv/bin && ln -s /bin/true ~/.moray/venv/bin/pip")
    failed = [done for c in load("onprem")["setup_commands"] if (done := node.run(c)).returncode]
    assert len(failed) == 1
    assert (
        f"has moray 0.0.9 and ray, version {ray.__version__}, and must have moray {moray.__version__}"
        in failed[0].stderr
    )
    (node.home / ".ray" / "auth_token").write_text("")
    errors = [done.stderr for c in load("onprem")["setup_commands"] if (done := node.run(c)).returncode]
    assert "auth_token is missing or empty" in errors[0]


def test_hosts_find_their_role(node: Node) -> None:
    config = load("onprem")
    node.run_all(config["setup_commands"])
    text = (CLUSTERS / "onprem.yaml").read_text()
    (node.home / "ray_bootstrap_config.yaml").write_text(text.replace("192.0.2.12", "127.0.0.1"))
    node.run_all(config["worker_start_ray_commands"])
    stop, start = node.called.read_text().splitlines()
    assert stop == "stop"
    assert start.startswith("start --address=10.0.0.1:6379 --node-ip-address=127.0.0.1 ")
    assert ' --resources={"moray_router":1,"moray_expert":7} ' in start


def test_a_host_in_no_group_starts_nothing(node: Node) -> None:
    config = load("onprem")
    node.run_all(config["setup_commands"])
    (node.home / "ray_bootstrap_config.yaml").write_text((CLUSTERS / "onprem.yaml").read_text())
    done = node.run(config["worker_start_ray_commands"][-1])
    assert done.returncode != 0
    assert "none of the addresses of this host are among 192.0.2.10" in done.stderr
    assert not node.called.exists()


@pytest.mark.parametrize("name", RAY_UP)
def test_start_commands(name: str) -> None:
    """What `ray start` must be told besides its role, and that the environment is that of setup."""
    config = load(name)
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--head" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker
    for command in (head, worker):
        assert command.startswith(". ~/.moray/env &&")
        assert "--object-store-memory=268435456" in command
        assert {"object-manager", "node-manager", "runtime-env-agent", "metrics-export"} <= set(
            re.findall(r"--([\w-]+)-port=\d+", command)
        )
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


# ---- KubeRay ------------------------------------------------------------------------------------------------------------

SERVICE = {"serveConfigV2", "rayClusterConfig", "upgradeStrategy", "serveService", "excludeHeadPodFromServeSvc"}
CLUSTER = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
AUTOSCALER = {"version", "upscalingMode", "idleTimeoutSeconds", "resources", "env"}
HEAD = {"template", "headService", "resources", "labels", "rayStartParams", "serviceType"}
WORKERS = HEAD - {"headService", "serviceType"} | {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "idleTimeoutSeconds",
}
"""Fields of KubeRay v1.6.2's API reference (ray.io/v1), as far as this project has any use for them."""


@pytest.fixture(scope="module")
def kuberay() -> dict[str, Any]:
    return load("kuberay")


def groups_of(service: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = service["spec"]["rayClusterConfig"]
    yield cluster["headGroupSpec"]
    yield from cluster["workerGroupSpecs"]


def test_kuberay_has_fields_of_its_api(kuberay: dict[str, Any]) -> None:
    assert (kuberay["apiVersion"], kuberay["kind"]) == ("ray.io/v1", "RayService")
    assert kuberay.keys() == {"apiVersion", "kind", "metadata", "spec"}
    spec = kuberay["spec"]
    cluster = spec["rayClusterConfig"]
    assert spec.keys() <= SERVICE
    assert spec["upgradeStrategy"] == {"type": "None"}
    assert cluster.keys() <= CLUSTER
    assert cluster["autoscalerOptions"].keys() <= AUTOSCALER
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"].keys() <= HEAD
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups_of(kuberay):
        assert all(
            isinstance(value, str) for value in (*group["resources"].values(), *group["rayStartParams"].values())
        )


def test_kuberay_names_versions_and_auth(kuberay: dict[str, Any]) -> None:
    cluster = kuberay["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token", "secretName": "moray-auth-token"}
    text = (CLUSTERS / "kuberay.yaml").read_text()
    assert f"rayproject/ray:{ray.__version__}-" in text
    assert f"moray-serve=={moray.__version__}" in text
    assert f'"moray {moray.__version__}"' in text
    for group in groups_of(kuberay):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f":{moray.__version__}")


def test_kuberay_pods(kuberay: dict[str, Any]) -> None:
    exports = dict(re.findall(r"export (RAY_\w+)=(\d+)", " ".join(load("aws")["setup_commands"])))
    for group in groups_of(kuberay):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        assert spec["restartPolicy"] == "Never"
        assert {env["name"]: env["value"] for env in container["env"]} == exports
        limits = container["resources"]["limits"]
        assert container["resources"]["requests"] == limits
        assert group["resources"].get("GPU", "0") == limits.get("nvidia.com/gpu", "0")
        assert int(group["resources"]["CPU"]) <= int(limits["cpu"])
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"models": "/models", "shm": "/dev/shm"}
        assert {volume["name"] for volume in spec["volumes"]} == mounted.keys()


def test_kuberay_serves_what_the_serve_file_does(kuberay: dict[str, Any]) -> None:
    embedded = yaml.safe_load(kuberay["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(embedded)
    other = yaml.safe_load((CONFIGS / "deployments" / "serve-r1-3x8-48gb.yaml").read_text())
    assert embedded["http_options"].pop("host") == "0.0.0.0"
    assert other["http_options"].pop("host") == "127.0.0.1"
    other["proxy_location"] = "EveryNode"
    assert embedded == other


# ---- room for the deployments -------------------------------------------------------------------------------------------


def cloud_nodes(name: str, count: str) -> list[Group]:
    return [
        copy.copy(kind["resources"])
        for kind in load(name)["available_node_types"].values()
        for _ in range(kind.get(count, 0))
    ]


def kuberay_nodes(count: str) -> list[Group]:
    return [
        {kind: float(amount) for kind, amount in group["resources"].items()}
        for group in groups_of(load("kuberay"))
        for _ in range(group.get(count, 0))
    ]


def onprem_nodes() -> list[Group]:
    groups = host_groups(load("onprem"), source="onprem.yaml")
    card = {"CPU": 64, "GPU": 8}  # which Ray counts for itself on a real host
    return [card | dict(group.resources) for group in groups for _ in group.hosts]


def place(deployment: Deployment, nodes: list[Group]) -> list[str]:
    """Put each process of a deployment on the first node with room for it; those that found none."""
    left = [dict(node) for node in nodes]
    homeless = []
    sections: list[tuple[str, int, ExpertHosts | Routers | ColdHosts]] = [
        ("router", deployment.routers.replicas, deployment.routers),
        ("expert host", deployment.experts.hosts, deployment.experts),
        ("cold host", deployment.experts.cold.hosts, deployment.experts.cold),
    ]
    for what, count, section in sections:
        needs = {"CPU": float(section.cpus), "GPU": getattr(section, "gpus", 0.0), **section.resources}
        assert section.resources or not count, f"{what}: asks for no label: it could come to any node"
        for _ in range(count):
            home = next((n for n in left if all(n.get(k, 0) >= amount for k, amount in needs.items())), None)
            if home is None:
                homeless.append(what)
                continue
            for kind, amount in needs.items():
                home[kind] = home.get(kind, 0) - amount
    return homeless


@pytest.mark.parametrize("count", ["min_workers", "max_workers"])
@pytest.mark.parametrize(("cluster", "deployment"), [("aws", "serve-r1-3x8-48gb"), ("gcp", "serve-r1-2x8-80gb")])
def test_clouds_have_room(cluster: str, deployment: str, count: str) -> None:
    assert place(load_deployment(deployment), cloud_nodes(cluster, count)) == []


@pytest.mark.parametrize("cluster", CLOUDS)
def test_clouds_have_room_for_a_cold_tier(cluster: str) -> None:
    tiers = load_deployment("serve-r1-3x8-24gb-cold")
    assert place(tiers, cloud_nodes(cluster, "max_workers")) == []
    assert place(tiers, cloud_nodes(cluster, "min_workers")).count("cold host") == tiers.experts.cold.hosts


def test_hosts_have_room() -> None:
    assert place(load_deployment("serve-r1-3x8-48gb"), onprem_nodes()) == []


@pytest.mark.parametrize("count", ["replicas", "maxReplicas"])
def test_pods_have_room(count: str) -> None:
    assert place(load_deployment("serve-r1-3x8-48gb"), kuberay_nodes(count)) == []
