"""`make kernels`: every kernel on every GPU generation, as the compiler left it and as a roofline judges it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .cases import Case
from .catalogue import compiling
from .codegen import MachineCode, predict
from .gpus import GPUS
from .launch import ARCHITECTURES

TOKENS = (1, 32, 256)
_WIDTH = 170  # of a table in a log, where nobody can say how wide the screen is


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a kernel does not compile."""
    parser = argparse.ArgumentParser(prog="python -m moray.kernels.table", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="only this one (repeatable)")
    architectures = parser.parse_args(arguments).arch or ARCHITECTURES
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table("kernel", "sm", "regs", "smem KiB", "spills", "instr (loop)", "tensor cores")
    for tokens in TOKENS:
        table.add_column(f"{tokens} tok us", justify="right")
    failures: list[str] = []
    with compiling(architectures) as cases:
        progress = Console(stderr=True)
        by_kernel = sorted(cases, key=lambda entry: entry[0].name)
        previous = ""
        for case, future in track(by_kernel, "compiling", console=progress, disable=not progress.is_terminal):
            if (error := future.exception()) is not None:
                failures.append(f"{case}: {error}")
                continue
            name = case.name if case.name != previous else ""
            table.add_row(name, *_cells(case, future.result()), end_section=False)
            previous = case.name
    console.print(table)
    print(_legend(architectures))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _cells(case: Case, code: MachineCode) -> list[str]:
    cells = [
        str(case.architecture),
        str(code.registers),
        f"{code.shared_memory / 1024:.1f}",
        str(code.spills),
        f"{code.instructions} ({code.loop_instructions})",
        " ".join(sorted({name.split(".")[0] for name in code.tensor_core})) or "-",
    ]
    for tokens in TOKENS:
        work = case.work(tokens) if case.work else None
        if work is None:
            cells.append("")
            continue
        prediction = predict(case, code, work)
        cells.append(f"{prediction.seconds * 1e6:.1f} ({prediction.roofline * 1e6:.1f})")
    return cells


def _legend(architectures: Sequence[int]) -> str:
    gpus = ", ".join(f"{a} {GPUS[a].name}" for a in architectures)
    return (
        f"us: predicted (roofline) for one layer of DeepSeek-R1. {gpus}.\nPredicted is the largest of the roofline, the time "
        "to issue the instructions and 3 us to start a kernel: a bound from below, not a measurement."
    )


if __name__ == "__main__":
    sys.exit(main())
