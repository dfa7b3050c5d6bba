"""Which code each kernel runs on this machine, and why."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from ...actors.native_library import actors_library
from ...kernels.catalogue import MODULES, all_cases
from ...kernels.cpu.library import Instructions, native
from ...kernels.launch import architecture
from .text import GIB


@dataclass(frozen=True, slots=True)
class KernelPath:
    """Which code a kernel runs on one device.

    Attributes:
        kernel: module of `moray.kernels`.
        device: e.g. "cuda:0 NVIDIA H100 (sm_90)", or "cpu".
        path: "Triton", "torch" or "native".
        why: what decided it, and which instructions it uses.
    """

    kernel: str
    device: str
    path: str
    why: str


def kernel_paths() -> list[KernelPath]:
    """One entry a kernel and device that it runs on."""
    reason = why_no_gpu()
    found: list[KernelPath] = []
    if not reason:
        for index in range(torch.cuda.device_count()):
            try:
                found += _gpu_paths(torch.device("cuda", index))
            except RuntimeError as error:
                reason = str(error)  # it is too old, which the check of GPUs says, too
    if not found:
        found = [KernelPath(_name(module), "cpu", "torch", f"no GPU: {reason}") for module in MODULES]
    return [*found, _cpu_path()]


def _cpu_path() -> KernelPath:
    """What CPUs compute with, in processes without a GPU and on cold hosts."""
    library = native()
    if library is None:
        why = "installed without a C++ compiler: install one, then Moray again; until then float32, by torch"
        return KernelPath("cpu", "cpu", "torch", why)
    if library.best is Instructions.GENERIC:
        return KernelPath("cpu", "cpu", "torch", "this processor has no AVX2; float32, by torch")
    loop = (
        ""
        if actors_library() is not None
        else "; without the native half of routers and expert hosts: install Moray again"
    )
    return KernelPath("cpu", "cpu", "native", f"{library.best.name}, bfloat16 and FP8 (float32 is torch's){loop}")


def why_no_gpu() -> str:
    """Why kernels cannot run on a GPU here, or "" if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch (CUDA {torch.version.cuda}) finds no device; is there a GPU and a driver (`nvidia-smi`)?"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def _name(module: object) -> str:
    return str(getattr(module, "__name__", module)).rsplit(".", 1)[-1]


def _gpu_paths(device: torch.device) -> list[KernelPath]:
    """One entry a kernel module; the instructions are those its ahead-of-time cases hold.

    Raises:
        RuntimeError: no kernel runs on this device.
    """
    code = architecture(device)
    properties = torch.cuda.get_device_properties(device)
    where = (
        f"{device} {properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory / GIB:.0f} GiB)"
    )
    cases = all_cases(code)
    found = []
    for module in MODULES:
        mine = [case for case in cases if case.kernel.function.__module__ == module.__name__]
        cores = sorted({case.tensor_core for case in mine if case.tensor_core})
        why = f"CUDA device, code for sm_{code}" + (f", {'/'.join(cores)}" if cores else "")
        found.append(KernelPath(_name(module), where, "Triton", why))
    return found
