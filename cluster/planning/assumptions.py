"""Every number in a plan that does not follow from the model or the nodes, with where it comes from.

A plan is only as good as these. They are part of its output, so that whoever reads it can see what was taken for granted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Assumption:
    """One number taken for granted.

    Attributes:
        name, unit: for people.
        source: where it comes from; "guess" where nobody has measured it.
    """

    name: str
    value: float
    unit: str
    source: str


CUDA_CONTEXT = Assumption(
    "CUDA context of a process",
    0.6e9,
    "bytes",
    "guess: 0.4 to 0.6 GB are usual for torch with cuBLAS on recent GPUs",
)
MEMORY_MARGIN = Assumption(
    "memory left to fragments", 0.05, "of the device", "guess: what torch's allocator cannot use"
)
CPU_PROCESS = Assumption(
    "a process without its tensors", 0.4e9, "bytes of the node", "guess: Python with torch and Ray imported"
)
GPU_PROCESS = Assumption(
    "a process with a GPU, without its tensors",
    2.5e9,
    "bytes of the node",
    "guess: CUDA libraries and pinned memory",
)
NODE_SERVICES = Assumption(
    "Ray, Serve and the system",
    2e9,
    "bytes of the node",
    "870 MB of idle Ray and Serve were measured, the rest is a guess",
)
HOTTEST_HOST = Assumption(
    "load of the busiest host over the mean, for buffers", 4.0, "times", "up to 3.3 was measured on tiny-r1's tasks"
)

MEMORY_EFFICIENCY = Assumption(
    "share of the memory's bandwidth that kernels reach", 0.8, "", "guess: usual for kernels that only read weights"
)
FLOPS_EFFICIENCY = Assumption(
    "share of the peak arithmetic that kernels reach", 0.5, "", "guess: decode batches are small"
)
NETWORK_EFFICIENCY = Assumption(
    "share of the network's bandwidth that payload gets", 0.9, "", "guess: headers, and pauses between frames"
)
PCIE = Assumption("between a GPU and its node's memory", 25e9, "bytes/s", "PCIe 4.0 x16 is 31.5 GB/s less its protocol")
SHM_LATENCY = Assumption(
    "one way through shared memory", 28e-6, "s", "56 us there and back were measured with two hosts on two cores"
)
NETWORK_LATENCY = Assumption(
    "one way between machines",
    150e-6,
    "s",
    "302 us there and back were measured over gloo on one machine; NCCL was not",
)
OPERATION = Assumption(
    "starting one torch operation from Python", 10e-6, "s", "guess: kernels follow each other no faster than that"
)
ROUTER_OPERATIONS = Assumption(
    "operations of a router's layer", 40, "", "counted roughly in model/transformer.py; no CUDA graphs"
)
HOST_OPERATIONS = Assumption("operations of a host's layer", 12, "", "counted roughly in kernels/experts.py")

NETWORK = Assumption("a node's network where none is given", 25e9 / 8, "bytes/s", "25 Gbit/s, the least worth trying")
DISK = Assumption("a node's disk where none is given", 2e9, "bytes/s", "guess: one NVMe drive")
CPU_MEMORY_BANDWIDTH = Assumption(
    "a node's own memory where no bandwidth is given", 20e9, "bytes/s", "21 to 22 GB/s were measured on two cores"
)
CPU_FLOPS = Assumption(
    "a node's CPUs where no rate is given",
    0.1e12,
    "1/s",
    "guess: float32 on a few cores",
)
START = Assumption("starting without loading", 20.0, "s", "20.1 s measured for `moray serve tiny-r1` on two cores")
ROUTING = Assumption(
    "how experts are chosen", 1.0, "", "uniformly, within the groups that a gate keeps: no expert is hot"
)

ALL = (
    CUDA_CONTEXT,
    MEMORY_MARGIN,
    CPU_PROCESS,
    GPU_PROCESS,
    NODE_SERVICES,
    HOTTEST_HOST,
    MEMORY_EFFICIENCY,
    FLOPS_EFFICIENCY,
    NETWORK_EFFICIENCY,
    PCIE,
    SHM_LATENCY,
    NETWORK_LATENCY,
    OPERATION,
    ROUTER_OPERATIONS,
    HOST_OPERATIONS,
    NETWORK,
    DISK,
    CPU_MEMORY_BANDWIDTH,
    CPU_FLOPS,
    START,
    ROUTING,
)
"""In the order in which they are shown."""
