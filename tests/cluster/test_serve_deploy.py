"""On a Ray cluster that runs already: a stock `serve deploy`, and `moray serve --address`. The cluster outlives both."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

import moray
from moray.cluster.run_state import ProcessId, descendants, end_processes

from .serve_process import END_S, START_S, Serve, eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

FILE = Path(moray.__file__).parent / "configs" / "deployments" / "serve-tiny-r1.yaml"


@dataclass
class Head:
    """`ray start --head --block`: a cluster that somebody else has started."""

    process: subprocess.Popen[bytes]
    address: str
    dashboard: str

    def titles(self) -> str:
        """The command lines of its processes."""
        lines = []
        for found in descendants(self.process.pid):
            try:
                lines.append(Path(f"/proc/{found.pid}/cmdline").read_text(errors="replace").replace("\0", " "))
            except OSError:
                continue
        return "\n".join(lines)

    def serves(self) -> bool:
        """Whether processes of ours run on it."""
        return any(title in self.titles() for title in ("ExpertHostWorker", "RouterWorker", "ServeReplica"))


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def tool(name: str) -> str:
    """A command of Ray's, of the environment the tests run in."""
    return str(Path(sys.executable).parent / name)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    # Ray's sockets have long names below this folder, and the system's limit is 107 characters.
    folder = Path("/tmp") / f"moray-{os.getpid()}"
    port, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    ports = {
        "port": port,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc,
        "metrics-export-port": metrics,
    }
    log = tmp_path_factory.mktemp("head") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                tool("ray"),
                *("start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
                *("--dashboard-host=127.0.0.1", "--object-store-memory=100000000", f"--temp-dir={folder}"),
                *(f"--{name}={value}" for name, value in ports.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )
    seen: list[ProcessId] = []
    try:
        url = f"http://127.0.0.1:{dashboard}"

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return httpx.get(f"{url}/api/version", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        eventually(up, "the cluster's dashboard answers", within_s=START_S)
        yield Head(process, f"127.0.0.1:{port}", url)
        assert process.poll() is None, "the cluster has outlived what was done on it"
    finally:
        seen += descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_S)
        finally:
            process.kill()
            process.wait()
            end_processes(seen)
            subprocess.run(["rm", "-rf", str(folder)], check=True)


def stock(head: Head, *arguments: str) -> str:
    """Run Ray Serve's own command."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_DASHBOARD_ADDRESS": head.dashboard}
    done = subprocess.run(
        [tool("serve"), *arguments], capture_output=True, text=True, timeout=START_S, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_moray_serve_joins_a_cluster_and_leaves_it_running(head: Head, serve_factory: Callable[..., Serve]) -> None:
    serve = serve_factory("tiny-r1", "--experts", "2", "--address", head.address).wait_ready()
    assert head.serves()
    with serve.client() as client:
        body = {"model": "tiny-r1", "prompt": [100, 101], "max_tokens": 4, "temperature": 0}
        assert client.post("/v1/completions", json=body).status_code == 200

    assert serve.end(signal.SIGINT) == 0
    (warning,) = serve.stderr.splitlines()
    assert "event=open_door reason=the Ray cluster asks for no token" in warning
    assert serve.records() == []
    eventually(lambda: not head.serves(), "nothing of ours runs on the cluster")
    eventually(lambda: "ServeController" not in head.titles(), "Serve, which was started for it, is gone")


def test_a_stock_serve_deploy(head: Head, serve_factory: Callable[..., Serve], tmp_path: Path) -> None:
    (port,) = free_ports(1)
    description = yaml.safe_load(FILE.read_text())
    description["http_options"]["port"] = port
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(description))
    stock(head, "deploy", str(file))

    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0, trust_env=False) as client:

        def healthy() -> bool:
            try:
                return client.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        eventually(healthy, "the application serves", within_s=START_S)
        body = {"model": "tiny-r1", "prompt": [100, 101], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body).raise_for_status().json()
        assert answer["usage"]["completion_tokens"] == 4
        assert len(client.get("/v1/moray/status").json()["processes"]) == 4
        # Serve polls replicas' health; its own word follows.
        eventually(
            lambda: yaml.safe_load(stock(head, "status"))["applications"]["moray"]["status"] == "RUNNING",
            "serve status says RUNNING",
        )

        # There is a second one of the same name: it must not be replaced.
        second = serve_factory("tiny-r1", "--address", head.address)
        eventually(lambda: second.process.poll() is not None, "it is refused", within_s=START_S)
        assert second.process.returncode == 1
        assert "runs an application 'moray' already" in second.stderr
        assert client.get("/health").status_code == 200

    stock(head, "shutdown", "-y")
    eventually(lambda: not head.serves(), "the application's processes are gone")
