"""Compiles kernels for GPUs that are not there, reads their machine code, and predicts their time.

Triton brings its own assembler and disassemblers, so no driver and no CUDA toolkit are needed. Results are kept beside
Triton's own compile cache, keyed by the machine code they describe.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from .cases import Case, Work
from .gpus import GPUS

_ANALYSIS = "3"
"""Change it when the meaning of `MachineCode` changes: what older versions kept is then not read."""

_TOOL_TIMEOUT_S = 120
_LAUNCH_S = 3e-6  # a kernel on an idle stream, cited for CUDA graphs and back-to-back launches: 2-4 us


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What one kernel became on one architecture.

    Attributes:
        registers: of one thread.
        shared_memory: bytes of one program.
        spills: instructions that move registers to or from local memory.
        instructions: of the whole kernel.
        loop_instructions: of the main loop: the innermost one with the most tensor-core instructions, or the longest one
            where there are none, or the whole kernel where it has no loop.
        tensor_core: the tensor-core instructions that occur, e.g. ("QMMA.16832.F32.E4M3.E4M3",).
    """

    registers: int
    shared_memory: int
    spills: int
    instructions: int
    loop_instructions: int
    tensor_core: tuple[str, ...]


def compile_case(case: Case) -> MachineCode:
    """Compile one case (or take it from the compile cache) and analyse the result.

    Raises:
        RuntimeError: this process interprets kernels (`TRITON_INTERPRET=1`), which rules out compiling them.
        triton.CompilationError: the kernel does not compile for this architecture.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels can be interpreted or compiled in one process, not both")
    function = case.kernel.jitted
    constants = {**case.config.tiles, **case.constants}
    unknown = set(constants) | set(case.arguments)
    assert unknown == set(function.arg_names), f"{case}: parameters {function.arg_names}, given {sorted(unknown)}"
    signature = {name: case.arguments.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if name in case.arguments and name not in case.unaligned and case.arguments[name][0] in "*iu"
    }
    source = ASTSource(function, signature, constants, aligned)
    config = case.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": config.fp_fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=options)
    return _analysed(compiled.asm["cubin"], compiled.metadata.shared)


def _analysed(cubin: bytes, shared_memory: int) -> MachineCode:
    import triton

    kept = Path(triton.knobs.cache.dir) / f"moray-{_ANALYSIS}-{hashlib.sha256(cubin).hexdigest()}.json"
    if kept.exists():
        fields = json.loads(kept.read_text(encoding="utf-8"))
        return MachineCode(**{**fields, "tensor_core": tuple(fields["tensor_core"])})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        lines = _run("nvdisasm", "-c", file.name).splitlines()
    code = analyse(lines, registers=_first_number(r"REG:(\d+)", usage), shared_memory=shared_memory)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(code)), encoding="utf-8")
    partial.replace(kept)
    return code


def _run(tool: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _first_number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in: {text}"
    return int(found[1])


_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_TENSOR_CORE = re.compile(r"^(?:HMMA|IMMA|DMMA|QMMA|OMMA|HGMMA|QGMMA|IGMMA|BGMMA|UTC\w*MMA)\b")


def analyse(disassembly: list[str], *, registers: int, shared_memory: int) -> MachineCode:
    """Count the instructions in the output of `nvdisasm -c`."""
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in disassembly:
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.match(line):
            if instruction[1].startswith("BRA") and (target := _TARGET.search(instruction[2])):
                jumps.append((len(names), target[1]))
            names.append(instruction[1])
    assert names, "the disassembly has no instructions"
    while names[-1] in ("NOP", "BRA"):  # padding, and the jump to itself before it
        names.pop()
    tensor_core = [bool(_TENSOR_CORE.match(name)) for name in names]
    # A branch to itself is the trap after the exit, no loop.
    loops = [(labels[to], at + 1) for at, to in jumps if to in labels and labels[to] < at < len(names)]
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    main = max(innermost, key=lambda loop: (sum(tensor_core[slice(*loop)]), loop[1] - loop[0]), default=(0, len(names)))
    return MachineCode(
        registers=registers,
        shared_memory=shared_memory,
        spills=sum(name.startswith(("STL", "LDL")) for name in names),
        instructions=len(names),
        loop_instructions=main[1] - main[0],
        tensor_core=tuple(sorted({name for name, is_one in zip(names, tensor_core, strict=True) if is_one})),
    )


@dataclass(frozen=True, slots=True)
class Prediction:
    """Time of one launch in seconds, by a simple model, and the bound it is held against.

    Attributes:
        roofline: the larger of bytes over bandwidth and flops over peak: no kernel can be faster.
        issue: what issuing the instructions takes, with the programs spread evenly over the multiprocessors.
    """

    roofline: float
    issue: float

    @property
    def seconds(self) -> float:
        """The larger of the two, and of what starting a kernel takes."""
        return max(self.roofline, self.issue, _LAUNCH_S)


def predict(case: Case, code: MachineCode, work: Work) -> Prediction:
    """Predict one launch from its machine code. Knows nothing of latencies and caches: a bound from below, not a measurement.

    Each multiprocessor issues one instruction a cycle from each of its four schedulers; a program's warps share them.
    """
    gpu = GPUS[case.architecture]
    arithmetic = case.arithmetic if case.arithmetic in gpu.flops else "fp16"
    roofline = max(work.bytes / gpu.bandwidth, work.flops / gpu.flops[arithmetic])
    once = code.instructions - code.loop_instructions
    issued = (once + code.loop_instructions * work.iterations) * case.config.num_warps / 4  # cycles of one program
    programs_each = -(-work.programs // gpu.multiprocessors)
    return Prediction(roofline=roofline, issue=programs_each * issued / (gpu.clock_ghz * 1e9))
