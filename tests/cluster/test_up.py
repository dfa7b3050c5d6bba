"""`moray up`: what it refuses, and what it runs, with a stand-in for `ray` that writes down how it was called."""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import moray
from moray.cluster.up import add_up
from moray.configs.errors import ConfigError

CLUSTERS = Path(moray.__file__).parent / "configs" / "clusters"


class Machine:
    """The operator's: a home directory with what `ray up` needs, a stand-in for `ray`, and a cluster file to change."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.calls = home / "calls"
        self._bin = home / "bin"
        self._bin.mkdir()
        for folder, name in ((".ray", "auth_token"), (".ssh", "id_ed25519")):
            (home / folder).mkdir()
            (home / folder / name).write_text("secret")
            (home / folder / name).chmod(0o600)
        self.ray()
        self.token = home / ".ray" / "auth_token"
        shipped = (
            (CLUSTERS / "onprem.yaml").read_text().replace("192.0.2.", "10.0.0.").replace("REPLACE_ME", "somebody")
        )
        self.config: dict[str, Any] = yaml.safe_load(shipped)
        self.file = home / "my cluster.yaml"

    def ray(self, status: int = 0) -> None:
        path = self._bin / "ray"
        script = (
            "import json, os, sys\n"
            f"json.dump({{'argv': sys.argv, 'env': dict(os.environ)}}, open({str(self.calls)!r}, 'w'))\n"
            f"if {status} < 0: os.kill(os.getpid(), {-status})\n"
            f"sys.exit({status})\n"
        )
        path.write_text(f"#!{sys.executable}\n{script}")
        path.chmod(0o755)

    def up(self, *flags: str) -> int:
        self.file.write_text(yaml.safe_dump(self.config))
        parser = argparse.ArgumentParser()
        add_up(parser.add_subparsers(required=True))
        options = parser.parse_args(["up", str(self.file), *flags])
        status: int = options.run(options)
        return status

    def refused(self) -> str:
        with pytest.raises(ConfigError) as refused:
            self.up("--yes")
        assert not self.calls.exists()
        return str(refused.value)

    @property
    def call(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.calls.read_text())
        return found


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("HOME", str(tmp_path))
    for tool in ("ssh", "rsync"):
        (tmp_path / tool).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_UP_enable_autoscaler_v2", raising=False)
    return Machine(tmp_path)


def test_it_runs_ray_up_and_says_how(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    assert machine.up("--yes", "--no-restart") == 0
    argv, environment = machine.call["argv"], machine.call["env"]
    assert argv[1:] == ["up", str(machine.file), "--yes", "--no-restart"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_UP_enable_autoscaler_v2"] == "0"
    said = capfd.readouterr().out.splitlines()
    assert said[0] == f"moray: running: RAY_AUTH_MODE=token RAY_UP_enable_autoscaler_v2=0 {shlex.join(argv)}"
    assert said[1].endswith(f"ray exec '{machine.file}' 'ray status'")


def test_it_ends_as_ray_does(machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    machine.ray(status=3)
    assert machine.up() == 3
    machine.ray(status=-15)
    assert machine.up() == 128 + 15
    assert "the head is up" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_clouds_keep_rays_own_autoscaler(machine: Machine, name: str) -> None:
    machine.config = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text().replace("REPLACE_ME", "mine"))
    assert machine.up("-y") == 0
    assert machine.call["env"]["RAY_AUTH_MODE"] == "token"
    assert "RAY_UP_enable_autoscaler_v2" not in machine.call["env"]


@pytest.mark.parametrize("name", ["onprem", "aws", "gcp"])
def test_files_as_they_ship_must_be_filled_in(machine: Machine, name: str) -> None:
    machine.config = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    told = machine.refused()
    assert "replace what only stands for something: " in told
    assert "REPLACE_ME" in told


def test_example_addresses_are_named(machine: Machine) -> None:
    machine.config["provider"]["worker_ips"][0] = "192.0.2.11"
    machine.config["metadata"]["groups"]["routers"]["hosts"][0] = "192.0.2.11"
    assert machine.refused().endswith(
        "something: metadata.groups.routers.hosts.0 = 192.0.2.11, provider.worker_ips.0 = 192.0.2.11"
    )


def test_kuberays_file_is_for_kubectl(machine: Machine) -> None:
    machine.config = yaml.safe_load((CLUSTERS / "kuberay.yaml").read_text())
    assert machine.refused().endswith(f"kubectl apply -f {machine.file}")


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (
            "setup_comands",
            ["true"],
            "Ray does not take the file: Additional properties are not allowed ('setup_comands'",
        ),
        ("auth.ssh_usr", "me", "Ray does not take auth: "),
        ("max_workers", -1, "Ray does not take max_workers: -1 is less than the minimum of 0"),
        ("provider.type", "rack", "Ray does not take it: Unsupported node provider: rack"),
        ("provider", {}, "provider.type is missing"),
        ("provider.worker_ips", ["10.0.0.11"], "neither provider.head_ip nor in provider.worker_ips"),
        ("available_node_types", {"a": {}}, "Ray does not take it"),
        ("file_mounts./opt/models", "~/models", "file_mounts./opt/models = ~/models: there is no such file"),
        ("auth.ssh_private_key", "~/key", "auth.ssh_private_key = ~/key: there is no such file on this machine"),
        ("file_mounts", {}, "file_mounts.~/.ray/auth_token is missing"),
        (
            "setup_commands",
            ["pip install moray-serve==0.0.9"],
            "installs moray-serve 0.0.9 on the nodes, and this machine",
        ),
        (
            "setup_commands",
            ["pip install 'ray[serve]==2.9.3'"],
            "installs ray 2.9.3 on the nodes, and this machine has",
        ),
        ("setup_commands", [], "set RAY_AUTH_MODE to nothing"),
        ("head_setup_commands", ["export RAY_AUTH_MODE=disabled"], "set RAY_AUTH_MODE to disabled and token"),
    ],
)
def test_what_is_refused(machine: Machine, path: str, value: object, told: str) -> None:
    *sections, key = path.split(".", 1) if path.startswith(("file_mounts.", "auth.", "provider.")) else [path]
    target = machine.config
    for section in sections:
        target = target[section]
    target[key] = copy.deepcopy(value)
    refused = machine.refused()
    assert refused.startswith(str(machine.file))
    assert told in refused


def test_no_auth_is_a_choice(machine: Machine) -> None:
    machine.config["setup_commands"] = ["export RAY_AUTH_MODE=disabled"]
    del machine.config["file_mounts"]
    assert machine.up() == 0
    assert machine.call["env"]["RAY_AUTH_MODE"] == "disabled"


def test_the_token_must_be_there_and_secret(machine: Machine) -> None:
    machine.token.chmod(0o640)
    assert "auth_token: has mode 640, so that others can read" in machine.refused()
    machine.token.unlink()
    assert "make one: ray get-auth-token --generate" in machine.refused()


def test_what_ray_up_needs(machine: Machine) -> None:
    (machine.home / "rsync").unlink()
    tools = machine.home / "tools"
    tools.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{machine.home / 'bin'}:{machine.home}")
        assert machine.refused() == "`ray up` needs rsync, which is not on PATH: install it"
        patch.setenv("PATH", str(tools))
        patch.setattr(sys, "executable", str(tools / "python"))
        assert "there is no `ray` on PATH" in machine.refused()


def test_a_file_that_is_none(machine: Machine) -> None:
    machine.config = {}
    machine.refused()
    machine.file.unlink()
    parser = argparse.ArgumentParser()
    add_up(parser.add_subparsers(required=True))
    options = parser.parse_args(["up", str(machine.file)])
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        options.run(options)
