"""A Ray cluster on fake machines, run as its operator does: a cluster file, `moray up`, Ray's own commands."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

import moray

from .hosts import Host, Hosts

T = TypeVar("T")

_CONFIGS = Path(moray.__file__).parent / "configs"
_CLUSTER_FILE = "/root/onprem.yaml"
_COMMAND_S = 240.0
"""For one of the operator's commands; each takes seconds on a free computer."""

_POLL_S = 0.25
PORT = 8000


def eventually(
    check: Callable[[], T], what: str | Callable[[], str], *, within_s: float, every_s: float = _POLL_S
) -> T:
    """Ask until the answer is true, and return it; fails with `what` when the time is up."""
    deadline = time.monotonic() + within_s
    while not (found := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(every_s)
    return found


@dataclass(frozen=True, slots=True)
class Group:
    """Hosts of one group of the cluster file, and what each offers."""

    hosts: tuple[str, ...]
    resources: Mapping[str, int]


class RayCluster:
    """The cluster of `configs/clusters/onprem.yaml`, with the addresses, the key and the sizes of these machines.

    Args:
        hosts: the machines.
        operator, head: names of the one that commands are given on, and of Ray's head.
        groups: the workers of each group.
    """

    def __init__(self, hosts: Hosts, *, operator: str, head: str, groups: Mapping[str, Group]) -> None:
        self.hosts = hosts
        self.operator = hosts[operator]
        self.head = hosts[head]
        self.url = f"http://{self.head.address}:{PORT}"
        self._head = head
        self._groups = dict(groups)
        self._token = ""

    # ---- Ray ----------------------------------------------------------------------------------------------------------

    def make_token(self) -> None:
        """Make the token that the cluster file brings to every host, as the file says."""
        self.operator.run("ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token")
        self._token = self.operator.run("cat ~/.ray/auth_token").strip()

    def up(self, *flags: str) -> str:
        """`moray up` with the file as it is now; its output."""
        self.operator.write(_CLUSTER_FILE, yaml.safe_dump(self._file(), sort_keys=False))
        return self.operator.run(f"cd && moray up {_CLUSTER_FILE} --yes {' '.join(flags)}", timeout_s=_COMMAND_S)

    def regroup(self, name: str, hosts: Sequence[str]) -> None:
        """Have a group of the file be these hosts from the next `up` on."""
        self._groups[name] = Group(tuple(hosts), self._groups[name].resources)

    def down(self) -> str:
        """`ray down`; its output."""
        return self.operator.run(f"cd && RAY_AUTH_MODE=token ray down --yes {_CLUSTER_FILE}", timeout_s=_COMMAND_S)

    def on_head(self, command: str) -> str:
        """`ray exec` on the head; the command's output among Ray's own."""
        quoted = command.replace("'", "'\\''")
        return self.operator.run(f"cd && RAY_AUTH_MODE=token ray exec {_CLUSTER_FILE} '{quoted}'", timeout_s=_COMMAND_S)

    def alive(self) -> list[str]:
        """Names of the machines that Ray's head takes for alive."""
        with self.head.threads(1) as threads:
            addresses = threads.submit(self._alive_addresses).result()
        return [host.name for host in self.hosts if host.address in addresses]

    def wait_for_nodes(self, names: Sequence[str], *, within_s: float) -> None:
        """Until these machines, and no others, are Ray's workers."""
        wanted = {self._head, *names}
        eventually(
            lambda: set(self.alive()) == wanted,
            lambda: f"Ray's nodes are {', '.join(sorted(wanted))}; they are {self.alive()}",
            within_s=within_s,
            every_s=1.0,
        )

    def _alive_addresses(self) -> set[str]:
        headers = {"authorization": f"Bearer {self._token}"}
        try:
            answer = httpx.get("http://127.0.0.1:8265/api/v0/nodes", headers=headers, timeout=20.0, trust_env=False)
        except httpx.TransportError:
            return set()
        nodes = answer.raise_for_status().json()["data"]["result"]["result"]
        return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}

    def _file(self) -> dict[str, Any]:
        """The stock file; what is changed is what it says is to be changed, and sizes."""
        file: dict[str, Any] = yaml.safe_load((_CONFIGS / "clusters" / "onprem.yaml").read_text())
        address = {name: self.hosts[name].address for group in self._groups.values() for name in group.hosts}
        file["provider"]["head_ip"] = self.head.address
        file["provider"]["worker_ips"] = list(address.values())
        file["metadata"]["groups"] = {
            "head": {**file["metadata"]["groups"]["head"], "hosts": [self.head.address]},
            **{
                name: {"hosts": [address[host] for host in group.hosts], "resources": dict(group.resources)}
                for name, group in self._groups.items()
                if group.hosts
            },
        }
        file["auth"]["ssh_user"] = "root"
        return file

    def diagnosis(self) -> str:
        """What the machines know of what went wrong."""
        logs = "/tmp/ray/session_latest/logs"
        found = []
        for host in self.hosts:
            said = host.run(
                f"ps -eo pid,stat,args | cut -c1-160; tail -n 40 {logs}/monitor.out {logs}/serve/controller_*.log; "
                f"grep -rhE 'Error|event=' {logs}/*.err {logs}/serve 2>/dev/null | tail -n 60",
                check=False,
            )
            found.append(f"== {host.name}\n{said}")
        return "\n".join(found)

    # ---- Moray --------------------------------------------------------------------------------------------------------

    def deploy(self, settings: Mapping[str, Any]) -> str:
        """`serve deploy` of the stock file with these settings besides; the command's output."""
        file: dict[str, Any] = yaml.safe_load((_CONFIGS / "deployments" / "serve-tiny-r1.yaml").read_text())
        file["http_options"] = {"host": self.head.address, "port": PORT}
        arguments = file["applications"][0]["args"]
        for section, values in settings.items():
            if isinstance(values, dict):
                arguments[section] = {**arguments.get(section, {}), **copy.deepcopy(values)}
            else:
                arguments[section] = values
        self.operator.write("/root/serve.yaml", yaml.safe_dump(file, sort_keys=False))
        self.operator.run(
            f"cd && RAY_AUTH_MODE=token ray rsync-up {_CLUSTER_FILE} serve.yaml serve.yaml", timeout_s=_COMMAND_S
        )
        return self.on_head("serve deploy serve.yaml")

    def moray(self, command: str) -> str:
        """A `moray` command on the head."""
        return self.head.run(f"cd && moray {command} --address {self.head.address}:6379", timeout_s=_COMMAND_S)

    def status(self) -> dict[str, Any] | None:
        """What `/v1/moray/status` answers to a client beside the cluster; None while it does not."""
        with self.operator.threads(1) as threads:
            return threads.submit(self._status).result()

    def _status(self) -> dict[str, Any] | None:
        try:
            answer = httpx.get(f"{self.url}/v1/moray/status", timeout=5.0, trust_env=False)
        except httpx.TransportError:
            return None
        if answer.status_code != 200:
            return None
        status: dict[str, Any] = answer.json()
        return status

    def wait_healthy(self, *, experts: int, within_s: float) -> dict[str, Any]:
        """Until health is ok with so many expert hosts; the status then."""

        def healthy() -> dict[str, Any] | None:
            status = self.status()
            if status is None or status["health"] != "ok" or len(placed(status)) != experts:
                return None
            return status

        found = eventually(
            healthy, lambda: f"{experts} expert hosts serve, and health is ok; {self.status()}", within_s=within_s
        )
        assert found is not None, "it was waited for"
        return found


def placed(status: Mapping[str, Any]) -> dict[str, str]:
    """Address of the node that each expert host is on, of those that serve."""
    return {p["id"]: p["node"] for p in status["processes"] if p["role"] == "expert_host" and p["state"] == "ready"}


def left_on(host: Host) -> list[str]:
    """Processes, sockets and shared memory that are on a machine beyond what it began with."""
    return [*host.processes(), *host.listening(), *(f"/dev/shm/{name}" for name in host.shared_memory())]
