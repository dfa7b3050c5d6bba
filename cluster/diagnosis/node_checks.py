"""Judges one node by its facts. Every check is a function of facts alone; every threshold says why it is where it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ...kernels.launch import ARCHITECTURES
from ..planning import assumptions
from .collect import SCRATCH, SHM
from .facts import NodeFacts
from .findings import Finding, at, fail, ok, warn
from .text import GIB, gbit, gib

GPU_BUSY: Final = 0.1
"""Share of a GPU's memory in use by others from which on it is worth a word: a desktop or a monitor takes less."""

MEMORY_LEAST: Final = int(assumptions.NODE_SERVICES.value)
"""Bytes that Ray, Serve and the system take before anything is loaded."""

MEMORY_BUSY: Final = 0.5
"""Share of a node's memory in use by others: a node for serving should have most of it free before it serves."""

SWAP_USED: Final = 256 << 20
"""Bytes swapped out: some idle pages always are; more, and something is short of memory."""

SHM_LEAST: Final = 128 << 20
"""What `moray serve` gives Ray's object store, and twice the 64 MiB of a container that nobody gave more."""

SHM_ENOUGH: Final = GIB
"""Ray's object store and the buffers that NCCL shares between the GPUs of a node, tens of MiB for each pair."""

DISK_FULL: Final = 0.95
"""From here on Ray creates no more objects on a node (`local_fs_capacity_threshold`)."""

DISK_FILLING: Final = 0.85

FILES_LEAST: Final = 4096
"""Ray holds several files open for each worker and actor, a router some for each host, the front one for each stream."""

FILES_ENOUGH: Final = 65536
"""What Ray's documentation asks for on a head of many nodes."""

PROCESSES_ENOUGH: Final = 8192
"""Threads count too, and every worker of Ray's has dozens."""

DISK_SLOW: Final = assumptions.DISK.value / 2
"""Bytes a second: half of what a plan takes for granted, so that loading takes twice as long as it says."""

DISK_DEAD: Final = 50e6
"""Bytes a second: below this a share of R1 of 40 GB takes a quarter of an hour."""

MTU_LEAST: Final = 1280
"""IPv6 works with no less; tunnels inside tunnels get there."""

INTERFACE_SLOW: Final = assumptions.NETWORK.value * 8
"""Bits a second that a plan takes for granted."""


def check_node(facts: NodeFacts) -> list[Finding]:
    """Everything there is to say of one node."""
    return [finding for check in CHECKS for finding in at(facts.node, check(facts))]


