"""`moray up`: the stock `ray up`, after a look at the file, with what is easy to forget in its environment."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..configs.errors import ConfigError
from .cluster_file import check_cluster_file
from .onprem import read_cluster_file


def add_up(commands: Any) -> None:
    """Add `up` to the command's sub-parsers."""
    up = commands.add_parser(
        "up",
        help="start a cluster on many machines: `ray up` with what is easy to forget",
        description="Check a cluster file (see configs/clusters), print the `ray up` that starts it, and run that.",
    )
    up.add_argument(
        "file", type=Path, metavar="FILE", help="cluster file of Ray's, such as configs/clusters/onprem.yaml"
    )
    up.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="...", help="after FILE, flags of `ray up`: --yes, --no-restart, ..."
    )
    up.set_defaults(run=lambda options: up_cluster(options.file, options.flags))


def up_cluster(file: Path, flags: Sequence[str]) -> int:
    """Check `file`, say what is run, run it; its exit status.

    Args:
        file: cluster file.
        flags: of `ray up`, passed on as they are.

    Raises:
        ConfigError: the file cannot be used, or something that `ray up` needs is not here.
    """
    config = read_cluster_file(file)
    mode = check_cluster_file(config, source=str(file))
    settings = up_environment(config["provider"]["type"], auth_mode=mode)
    ray = _ray()
    for tool in ("ssh", "rsync"):
        if shutil.which(tool) is None:
            raise ConfigError(f"`ray up` needs {tool}, which is not on PATH: install it")
    command = [ray, "up", str(file), *flags]
    print("moray: running:", *(f"{name}={value}" for name, value in settings.items()), shlex.join(command), flush=True)
    status = _run(command, {**os.environ, **settings})
    if status == 0:
        print(
            "moray: the head is up; it brings up the others, which takes a minute or more: "
            f"ray exec {shlex.quote(str(file))} 'ray status'",
            flush=True,
        )
    return status


def up_environment(provider: str, *, auth_mode: str) -> dict[str, str]:
    """Environment variables that `ray up` needs.

    Args:
        provider: `provider.type` of the file.
        auth_mode: that the file sets on the nodes.
    """
    settings = {"RAY_AUTH_MODE": auth_mode}
    if provider == "local":
        # Ray's default, autoscaler v2, starts one worker too few with this provider (2.60).
        settings["RAY_UP_enable_autoscaler_v2"] = "0"
    return settings


def _ray() -> str:
    """The `ray` command: on PATH, else beside the Python that runs this."""
    beside = Path(sys.executable).with_name("ray")
    found = shutil.which("ray") or (str(beside) if beside.is_file() else None)
    if found is None:
        raise ConfigError("there is no `ray` on PATH: activate the environment that moray-serve is installed in")
    return found


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    # Without a deadline: it asks questions, and machines of a cloud take what they take. Ctrl-C ends it.
    with subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                status = process.wait()
            except KeyboardInterrupt:
                continue  # it got the same signal, and ends in its own way
            return status if status >= 0 else 128 - status  # as a shell reports a signal
