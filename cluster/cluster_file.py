"""What can be wrong with a cluster file before `ray up` touches any machine, said in one line each."""

from __future__ import annotations

import ipaddress
import logging
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..configs.errors import ConfigError
from .onprem import host_groups

PLACEHOLDER = "REPLACE_ME"
"""What stands in the files that ship where only the user can know what belongs there."""

_EXAMPLES = tuple(
    ipaddress.ip_network(net) for net in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")
)
"""Addresses that are kept for documentation (RFC 5737, RFC 3849): no host has one."""

_AUTH_MODE = re.compile(r"RAY_AUTH_MODE=['\"]?(\w+)")
_VERSION = re.compile(r"\b(moray-serve|ray)(?:\[\w+\])?==([\w.]+)")

TOKEN_PATH = "~/.ray/auth_token"
"""Where Ray looks for the token on every node."""

_MAKE_TOKEN = "ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token"
_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def check_cluster_file(config: Mapping[str, Any], *, source: str) -> str:
    """Look at a cluster file for `ray up`; the auth mode it sets.

    Args:
        config: as plain data.
        source: named in errors.

    Raises:
        ConfigError: it cannot be used as it is; says what to change.
    """
    if str(config.get("apiVersion", "")).startswith("ray.io/"):
        raise ConfigError(f"{source}: is for KubeRay's operator: kubectl apply -f {source}")
    _check_placeholders(config, source)
    _check_schema(config, source)
    if config["provider"]["type"] == "local":
        host_groups(config, source=source)
    _check_versions(config, source)
    _check_local_files(config, source)
    mode = _auth_mode(config, source)
    if mode == "token":
        _check_token(config, source)
    return mode


def _strings(value: object, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string in plain data, with where it is."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{where}.{index}")
    elif isinstance(value, str):
        yield where, value


def _check_placeholders(config: Mapping[str, Any], source: str) -> None:
    left = [f"{where} = {text}" for where, text in _strings(config) if PLACEHOLDER in text or _is_example(text)]
    if left:
        raise ConfigError(f"{source}: replace what only stands for something: {', '.join(left)}")


def _is_example(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return any(address in net for net in _EXAMPLES)


def _check_schema(config: Mapping[str, Any], source: str) -> None:
    import click
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)  # it tells of every default
    provider = config.get("provider")
    if not isinstance(provider, Mapping) or not isinstance(provider.get("type"), str):
        raise ConfigError(f"{source}: provider.type is missing: local, aws, gcp, ...")
    try:
        validate_config(prepare_config(dict(config)))
    except jsonschema.ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path) or "the file"
        raise ConfigError(f"{source}: Ray does not take {where}: {error.message}") from None
    except (ValueError, NotImplementedError, KeyError, click.ClickException) as error:
        raise ConfigError(f"{source}: Ray does not take it: {error}") from error


def _commands(config: Mapping[str, Any]) -> Iterator[str]:
    for key in _COMMANDS:
        yield from (config.get(key) or ())
    for node_type in (config.get("available_node_types") or {}).values():
        yield from (node_type.get("worker_setup_commands") or ())


def _check_versions(config: Mapping[str, Any], source: str) -> None:
    import ray

    own = {"moray-serve": __version__, "ray": ray.__version__}
    for command in _commands(config):
        for name, version in _VERSION.findall(command):
            mine = own[name]
            if version != mine:
                raise ConfigError(
                    f"{source}: installs {name} {version} on the nodes, and this machine has {mine}: it must be the same "
                    "everywhere"
                )


def _check_local_files(config: Mapping[str, Any], source: str) -> None:
    """Files of this machine that Ray copies: it stops with a stack trace where one is missing."""
    mounts = {f"file_mounts.{there}": here for there, here in (config.get("file_mounts") or {}).items()}
    auth = config.get("auth") or {}
    if "ssh_private_key" in auth:
        mounts["auth.ssh_private_key"] = auth["ssh_private_key"]
    token = f"file_mounts.{TOKEN_PATH}"
    for where, here in mounts.items():
        if where != token and not Path(here).expanduser().exists():
            raise ConfigError(f"{source}: {where} = {here}: there is no such file on this machine")


def _auth_mode(config: Mapping[str, Any], source: str) -> str:
    modes: set[str] = {mode for command in _commands(config) for mode in _AUTH_MODE.findall(command)}
    if len(modes) != 1 or not modes <= {"token", "disabled"}:
        found = " and ".join(sorted(modes)) or "nothing"
        raise ConfigError(
            f"{source}: its commands set RAY_AUTH_MODE to {found}: set it to token (or to disabled, which lets in whoever "
            "reaches a port) on every node, or Ray decides by whether a token lies about"
        )
    return modes.pop()


def _check_token(config: Mapping[str, Any], source: str) -> None:
    here = (config.get("file_mounts") or {}).get(TOKEN_PATH)
    if here is None:
        raise ConfigError(
            f"{source}: RAY_AUTH_MODE is token, and file_mounts.{TOKEN_PATH} is missing: nodes need the token"
        )
    path = Path(here).expanduser()
    if not path.is_file() or not path.stat().st_size:
        raise ConfigError(f"{path}: there is no token; make one: {_MAKE_TOKEN}")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path}: has mode {mode:o}, so that others can read the cluster's token: chmod 600 {path}")