def check_versions(facts: NodeFacts) -> Iterator[Finding]:
    """What must be installed is."""
    needed = ["torch", "ray", *(["triton"] if facts.gpus else [])]
    missing = [name for name in needed if not facts.versions.get(name)]
    if missing:
        yield fail(
            "versions", f"{', '.join(missing)}: not installed", "install Moray with its dependencies (`make setup`)"
        )
        return
    yield ok("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version))


def check_gpus(facts: NodeFacts) -> Iterator[Finding]:
    """GPUs that Moray's kernels run on, usable by torch, with their memory free and without errors."""
    if not facts.gpus:
        if facts.gpu_problem:
            yield fail("gpus", facts.gpu_problem, "mend the driver, or serve with `device: cpu`")
        else:
            yield ok("gpus", "none: experts and routers here compute on CPUs")
        return
    problems = [*_unusable_gpus(facts), *_gpus_in_use(facts), *_gpu_errors(facts)]
    if not any(problem.level == "fail" for problem in problems):
        kinds = Counter((gpu.name, gpu.architecture, gpu.memory_total) for gpu in facts.gpus)
        what = [f"{count}x {name} (sm_{code}, {gib(size)})" for (name, code, size), count in kinds.items()]
        yield ok("gpus", ", ".join(what))
    yield from problems


def _unusable_gpus(facts: NodeFacts) -> Iterator[Finding]:
    too_old = sorted(
        {f"{gpu.name} is sm_{gpu.architecture}" for gpu in facts.gpus if 0 < gpu.architecture < ARCHITECTURES[0]}
    )
    if too_old:
        yield fail(
            "gpus",
            f"{', '.join(too_old)}: Moray's kernels need sm_{ARCHITECTURES[0]} (A100) or newer",
            "give this node's processes `device: cpu`, or hide the GPU from them",
        )
    if facts.gpu_problem:
        yield fail("gpus", facts.gpu_problem, "look at `nvidia-smi` and the driver's log (`dmesg | grep NVRM`)")
    elif facts.torch_gpus < len(facts.gpus):
        cuda = facts.versions.get("CUDA")
        yield fail(
            "gpus",
            f"the driver has {len(facts.gpus)}, torch can use {facts.torch_gpus}"
            + ("" if cuda else ": it is built without CUDA"),
            "see whether CUDA_VISIBLE_DEVICES hides some"
            if cuda
            else "install torch from PyPI, whose Linux build has CUDA",
        )
    if not facts.compiler:
        yield fail(
            "gpus", "no C compiler: Triton builds a small launcher for each kernel", "install gcc or clang on this node"
        )
    if not facts.nccl and facts.torch_gpus:
        yield warn(
            "gpus",
            "this torch is built without NCCL: GPUs of different nodes would be linked over gloo",
            "install torch from PyPI, whose Linux build has NCCL",
        )


def _gpus_in_use(facts: NodeFacts) -> Iterator[Finding]:
    for index, gpu in enumerate(facts.gpus):
        used = gpu.memory_total - gpu.memory_free
        if used > GPU_BUSY * gpu.memory_total:
            yield warn(
                "gpus",
                f"GPU {index}: {gib(used)} of {gib(gpu.memory_total)} are in use",
                "see whose with `nvidia-smi`; a deployment that serves already is fine",
            )


def _gpu_errors(facts: NodeFacts) -> Iterator[Finding]:
    for index, gpu in enumerate(facts.gpus):
        if gpu.uncorrected_errors:
            yield fail(
                "gpus",
                f"GPU {index}: {gpu.uncorrected_errors} uncorrected memory errors since the driver was loaded",
                "take it out of service: `nvidia-smi -q -d ECC,ROW_REMAPPER` says whether a reset mends it",
            )
    if any(gpu.persistent is False for gpu in facts.gpus):
        yield warn(
            "gpus",
            "persistence mode is off: the driver initialises a GPU anew for each first process",
            "`nvidia-smi -pm 1`, or enable nvidia-persistenced",
        )


def check_cpus(facts: NodeFacts) -> Iterator[Finding]:
    """CPUs, and what the container may use of them."""
    cpu = facts.cpu
    instructions = f" with {cpu.kernels or cpu.instructions}" if cpu.kernels or cpu.instructions else ""
    if cpu.limit is not None and cpu.limit < cpu.count:
        yield warn(
            "cpus",
            f"the container may use {cpu.limit:g} of {cpu.count}{instructions}",
            f"raise its limit, or start Ray here with --num-cpus {max(1, int(cpu.limit))}: threads beyond it stop each other",
        )
        return
    yield ok("cpus", f"{cpu.count}{instructions}")


def check_memory(facts: NodeFacts) -> Iterator[Finding]:
    """The node's own memory: of GPU nodes for buffers and Ray, of CPU nodes for weights."""
    memory = facts.memory
    available = min(memory.available, memory.usable)
    limit = f"; the container's limit is {gib(memory.usable)}" if memory.usable < memory.total else ""
    what = f"{gib(available)} free of {gib(memory.total)}{limit}"
    if available < MEMORY_LEAST:
        yield fail("memory", what, f"free some: Ray and Serve alone need {gib(MEMORY_LEAST)}")
    elif available < MEMORY_BUSY * memory.usable:
        yield warn(
            "memory", what, "see what takes the rest (`ps aux --sort -rss`); a deployment that serves already is fine"
        )
    else:
        yield ok("memory", what)
    if memory.swap_used > SWAP_USED:
        yield warn(
            "swap",
            f"{gib(memory.swap_used)} of {gib(memory.swap_total)} in use",
            "switch swap off (`swapoff -a`): weights that are paged out stop every step that needs them",
        )


def check_shared_memory(facts: NodeFacts) -> Iterator[Finding]:
    """`/dev/shm`: of Ray's object store and NCCL. Links of Moray's own take memory without a file system."""
    space = facts.spaces.get(SHM)
    grow = "enlarge it: `mount -o remount,size=8G /dev/shm`, or `--shm-size 8g` of the container"
    if space is None:
        yield fail("shared memory", "/dev/shm is missing", "mount a tmpfs there: Ray and NCCL need it")
        return
    what = f"{gib(space.free)} free of {gib(space.total)} in {space.path}"
    if space.free < SHM_LEAST:
        yield fail("shared memory", what, grow)
    elif space.free < SHM_ENOUGH:
        yield warn("shared memory", what, grow)
    else:
        yield ok("shared memory", what)


def check_limits(facts: NodeFacts) -> Iterator[Finding]:
    """ulimits."""
    files, locked, processes = (facts.limits.get(name) for name in ("nofile", "memlock", "nproc"))
    problems = []
    if files is not None and files < FILES_ENOUGH:
        judge = fail if files < FILES_LEAST else warn
        problems.append(
            judge(
                "ulimits",
                f"{files} open files",
                f"`ulimit -n {FILES_ENOUGH}` before `ray start` (LimitNOFILE of a service, --ulimit of a container)",
            )
        )
    if processes is not None and processes < PROCESSES_ENOUGH:
        problems.append(
            warn("ulimits", f"{processes} processes and threads", f"`ulimit -u {PROCESSES_ENOUGH}` before `ray start`")
        )
    if locked is not None and facts.gpus:
        problems.append(
            warn(
                "ulimits",
                f"{locked >> 10} KiB of locked memory: NCCL cannot register buffers with an RDMA card",
                "`ulimit -l unlimited` before `ray start` (LimitMEMLOCK=infinity, --ulimit memlock=-1)",
            )
        )
    if not problems:
        shown = {"open files": files, "processes": processes}
        problems.append(
            ok("ulimits", ", ".join(f"{'unlimited' if n is None else n} {what}" for what, n in shown.items()))
        )
    yield from problems


def check_space(facts: NodeFacts) -> Iterator[Finding]:
    """Where Ray keeps its sessions and logs."""
    space = facts.spaces.get(SCRATCH)
    if space is None:
        yield fail("scratch space", "there is no directory for temporary files", "create /tmp, or set RAY_TMPDIR")
        return
    used = 1 - space.free / space.total if space.total else 0.0
    what = f"{gib(space.free)} free of {gib(space.total)} in {space.path}"
    clear = f"clear {space.path}, or start Ray with --temp-dir elsewhere"
    if used > DISK_FULL:
        yield fail("scratch space", f"{what}: Ray creates no objects on a disk that is {DISK_FULL:.0%} full", clear)
    elif used > DISK_FILLING:
        yield warn("scratch space", what, clear)
    else:
        yield ok("scratch space", what)


def check_ports(facts: NodeFacts) -> Iterator[Finding]:
    """Ports that others hold."""
    taken = [port for port in facts.ports if not port.ours]
    for port in taken:
        yield warn(
            "ports",
            f"{port.port} ({port.purpose}) is taken by {port.holder}",
            "end that process, or take another port (http_options.port of a Serve file; flags of `ray start`)",
        )
    if not taken:
        held = ", ".join(str(port.port) for port in facts.ports)
        yield ok("ports", f"in use by Ray: {held}" if held else "those of Ray and Serve are free")


def check_network(facts: NodeFacts) -> Iterator[Finding]:
    """The interface by which the other nodes know this one."""
    network = facts.network
    speed = f", {gbit(network.bits_per_s / 8)}" if network.bits_per_s else ""
    what = f"{network.address} on {network.interface or 'no interface'}, MTU {network.mtu}{speed}"
    if not network.interface:
        yield fail(
            "network",
            f"{network.address} is the address of no interface here",
            "start Ray with --node-ip-address of one that has an interface: links listen on it",
        )
    elif network.mtu < MTU_LEAST:
        yield warn("network", what, f"raise the MTU of {network.interface} to 1500 or more")
    elif 0 < network.bits_per_s < INTERFACE_SLOW:
        yield warn(
            "network",
            what,
            f"use an interface of {gbit(INTERFACE_SLOW / 8)} or more, or tell `moray plan` with --network",
        )
    else:
        yield ok("network", what)


def check_model(facts: NodeFacts) -> Iterator[Finding]:
    """The checkpoint, if one was named: readable from here, and how fast."""
    model = facts.model
    if model is None:
        return
    if model.problem:
        yield fail(
            "model",
            model.problem,
            "have the checkpoint at the same path on every node, or its source reachable from every node",
        )
        return
    what = f"{model.path}: {model.files} files, {model.total_bytes / 1e9:.2f} GB"
    if model.missing_bytes and model.space and model.space.free < model.missing_bytes:
        yield fail(
            "model",
            f"{what}, of which {model.missing_bytes / 1e9:.2f} GB are to be fetched; {model.space.path} has "
            f"{model.space.free / 1e9:.2f} GB free",
            "make room there, or have models fetched to another disk",
        )
    else:
        yield ok("model", what + (f", {model.missing_bytes / 1e9:.2f} GB to be fetched" if model.missing_bytes else ""))
    disk = model.disk
    if disk.problem:
        yield ok("disk", f"not measured: {disk.problem}")
        return
    what = f"{disk.bytes_per_s / 1e9:.2f} GB/s read of {model.path}"
    if disk.how == "dropped":
        what += " (the page cache may have helped)"
    slower = "a local NVMe drive is faster; or tell `moray plan` with --disk how long loading will take"
    if disk.bytes_per_s < DISK_DEAD:
        yield fail("disk", what, slower)
    elif disk.bytes_per_s < DISK_SLOW:
        yield warn("disk", what, slower)
    else:
        yield ok("disk", what)


CHECKS: Final[Sequence[Callable[[NodeFacts], Iterator[Finding]]]] = (
    check_versions,
    check_gpus,
    check_cpus,
    check_memory,
    check_shared_memory,
    check_limits,
    check_space,
    check_ports,
    check_network,
    check_model,
)
