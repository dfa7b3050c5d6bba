"""Runs the Triton kernels on CPU tensors, with the numbers a GPU would give: for tests on machines without one.

Triton's own interpreter (3.7) is wrong for the types this project lives on: it truncates fp32 to bf16, adds and multiplies
the raw bits of bf16, and rounds to e4m3 in ways no hardware does. `install` replaces those parts:

* conversions between floating types are torch's: round to nearest even, saturating to +-448 for e4m3;
* arithmetic on bf16 is done in fp32 and rounded once; on FP8, and in reductions of either, it is refused;
* `tl.dot` is exact (fp64, rounded once to the accumulator's type), rounds fp32 operands to tf32 where a GPU would, and
  refuses inner dimensions below 16, as the compiler does;
* a load or store outside the tensors given to the kernel is an error that names the address;
* lanes that a masked load leaves undefined hold NaN, or an absurd integer.

It relies on private parts of triton 3.7, which pyproject.toml pins; tests/kernels/numerics/test_interpreter.py holds each
of these claims. Start the process with `TRITON_INTERPRET=1`; such a process cannot compile kernels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import launch

_installed = False


def install(architecture: int = 90) -> None:
    """Send CPU tensors through the interpreted kernels from now on, as they are written for one GPU generation.

    May be called again to change the generation.

    Raises:
        RuntimeError: Triton was not told to interpret before it was imported.
    """
    global _installed
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before the process starts: Triton reads it when it is imported")
    assert architecture in launch.ARCHITECTURES, architecture
    if not _installed:
        _patch()
        _installed = True
    launch.interpreted_architecture = architecture


def _patch() -> None:
    from triton.runtime import interpreter as stock

    codec = _Codec()
    builder = stock.InterpreterBuilder
    _patch_arithmetic(stock, builder, codec)
    _patch_dot(stock, builder, codec)
    _patch_memory(stock, builder)
    _patch_reductions(stock, codec)
    _patch_speed(stock)


class _Codec:
    """Between the raw arrays of the interpreter and numbers."""

    def __init__(self) -> None:
        import triton.language as tl

        self.tl = tl
        self.torch_types = {
            tl.bfloat16: torch.bfloat16,
            tl.float8e4nv: torch.float8_e4m3fn,
            tl.float8e5: torch.float8_e5m2,
            tl.float16: torch.float16,
            tl.float32: torch.float32,
            tl.float64: torch.float64,
        }
        self.storage = {tl.bfloat16: np.uint16, tl.float8e4nv: np.uint8, tl.float8e5: np.uint8}

    def is_narrow(self, kind: Any) -> bool:
        """Whether numpy has no such type, so that the interpreter keeps raw bits."""
        return kind in self.storage or kind == self.tl.float8e4b15

    def decode(self, data: Any, kind: Any) -> Any:
        """Raw bits of a floating type as numbers: fp32 for narrow types, itself otherwise."""
        if kind == self.tl.float8e4b15:  # an fp16 with one exponent and seven mantissa bits fewer
            return ((data.astype(np.uint16) & 0x80) << 8 | (data.astype(np.uint16) & 0x7F) << 7).view(np.float16)
        if kind not in self.storage:
            return data
        raw = torch.from_numpy(np.ascontiguousarray(data).reshape(-1))
        return raw.view(self.torch_types[kind]).float().numpy().reshape(np.shape(data))

    def encode(self, values: Any, kind: Any) -> Any:
        """Numbers rounded to a floating type, as the interpreter keeps it."""
        if kind == self.tl.float8e4b15:
            raise NotImplementedError("rounding to float8e4b15: no kernel stores it")
        numbers = torch.from_numpy(np.ascontiguousarray(values).reshape(-1))
        if kind == self.tl.float8e4nv:
            numbers = numbers.clamp(-448.0, 448.0)  # NaN stays; PTX has only the saturating conversion
        rounded = numbers.to(self.torch_types[kind])
        if kind in self.storage:
            rounded = rounded.view(torch.uint16 if self.storage[kind] is np.uint16 else torch.uint8)
        return rounded.numpy().reshape(np.shape(values))


def _patch_arithmetic(stock: Any, builder: Any, codec: _Codec) -> None:
    tl = codec.tl
    cast_stock, binary_stock, ternary_stock = builder.cast_impl, builder.binary_op, builder.ternary_op
    unary_stock = builder.unary_op
    comparisons = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}

    def cast(self: Any, source: Any, target: Any, *_: Any) -> Any:
        kind, wanted = source.dtype.scalar, target.scalar
        if kind.is_floating() and wanted.is_floating():
            return stock.TensorHandle(codec.encode(codec.decode(source.data, kind), wanted), wanted)
        if codec.is_narrow(kind):
            return cast_stock(self, stock.TensorHandle(codec.decode(source.data, kind), tl.float32), target)
        if codec.is_narrow(wanted):
            return stock.TensorHandle(codec.encode(source.data.astype(np.float32), wanted), wanted)
        return cast_stock(self, source, target)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if rounding is not None and rounding != stock._ir.ROUNDING_MODE.RTNE:
            raise NotImplementedError(f"rounding mode {rounding}")
        return cast(self, source, target)

    def in_fp32(handles: tuple[Any, ...], what: str) -> list[Any]:
        if any(handle.dtype.scalar != tl.bfloat16 for handle in handles):
            raise TypeError(f"{what} on {[str(h.dtype) for h in handles]}: cast FP8 to a wider type first")
        return [stock.TensorHandle(codec.decode(handle.data, tl.bfloat16), tl.float32) for handle in handles]

    def is_bits_only(op: Any) -> bool:
        return op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

    def binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not codec.is_narrow(left.dtype.scalar) or is_bits_only(op):
            return binary_stock(self, left, right, op)
        result = binary_stock(self, *in_fp32((left, right), op.__name__), op)
        if op in comparisons:
            return result
        return stock.TensorHandle(codec.encode(result.data, tl.bfloat16), tl.bfloat16)

    def ternary(self: Any, first: Any, second: Any, third: Any, op: Any) -> Any:
        if op is np.where or not codec.is_narrow(third.dtype.scalar):
            return ternary_stock(self, first, second, third, op)
        result = ternary_stock(self, *in_fp32((first, second, third), op.__name__), op)
        return stock.TensorHandle(codec.encode(result.data, tl.bfloat16), tl.bfloat16)

    def unary(self: Any, argument: Any, op: Any) -> Any:
        if not codec.is_narrow(argument.dtype.scalar):
            return unary_stock(self, argument, op)
        result = unary_stock(self, *in_fp32((argument,), op.__name__), op)
        return stock.TensorHandle(codec.encode(result.data, tl.bfloat16), tl.bfloat16)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if codec.is_narrow(z.dtype.scalar):
            raise TypeError(f"fma on {z.dtype}: cast to fp32 first")
        wide = x.data.astype(np.float64) * y.data + z.data  # one rounding; exact enough for fp32
        return stock.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    builder.cast_impl, builder.create_fp_to_fp = cast, fp_to_fp
    builder.binary_op, builder.ternary_op, builder.unary_op, builder.create_fma = binary, ternary, unary, fma


def _tf32(values: Any) -> Any:
    """fp32 rounded to the 10 mantissa bits of tf32 (to nearest, ties away, as `cvt.rna`)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    finite = np.isfinite(values)
    return np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)


