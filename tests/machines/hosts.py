"""Fake machines on one real one: namespaces with addresses, file systems and sshd of their own, on a network of their own.

    the tests' own process          sees none of it; reaches in with `Host.run`, and `Host.threads` for sockets
      the network's namespaces      a bridge that every machine's cable ends in; `cut` takes the cable's end down
        a machine's namespaces      PIDs, mounts, network, name, IPC; private /tmp, /root, /run, /dev/shm
        another machine's           ...

Everything hangs from one process in namespaces of its own. When it ends, which it does when the tests' process does, for
whatever reason, the kernel removes every process, mount, file and network card of all machines: there is nothing to clean up,
and nothing shows outside, where any number of these can be at once. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import moray

_FIRST_PROCESS = Path(__file__).parent / "first_process.py"
_NEW = ("--net", "--pid", "--mount", "--uts", "--ipc")
_START_S = 30.0
"""For a machine to come up: tenths of a second on a free computer."""

_END_S = 20.0
_CLONE_NEWNET = 0x40000000
_BRIDGE = "machines"
_COMMANDS = ("bash", "unshare", "nsenter", "mount", "hostname", "ip", "ss", "sshd", "ssh", "ssh-keygen", "rsync")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class HostError(Exception):
    """A fake machine did not come up, or a command on it failed."""


def missing() -> str:
    """Why there can be no fake machines here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    absent = [command for command in _COMMANDS if _which(command) is None]
    if absent:
        return f"needs {', '.join(absent)} (apt-get install openssh-server openssh-client rsync iproute2 util-linux)"
    attempt = "mount -t tmpfs tmpfs /tmp && ip link add one type veth peer name two && ip link add three type bridge"
    tried = subprocess.run(
        ["unshare", *_NEW, "--fork", "sh", "-c", attempt], capture_output=True, text=True, timeout=_START_S, check=False
    )
    return f"cannot make namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _which(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:{_PATH}")


class Host:
    """One machine.

    Attributes:
        name: its name, which the others know.
        address: its IPv4 address.
        pid: of its first process, as seen from outside.
    """

    def __init__(self, name: str, address: str, pid: int) -> None:
        self.name = name
        self.address = address
        self.pid = pid

    def run(self, command: str, *, timeout_s: float = 60.0, check: bool = True) -> str:
        """Run a shell command as root there, with the environment of a login; its output, errors with it.

        Raises:
            HostError: it failed, if `check`, or took too long; has its output.
        """
        arguments = self.entering("bash", "--login", "-c", command)
        try:
            done = subprocess.run(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
                env={"HOME": "/root", "USER": "root", "LOGNAME": "root", "PATH": _PATH, "TERM": "dumb"},
            )
        except subprocess.TimeoutExpired as error:
            said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout
            raise HostError(f"{self.name}: not done after {timeout_s:.0f} s: {command}\n{said or ''}") from error
        if check and done.returncode:
            raise HostError(f"{self.name}: exit status {done.returncode}: {command}\n{done.stdout}")
        return done.stdout

    def entering(self, *command: str) -> list[str]:
        """The command line that runs `command` there."""
        return ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--uts", "--ipc", "--wd=/", *command]

    @contextlib.contextmanager
    def threads(self, count: int) -> Iterator[ThreadPoolExecutor]:
        """Threads of this process whose sockets are on that machine's network, as those of its own processes are."""
        with ThreadPoolExecutor(count, initializer=_enter_network, initargs=(self.pid,)) as threads:
            yield threads

    def write(self, path: str, text: str) -> None:
        """Write a file there."""
        subprocess.run(
            self.entering("bash", "-c", f"mkdir -p $(dirname {shlex.quote(path)}); cat > {shlex.quote(path)}"),
            input=text,
            text=True,
            check=True,
            timeout=_START_S,
        )

    def processes(self) -> list[str]:
        """Command lines of all that runs there, but for sshd, the first process and what asks."""
        script = "for p in /proc/[0-9]*; do echo \"$(basename $p) $(tr '\\0' ' ' < $p/cmdline 2>/dev/null)\"; done"
        found = []
        for line in self.run(script).splitlines():
            pid, _, command = line.partition(" ")
            if command and pid != "1" and not any(known in command for known in ("sshd", "bash --login -c for p in")):
                found.append(command.strip())
        return found

    def listening(self) -> list[str]:
        """Addresses of its listening sockets, but for sshd's: `tcp 10.0.0.2:80`, `unix /tmp/socket`."""
        found = []
        for line in self.run("ss --no-header --numeric --listening --tcp --udp --unix").splitlines():
            kind, _, _, _, where, *_ = line.split()
            if not where.endswith(":22"):
                found.append(f"{kind} {where}")
        return found

    def shared_memory(self) -> list[str]:
        """Files in /dev/shm."""
        return sorted(self.run("ls -A /dev/shm").split())


