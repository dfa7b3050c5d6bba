"""Process 1 of a fake machine, and of the network between the machines: what it sets up lasts as long as it does.

Runs by itself in new namespaces; the first line of its standard input says, in JSON, what to set up. The kernel ends a PID
namespace with its first process, and removes what nobody is in any more: mounts, network cards. This process ends when its
standard input does, which ends with whoever started it, however they end.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_PRIVATE = {"/tmp": "1777", "/root": "0700", "/run": "0755", "/dev/shm": "1777", "/var/tmp": "1777"}
"""What each machine has for itself, empty at first, and its mode."""

_OWN = Path("/run/machine")

_REAP_EVERY_S = 0.2


def _read_line() -> str:
    """A line of the standard input, unbuffered: `_stay` looks at the file itself."""
    line = b""
    while not line.endswith(b"\n"):
        got = os.read(sys.stdin.fileno(), 1)
        if not got:
            sys.exit("it was let go before it was up")
        line += got
    return line.decode()


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _set_up_network(settings: dict[str, Any]) -> None:
    """A bridge, which is also the machines' way out: it tells them at once that there is nothing beyond."""
    _run("ip", "link", "add", settings["bridge"], "type", "bridge")
    _run("ip", "address", "add", settings["address"], "dev", settings["bridge"])
    _run("ip", "link", "set", settings["bridge"], "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _mount_private_folders(visible: list[str]) -> None:
    """Empty file systems over `_PRIVATE`; of what they cover, `visible` stays where it is, to be read alone."""
    covered = [path for path in visible if any(Path(path).is_relative_to(private) for private in _PRIVATE)]
    opened = {path: os.open(path, os.O_PATH) for path in covered}
    for private, mode in _PRIVATE.items():
        if Path(private).is_dir():
            _run("mount", "-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", private)
    for path, descriptor in opened.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        # Its path leads into the new file system by now; what was opened before is still what it was.
        _run("mount", "--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{descriptor}", path)
        _run("mount", "-o", "remount,bind,ro", path)
        os.close(descriptor)


def _write_over(path: str, text: str) -> None:
    """Have this machine alone find `text` in a file of the system."""
    own = _OWN / Path(path).name
    own.write_text(text)
    own.chmod(Path(path).stat().st_mode & 0o777)
    _run("mount", "--bind", str(own), path)


def _set_up_accounts(settings: dict[str, Any]) -> None:
    """Names without a name server, and a root who can log in and has these commands and variables."""
    _write_over("/etc/hosts", "".join(f"{address} {name}\n" for name, address in settings["names"].items()))
    _write_over("/etc/resolv.conf", "")
    others = [line for line in Path("/etc/shadow").read_text().splitlines() if not line.startswith("root:")]
    _write_over("/etc/shadow", "\n".join(["root:*:19000:0:99999:7:::", *others, ""]))  # neither locked nor a password
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings["environment"].items())
    (Path("/root") / ".bashrc").write_text(exports)
    (Path("/root") / ".bash_profile").write_text(". ~/.bashrc\n")
    for name, content in settings["files"].items():
        file = Path("/root") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(0o600)


def _start_sshd(settings: dict[str, Any]) -> None:
    Path("/run/sshd").mkdir()
    for name in ("host_key", "authorized_keys"):
        (_OWN / name).write_text(settings[name])
        (_OWN / name).chmod(0o600)
    (_OWN / "sshd_config").write_text(
        f"ListenAddress {settings['address']}\n"
        f"HostKey {_OWN}/host_key\n"
        f"AuthorizedKeysFile {_OWN}/authorized_keys\n"
        "PasswordAuthentication no\n"
        "UsePAM no\n"
        "StrictModes no\n"
        "UseDNS no\n"
        "MaxStartups 100\n"
        "PidFile none\n"
    )
    _run(settings["sshd"], "-f", f"{_OWN}/sshd_config", "-E", f"{_OWN}/sshd.log")


def _stay() -> None:
    """Reap what is orphaned here, as every first process must, until the standard input ends."""
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], _REAP_EVERY_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            return
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            continue


def main() -> None:
    """Set up what is asked for, say this process's id as it is outside, and stay."""
    settings: dict[str, Any] = json.loads(_read_line())  # not in the arguments, which everybody can read: it has keys
    outside = os.readlink("/proc/self")  # /proc is still that of the machine the tests run on
    _run("ip", "link", "set", "lo", "up")
    if "bridge" in settings:
        _set_up_network(settings)
        print(outside, flush=True)
    else:
        _run("mount", "-t", "proc", "proc", "/proc")
        _run("hostname", settings["name"])
        _mount_private_folders(settings["visible"])
        _OWN.mkdir()
        _set_up_accounts(settings)
        print(outside, flush=True)
        _read_line()  # the network card is in place
        _start_sshd(settings)
        print("ready", flush=True)
    _stay()


if __name__ == "__main__":
    main()
