"""Kernels that become Triton kernels when they are first launched, and the one place that launches them.

Triton is imported by the first launch, not before: a process that serves from CPUs never loads it, and a machine without
it can still import every module. Hence a kernel is written as

    if TYPE_CHECKING:
        import triton.language as tl

    @kernel
    def _double(x: tl.tensor, n: tl.int32, BLOCK: tl.constexpr) -> None: ...

and started with `launch`. Wrappers ask `uses_triton` which path their tensors take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""GPU generations that every kernel is compiled for ahead of time, as 10 x major + minor compute capability."""


@dataclass(frozen=True, slots=True)
class Config:
    """How one kernel is launched for some range of sizes.

    Attributes:
        num_warps: warps a program.
        num_stages: loads in flight, as the software pipeliner counts them.
        source: where the numbers come from, for whoever wants to change them.
        tiles: values of the kernel's tile-size constants by name.
        fp_fusion: let the compiler contract a * b + c to one rounding. Off where bits must equal torch's.
    """

    num_warps: int
    num_stages: int
    source: str
    tiles: Mapping[str, int] = field(default_factory=dict)
    fp_fusion: bool = True


class Kernel:
    """A Triton kernel, or a device function that kernels call, not yet given to Triton. Made by `kernel`."""

    def __init__(self, function: FunctionType) -> None:
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.function = function

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Only what Triton makes of a device function can be called, and only by a kernel: this is for type checkers."""
        raise TypeError(f"{self.__name__} is Triton code: start kernels with launch()")

    @functools.cached_property
    def jitted(self) -> Any:
        """What `triton.jit` makes of the function: compiled by a launch, interpreted under `TRITON_INTERPRET=1`."""
        import triton
        import triton.language

        # The function gets globals of its own: `tl` exists only here, device functions it calls must be jitted too, and
        # Triton's interpreter adds names of its own to whatever it is given.
        visible = dict(self.function.__globals__)
        own = FunctionType(self.function.__code__, visible, self.function.__name__, self.function.__defaults__)
        functools.update_wrapper(own, self.function)
        del own.__wrapped__  # type: ignore[attr-defined]  # inspect would follow it back to the original
        visible["tl"] = triton.language
        for name in self.function.__code__.co_names:
            if isinstance(helper := visible.get(name), Kernel):
                visible[name] = helper.jitted
        return triton.jit(own)


def kernel(function: Callable[..., Any]) -> Kernel:
    """Mark a function as a Triton kernel or as a device function; `triton.jit` is applied when it is first needed."""
    assert isinstance(function, FunctionType)
    return Kernel(function)


interpreted_architecture: int | None = None
"""Set by `kernels/interpreter.py`: CPU tensors then go through the interpreted kernels, as written for this generation."""

interpreted_reads: list[torch.Tensor] = []
"""The `reads` of the launch that is being interpreted."""


def uses_triton(*tensors: torch.Tensor) -> bool:
    """Whether a wrapper given these tensors runs its Triton kernel (CUDA, or interpreted) or its CPU path.

    Raises:
        ValueError: they are not all on one device.
    """
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        raise ValueError(f"tensors on different devices: {', '.join(str(tensor.device) for tensor in tensors)}")
    return device.type == "cuda" or interpreted_architecture is not None


def architecture(device: torch.device) -> int:
    """The entry of `ARCHITECTURES` whose code runs on this device: the newest that is not newer than the device.

    Raises:
        RuntimeError: no such entry; the device is too old, or not from NVIDIA.
    """
    if device.type != "cuda":
        assert interpreted_architecture is not None, f"{device} has no architecture"
        return interpreted_architecture
    return _device_architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _device_architecture(index: int) -> int:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        raise RuntimeError(f"{name}: Moray's kernels are written for NVIDIA GPUs")
    major, minor = torch.cuda.get_device_capability(index)
    older = [entry for entry in ARCHITECTURES if entry <= 10 * major + minor]
    if not older:
        raise RuntimeError(f"{name} is sm_{major}{minor}; Moray's kernels need sm_{ARCHITECTURES[0]} (A100) or newer")
    return older[-1]


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    *arguments: object,
    config: Config,
    reads: Iterable[torch.Tensor] = (),
    **constants: object,
) -> None:
    """Run `grid` programs of a kernel on the device of its first tensor, in that device's current stream.

    Args:
        kernel: what to run.
        grid: programs along each axis, up to three; with none along an axis nothing is started.
        arguments: tensors and numbers, in the order of the kernel's parameters.
        config: launch configuration; its tiles are passed as constants.
        reads: tensors the kernel reaches through pointers kept in other tensors; only the interpreter's check of addresses
            needs to know them.
        constants: further compile-time constants.
    """
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": config.fp_fusion}
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel.jitted[grid](*arguments, **config.tiles, **constants, **options)
        return
    interpreted_reads[:] = reads
    kernel.jitted[grid](*arguments, **config.tiles, **constants, **options)
