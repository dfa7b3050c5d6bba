"""What a node says of itself: plain values, read in one place (`collect.py`) and judged in others (`*_checks.py`).

Facts travel between nodes as plain data, so that a node with another version of Moray can still be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ...configs.errors import ClusterError


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU.

    Attributes:
        name: as the driver calls it.
        architecture: 10 x major + minor compute capability; 0 if the driver does not tell.
        memory_total, memory_free: bytes.
        persistent: whether the driver keeps it initialised; None if it does not tell.
        uncorrected_errors: ECC errors since the driver was loaded; None without ECC.
    """

    name: str
    architecture: int
    memory_total: int
    memory_free: int
    persistent: bool | None = None
    uncorrected_errors: int | None = None


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """The processors.

    Attributes:
        count: that this process may run on.
        limit: CPUs' worth of time that the container may use; None without a limit.
        instructions: the widest that torch uses here, as in "AVX512"; "" if torch is missing.
        kernels: the best that the native CPU kernels have here, as in "avx512_bf16"; "" where Moray was installed without them.
    """

    count: int
    limit: float | None = None
    instructions: str = ""
    kernels: str = ""


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """The node's own memory, in bytes; `limit` is the container's, None without one."""

    total: int
    available: int
    limit: int | None = None
    swap_total: int = 0
    swap_used: int = 0

    @property
    def usable(self) -> int:
        """What processes here can have in all."""
        return self.total if self.limit is None else min(self.total, self.limit)


@dataclass(frozen=True, slots=True)
class SpaceFacts:
    """A file system: where it was looked at, and its bytes."""

    path: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """How fast files of a checkpoint are read, the page cache left out.

    Attributes:
        read_bytes, seconds: what was read, in which time.
        how: `direct`, past the page cache; or `dropped`, out of which the files were asked to be dropped before.
        problem: why nothing was measured, or "".
    """

    read_bytes: int = 0
    seconds: float = 0.0
    how: Literal["direct", "dropped", ""] = ""
    problem: str = ""

    @property
    def bytes_per_s(self) -> float:
        """0.0 where nothing was measured."""
        return self.read_bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A checkpoint as this node sees it.

    Attributes:
        path: the directory, or the URL of this very content.
        files, total_bytes: of its weights.
        config_digest: of the bytes of `config.json`; of a URL, the version it has now.
        listing_digest: of the names and sizes of its weights.
        disk: how fast they are read.
        missing_bytes: of a URL, what this node would have to fetch.
        space: where it would be put; None if nothing is missing.
        problem: why it cannot be read here, or "".
    """

    path: str
    files: int = 0
    total_bytes: int = 0
    config_digest: str = ""
    listing_digest: str = ""
    disk: DiskFacts = field(default_factory=DiskFacts)
    missing_bytes: int = 0
    space: SpaceFacts | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PortFacts:
    """A port that Ray, Serve or Moray would listen on, and somebody listens on already.

    Attributes:
        purpose: what it would be for.
        holder: name and pid of the process, as far as this user may know them.
        ours: whether that is a process of Ray or Moray.
    """

    port: int
    purpose: str
    holder: str
    ours: bool


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """The way to the other nodes.

    Attributes:
        address: this node's.
        interface: that has it; "" if none does.
        mtu: bytes; 0 if not known.
        bits_per_s: what the interface says of itself; 0 if it does not, as most virtual ones.
    """

    address: str
    interface: str = ""
    mtu: int = 0
    bits_per_s: int = 0


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node.

    Attributes:
        node: its name in every finding.
        versions: of what must be equal everywhere; "" for what is missing.
        gpus: that the driver knows.
        torch_gpus: how many of them torch can use.
        gpu_problem: why the driver or torch cannot use them; "".
        nccl: whether this torch has NCCL.
        compiler: the C compiler that Triton would call; "" if there is none.
        limits: ulimits by name, the soft ones; None for unlimited.
        spaces: file systems by what they are for: `shm` and `scratch`.
        wall_time: seconds since 1970, for a person; clocks are compared over the links.
    """

    node: str
    hostname: str
    versions: Mapping[str, str]
    cpu: CpuFacts
    memory: MemoryFacts
    network: NetworkFacts
    gpus: tuple[GpuFacts, ...] = ()
    torch_gpus: int = 0
    gpu_problem: str = ""
    nccl: bool = False
    compiler: str = ""
    limits: Mapping[str, int | None] = field(default_factory=dict)
    spaces: Mapping[str, SpaceFacts] = field(default_factory=dict)
    ports: tuple[PortFacts, ...] = ()
    model: ModelFacts | None = None
    wall_time: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Any) -> NodeFacts:
        """Back from plain data.

        Raises:
            ClusterError: it has another form, as that of another version.
        """
        try:
            return _FACTS.validate_python(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ClusterError(
                f"its facts have another form ({where}: {first['msg']}): another version of Moray"
            ) from None


_FACTS = TypeAdapter(NodeFacts)
