"""One layer's way to two expert hosts and back, side by side with the bare exchange of the same bytes.

    python tests/bench/dispatch.py [--rounds 300] [--hidden 7168] [--tokens 1 8 64] [--profile]

The hosts are real ones in processes of their own, over shm; their experts only copy each pair's hidden state, so that what
is measured is the path and not the model. Beside them two processes exchange as many bytes with this one through plain
shared memory and a Unix socket as doorbell: the sender copies into shared memory, the receiver out of it, and nothing else
is done. Rounds of both are interleaved, so that a busy machine disturbs them alike: compare columns, not machines.

    start, finish     microseconds that `ExpertDispatch` takes for each half of a layer
    layer, raw        both halves together, and the bare exchange; their ratio is the median of the rounds' own
    cpu, host cpu     what this process and each host compute for it; the rest is waiting
    raw cpu, raw host the same for the bare exchange. On a machine that others use, these alone mean anything
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import ctypes
import json
import math
import mmap
import os
import pstats
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moray.actors import expert_host, expert_table
from moray.actors.deadline import Deadline
from moray.actors.expert_dispatch import ExpertDispatch
from moray.actors.expert_host import ExpertHost
from moray.actors.links import LinkAddress, dial
from moray.actors.native_exchange import native_exchange
from moray.actors.placement_table import PlacementTable
from moray.kernels.combine import combine_reference
from moray.kernels.cpu.library import set_threads
from moray.kernels.cpu.matrix import pack
from moray.kernels.experts import MlpWeights
from moray.kernels.packed import TILE
from moray.model.compute import Compute

SECRET = b"only for this benchmark"
HOSTS, EXPERTS, TOP_K, LAYER = 2, 64, 8, 3
RAW_BYTES = 64 << 20
PATIENCE_S = 30.0
_DOORBELL = struct.Struct("<QQ")


_EXPERTS = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int32,
    ),  # x, tokens, rows, slots, pairs
    *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p),  # MLPs, slots, out
)


def copying(hidden: int) -> Any:
    """What a host's native loop calls in place of the kernel: gives each pair its hidden state [hidden] bf16 back."""

    def array(address: int, kind: str, *shape: int) -> npt.NDArray[Any]:
        dtype = np.dtype(kind)
        memory = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address)
        found: npt.NDArray[Any] = np.frombuffer(memoryview(memory), dtype=dtype)
        return found.reshape(shape)

    def copy(x: int, tokens: int, rows: int, _slots: int, pairs: int, _mlps: int, _num_slots: int, out: int) -> int:
        states, row_of_pair = array(x, "u2", tokens, hidden), array(rows, "i4", pairs)
        np.take(states, row_of_pair, axis=0, out=array(out, "u2", pairs, hidden), mode="clip")
        return 0

    return _EXPERTS(copy)


