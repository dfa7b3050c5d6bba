"""The fake machines themselves: apart from each other, reachable through the network alone, and gone without a trace."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import hosts as fake_hosts
from .hosts import HostError, Hosts
from .ray_cluster import eventually

_MISSING = fake_hosts.missing()

pytestmark = [
    pytest.mark.machines,
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "nothing is missing"),
]

_SSH = "ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o ConnectTimeout=2 -o LogLevel=ERROR"
_GONE_S = 30.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(("one", "two"), environment={"GREETING": "hello there"}) as hosts:
        yield hosts


def test_one_logs_in_at_another_by_name(hosts: Hosts) -> None:
    assert (
        hosts["one"].run(f"{_SSH} two 'hostname; echo $GREETING; python -c \"import moray\"'") == "two\nhello there\n"
    )


def test_each_has_files_processes_and_sockets_of_its_own(hosts: Hosts) -> None:
    one, two = hosts
    one.write("/tmp/deep/file", "of one")
    one.run("echo x > /dev/shm/mine; sleep 98765 > /dev/null 2>&1 &")
    assert one.run("cat /tmp/deep/file") == "of one"
    assert one.shared_memory() == ["mine"]
    assert any("98765" in process for process in one.processes())
    with one.threads(1) as threads:
        listening = threads.submit(socket.create_server, (one.address, 0)).result()
        with listening:
            address = "{}:{}".format(*listening.getsockname())
            assert f"tcp {address}" in one.listening()
    assert two.run("ls /tmp/deep 2>&1; true").startswith("ls: ")
    assert (two.shared_memory(), two.processes(), two.listening()) == ([], [], [])
    assert not Path("/tmp/deep").exists()
    assert one.address not in subprocess.run(["ip", "address"], capture_output=True, text=True, check=True).stdout


def test_a_cut_machine_is_silent_until_it_is_healed(hosts: Hosts) -> None:
    one, two = hosts
    hosts.cut(two)
    with pytest.raises(HostError, match="exit status 255"):
        one.run(f"{_SSH} two true")
    assert two.run("hostname") == "two\n", "only its network is cut"
    hosts.heal(two)
    eventually(lambda: one.run(f"{_SSH} two hostname", check=False) == "two\n", "it answers again", within_s=_GONE_S)


def test_what_fails_there_says_so(hosts: Hosts) -> None:
    with pytest.raises(HostError, match=r"(?s)one: exit status 3: echo because; exit 3.*because"):
        hosts["one"].run("echo because; exit 3")
    with pytest.raises(HostError, match=r"(?s)one: not done after 0 s: echo begun; sleep 60.*begun"):
        hosts["one"].run("echo begun; sleep 60", timeout_s=0.4)


def test_nothing_outlives_whoever_made_them(tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from tests.machines.hosts import Hosts\n"
        "with Hosts(('one',)) as hosts:\n"
        "    host = hosts['one']\n"
        "    host.run('setsid sleep 87654 > /dev/null 2>&1 &')\n"
        "    print(json.dumps(host.pid), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        pid = json.loads(process.stdout.readline())
        namespace = os.readlink(f"/proc/{pid}/ns/pid")
        assert len(_in_namespace(namespace)) >= 3, "its first process, sshd, and what sleeps"
        process.send_signal(signal.SIGKILL)
    eventually(lambda: _in_namespace(namespace) == [], "every process has ended", within_s=_GONE_S)


def _in_namespace(namespace: str) -> list[int]:
    """Processes of a PID namespace."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns" / "pid") == namespace:
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended meanwhile
    return found
