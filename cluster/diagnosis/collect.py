"""Reads the facts of the node it runs on. What is missing there is said in the facts, and not raised."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from ...kernels.cpu.library import native
from .container import cpu_limit, memory_limit
from .facts import CpuFacts, MemoryFacts, NetworkFacts, NodeFacts, PortFacts, SpaceFacts
from .gpu_facts import GpusFound, find_gpus
from .model_facts import model_facts
from .space import space_of

DISTRIBUTIONS: Final = ("torch", "ray", "triton")

WANTED_PORTS: Final = {
    6379: "Ray's head",
    8000: "Serve's HTTP proxy",
    **dict.fromkeys(range(8076, 8081), "Ray's node, in our cluster files"),
    8265: "Ray's dashboard",
    10001: "Ray's client server",
    52365: "the agent of Ray's dashboard",
}
"""Defaults of Ray and Serve, and what `configs/clusters` gives Ray; everything else takes whichever ports are free."""

SHM, SCRATCH = "shm", "scratch"
"""Keys of `NodeFacts.spaces`: shared memory, and where Ray keeps logs and spilled objects."""

LIMITS: Final = {
    "nofile": resource.RLIMIT_NOFILE,
    "memlock": resource.RLIMIT_MEMLOCK,
    "nproc": resource.RLIMIT_NPROC,
}

_OURS = re.compile(r"raylet|gcs_server|ray::|/ray/|\bray-|moray")
_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Wish:
    """What to look at beside the node itself.

    Attributes:
        node: name to report under; also its address, where `address` is not given.
        address: by which the other nodes know it; "" to look for it.
        model: checkpoint directory, the embedded model's name, or a URL to fetch it from; "" for none.
        weights_dir: where fetched models lie; "" for the default.
        front_port: of the deployment; 0 for Serve's default.
        in_ray: whether this runs in a worker of Ray's.
    """

    node: str
    address: str = ""
    model: str = ""
    weights_dir: str = ""
    front_port: int = 0
    in_ray: bool = False


def collect(wish: Wish) -> NodeFacts:
    """Look at this node: a few seconds, most of them torch's import and the disk."""
    import torch

    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    kernels = native()
    gpus = find_gpus(torch_has_cuda=torch.version.cuda is not None, hidden_by_ray=wish.in_ray)
    return NodeFacts(
        node=wish.node,
        hostname=socket.gethostname(),
        versions=_versions(torch, gpus, nccl=nccl),
        cpu=CpuFacts(
            len(os.sched_getaffinity(0)),
            cpu_limit(),
            torch.backends.cpu.get_cpu_capability(),
            "" if kernels is None else kernels.best.name.lower(),
        ),
        memory=_memory(),
        network=network_facts(wish.address or own_address()),
        gpus=gpus.gpus,
        torch_gpus=gpus.torch_gpus,
        gpu_problem=gpus.problem,
        nccl=nccl,
        compiler=next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), ""),
        limits={name: _limit(number) for name, number in LIMITS.items()},
        spaces=_spaces(),
        ports=taken_ports(WANTED_PORTS | ({wish.front_port: "Serve's HTTP proxy"} if wish.front_port else {})),
        model=model_facts(wish.model, wish.weights_dir) if wish.model else None,
        wall_time=time.time(),
    )


def network_facts(address: str) -> NetworkFacts:
    """The interface that has this address."""
    for interface, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            stats = psutil.net_if_stats().get(interface)
            if stats is None:
                return NetworkFacts(address, interface)
            return NetworkFacts(address, interface, stats.mtu, stats.speed * 1_000_000)
    return NetworkFacts(address)


def own_address() -> str:
    """The address by which this node would be known: of the interface towards the default route, as Ray looks for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of nobody's (RFC 5737); connecting UDP sends nothing
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def taken_ports(wanted: dict[int, str]) -> tuple[PortFacts, ...]:
    """Those of the `wanted` (port -> purpose) that a process of this node listens on."""
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    holders: dict[int, int | None] = {c.laddr.port: c.pid for c in listening if c.laddr.port in wanted}
    return tuple(_port(port, wanted[port], pid) for port, pid in sorted(holders.items()))


def _port(port: int, purpose: str, pid: int | None) -> PortFacts:
    if pid is None:
        return PortFacts(port, purpose, "another user's process", ours=False)
    try:
        process = psutil.Process(pid)
        # The command line decides, and stays here: it may hold what is nobody's business.
        return PortFacts(
            port, purpose, f"{process.name()} (pid {pid})", bool(_OURS.search(" ".join(process.cmdline())))
        )
    except psutil.Error:
        return PortFacts(port, purpose, f"pid {pid}", ours=False)


def code_digest(package: Path = _PACKAGE) -> str:
    """Of the Python files of this installation: equal exactly if the code is."""
    digest = hashlib.sha256()
    for room in ("configs", "kernels", "model", "actors", "cluster"):
        for path in sorted((package / room).rglob("*.py")):
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _versions(torch: Any, gpus: GpusFound, *, nccl: bool) -> dict[str, str]:
    from ... import __version__

    found = {"python": platform.python_version(), "moray": __version__, "moray's code": code_digest()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    found["torch"] = torch.__version__  # with the build, which the distribution's version leaves out
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    if nccl:
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if gpus.driver:
        found["driver"] = gpus.driver
    return found


def _memory() -> MemoryFacts:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit = memory_limit(memory.total)
    return MemoryFacts(memory.total, memory.available, limit, swap.total, swap.used)


def _spaces() -> dict[str, SpaceFacts]:
    """What is missing is left out; the checks say so."""
    places = {SHM: "/dev/shm", SCRATCH: os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()}
    found = {what: space_of(path) for what, path in places.items()}
    return {what: space for what, space in found.items() if space is not None}


def _limit(number: int) -> int | None:
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft
