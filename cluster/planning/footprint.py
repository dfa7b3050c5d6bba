"""What each process takes of its device and of its node's own memory, by what it is for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from ...actors.links.base import FRAMES_IN_FLIGHT
from ...actors.links.receive_buffers import size_class
from ...actors.links.shm_memory import SLOTS, slot_bytes_for
from ...configs.deployment import Deployment
from ...model.config import ModelConfig
from . import assumptions
from .nodes import Node
from .sizes import ModelSizes
from .traffic import done_frame, work_frame

WEIGHTS = "weights"
SCALES = "scales"
KV_PAGES = "KV pages"
BUFFERS = "communication buffers"
ACTIVATIONS = "activations"
CONTEXT = "CUDA context"
PROCESS = "process"
SERVICES = "Ray and system"


@dataclass(slots=True)
class Process:
    """One process of the deployment.

    Attributes:
        id: as `moray status` shows it.
        role: "router" or "expert_host".
        node: name of its node.
        disk_bytes: what it reads to load.
        slots: experts it holds, all layers together.
        memory: on its device, by what it is for; a device may be a node's own memory.
        node_memory: of the node's own memory, for processes on GPUs.
    """

    id: str
    role: str
    node: str
    disk_bytes: int
    slots: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    node_memory: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Device:
    """A GPU, or the memory of a node without any.

    Attributes:
        name: e.g. "nodea-0 L40S 3".
        index: of the GPU on its node.
        capacity: bytes; for a node without GPUs whose memory nobody gave, None.
        margin: bytes of it that are left alone.
        fixed: bytes that are there before any process.
        free: share of it that no process has taken, as Ray counts GPUs.
    """

    name: str
    node: Node
    index: int
    capacity: int | None
    margin: int
    processes: list[Process] = field(default_factory=list)
    fixed: dict[str, int] = field(default_factory=dict)
    free: float = 1.0

    @property
    def used(self) -> int:
        """Bytes in use, the margin not among them."""
        return sum(self.fixed.values()) + sum(sum(process.memory.values()) for process in self.processes)

    @property
    def left(self) -> int:
        """Bytes that could still be used; below 0 by what is missing. Without a capacity there is always a TiB."""
        return (1 << 40) if self.capacity is None else self.capacity - self.margin - self.used


def expert_host(
    name: str,
    device: Device,
    sizes: ModelSizes,
    deployment: Deployment,
    *,
    slots: int,
    hosts: int,
    routers: Collection[Device],
    frames: torch.dtype,
) -> Process:
    """An expert host with `slots` experts, one of `hosts`, linked to the routers on these devices.

    Args:
        sizes: of the model where this host computes.
        frames: dtype of what routers send, and get back.
    """
    weights = sizes.expert * slots
    process = Process(name, "expert_host", device.node.name, sizes.disk_expert.total * slots, slots)
    config, dtype = sizes.config, sizes.compute.dtype
    tokens, pairs = _largest_share(config, deployment, hosts)
    request = work_frame(tokens, pairs, config.hidden_size, frames).payload
    reply = done_frame(pairs, config.hidden_size, frames).payload
    on_device, on_node = _buffers(device, routers, sent=reply, received=request)
    middle = 2 * config.moe_intermediate_size + config.moe_intermediate_size
    process.memory = {
        WEIGHTS: weights.weights,
        SCALES: weights.scales,
        BUFFERS: on_device,
        # The rows, both products and the result of the largest share of a step.
        ACTIVATIONS: (tokens * config.hidden_size + pairs * (middle + config.hidden_size)) * dtype.itemsize,
    }
    _add_process(process, device, on_node)
    return process


def router(
    name: str,
    device: Device,
    sizes: ModelSizes,
    deployment: Deployment,
    *,
    positions: int,
    hosts: Collection[Device],
) -> Process:
    """A router without KV pages yet, for sequences of up to so many positions, linked to the hosts on these devices."""
    weights = sizes.router.total
    process = Process(name, "router", device.node.name, sizes.disk_dense.total)
    config, dtype = sizes.config, sizes.compute.dtype
    tokens, pairs = _largest_share(config, deployment, len(hosts))
    request = work_frame(tokens, pairs, config.hidden_size, dtype).payload
    reply = done_frame(pairs, config.hidden_size, dtype).payload
    on_device, on_node = _buffers(device, hosts, sent=request, received=reply)
    process.memory = {
        WEIGHTS: weights.weights + sizes.rotation_bytes(positions),
        SCALES: weights.scales,
        KV_PAGES: 0,
        BUFFERS: on_device,
        ACTIVATIONS: _router_activations(sizes, deployment),
    }
    _add_process(process, device, on_node)
    if device.node.group.gpus:
        process.node_memory["weights on their way"] = sizes.disk_dense.total
    return process


def _add_process(process: Process, device: Device, buffers_on_node: int) -> None:
    if device.node.group.gpus:
        process.memory[CONTEXT] = int(assumptions.CUDA_CONTEXT.value)
        process.node_memory = {PROCESS: int(assumptions.GPU_PROCESS.value), BUFFERS: buffers_on_node}
    else:
        process.memory[BUFFERS] += buffers_on_node
        process.memory[PROCESS] = int(assumptions.CPU_PROCESS.value)


def _router_activations(sizes: ModelSizes, deployment: Deployment) -> int:
    """The largest tensors that are there at once in a step of `token_budget` tokens."""
    config, itemsize = sizes.config, sizes.compute.dtype.itemsize
    tokens, rows = deployment.routers.token_budget, deployment.routers.max_running
    answers = tokens * config.num_experts_per_tok * config.hidden_size * itemsize
    sums = 4 * tokens * config.hidden_size * 4
    queries = 2 * tokens * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank) * itemsize
    logits = 3 * rows * config.vocab_size * 4
    return answers + sums + max(queries, logits)


def _largest_share(config: ModelConfig, deployment: Deployment, hosts: int) -> tuple[int, int]:
    """Tokens and pairs of the largest frame that a host is to expect: those of a full step, as skewed as is assumed."""
    tokens = deployment.routers.token_budget
    even = -(-tokens * config.num_experts_per_tok // max(1, hosts))
    pairs = min(tokens * config.num_experts_per_tok, int(even * assumptions.HOTTEST_HOST.value))
    return min(tokens, pairs), pairs


def _buffers(device: Device, others: Collection[Device], *, sent: int, received: int) -> tuple[int, int]:
    """Bytes of links' buffers on the device, and in the node's own memory, for payloads of up to so many bytes."""
    on_device = on_node = 0
    for other in others:
        if other.node.name == device.node.name:
            on_node += SLOTS * slot_bytes_for(sent)  # the sender's arena; the receiver maps it
            continue
        own = FRAMES_IN_FLIGHT * size_class(sent) + (FRAMES_IN_FLIGHT + 1) * size_class(received)
        if device.node.group.gpus and not other.node.group.gpus:
            on_node += own  # gloo, to a cold host: frames are staged in the node's memory
        else:
            on_device += own
    return on_device, on_node