def _patch_dot(stock: Any, builder: Any, codec: _Codec) -> None:
    def dot(self: Any, a: Any, b: Any, accumulator: Any, input_precision: Any, _imprecise: Any) -> Any:
        if a.data.shape[-1] < 16:
            raise ValueError(f"tl.dot over an inner dimension of {a.data.shape[-1]}: tensor cores need at least 16")
        operands = [codec.decode(handle.data, handle.dtype.scalar) for handle in (a, b)]
        if a.dtype.scalar == codec.tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            operands = [_tf32(operand) for operand in operands]
        product = np.matmul(operands[0].astype(np.float64), operands[1].astype(np.float64))
        kind = accumulator.data.dtype
        return stock.TensorHandle(product.astype(kind) + accumulator.data, accumulator.dtype.scalar)

    builder.create_dot = dot


def _patch_memory(stock: Any, builder: Any) -> None:
    load_stock, store_stock = builder.create_masked_load, builder.create_masked_store
    rmw_stock, call_stock = builder.create_atomic_rmw, stock.GridExecutor.__call__
    ranges: list[tuple[int, int]] = []

    def check(pointers: Any, mask: Any, what: str) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.uint64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, stop in ranges:
            inside |= (addresses >= start) & (addresses + np.uint64(size) <= stop)
        if not inside.all():
            address = int(addresses[~inside][0])
            nearest = min(ranges, key=lambda span: min(abs(address - span[0]), abs(address - span[1])))
            raise IndexError(
                f"{what} outside every tensor of the launch: {int((~inside).sum())} of {inside.size} lanes, the first "
                f"{address - nearest[0]} bytes into a tensor of {nearest[1] - nearest[0]} bytes"
            )

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        check(pointers, mask, "load")
        if other is None and not mask.data.all():
            kind = stock._get_np_dtype(pointers.get_element_ty())
            undefined = np.full(pointers.data.shape, 0x7F, dtype=np.uint8)[..., None]
            undefined = np.repeat(undefined, kind.itemsize, axis=-1).view(kind)[..., 0]
            if kind.kind == "f":
                undefined = np.full(pointers.data.shape, np.nan, dtype=kind)
            elif pointers.get_element_ty() == stock.tl.bfloat16:
                undefined = np.full(pointers.data.shape, 0x7FC0, dtype=kind)
            other = stock.TensorHandle(undefined, pointers.get_element_ty())
        return load_stock(self, pointers, mask, other, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "store")
        return store_stock(self, pointers, value, mask, *rest)

    def atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "atomic")
        return rmw_stock(self, op, pointers, value, mask, *rest)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        given = (*arguments, *named.values(), *launch.interpreted_reads)
        tensors = [a for a in given if isinstance(a, torch.Tensor)]
        ranges[:] = [_extent(tensor) for tensor in tensors]
        with np.errstate(all="ignore"), warnings.catch_warnings():  # infinities and NaN are part of what is tested
            warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
            return call_stock(self, *arguments, **named)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw = atomic
    stock.GridExecutor.__call__ = call


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and one-past-last address of a tensor's own elements (its storage may be larger)."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _patch_reductions(stock: Any, codec: _Codec) -> None:
    def refusing(apply: Callable[..., Any]) -> Callable[..., Any]:
        def checked(self: Any, values: Any) -> Any:
            for value in values if isinstance(values, tuple) else (values,):
                if codec.is_narrow(value.dtype.scalar):
                    raise TypeError(f"reduction or scan over {value.dtype}: cast to fp32 first")
            return apply(self, values)

        return checked

    for operations in (stock.ReduceOps, stock.ScanOps):
        operations.apply_impl = refusing(operations.apply_impl)


def _patch_speed(stock: Any) -> None:
    """Redirect the names of `triton.language` to the interpreter once for every set of modules that a function sees.

    The stock interpreter does it again at every launch and every call of a device function. A kernel sees
    `triton.language`; the functions of Triton's own library see `triton.language.core`, whose names are redirected apart.
    """
    patch_stock = stock._patch_lang
    modules = (stock.tl, stock.tl.core)
    seen: dict[frozenset[str], Any] = {}

    class KeepPatched:
        def restore(self) -> None:
            pass

    def patch_once(function: Any) -> Any:
        globals_ = function.__globals__
        visible = frozenset(module.__name__ for name in ("tl", "core") if (module := globals_.get(name)) in modules)
        if visible not in seen:
            seen[visible] = patch_stock(function)
        return KeepPatched()

    stock._patch_lang = patch_once
