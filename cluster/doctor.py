"""`moray doctor`: what this machine has, which path each kernel takes on it and why, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from ..kernels.catalogue import MODULES, all_cases
from ..kernels.launch import architecture

_DISTRIBUTIONS = ("torch", "triton", "ray")
_WIDTH = 120  # of tables in a log


@dataclass(frozen=True, slots=True)
class KernelPath:
    """Which code a kernel runs on one device.

    Attributes:
        kernel: module of `moray.kernels`.
        device: e.g. "cuda:0 NVIDIA H100 (sm_90)", or "cpu".
        path: "Triton" or "torch".
        why: what decided it, and which instructions it uses.
    """

    kernel: str
    device: str
    path: str
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """What `moray doctor` found.

    Attributes:
        machine: name -> value, in the order to show.
        kernels: one entry a kernel and device.
        problems: what is wrong, each with the way out; nothing serves as it should before these are solved.
    """

    machine: dict[str, str]
    kernels: list[KernelPath]
    problems: list[str]


def examine() -> Report:
    """Look at this machine. Takes a second or two; starts nothing."""
    problems: list[str] = []
    machine = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for name in _DISTRIBUTIONS:
        try:
            machine[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine[name] = "not installed"
            if name != "triton" or torch.cuda.is_available():
                problems.append(f"{name} is not installed: install Moray with its dependencies (`make setup`)")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine["cpus"] = f"{len(os.sched_getaffinity(0))}, {memory / 2**30:.1f} GiB of memory"
    reason = _why_no_gpu()
    devices = [] if reason else [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    machine["gpus"] = f"none: {reason}" if reason else ", ".join(_described(device) for device in devices)
    machine["links"] = ", ".join(["inline", "shm", "gloo", *(["nccl"] if devices and _has_nccl() else [])])
    kernels: list[KernelPath] = []
    for device in devices:
        try:
            kernels += _gpu_paths(device)
        except RuntimeError as error:
            problems.append(f"{error}; give this machine's processes `device: cpu`, or hide the GPU from them")
    if devices and shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        problems.append("no C compiler: Triton builds a small launcher for each kernel; install gcc or clang")
    if devices and not _has_nccl():
        problems.append("this torch is built without NCCL: GPUs of different machines would be linked over gloo")
    if not kernels:
        why = reason or "its GPUs cannot be used"
        kernels = [KernelPath(_name(module), "cpu", "torch", f"no GPU: {why}") for module in MODULES]
    return Report(machine, kernels, problems)


def doctor(*, as_json: bool) -> int:
    """`moray doctor`: print the report; returns 1 if there are problems."""
    report = examine()
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        show(report, Console(width=None if sys.stdout.isatty() else _WIDTH))
    return 1 if report.problems else 0


def show(report: Report, console: Console) -> None:
    """Print a report as tables."""
    machine = Table.grid(padding=(0, 2))
    for name, value in report.machine.items():
        machine.add_row(name, value)
    console.print(machine)
    kernels = Table("kernel", "device", "path", "why", title="kernels", title_justify="left")
    for entry in report.kernels:
        kernels.add_row(entry.kernel, entry.device, entry.path, entry.why)
    console.print(kernels)
    for problem in report.problems:
        console.print(f"problem: {problem}", style="bold", soft_wrap=True)
    console.print("no problems found" if not report.problems else f"{len(report.problems)} problem(s)")


def _name(module: object) -> str:
    return str(getattr(module, "__name__", module)).rsplit(".", 1)[-1]


def _why_no_gpu() -> str:
    """Why kernels cannot run on a GPU here, or "" if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch (CUDA {torch.version.cuda}) finds no device; is there a GPU and a driver (`nvidia-smi`)?"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def _has_nccl() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_nccl_available()


def _described(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    capability = f"sm_{properties.major}{properties.minor}"
    return f"{device} {properties.name} ({capability}, {properties.total_memory / 2**30:.0f} GiB)"


def _gpu_paths(device: torch.device) -> list[KernelPath]:
    """One entry a kernel module; the instructions are those its ahead-of-time cases hold.

    Raises:
        RuntimeError: no kernel runs on this device.
    """
    code = architecture(device)
    where = _described(device).rsplit(",", 1)[0] + ")"
    by_module: dict[str, list[str]] = {}
    cases = all_cases(code)
    for module in MODULES:
        mine = [case for case in cases if case.kernel.function.__module__ == module.__name__]
        cores = sorted({case.tensor_core for case in mine if case.tensor_core})
        by_module[_name(module)] = cores
    return [
        KernelPath(
            name, where, "Triton", f"CUDA device, code for sm_{code}" + (f", {'/'.join(cores)}" if cores else "")
        )
        for name, cores in by_module.items()
    ]