class Hosts:
    """Machines on one network. A context: they end with it.

    Args:
        names: of the machines there are at first.
        network: their addresses are taken from it, from the third on.
        environment: variables every login has, besides PATH.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        network: str = "10.213.47.0/24",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._network = ipaddress.ip_network(network)
        self._gateway = str(self._network[1])
        self._environment = dict(environment or {})
        self._names = {name: str(self._network[index]) for index, name in enumerate(names, start=2)}
        self._hosts: dict[str, Host] = {}
        self._processes: list[subprocess.Popen[str]] = []
        self._root: Host | None = None
        self._keys: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            self._make_keys()
            settings = {"bridge": _BRIDGE, "address": f"{self._gateway}/{self._network.prefixlen}"}
            process = self._first_process(settings, [])
            self._root = Host("network", self._gateway, int(self._line_of(process)))
            with ThreadPoolExecutor(len(self._names)) as threads:
                list(threads.map(self._add, self._names))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts[name] for name in self._names)

    @property
    def private_key(self) -> str:
        """Text of the key that root of every machine lets in."""
        return self._keys["id"]

    def cut(self, host: Host) -> None:
        """Pull the machine's network cable: nothing goes in or out, and nothing there or elsewhere is told."""
        self._on_network("ip", "link", "set", self._cable(host.name), "down")

    def heal(self, host: Host) -> None:
        """Plug it in again."""
        self._on_network("ip", "link", "set", self._cable(host.name), "up")

    def stop(self) -> None:
        """End every machine, and with them all that ran there. Idempotent."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        deadline = time.monotonic() + _END_S
        for process in reversed(self._processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_END_S)
            if process.stdout is not None:
                process.stdout.close()
        self._processes.clear()
        self._hosts.clear()

    # ---- how they come up ---------------------------------------------------------------------------------------------

    def _make_keys(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("id", "host"):
                key = f"{folder}/{name}"
                subprocess.run(
                    ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key],
                    stdin=subprocess.DEVNULL,
                    check=True,
                    timeout=_START_S,
                )
                self._keys[name] = Path(key).read_text()
                self._keys[f"{name}.pub"] = Path(f"{key}.pub").read_text()

    def _add(self, name: str) -> None:
        root, address = self._root, self._names[name]
        assert root is not None, "the network runs"
        binaries = Path(sys.executable).parent
        environment = {
            "PATH": f"{binaries}:{_PATH}",
            **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
            **self._environment,
        }
        settings = {
            "name": name,
            "address": address,
            "names": {"localhost": "127.0.0.1", **self._names},
            "visible": _needed_paths(),
            "environment": environment,
            "files": {".ssh/id_ed25519": self._keys["id"]},
            "host_key": self._keys["host"],
            "authorized_keys": self._keys["id.pub"],
            "sshd": _which("sshd"),
        }
        process = self._first_process(settings, root.entering())
        host = Host(name, address, int(self._line_of(process)))
        cable = self._cable(name)
        self._on_network("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        self._on_network("ip", "link", "set", cable, "master", _BRIDGE, "up")
        inside = host.entering()
        for command in (
            ("ip", "address", "add", f"{address}/{self._network.prefixlen}", "dev", "eth0"),
            ("ip", "link", "set", "eth0", "up"),
            ("ip", "route", "add", "default", "via", self._gateway),
        ):
            subprocess.run([*inside, *command], check=True, timeout=_START_S)
        self._tell(process, "the network card is in place")
        said = self._line_of(process)
        if said != "ready":
            raise HostError(f"{name} said {said!r} where 'ready' belongs")
        self._hosts[name] = host

    def _first_process(self, settings: Mapping[str, object], entering: Sequence[str]) -> subprocess.Popen[str]:
        arguments = [*entering, "unshare", *_NEW, "--fork", "--kill-child", sys.executable, str(_FIRST_PROCESS)]
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests, which then let go
        )
        self._processes.append(process)
        self._tell(process, json.dumps(settings))
        return process

    def _tell(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None, "it is a pipe"
        process.stdin.write(f"{line}\n")
        process.stdin.flush()

    def _line_of(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None, "it is a pipe"
        readable, _, _ = select.select([process.stdout], [], [], _START_S)
        line = process.stdout.readline().strip() if readable else ""
        if not line:
            raise HostError(f"a machine did not come up within {_START_S:.0f} s; its errors are on the standard error")
        return line

    def _cable(self, name: str) -> str:
        return f"port{list(self._names).index(name)}"

    def _on_network(self, *command: str) -> None:
        root = self._root
        assert root is not None, "the network runs"
        # Not its PID namespace: process ids in `command` are those seen from here.
        subprocess.run(["nsenter", "--target", str(root.pid), "--net", *command], check=True, timeout=_START_S)


def _needed_paths() -> list[str]:
    """What the interpreter and its packages are, wherever they lie."""
    package = Path(moray.__file__)
    paths: list[str | Path] = [
        sys.prefix,
        sys.base_prefix,
        package.parent,
        package.resolve().parent,
        Path(__file__).resolve().parents[2],
        *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p),
    ]
    found = {str(path.absolute()) for path in map(Path, paths) if path.is_dir()}
    # Parents first: what is mounted over them would hide what they hold.
    return sorted(found, key=len)


def _enter_network(pid: int) -> None:
    """Move the calling thread, and no other, into the network of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter the machines' network: {os.strerror(number)}")
