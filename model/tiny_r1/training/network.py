"""A readable DeepSeek-V3 for training: MLA, noaux_tc gate, routed and shared experts, one MTP layer.

B rows, S positions, T = B * S tokens, H hidden, E experts, K choices, D head channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name everyone uses)

from .config import Shape
from .elementwise import KERNELS
from .experts import RoutedExperts, plan_dispatch


def rope_tables(shape: Shape, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, rope / 2] of YaRN; its attention factor cancels as mscale equals mscale_all_dim."""
    dim, base = shape.qk_rope_head_dim, shape.rope_theta
    plain = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def boundary(rotations: float) -> float:
        return dim * math.log(shape.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(boundary(shape.beta_fast)), 0), min(math.ceil(boundary(shape.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = plain / shape.rope_factor * ramp + plain * (1 - ramp)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def softmax_scale(shape: Shape) -> float:
    """1 / sqrt(D), times YaRN's mscale squared."""
    mscale = 0.1 * math.log(shape.rope_factor) + 1.0
    return float(shape.qk_head_dim**-0.5 * mscale * mscale)


class Linear(nn.Module):
    """y = x W^T; W is kept in float32 and cast to the dtype of x, through the weight filter where quantised."""

    def __init__(self, inputs: int, outputs: int, quantised: bool = True) -> None:
        super().__init__()
        self.quantised = quantised
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        weight: Tensor = self.weight
        if self.quantised and KERNELS.weight_filter is not None:
            weight = KERNELS.weight_filter(weight)
        if self.quantised and KERNELS.activation_filter is not None:
            x = KERNELS.activation_filter(x)
        return F.linear(x, weight.to(x.dtype))


class Norm(nn.Module):
    """RMS norm with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size]."""
        return KERNELS.normalise(x, self.weight, self.eps)


@dataclass
class Context:
    """What all layers share in one forward pass. cos/sin [B, S, 1, rope / 2]; mask bool [B, 1, S, S]."""

    cos: Tensor
    sin: Tensor
    mask: Tensor


class Cache:
    """Keys and values of one layer, [B, heads, capacity, D], filled up to `length`."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.keys, self.values = torch.empty(0), torch.empty(0)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append S positions; returns all of them."""
        if self.length == 0:
            self.keys, self.values = (t.new_empty(*t.shape[:2], self.capacity, t.shape[3]) for t in (k, v))
        stop = self.length + k.shape[2]
        self.keys[:, :, self.length : stop], self.values[:, :, self.length : stop] = k, v
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def keep(self, rows: Tensor) -> None:
        """Forget the rows that are not in int64 `rows`."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class Attention(nn.Module):
    """Multi-head latent attention, unabsorbed."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, heads = shape, shape.num_attention_heads
        self.scale = softmax_scale(shape)
        self.q_a_proj = Linear(shape.hidden_size, shape.q_lora_rank)
        self.q_a_layernorm = Norm(shape.q_lora_rank, shape.rms_norm_eps)
        self.q_b_proj = Linear(shape.q_lora_rank, heads * shape.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(shape.hidden_size, shape.kv_lora_rank + shape.qk_rope_head_dim)
        self.kv_a_layernorm = Norm(shape.kv_lora_rank, shape.rms_norm_eps)
        self.kv_b_proj = Linear(shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.v_head_dim))
        self.o_proj = Linear(heads * shape.v_head_dim, shape.hidden_size)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        """x [B, S, H] -> [B, S, H]; with a cache, keys and values of earlier positions come from it."""
        shape, heads = self.shape, self.shape.num_attention_heads
        nope = shape.qk_nope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (heads, shape.qk_head_dim))
        q = torch.cat((q[..., :nope], KERNELS.rotate(q[..., nope:], context.cos, context.sin)), -1)
        latent = self.kv_a_proj_with_mqa(x)
        rope = KERNELS.rotate(latent[..., None, shape.kv_lora_rank :], context.cos, context.sin)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent[..., : shape.kv_lora_rank]))
        kv = kv.unflatten(-1, (heads, nope + shape.v_head_dim))
        k = torch.cat((kv[..., :nope], rope.expand(-1, -1, heads, -1)), -1).transpose(1, 2).contiguous()
        v = kv[..., nope:].transpose(1, 2).contiguous()
        if cache is not None:
            k, v = cache.extend(k, v)
        out = KERNELS.attend(q.transpose(1, 2).contiguous(), k, v, context.mask, self.scale)
        return torch.as_tensor(self.o_proj(out.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Dense or shared-expert SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(hidden, width), Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H]."""
        return torch.as_tensor(self.down_proj(KERNELS.swiglu(self.gate_proj(x), self.up_proj(x))))


class Gate(nn.Module):
    """noaux_tc: the bias picks the groups and the experts, the unbiased sigmoid scores weigh them."""

    e_score_correction_bias: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.randn(shape.n_routed_experts, shape.hidden_size) * shape.hidden_size**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] -> ids int64 [T, K], weights float32 [T, K]."""
        shape = self.shape
        scores = torch.sigmoid(F.linear(x.float(), self.weight))
        biased = (scores.detach() + self.e_score_correction_bias).view(len(x), shape.n_group, -1)
        groups = biased.topk(2, dim=-1).values.sum(-1).topk(shape.topk_group, dim=-1).indices
        kept = torch.zeros_like(biased[..., 0], dtype=torch.bool).scatter_(-1, groups, True)
        ids = biased.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2).topk(shape.num_experts_per_tok).indices
        weights = scores.gather(-1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * shape.routed_scaling_factor


class Moe(nn.Module):
    """Routed experts and one shared expert. The experts' weights are stacked: gate_up [E, 2N, H], down [E, H, N]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        experts, width, hidden = shape.n_routed_experts, shape.moe_intermediate_size, shape.hidden_size
        self.gate = Gate(shape)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * width, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * width**-0.5)
        self.shared_experts = Mlp(hidden, width)
        self.counts = torch.zeros(experts)  # tokens per expert since the bias was last updated

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H]."""
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = self.gate(flat)
        plan = plan_dispatch(ids, self.gate.shape.n_routed_experts, multiple=128 if self.training else 1)
        if self.training:
            self.counts += plan.counts
        gate_up: Tensor = self.gate_up
        down: Tensor = self.down
        if KERNELS.weight_filter is not None:
            gate_up, down = KERNELS.weight_filter(gate_up), KERNELS.weight_filter(down)
        if KERNELS.activation_filter is not None:
            flat = KERNELS.activation_filter(flat)
        routed: Any = RoutedExperts.apply(flat, weights, gate_up.to(x.dtype), down.to(x.dtype), plan)  # type: ignore[no-untyped-call]
        return torch.as_tensor(routed.view_as(x) + self.shared_experts(x))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp: nn.Module = Mlp(shape.hidden_size, shape.intermediate_size) if dense else Moe(shape)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        """x [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return torch.as_tensor(x + self.mlp(self.post_attention_layernorm(x)))


class MtpBlock(Block):
    """The multi-token-prediction layer: from the hidden state at i and the token at i + 1, the token at i + 2.

    The hidden state is the one after the main model's final norm.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, dense=False)
        self.enorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.hnorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.eh_proj = Linear(2 * shape.hidden_size, shape.hidden_size, quantised=False)
        self.shared_head_norm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def combine(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """The layer's input from the next token's embedding and the hidden state, both [B, S, H]."""
        return torch.as_tensor(self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1)))


