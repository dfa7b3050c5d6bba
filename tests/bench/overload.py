"""Four times the load that can be sustained, for minutes: `python tests/bench/overload.py --minutes 10`.

Starts `moray serve tiny-r1 --experts 2` and asks it over HTTP, streaming, for answers of one length, in four parts:

unloaded      one stream: what an answer's tokens wait for each other where nobody else is there. Its 99th percentile, times
              `--within`, is what admitted requests are to keep under any load.
(restart)     with `routers.target_itl_s` below that, which is how an operator says so: the router then gives no more answers at
              once, and computes no more of other prompts beside them, than steps have time for. Steps are not all there is
              between two tokens of a client, on these cores they also wait for the front and for this client: `--aim` is the
              part of the bound that steps get. `--aim 0` leaves the target out: what is measured then is throughput first.
sustainable   as many clients as keep the server's queue from running empty, each sending its next request once its last one was
              answered: the requests a second that are answered so are the load that can be sustained. More would wait ever
              longer.
overload      `--times` that rate at random times, whatever becomes of earlier requests, for `--minutes`. Those that are let in
              are answered to the end; the rest get 429, at once where the queue is full or would take longer than
              `routers.max_wait_s`, else after so long in it.

Prints the inter-token latency of the answers beside the unloaded one, what became of all requests, and the resident memory of
each process at the beginning, in the middle and at the end of the overload. Ends with 1 if a request ended in any other way
than with 200 or 429, if the 99th percentile is above the bound, or if memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from moray.cluster.bench.connection import Address
from moray.cluster.bench.figures import Figures, Times, figures
from moray.cluster.bench.load import Extent, measure
from moray.cluster.bench.target import Server, probed
from moray.cluster.bench.workload import Level, Workload
from moray.cluster.run_state import descendants
from moray.cluster.simulation.trace import LogNormal

START_S = 240.0
TIMEOUT_S = 300.0
EVERY_S = 2.0
"""Between looks at memory."""

GROWTH = 1.05
"""Resident memory may grow by so much over the second half of the overload and still count as flat: Python's own arenas fill
unevenly. A leak of one token's text a request would show."""

GROWTH_FLOOR = 8 << 20


