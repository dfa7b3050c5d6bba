"""What keeps a Ray cluster that `moray serve` starts to its own user: a token without which nobody may use it, and a folder.

Ray runs whatever it is asked to run, and keeps the secret of Moray's own connections. Left to itself it listens on every
address, asks nobody for anything, and lets every user of the machine write to its files. So a server's Ray asks for a token,
made anew at each start and kept in a file that its user alone can read, where `moray scale` and the other commands of that
user find it; and its logs and sockets are in a folder that nobody else may enter.

A cluster that is joined has rules of its own: what RAY_AUTH_MODE and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH tell to Ray.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from ..configs.errors import ConfigError
from .run_state import RunState


def make_token(path: Path) -> None:
    """Make a token, and have the Ray cluster that this process is about to start ask for it.

    Args:
        path: its file, which must not exist.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    _use(path)


def use_token_for(address: str) -> None:
    """Show the token of the server whose Ray is at `address`, if one of this user's does run there. Before `ray.init`."""
    state = RunState()
    for record in state.records():
        path = state.token_path(record.server)
        if record.server.alive and address in (record.ray_address, "auto") and path.is_file():
            _use(path)
            return


def session_folder(base: Path) -> Path:
    """A folder below `base`, which all users share, for Ray's sessions of this user.

    Raises:
        ConfigError: somebody else has made it, or has access to it.
    """
    private = base / f"moray-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        private.mkdir(mode=0o700)
    found = private.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{private} must be a folder of this user's alone (mode 700), and is not: remove it")
    # Ray opens the folder it is given to everybody, at every start of a process; not the one above.
    return private / "ray"


@contextlib.contextmanager
def few_processes() -> Iterator[None]:
    """Keep the `ray.init` inside from starting what nobody here asks for anything: the dashboard's process, which it starts
    with `include_dashboard=False`, too, and waits for; the one that sends logs to the driver; and the autoscaler's.
    """
    from ray._private.node import Node

    before = {name: getattr(Node, name) for name in ("start_api_server", "start_log_monitor", "start_monitor")}
    for name in before:
        setattr(Node, name, lambda *_args, **_options: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def _use(path: Path) -> None:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    os.environ.pop("RAY_AUTH_TOKEN", None)  # which would come first
    if "ray" in sys.modules:
        # It has read the environment already; this is how its own `ray.init` changes its mind.
        from ray._private.authentication import authentication_token_setup as authentication

        authentication.Config.initialize("")
        authentication.AuthenticationTokenLoader.instance().reset_cache()
