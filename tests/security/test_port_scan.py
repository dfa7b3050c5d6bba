"""A running server, seen by somebody on its network or its machine who does not hold the cluster's secret."""

from __future__ import annotations

import base64
import itertools
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moray.actors.deadline import Deadline
from moray.actors.links import dial
from moray.actors.links.sockets import split_endpoint
from moray.cluster.ledger import Record
from moray.cluster.run_state import RunState

from ..cluster.serve_process import Serve, eventually, stream_ids
from .processes import Held, Place, command, held, listening
from .strangers import CLOSED_WITHIN_S, attacks, connected, crowd, recorded, refused

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PROMPT = list(range(100, 140))
TOKENS = 60
SILENT = 100
"""More than an acceptor has handshakes in progress at a time."""

CHANNELS = {"shm": "link/shm", "gloo": "link/gloo", "front": "front"}

RAYS_OWN = re.compile(
    r"ray/core/src/ray/(gcs/gcs_server|raylet/raylet)|ray/autoscaler/|ray/_private/(log_monitor|runtime_env/agent)"
    r"|ray/dashboard/|^ray::(DashboardAgent|RuntimeEnvAgent|ServeController|ProxyActor|ServeReplica:)|moray\.cluster\.cli"
)
"""Processes in which nothing of ours listens: Ray's and Serve's, and those in which Ray's own code listens beside ours."""

OURS = re.compile(r"^ray::(ExpertHostWorker|RouterWorker)")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    serve = Serve(tmp_path_factory.mktemp("scanned"), ["--port", "0", "tiny-r1", "--experts", "2"])
    try:
        yield serve.wait_ready()
    finally:
        serve.take_down()


ASK_RAY = """
import os, sys
from moray.cluster import private_ray
if sys.argv[2] == "with token":
    private_ray.use_token_for(sys.argv[1])
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_get(b"cluster:moray", namespace=b"moray").hex())
"""