class TinyR1(nn.Module):
    """The model; `layers[-1]` is the MTP layer, as in the published checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        blocks = [Block(shape, layer < shape.first_k_dense_replace) for layer in range(shape.num_hidden_layers)]
        self.layers = nn.ModuleList([*blocks, MtpBlock(shape)])
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size, quantised=False)
        self.cos, self.sin = rope_tables(shape, shape.max_position_embeddings)

    def context(self, positions: Tensor, mask: Tensor) -> Context:
        """Gather the RoPE tables for int64 positions [B, S]."""
        return Context(self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2), mask)

    def forward(
        self, tokens: Tensor, context: Context, caches: list[Cache] | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """tokens int64 [B, S] -> hidden states after the final norm [B, S, H]."""
        x = self.embed_tokens(tokens).to(dtype)
        for index, layer in enumerate(self.layers[:-1]):
            x = layer(x, context, None if caches is None else caches[index])
        return torch.as_tensor(self.norm(x))

    def predict_second(self, hidden: Tensor, next_tokens: Tensor, context: Context) -> Tensor:
        """The MTP layer's logits [B, S, V] for the token after next."""
        mtp = self.layers[-1]
        assert isinstance(mtp, MtpBlock)
        x = mtp.combine(self.embed_tokens(next_tokens).to(hidden.dtype), hidden)
        return torch.as_tensor(self.lm_head(mtp.shared_head_norm(Block.forward(mtp, x, context))))