def serve(index: int, hidden: int, threads: int) -> None:
    """The process of an expert host whose experts do nothing but copy."""
    set_threads(threads, packed=True)

    def copied(x: torch.Tensor, rows: torch.Tensor, *_: object, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            return x.index_select(0, rows)
        return torch.index_select(x, 0, rows, out=out)

    natively_copied = copying(hidden)
    address_of_copying = ctypes.cast(natively_copied, ctypes.c_void_p).value
    vars(expert_host)["grouped_mlp"] = copied
    vars(expert_table)["loaded"] = lambda: SimpleNamespace(grouped_mlp_address=address_of_copying)
    host = ExpertHost(f"expert-host-{index}", compute=Compute.native())
    gate_up = pack(torch.zeros(2 * TILE, hidden, dtype=torch.bfloat16))
    nothing = MlpWeights(gate_up, pack(torch.zeros(hidden, TILE, dtype=torch.bfloat16)))
    held = list(range(index, EXPERTS, HOSTS))
    with host._held.loading(1) as loading:
        host._held.add(loading, [LAYER], [held], {(LAYER, expert): nothing for expert in held})
    address = host.listen("shm", bind_host="127.0.0.1", secret=SECRET)
    print(json.dumps([address.kind, address.endpoint, address.machine]), flush=True)
    sys.stdin.read()
    host.stop()


def serve_raw(fd: int, memory_fd: int) -> None:
    """The process of a bare exchange: reads what it is told of, answers as much as it is asked for."""
    memory = np.frombuffer(mmap.mmap(memory_fd, RAW_BYTES), dtype=np.uint8)
    own = np.zeros(RAW_BYTES // 2, dtype=np.uint8)
    with socket.socket(fileno=fd) as bell:
        while data := bell.recv(_DOORBELL.size):
            asked, answered = _DOORBELL.unpack(data)
            own[:asked] = memory[:asked]
            memory[RAW_BYTES // 2 : RAW_BYTES // 2 + answered] = own[:answered]
            bell.send(b"x")


@contextmanager
def child(*arguments: str, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Another process of this script, which ends with its stdin or its socket."""
    with subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(PATIENCE_S)


@contextmanager
def dispatching(hidden: int, threads: int) -> Iterator[tuple[ExpertDispatch, list[int]]]:
    """A dispatch to hosts in other processes, and their process ids."""
    table = PlacementTable(
        epoch=1,
        first_layer=LAYER,
        experts=EXPERTS,
        slots={f"expert-host-{i}": (tuple(range(i, EXPERTS, HOSTS)),) for i in range(HOSTS)},
    )
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(child("--host", str(i), "--hidden", str(hidden), "--host-threads", str(threads)))
            for i in range(HOSTS)
        ]
        links = {}
        for host, process in zip(table.slots, processes, strict=True):
            assert process.stdout is not None
            address = LinkAddress(*json.loads(process.stdout.readline()))
            links[host] = dial(address, secret=SECRET, identity="bench", deadline=Deadline.after(PATIENCE_S))
        dispatch = ExpertDispatch(table, links, exchange=native_exchange())
        stack.callback(dispatch.close)
        yield dispatch, [process.pid for process in processes]


Exchange = Callable[[Sequence[tuple[int, int]]], None]


@contextmanager
def exchanging() -> Iterator[tuple[Exchange, list[int]]]:
    """Bare exchanges: for each process how many bytes it is sent and how many it sends back. And the process ids."""
    with contextlib.ExitStack() as stack:
        ends, pids = [], []
        for _ in range(HOSTS):
            memory_fd = os.memfd_create("moray-bench")
            os.ftruncate(memory_fd, RAW_BYTES)
            here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            fds = (there.fileno(), memory_fd)
            pids.append(stack.enter_context(child("--raw", *map(str, fds), pass_fds=fds)).pid)
            there.close()
            stack.callback(here.close)
            ends.append((here, np.frombuffer(mmap.mmap(memory_fd, RAW_BYTES), dtype=np.uint8)))
            os.close(memory_fd)
        own = np.zeros(RAW_BYTES // 2, dtype=np.uint8)

        def exchange(sizes: Sequence[tuple[int, int]]) -> None:
            for (bell, memory), (asked, answered) in zip(ends, sizes, strict=True):
                memory[:asked] = own[:asked]
                bell.send(_DOORBELL.pack(asked, answered))
            at = 0
            for (bell, memory), (_, answered) in zip(ends, sizes, strict=True):
                bell.recv(1)
                own[at : at + answered] = memory[RAW_BYTES // 2 : RAW_BYTES // 2 + answered]
                at += answered

        yield exchange, pids


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"/proc/{pid}/task/{task}/schedstat", encoding="ascii") as file,
        ):
            total += int(file.read().split()[0])
    return total / 1e9


class Inputs:
    """What a gate gives for T tokens, and the bytes that go to and come from each host for it."""

    def __init__(self, tokens: int, hidden: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden_states = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
        scores = torch.rand(tokens, EXPERTS, generator=generator)
        self.topk_ids = scores.topk(TOP_K).indices
        self.topk_weights = torch.rand(tokens, TOP_K, generator=generator)
        on = self.topk_ids.numpy() % HOSTS
        self.sizes = [
            (
                int((on == i).any(axis=1).sum()) * hidden * 2 + int((on == i).sum()) * 8,
                int((on == i).sum()) * hidden * 2,
            )
            for i in range(HOSTS)
        ]

    def check(self, found: torch.Tensor) -> None:
        """Experts that copy give the hidden state back, so often and with such weights as the gate has said."""
        copies = self.hidden_states[:, None].expand(-1, TOP_K, -1)
        assert torch.equal(found, combine_reference(copies, self.topk_weights)), "not what was sent"


def measure(
    dispatch: ExpertDispatch,
    hosts: Sequence[int],
    exchange: Exchange,
    raw_hosts: Sequence[int],
    inputs: Sequence[Inputs],
    rounds: int,
) -> dict[str, float]:
    """Medians in microseconds of each round's times, and CPU microseconds a round."""
    times: dict[str, list[float]] = {name: [] for name in ("start", "finish", "cpu", "layer", "raw", "raw cpu")}
    clock, thread = time.perf_counter, time.thread_time
    for one in inputs:
        one.check(dispatch.finish(dispatch.start(LAYER, one.hidden_states, one.topk_ids, one.topk_weights)))
        exchange(one.sizes)
    before = [sum(map(cpu_seconds, pids)) for pids in (hosts, raw_hosts)]
    for number in range(rounds):
        one = inputs[number % len(inputs)]
        began, cpu = clock(), thread()
        pending = dispatch.start(LAYER, one.hidden_states, one.topk_ids, one.topk_weights)
        started = clock()
        dispatch.finish(pending)
        finished, cpu_then = clock(), thread()
        exchange(one.sizes)
        times["raw"].append(clock() - finished)
        times["raw cpu"].append(thread() - cpu_then)
        times["cpu"].append(cpu_then - cpu)
        times["start"].append(started - began)
        times["finish"].append(finished - started)
        times["layer"].append(finished - began)
    medians = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    for name, pids, seconds in zip(("host cpu", "raw host"), (hosts, raw_hosts), before, strict=True):
        medians[name] = (sum(map(cpu_seconds, pids)) - seconds) / rounds / len(pids) * 1e6
    medians["ratio"] = statistics.median(a / b for a, b in zip(times["layer"], times["raw"], strict=True))
    medians["cpu ratio"] = (medians["cpu"] + HOSTS * medians["host cpu"]) / (
        medians["raw cpu"] + HOSTS * medians["raw host"]
    )
    return medians


def profile(dispatch: ExpertDispatch, tokens: int, hidden: int, rounds: int) -> None:
    """Where this process' time goes, function by function; the profiler makes small functions look large."""
    inputs = [Inputs(tokens, hidden, seed) for seed in range(16)]
    profiler = cProfile.Profile()
    for number in range(rounds):
        one = inputs[number % len(inputs)]
        profiler.enable()
        dispatch.finish(dispatch.start(LAYER, one.hidden_states, one.topk_ids, one.topk_weights))
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, default=1, help="compute threads of this process")
    parser.add_argument("--host-threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.host is not None:
        return serve(arguments.host, arguments.hidden, arguments.host_threads)
    if arguments.raw is not None:
        return serve_raw(*arguments.raw)

    set_threads(arguments.threads, packed=True)
    with (
        torch.inference_mode(),
        dispatching(arguments.hidden, arguments.host_threads) as (dispatch, pids),
        exchanging() as (exchange, raw_pids),
    ):
        if arguments.profile:
            for tokens in arguments.tokens:
                profile(dispatch, tokens, arguments.hidden, arguments.rounds)
            return None
        columns = ("start", "finish", "layer", "raw", "ratio", "cpu", "raw cpu", "host cpu", "raw host", "cpu ratio")
        print(f"{f'T x {arguments.hidden} bf16':>16}" + "".join(f"{name:>10}" for name in columns) + "   us")
        for tokens in arguments.tokens:
            inputs = [Inputs(tokens, arguments.hidden, seed) for seed in range(16)]
            found = measure(dispatch, pids, exchange, raw_pids, inputs, arguments.rounds)
            cells = (f"{found[name]:>10.{2 if 'ratio' in name else 0}f}" for name in columns)
            print(f"{tokens:>16}" + "".join(cells))
    return None


if __name__ == "__main__":
    main()
