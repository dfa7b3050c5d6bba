"""Expert hosts that are real processes, for tests that stop or kill them, or that must cross a process boundary."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moray.actors.links import LinkAddress, LinkKind
from moray.actors.placement_table import PlacementTable
from moray.actors.testing import SECRET, EngineParts


@dataclass(frozen=True, slots=True)
class HostProcess:
    """A host's process, where it listens, and the bytes that it has read of the checkpoint's tensors and holds."""

    pid: int
    address: LinkAddress
    data_bytes_read: int
    resident_bytes: int


@contextlib.contextmanager
def host_processes(parts: EngineParts, table: PlacementTable, kind: LinkKind) -> Iterator[Mapping[str, HostProcess]]:
    """The hosts of a table, loaded and listening; what is left of them ends with the context, stopped or not."""
    script = str(Path(__file__).with_name("host_process.py"))
    with contextlib.ExitStack() as stack:
        processes = {}
        for host_id, slots in table.slots.items():
            process = subprocess.Popen(
                [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(_end, process)
            description = {
                "host_id": host_id,
                "dtype": str(parts.compute.dtype).removeprefix("torch."),
                "keep_fp8": parts.compute.keep_fp8,
                "packed": parts.compute.packed,
                "checkpoint": str(parts.checkpoint),
                "slots": slots,
                "epoch": table.epoch,
                "kinds": [kind],
                "secret": SECRET.hex(),
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps(description) + "\n")
            process.stdin.flush()
            processes[host_id] = process
        hosts = {}
        for host_id, process in processes.items():
            assert process.stdout is not None
            loaded = json.loads(process.stdout.readline())
            ((kind_, endpoint, machine),) = loaded["addresses"]
            hosts[host_id] = HostProcess(
                process.pid,
                LinkAddress(kind_, endpoint, machine),
                loaded["data_bytes_read"],
                loaded["resident_bytes"],
            )
        yield hosts


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.communicate(timeout=5)  # closes its stdin, which ends it in order
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate(timeout=5)