def ask_ray(server: Serve, how: str) -> subprocess.CompletedProcess[str]:
    """What the controller has left with Ray for the next controller, as hexadecimal digits."""
    [record] = RunState(server.runtime / "moray").records()
    environment = {**server.environment, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, "-c", ASK_RAY, record.ray_address, how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def record(server: Serve) -> Record:
    done = ask_ray(server, "with token")
    assert done.returncode == 0, done.stderr
    return Record.unpack(bytes.fromhex(done.stdout))


@pytest.fixture(scope="module")
def places(record: Record) -> dict[Place, str]:
    """Where Moray listens, by its own account, and for what."""
    found = {}
    for process in record.processes:
        for address in process.addresses:
            is_unix = address.kind == "shm"
            place = Place(f"@{address.endpoint}") if is_unix else Place(*split_endpoint(address.endpoint))
            found[place] = CHANNELS[address.kind]
        if process.address:
            found[Place(*split_endpoint(process.address))] = CHANNELS["front"]
    return found


def workers(server: Serve) -> dict[int, str]:
    """Moray's own processes and what each is."""
    shown = {process.pid: OURS.match(command(process.pid)) for process in server.processes() if process.alive}
    return {pid: match[1] for pid, match in shown.items() if match}


def test_every_listening_socket_is_known(server: Serve, places: dict[Place, str]) -> None:
    """Ours listen on this node's own address; beside them there are Ray's and Serve's, and nothing else."""
    assert sorted(places.values()) == ["front", "link/gloo", "link/gloo", "link/shm", "link/shm"]
    address = {process["node"] for process in server.status()["processes"]}
    assert len(address) == 1
    assert {place.host for place in places if not place.is_unix} == address
    assert not address & {"0.0.0.0", "::", ""}

    ours = workers(server)
    found = listening(process.pid for process in server.processes() if process.alive)
    assert sorted(ours.values()) == ["ExpertHostWorker", "ExpertHostWorker", "RouterWorker"]
    seen = set()
    for pid, there in found.items():
        if pid in ours:
            assert len([place for place in there if place not in places]) == 1, "that of Ray's worker, and no other"
            seen |= {place for place in there if place in places}
        elif there:
            assert RAYS_OWN.search(command(pid)), f"{command(pid)} listens at {there}"
            assert not places.keys() & set(there)
    assert seen == places.keys()
    port = int(server.url.rpartition(":")[2])
    # `moray serve` holds the front's socket, and the front has borrowed it.
    assert {place.host for place in itertools.chain(*found.values()) if place.port == port} == {"127.0.0.1"}


def test_strangers_get_nothing_and_break_nothing(
    server: Serve, record: Record, places: dict[Place, str], within_limits: Callable[[dict[int, Held]], bool]
) -> None:
    pids = list(workers(server))
    with server.client() as client, Streams(server) as streams:
        undisturbed = stream_ids(client, PROMPT, TOKENS, [])
        with ThreadPoolExecutor(2 * len(places)) as pool:
            # What is opened once, for whoever comes first, is there before it is counted: gloo's device, for example.
            first = [
                pool.submit(attacks, place, channel, recorded(place, channel, record.secret))
                for place, channel in places.items()
            ]
            for attacked in first:
                attacked.result()
            before = {pid: held(pid) for pid in pids}
            silent = {place: pool.submit(crowd, place, SILENT) for place in places}
            tried = {
                place: pool.submit(attacks, place, channel, recorded(place, channel, record.secret))
                for place, channel in places.items()
            }
            for place in places:
                for told in silent[place].result():
                    assert told.data == b""
                    assert told.seconds < CLOSED_WITHIN_S
                for attack, told in tried[place].result().items():
                    assert refused(told), (attack, place, told)
                    assert record.secret not in told.data
        streams.wait_for_one_more()
    assert streams.seen == {tuple(undisturbed)}
    eventually(lambda: within_limits(before), f"every process holds what it held before: {before}")


@pytest.fixture
def within_limits() -> Callable[[dict[int, Held]], bool]:
    """Whether processes hold what they held, but for what Ray opens and closes by itself. 500 strangers came to each."""

    def check(before: dict[int, Held]) -> bool:
        now = {pid: held(pid) for pid in before}
        return all(
            now[pid].descriptors <= then.descriptors + 4
            and now[pid].threads <= then.threads + 4
            and now[pid].resident_mb <= then.resident_mb + 64
            for pid, then in before.items()
        )

    return check


class Streams:
    """Streams one answer after the other, in a thread, until it is left."""

    def __init__(self, server: Serve) -> None:
        self.seen: set[tuple[int, ...]] = set()
        self._server = server
        self._done = threading.Condition()
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streams")

    def __enter__(self) -> Streams:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for_one_more(self) -> None:
        """Wait for a stream that begins after this call, and so for one that ran before it too."""
        with self._done:
            wanted = self._count + 2
            assert self._done.wait_for(lambda: self._count >= wanted, 120), "streams have stopped"

    def _run(self) -> None:
        with self._server.client() as client:
            while not self._stop.is_set():
                tokens = tuple(stream_ids(client, PROMPT, TOKENS, []))
                with self._done:
                    self.seen.add(tokens)
                    self._count += 1
                    self._done.notify_all()


def test_what_gloo_opens_for_a_link_is_closed_again(server: Serve, record: Record, places: dict[Place, str]) -> None:
    """gloo listens for each link, by itself and without asking who comes; see `actors/links/open_ports.py`."""
    address = next(a for process in record.processes for a in process.addresses if a.kind == "gloo")
    pids = list(workers(server))
    before = set(itertools.chain(*listening(pids).values()))
    link = dial(address, secret=record.secret, identity="router-98", deadline=Deadline.after(60))
    try:
        opened = set(itertools.chain(*listening(pids).values())) - before
        assert {place.host for place in opened} == {split_endpoint(address.endpoint)[0]}
        for place in opened:
            with pytest.raises(TimeoutError):
                socket.create_connection((place.host, place.port), timeout=0.1)
        for place in places:
            connected(place).close()
    finally:
        link.close()


def test_ray_gives_nothing_without_its_token(server: Serve, record: Record) -> None:
    """Who may use Ray may do everything, and read the secret."""
    refused = ask_ray(server, "without")
    assert refused.returncode != 0
    assert refused.stdout == ""
    assert "AuthenticationError" in refused.stderr


def test_the_secret_is_nowhere_to_be_read(server: Serve, record: Record) -> None:
    [run] = RunState(server.runtime / "moray").records()
    token = RunState(server.runtime / "moray").token_path(run.server)
    hidden = [*forms(record.secret), token.read_bytes()]

    def shows(where: str, content: bytes) -> list[str]:
        return [where for form in hidden if form in content]

    found = []
    for process in server.processes():
        for part in ("cmdline", "environ", "comm"):
            path = Path(f"/proc/{process.pid}/{part}")
            if process.alive:
                found += shows(str(path), path.read_bytes())
    for path in [*Path(run.session).rglob("*"), *server.folder.rglob("*")]:
        if path.is_file() and path != token:
            found += shows(str(path), path.read_bytes())
    with server.client() as client:
        for url in ("/health", "/metrics", "/v1/moray/status", "/v1/models"):
            found += shows(url, client.get(url).content)
    assert found == []
    assert token.stat().st_mode & 0o777 == 0o600
    for private in (token.parent, Path(run.session).parent.parent):
        assert private.stat().st_mode & 0o777 == 0o700


def forms(secret: bytes) -> list[bytes]:
    """The ways in which bytes find their way into a text."""
    return [
        secret,
        secret.hex().encode(),
        base64.b64encode(secret).rstrip(b"="),
        base64.urlsafe_b64encode(secret).rstrip(b"="),
        repr(secret)[2:-1].encode(),
        str(list(secret))[1:-1].encode(),
    ]
