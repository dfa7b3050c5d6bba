"""Muon on matrices, AdamW on everything else, sharded over the training processes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on [..., rows, cols]: the nearest (semi-)orthogonal matrix, roughly, in bfloat16.

    The coefficients are Keller Jordan's, chosen for speed rather than exactness.
    """
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return torch.as_tensor(x.mT if tall else x).float()


def _chunks(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The flat tensor cut into pieces as long as the tensors of `like`."""
    ends = list(itertools.accumulate(t.numel() for t in like))
    return [flat[end - t.numel() : end] for end, t in zip(ends, like, strict=True)]


class Muon:
    """Nesterov momentum, then orthogonalised; a stacked [E, 2N, H] gate_up is split into its two matrices first."""

    def __init__(self, parameters: dict[str, nn.Parameter], weight_decay: float, momentum: float = 0.95) -> None:
        self.parameters, self.weight_decay, self.momentum = parameters, weight_decay, momentum
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.owner: dict[str, int] = {}
        load = [0] * self.world  # heaviest first onto the least loaded process
        for name, parameter in sorted(parameters.items(), key=lambda item: -item[1].numel()):
            self.owner[name] = load.index(min(load))
            load[self.owner[name]] += parameter.numel()
        self.buffers = {n: torch.zeros_like(p) for n, p in parameters.items() if self.owner[n] == self.rank}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Each process updates the matrices it owns and sends them to the others."""
        for name, parameter in self.parameters.items():
            if self.owner[name] != self.rank or parameter.grad is None:
                continue
            buffer = self.buffers[name].lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(buffer, self.momentum)
            split = update
            if name.endswith("gate_up"):
                split = update.reshape(len(update), 2, -1, update.shape[-1])
            scale = max(1.0, split.shape[-2] / split.shape[-1]) ** 0.5
            parameter.mul_(1 - learning_rate * self.weight_decay)
            parameter.add_(orthogonalise(split).view_as(parameter), alpha=-learning_rate * scale)
        for source in range(self.world if self.world > 1 else 0):
            owned = [p.data for n, p in self.parameters.items() if self.owner[n] == source]
            flat = torch.cat([p.reshape(-1) for p in owned])
            dist.broadcast(flat, source)
            for target, chunk in zip(owned, _chunks(flat, owned), strict=True):
                target.copy_(chunk.view_as(target))

    def state_dict(self) -> dict[str, Tensor]:
        """The momenta this process owns."""
        return self.buffers

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the momenta this process owns out of a state that may hold more."""
        for name, buffer in self.buffers.items():
            if name in state:
                buffer.copy_(state[name])


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(matrices for Muon, the rest for AdamW): embedding, head, norms and gates are the rest."""
    matrices: dict[str, nn.Parameter] = {}
    rest: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        special = "embed_tokens" in name or "lm_head" in name or name.endswith("gate.weight")
        (rest if parameter.ndim < 2 or special else matrices)[name] = parameter
    return matrices, rest


def average_gradients(model: nn.Module, extra: list[Tensor]) -> None:
    """Average the gradients over the processes, and sum the tensors of `extra`, in one message."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.reshape(-1) for g in grads), *(t.reshape(-1) for t in extra)])
    dist.all_reduce(flat)
    chunks = _chunks(flat, [*grads, *extra])
    for grad, chunk in zip(grads, chunks, strict=False):
        torch.div(chunk.view_as(grad), dist.get_world_size(), out=grad)
    for tensor, chunk in zip(extra, chunks[len(grads) :], strict=True):
        tensor.copy_(chunk.view_as(tensor))


def adamw(parameters: dict[str, nn.Parameter], learning_rate: float) -> Any:
    """AdamW without weight decay."""
    return torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
