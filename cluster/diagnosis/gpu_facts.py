"""The GPUs of a node, as its driver tells of them and as torch can use them.

Both are asked in processes of their own: Ray hides GPUs from workers that reserve none, and a context in this process would
keep memory that is to be reported as free.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .facts import GpuFacts

_SMI = "nvidia-smi"
_FIELDS = (
    "name",
    "compute_cap",
    "memory.total",
    "memory.free",
    "persistence_mode",
    "ecc.errors.uncorrected.volatile.total",
    "driver_version",
)
_MIB = 1 << 20

_SMI_TIMEOUT_S = 20.0
"""Without persistence mode the driver initialises each of eight GPUs first, a second or two each."""

_TORCH_TIMEOUT_S = 45.0
"""To import torch from a slow disk and initialise CUDA."""

_TORCH_QUESTION = """
import json, torch
found = []
for index in range(torch.cuda.device_count()):
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    found.append([properties.name, 10 * properties.major + properties.minor, total, free])
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class GpusFound:
    """The GPUs of this node.

    Attributes:
        gpus: of the driver, or of torch where the driver's tool is missing.
        torch_gpus: how many torch can use.
        driver: its version; "" if it is not known.
        problem: why the driver or torch could not be asked, or "".
    """

    gpus: tuple[GpuFacts, ...] = ()
    torch_gpus: int = 0
    driver: str = ""
    problem: str = ""


def find_gpus(*, torch_has_cuda: bool, hidden_by_ray: bool) -> GpusFound:
    """Look for GPUs; milliseconds where there is no driver.

    Args:
        torch_has_cuda: whether torch is built for CUDA; else it is not asked.
        hidden_by_ray: whether this process is a worker of Ray's that reserved no GPU.
    """
    tool = shutil.which(_SMI)
    if tool is None and not any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/dxg")):
        return GpusFound()
    problem, driver = "", ""
    gpus: list[GpuFacts] = []
    if tool is not None:
        try:
            question = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
            gpus, driver = parse_smi(_output(question, _SMI_TIMEOUT_S))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            problem = f"{_SMI} fails: {_why(error)}"
    if not torch_has_cuda:
        return GpusFound(tuple(gpus), 0, driver, problem)
    environment = dict(os.environ)
    if hidden_by_ray and environment.get("CUDA_VISIBLE_DEVICES") == "":
        del environment["CUDA_VISIBLE_DEVICES"]
    try:
        seen = parse_torch(_output([sys.executable, "-c", _TORCH_QUESTION], _TORCH_TIMEOUT_S, environment))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return GpusFound(tuple(gpus), 0, driver, problem or f"torch cannot use CUDA: {_why(error)}")
    return GpusFound(tuple(gpus or seen), len(seen), driver, problem)


def parse_smi(text: str) -> tuple[list[GpuFacts], str]:
    """GPUs and the driver's version from the tool's lines; what a GPU does not tell is written in brackets.

    Raises:
        ValueError: a line has another form.
    """
    gpus, driver = [], ""
    for line in text.strip().splitlines():
        name, capability, total, free, persistence, errors, driver = (part.strip() for part in line.split(","))
        gpus.append(
            GpuFacts(
                name=name,
                architecture=_number(capability.replace(".", "")) or 0,
                memory_total=(_number(total) or 0) * _MIB,
                memory_free=(_number(free) or 0) * _MIB,
                persistent={"Enabled": True, "Disabled": False}.get(persistence),
                uncorrected_errors=_number(errors),
            )
        )
    return gpus, driver


def _number(text: str) -> int | None:
    return None if text.startswith("[") else int(text)


def parse_torch(text: str) -> list[GpuFacts]:
    """GPUs from the answer of a process with torch.

    Raises:
        ValueError: it is no such answer.
    """
    lines = text.strip().splitlines()  # libraries may have printed something before
    return [GpuFacts(*found) for found in json.loads(lines[-1] if lines else "")]


def _output(command: list[str], timeout_s: float, environment: dict[str, str] | None = None) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=timeout_s, env=environment
    ).stdout


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = f"{error.stdout}\n{error.stderr}".strip().splitlines()
        return lines[-1] if lines else f"exit status {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {error.timeout:.0f} s"
    return str(error)