class Serving:
    """One `moray serve`."""

    def __init__(self, folder: Path, deployment: dict[str, Any]) -> None:
        folder.mkdir()
        config = folder / "deployment.yaml"
        config.write_text(yaml.safe_dump(deployment))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moray.cluster.cli", "serve", "--config", str(config), "--port", "0"],
            env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def ready(self) -> str:
        """Wait for it; its URL."""
        timer = threading.Timer(START_S, self._process.kill)
        timer.start()
        assert self._process.stdout is not None
        line = next(line for line in self._process.stdout if "ready: " in line)
        timer.cancel()
        print(line.strip(), flush=True)
        return line.split("ready: ")[1].split()[0]

    def end(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(90)


class Memory:
    """Resident bytes of every process below one, by name, as long as it is watched."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.seen: dict[str, list[tuple[float, int]]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    def _watch(self) -> None:
        started = time.monotonic()
        names: dict[int, str] = {}
        while not self._over.wait(EVERY_S):
            for pid in [self._pid, *(process.pid for process in descendants(self._pid))]:
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                    title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue  # it has ended meanwhile
                if "VmRSS" in status:
                    resident = int(status.split("VmRSS:")[1].split()[0]) << 10
                    # A title may say what its process does just now: the first one names it.
                    name = names.setdefault(pid, f"{_name([part.decode(errors='replace') for part in title])} {pid}")
                    self.seen.setdefault(name, []).append((time.monotonic() - started, resident))

    def table(self) -> dict[str, tuple[int, int, int]]:
        """Of each process that was there all the time: medians of the first, the middle and the last tenth."""
        longest = max((len(values) for values in self.seen.values()), default=0)
        found = {}
        for name, values in self.seen.items():
            if len(values) < 0.9 * longest:
                continue
            bytes_ = [resident for _, resident in values]
            tenth = max(1, len(bytes_) // 10)
            middle = len(bytes_) // 2
            parts = bytes_[:tenth], bytes_[middle - tenth // 2 : middle + tenth // 2 + 1], bytes_[-tenth:]
            first, between, last = (int(statistics.median(part)) for part in parts)
            found[name] = (first, between, last)
        return found


def _name(command: list[str]) -> str:
    first = command[0]
    if first.startswith("ray::"):
        return first.removeprefix("ray::")
    script = next((Path(part).name for part in command[1:] if part.endswith(".py")), "")
    return script or Path(first).name


@asynccontextmanager
async def serving(folder: Path, deployment: dict[str, Any]) -> AsyncIterator[tuple[Server, int]]:
    """A server as long as the block takes, and its pid."""
    process = Serving(folder, deployment)
    try:
        url = await asyncio.to_thread(process.ready)
        yield await probed(Server("moray", Address.of(url)), form="ids"), process.pid
    finally:
        await asyncio.to_thread(process.end)


async def run(server: Server, workload: Workload, level: Level, seconds: float, name: str) -> Figures:
    """One part."""
    return figures(await measure(server, workload, level, Extent(None, seconds, 2, TIMEOUT_S), name))


def milliseconds(times: Times) -> str:
    return f"p50 {1e3 * times.p50:6.1f}  p95 {1e3 * times.p95:6.1f}  p99 {1e3 * times.p99:6.1f} ms"


def show(what: str, found: Figures) -> None:
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.outcomes.items()))
    print(
        f"{what:12} {found.requests_per_s:6.2f} req/s  {found.output_per_s:7.1f} tok/s  between tokens "
        f"{milliseconds(found.itl)}  to the first p50 {found.ttft.p50:5.2f} p99 {found.ttft.p99:5.2f} s  {outcomes}",
        flush=True,
    )
    if found.late.p99 > 0.05 or found.client_lag_s > 0.2:
        print(f"  this client was late: p99 {1e3 * found.late.p99:.0f} ms, {1e3 * found.client_lag_s:.0f} ms at most")


async def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All parts, printed as they end."""
    workload = Workload(
        LogNormal(options.prompt, 4 * options.prompt), LogNormal(options.output, 4 * options.output), None, 0, 250, 0
    )
    deployment: dict[str, Any] = {"model": options.model, "experts": {"hosts": options.hosts}}
    routers: dict[str, Any] = json.loads(options.routers)
    parts: dict[str, Figures] = {}
    async with serving(folder / "unloaded", deployment | {"routers": routers}) as (server, _):
        parts["unloaded"] = await run(server, workload, Level("concurrency", 1), options.seconds, "unloaded")
    show("unloaded", parts["unloaded"])
    bound_s = options.within * parts["unloaded"].itl.p99
    if options.aim:
        routers["target_itl_s"] = options.aim * bound_s
        print(f"routers.target_itl_s = {1e3 * routers['target_itl_s']:.1f} ms", flush=True)
    async with serving(folder / "loaded", deployment | {"routers": routers}) as (server, pid):
        level = Level("concurrency", options.clients)
        parts["warming"] = await run(server, workload, level, options.seconds / 2, "warming")
        parts["sustainable"] = await run(server, workload, level, options.seconds, "sustainable")
        show("sustainable", parts["sustainable"])
        rate = options.times * parts["sustainable"].requests_per_s
        memory = Memory(pid)
        with memory.watched():
            parts["overload"] = await run(server, workload, Level("rate", rate), 60 * options.minutes, "overload")
        show("overload", parts["overload"])
        # Where all is over the server must be as it was.
        parts["afterwards"] = await run(server, workload, Level("concurrency", 1), options.seconds / 2, "afterwards")
        show("afterwards", parts["afterwards"])
    return {"parts": parts, "bound_s": bound_s, "rate": rate, "memory": memory.table()}


def verdict(found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    overload: Figures = found["parts"]["overload"]
    problems = [
        f"{count} requests ended with {outcome}: {overload.details.get(outcome, '')}"
        for outcome, count in overload.outcomes.items()
        if outcome not in ("ok", "HTTP 429")
    ]
    if overload.itl.p99 > found["bound_s"]:
        problems.append(
            f"99% of the tokens came within {1e3 * overload.itl.p99:.1f} ms, the bound is {1e3 * found['bound_s']:.1f}"
        )
    for name, (_, middle, last) in found["memory"].items():
        if last > max(GROWTH * middle, middle + GROWTH_FLOOR):
            problems.append(f"{name} grew from {middle >> 20} to {last >> 20} MB in the second half")
    return problems


def main() -> int:
    """Run everything; 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of overload")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part before")
    parser.add_argument("--times", type=float, default=4.0, help="the sustainable rate")
    parser.add_argument("--within", type=float, default=2.0, help="of the unloaded 99th percentile")
    parser.add_argument(
        "--aim", type=float, default=0.6, help="part of that bound which is the router's target; 0: none"
    )
    parser.add_argument("--clients", type=int, default=48, help="that find the sustainable rate")
    parser.add_argument("--prompt", type=int, default=48, help="median tokens of prompts")
    parser.add_argument("--output", type=int, default=48, help="and of answers; 95%% have less than four times as many")
    parser.add_argument("--model", default="tiny-r1")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--routers", default="{}", help="further settings of the deployment's routers, as JSON")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measured(options, Path(folder)))
    unloaded, overload = found["parts"]["unloaded"], found["parts"]["overload"]
    print(
        f"\n{options.minutes:g} minutes at {found['rate']:.1f} requests/s, {options.times:g} times the sustainable load: "
        f"99% of the tokens of admitted requests within {1e3 * overload.itl.p99:.1f} ms, "
        f"{overload.itl.p99 / unloaded.itl.p99:.2f} times the unloaded {1e3 * unloaded.itl.p99:.1f} ms"
    )
    print(f"{'resident MB':40} {'beginning':>10} {'middle':>10} {'end':>10}")
    for name, row in sorted(found["memory"].items(), key=lambda item: -item[1][2]):
        print(f"{name:40} " + " ".join(f"{value / (1 << 20):10.1f}" for value in row))
    totals = [sum(row[i] for row in found["memory"].values()) for i in range(3)]
    print(f"{'all':40} " + " ".join(f"{value / (1 << 20):10.1f}" for value in totals))
    problems = verdict(found)
    for problem in problems:
        print(f"NOT AS IT SHOULD BE: {problem}")
    if options.out is not None:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        parts = {name: asdict(part) for name, part in found["parts"].items()}
        options.out.write_text(json.dumps({"settings": settings, **found, "parts": parts}, indent=2))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
