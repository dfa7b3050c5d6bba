"""The routed experts with a hand-written backward: every step a gather or a matmul of one of a few repeated shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .elementwise import KERNELS

# Each expert's rows are padded to a multiple of this: oneDNN compiles a kernel for each new matmul shape (2-6 ms), so
# the shapes have to repeat.
ROW_MULTIPLE = 128


@dataclass(frozen=True)
class Dispatch:
    """Where each (token, choice) goes: rows sorted by expert, each expert's segment padded."""

    rows: Tensor  # int64 [R], the (token, choice) pair of a row, as token * K + choice; padding repeats pair 0
    padding: Tensor  # bool [R]
    positions: Tensor  # int64 [T, K], the row of a pair
    bounds: list[int]  # E + 1 segment bounds in rows
    counts: Tensor  # float32 [E], rows without padding


def plan_dispatch(topk_ids: Tensor, experts: int, multiple: int = ROW_MULTIPLE) -> Dispatch:
    """Sort the pairs of topk_ids int64 [T, K] by expert."""
    flat = topk_ids.reshape(-1)
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + multiple - 1) // multiple * multiple
    starts = torch.cumsum(padded, 0) - padded
    order = torch.argsort(flat, stable=True)
    first = torch.cumsum(counts, 0) - counts
    sorted_ids = flat[order]
    target = starts[sorted_ids] + torch.arange(flat.numel()) - first[sorted_ids]
    total = int(padded.sum())
    rows = torch.zeros(total, dtype=torch.int64)
    padding = torch.ones(total, dtype=torch.bool)
    rows[target] = order
    padding[target] = False
    positions = torch.empty_like(flat)
    positions[order] = target
    bounds = [0, *torch.cumsum(padded, 0).tolist()]
    return Dispatch(rows, padding, positions.view(topk_ids.shape), bounds, counts.float())


class RoutedExperts(torch.autograd.Function):
    """sum_k w[t, k] * expert(ids[t, k])(x[t]) for x [T, H], weights [T, K], gate_up [E, 2N, H], down [E, H, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, plan: Dispatch) -> Tensor:
        """Output [T, H]."""
        choices = weights.shape[1]
        width = down.shape[2]
        tokens = torch.div(plan.rows, choices, rounding_mode="floor")
        x_rows = x[tokens]
        hidden = x.new_empty(len(plan.rows), 2 * width)
        y_rows = torch.empty_like(x_rows)
        for expert, (start, stop) in enumerate(zip(plan.bounds[:-1], plan.bounds[1:], strict=True)):
            if start == stop:
                continue
            both = torch.mm(x_rows[start:stop], gate_up[expert].t(), out=hidden[start:stop])
            inner = torch.nn.functional.silu(both[:, :width]).mul_(both[:, width:])
            if KERNELS.activation_filter is not None:
                inner = KERNELS.activation_filter(inner)
            torch.mm(inner, down[expert].t(), out=y_rows[start:stop])
        picked = y_rows[plan.positions.reshape(-1)].view(*plan.positions.shape, -1)
        ctx.save_for_backward(x_rows, hidden, y_rows, weights, gate_up, down)
        ctx.plan, ctx.tokens = plan, tokens
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), picked).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weights, gate_up and down."""
        x_rows, hidden, y_rows, weights, gate_up, down = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        grad = grads[0].contiguous()
        width = down.shape[2]
        picked = y_rows[plan.positions.reshape(-1)].view(*plan.positions.shape, -1)
        grad_weights = torch.bmm(picked, grad.unsqueeze(2)).squeeze(2).to(weights.dtype)
        row_weights = weights.reshape(-1)[plan.rows].masked_fill(plan.padding, 0.0).to(grad.dtype)
        grad_y = grad[ctx.tokens].mul_(row_weights.unsqueeze(1))
        grad_x_rows = torch.empty_like(x_rows)
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for expert, (start, stop) in enumerate(zip(plan.bounds[:-1], plan.bounds[1:], strict=True)):
            if start == stop:
                continue
            gate, up = hidden[start:stop, :width], hidden[start:stop, width:]
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            torch.mm(grad_y[start:stop].t(), silu * up, out=grad_down[expert])
            grad_inner = torch.mm(grad_y[start:stop], down[expert])
            grad_both = torch.empty_like(hidden[start:stop])
            torch.mul(grad_inner, silu, out=grad_both[:, width:])
            slope = silu.neg().add_(1).mul_(sigmoid).add_(silu)  # d silu = sigmoid * (1 - silu) + silu
            torch.mul(grad_inner.mul_(up), slope, out=grad_both[:, :width])
            torch.mm(grad_both.t(), x_rows[start:stop], out=grad_gate_up[expert])
            torch.mm(grad_both, gate_up[expert], out=grad_x_rows[start:stop])
        grad_x = grad_x_rows[plan.positions.reshape(-1)].view(*plan.positions.shape, -1).sum(1)
        return grad_x, grad_weights, grad_gate_up, grad_down, None
