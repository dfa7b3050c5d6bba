"""How cached latent rows lie in memory: plain, or with the latent part in FP8.

A row is the normalised compressed key-value of one token (`kv_lora` columns) and its rotated shared key (`rope` columns).

* plain: `kv_lora + rope` numbers of the compute dtype; 1152 bytes for DeepSeek-R1 in bfloat16.
* FP8: bytes. `kv_lora` e4m3 codes, one fp32 scale for each 128 of them (the last group may be ragged), then `rope` bfloat16
  numbers; every part starts at a multiple of 16 bytes, the next row too. 512 + 16 + 128 = 656 bytes for DeepSeek-R1. The
  rotated key stays in bfloat16: it carries the positions and is a ninth of the row.

A group with a NaN or an infinity gets a NaN for its scale, so that all of it reads as NaN on every GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from .fp8 import E4M3_MAX, SMALLEST_AMAX, decode_e4m3

GROUP = 128
"""Latent columns that share one scale."""

ALIGNMENT = 16
"""Bytes: what one thread copies at a time."""


@dataclass(frozen=True, slots=True)
class KvFormat:
    """The layout of a cache.

    Attributes:
        kv_lora: latent columns, the value's too.
        rope: columns of the rotated key.
        dtype: of the stored numbers; `torch.uint8` stands for the FP8 layout.
    """

    kv_lora: int
    rope: int
    dtype: torch.dtype

    @classmethod
    def of(cls, pages: torch.Tensor, *, kv_lora: int, rope: int) -> KvFormat:
        """The format of pages [..., row].

        Raises:
            ValueError: the rows have another width.
        """
        found = cls(kv_lora, rope, pages.dtype)
        if pages.shape[-1] != found.row:
            raise ValueError(f"pages have rows of {pages.shape[-1]} {pages.dtype}; {kv_lora} + {rope} need {found.row}")
        return found

    @property
    def is_fp8(self) -> bool:
        """Whether the latents are e4m3 codes with scales."""
        return self.dtype == torch.uint8

    @property
    def groups(self) -> int:
        """Scales a row has in the FP8 layout."""
        return -(-self.kv_lora // GROUP)

    @property
    def scale_at(self) -> int:
        """Byte of an FP8 row where its scales start."""
        return _aligned(self.kv_lora)

    @property
    def rope_at(self) -> int:
        """Where the rotated key starts: in bytes of an FP8 row, in elements of a plain one."""
        return _aligned(self.scale_at + 4 * self.groups) if self.is_fp8 else self.kv_lora

    @property
    def row(self) -> int:
        """Elements of `dtype` in one row."""
        return _aligned(self.rope_at + 2 * self.rope) if self.is_fp8 else self.kv_lora + self.rope

    @property
    def row_bytes(self) -> int:
        """Bytes one cached token takes in one layer."""
        return self.row * self.dtype.itemsize

    def constants(self) -> dict[str, int]:
        """Compile-time constants of the kernels: lengths of rows and starts of parts, in elements of what `views` gives."""
        return {
            "LATENT_ROW": self.row,
            "SCALE_ROW": self.row // 4 if self.is_fp8 else 0,
            "ROPE_ROW": self.row // 2 if self.is_fp8 else self.row,
            "SCALE_AT": self.scale_at // 4 if self.is_fp8 else 0,
            "ROPE_AT": self.rope_at // 2 if self.is_fp8 else self.rope_at,
        }

    def views(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The memory of contiguous pages as what it holds: latents, scales (FP8 only), rotated keys."""
        assert pages.is_contiguous(), pages.stride()
        if not self.is_fp8:
            return pages, pages, pages
        return pages, pages.view(torch.float32), pages.view(torch.bfloat16)

    def create(self, layers: int, pages: int, page_size: int, device: torch.device | str | None = None) -> torch.Tensor:
        """An empty cache [layers, pages, page_size, row]."""
        return torch.zeros((layers, pages, page_size, self.row), dtype=self.dtype, device=device)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Rows [..., kv_lora + rope] of a floating type as they are stored, [..., row]. Plain torch."""
        if not self.is_fp8:
            return values.to(self.dtype)
        latent, rope = values.split([self.kv_lora, self.rope], dim=-1)
        codes, scales = quantize_groups(latent)
        parts = (
            codes.view(torch.uint8),
            scales.view(torch.uint8),
            rope.to(torch.bfloat16).contiguous().view(torch.uint8),
        )
        return torch.cat([functional.pad(part, (0, -part.shape[-1] % ALIGNMENT)) for part in parts], dim=-1)

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Stored rows [..., row] as numbers [..., kv_lora + rope], multiplied in fp32 and rounded once. Plain torch."""
        if not self.is_fp8:
            return rows.to(dtype)
        codes = rows[..., : self.kv_lora].contiguous()
        scales = rows[..., self.scale_at : self.scale_at + 4 * self.groups].contiguous().view(torch.float32)
        latent = decode_e4m3(codes) * scales.repeat_interleave(GROUP, dim=-1)[..., : self.kv_lora]
        rope = rows[..., self.rope_at : self.rope_at + 2 * self.rope].contiguous().view(torch.bfloat16)
        return torch.cat((latent.to(dtype), rope.to(dtype)), dim=-1)


def quantize_groups(latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """latent [..., K] as e4m3 codes [..., K] and fp32 scales [..., ceil(K / 128)]: a group's largest magnitude becomes 448."""
    columns = latent.shape[-1]
    grouped = functional.pad(latent.float(), (0, -columns % GROUP)).unflatten(-1, (-1, GROUP))
    amax = grouped.abs().amax(-1)
    scales = amax.clamp_min(SMALLEST_AMAX) / E4M3_MAX
    codes = (grouped / scales.unsqueeze(-1)).flatten(-2)[..., :columns].to(torch.float8_e4m3fn)
    return codes.contiguous(), torch.where(amax.isfinite(), scales, float("nan"))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
