"""What Ray's provider for hosts that are there already (`type: local`) leaves to the hosts of an on-premises cluster file.

The provider knows a single kind of worker. So the file names the hosts of each group itself, under `metadata.groups`; Ray
brings the file to every host, and each looks itself up there when it starts:

    ray start $(python -m moray.cluster.onprem flags ~/ray_bootstrap_config.yaml) --address=...

And the provider reads the list of hosts only when it is made, with the autoscaler, and trusts what it wrote down about them.
So a command on the head brings what it wrote down up to date: `register` with hosts that are new in the file, for an autoscaler
that runs; `register --restart` also with the fact that Ray is not running on any worker as far as a new head goes.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..configs.errors import ConfigError

HEAD_GROUP = "head"
"""The group whose only host is the provider's `head_ip`."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Group(_Section):
    hosts: list[str]
    resources: dict[str, int]


class _Metadata(_Section):
    groups: dict[str, _Group] = Field(min_length=1)


class _Provider(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    head_ip: str
    worker_ips: list[str]


@dataclass(frozen=True, slots=True)
class HostGroup:
    """Hosts that are alike.

    Attributes:
        name: of the group.
        hosts: their addresses, as the provider has them.
        resources: what each offers, as the `resources` of Ray's node types: CPU and GPU as Ray is to count them (without, it
            counts itself), and labels of our own.
    """

    name: str
    hosts: tuple[str, ...]
    resources: Mapping[str, int]

    def flags(self, host: str) -> list[str]:
        """Of `ray start` on `host`; none holds a space."""
        labels = {name: amount for name, amount in self.resources.items() if name not in ("CPU", "GPU")}
        counted = {"CPU": "--num-cpus", "GPU": "--num-gpus"}
        flags = [f"--node-ip-address={host}"]
        flags += [f"{flag}={self.resources[kind]}" for kind, flag in counted.items() if kind in self.resources]
        return flags + ([f"--resources={json.dumps(labels, separators=(',', ':'))}"] if labels else [])


def host_groups(config: Mapping[str, Any], *, source: str) -> tuple[HostGroup, ...]:
    """The groups of an on-premises cluster file, given as plain data; `source` is named in errors.

    Raises:
        ConfigError: an address is none, or a host is in no group, in two, or in one without being the provider's.
    """
    try:
        provider = _Provider.model_validate(config.get("provider"))
        groups = _Metadata.model_validate(config.get("metadata")).groups
    except ValidationError as error:
        problems = [f"{'.'.join(str(p) for p in e['loc'])} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{source}: provider and metadata: " + "; ".join(problems)) from None
    listed = [provider.head_ip, *provider.worker_ips]
    for host in listed:
        _check_address(host, source)
    if len(set(listed)) < len(listed):
        raise ConfigError(f"{source}: provider: {', '.join(sorted(listed))}: a host can be there only once")
    grouped = [host for group in groups.values() for host in group.hosts]
    for host in listed:
        if grouped.count(host) != 1:
            raise ConfigError(
                f"{source}: {host} is in {grouped.count(host) or 'none'} of metadata.groups: name it in exactly one, "
                "which says what the host offers"
            )
    if strangers := sorted(set(grouped) - set(listed)):
        raise ConfigError(
            f"{source}: metadata.groups: {', '.join(strangers)}: neither provider.head_ip nor in provider.worker_ips"
        )
    if HEAD_GROUP not in groups or groups[HEAD_GROUP].hosts != [provider.head_ip]:
        raise ConfigError(
            f"{source}: metadata.groups.{HEAD_GROUP}.hosts must be provider.head_ip, {provider.head_ip}, and nothing else"
        )
    for name, group in groups.items():
        _check_resources(group.resources, f"{source}: metadata.groups.{name}.resources")
    return tuple(HostGroup(name, tuple(group.hosts), group.resources) for name, group in groups.items())


def _check_address(host: str, source: str) -> None:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        raise ConfigError(
            f"{source}: provider: {host!r} is no IPv4 address: a name may mean another address on the host itself, and Ray's "
            "provider knows no IPv6"
        ) from None


def _check_resources(resources: Mapping[str, int], where: str) -> None:
    for name, amount in resources.items():
        if not name or " " in name or amount < 0:
            raise ConfigError(f"{where}: {name!r} = {amount}: must have a name without spaces, and not be negative")


def flags_of_this_host(config: Mapping[str, Any], *, source: str, is_here: Callable[[str], bool]) -> list[str]:
    """Flags of `ray start` on this host.

    Args:
        config: the cluster file.
        source: named in errors.
        is_here: whether an address is one of this host's.

    Raises:
        ConfigError: the file cannot be used, or this host is not in it.
    """
    groups = host_groups(config, source=source)
    found = [(group, host) for group in groups for host in group.hosts if is_here(host)]
    if len(found) != 1:
        hosts = ", ".join(host for group in groups for host in group.hosts)
        problem = f"{len(found)} addresses of" if found else "none of the addresses of"
        raise ConfigError(f"{source}: {problem} this host are among {hosts}: list exactly one")
    group, host = found[0]
    return group.flags(host)


def is_own_address(address: str) -> bool:
    """Whether a network interface of this host has the address: only then can a socket be bound to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def register(config: Mapping[str, Any], *, restart: bool) -> None:
    """Have Ray's provider on this machine know every host of the file.

    Args:
        config: the cluster file, as Ray prepared it.
        restart: the head is about to start: no worker is part of its cluster. Without this, an autoscaler that finds workers
            written down as running has them start Ray, but brings them neither files nor a changed setup.
    """
    from ray.autoscaler._private.local.node_provider import LocalNodeProvider
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND

    provider = LocalNodeProvider(config["provider"], config["cluster_name"])
    if restart:
        for host in provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER}):
            provider.terminate_node(host)  # of this provider: it writes it down, and no more


def read_cluster_file(path: Path) -> dict[str, Any]:
    """A cluster file as plain data.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        config = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds {type(config).__name__}, not a cluster file")
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what a command of the cluster file asks; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moray.cluster.onprem")
    commands = parser.add_subparsers(dest="command", required=True)
    flags = commands.add_parser("flags", help="print this host's own flags of `ray start`")
    known = commands.add_parser("register", help="have Ray's autoscaler on this host know every host of the file")
    known.add_argument("--restart", action="store_true", help="no worker runs: the head is about to start")
    for command in (flags, known):
        command.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    try:
        config = read_cluster_file(options.file)
        if options.command == "flags":
            print(*flags_of_this_host(config, source=str(options.file), is_here=is_own_address))
        else:
            host_groups(config, source=str(options.file))
            register(config, restart=options.restart)
    except ConfigError as error:
        print(f"moray: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
