"""Does the simulator say what this machine does: `python tests/bench/simulator.py`.

Starts `moray serve tiny-r1` in several shapes, keeps streams running in it, and counts the tokens that come. Beside each it
puts what `cluster/simulation` says of the same shape under the same streams, with constants (`calibration.py`) that come from
the parts alone and from servers of its own, whose runs are not among those compared. All shapes are measured once a round, so
that what the machine does otherwise hits all alike; medians of the rounds are compared. Close everything else.

Prints the constants of published deployments as well, and how they compare (`published.py`), unless `--machine` is given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import yaml

from moray.cluster.assembly import checkpoint_path, compute, host_name, router_name, router_settings
from moray.cluster.placement import next_placement
from moray.cluster.run_state import descendants
from moray.cluster.simulation.calibration import ServedRun, calibrate
from moray.cluster.simulation.cluster import Site
from moray.cluster.simulation.cpu_costs import Calibration, CpuCosts
from moray.cluster.simulation.draws import Wire
from moray.cluster.simulation.engine import Options, simulate
from moray.cluster.simulation.published import DEPLOYMENTS, compare
from moray.cluster.simulation.trace import Closed, Measured
from moray.configs.deployment import Deployment
from moray.model.config import ModelConfig

MODEL = "tiny-r1"
START_S = 240.0
WARM_S = 3.0
TICKS = os.sysconf("SC_CLK_TCK")
SPREAD = 0.25
"""Lengths are drawn evenly from so much below to so much above, or all streams would go on in step."""

SIMULATED_S = 60.0

CROWDED_S = 20.0
CROWDED_PARTS = 8
"""Parts of a core between the values that `crowded` is looked for among."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A server: what its deployment file says beside the model."""

    hosts: int = 2
    routers: int = 1
    min_replicas: int = 1
    token_budget: int = 512

    def deployment(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "experts": {"hosts": self.hosts, "min_replicas": self.min_replicas, "threads": 1},
            "routers": {"replicas": self.routers, "token_budget": self.token_budget, "speculate": "off", "threads": 1},
        }


@dataclass(frozen=True, slots=True)
class Load:
    """Streams: each sends its next request when the last one has ended."""

    streams: int
    prompt: int
    answer: int

    def lengths(self, mean: int) -> tuple[int, ...]:
        return tuple(range(max(1, round(mean * (1 - SPREAD))), max(2, round(mean * (1 + SPREAD)) + 1)))


CALIBRATED: Mapping[Shape, tuple[Load, ...]] = {
    Shape(hosts=1): (Load(1, 40, 100), Load(10, 30, 70)),
    Shape(hosts=2): (
        Load(1, 40, 100),
        Load(2, 40, 100),
        Load(10, 30, 70),
        Load(24, 20, 60),
        Load(6, 20, 6),
        Load(6, 250, 6),
    ),
    Shape(hosts=3): (Load(1, 40, 100), Load(10, 30, 70)),
}

CHECKED: Mapping[Shape, tuple[Load, ...]] = {
    Shape(hosts=1): (Load(1, 24, 120), Load(16, 24, 120)),
    Shape(hosts=2): (Load(4, 24, 120), Load(32, 24, 120), Load(8, 400, 40)),
    Shape(hosts=3, min_replicas=2): (Load(8, 24, 120),),
    Shape(hosts=2, routers=2): (Load(16, 24, 120),),
    Shape(hosts=3, token_budget=64): (Load(12, 200, 60),),
}


# ---- the real thing ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Counts:
    """At one moment: what routers have done, and the CPU seconds of each process by its name."""

    at: float
    steps: int
    generated: int
    prompts: int
    finished: int
    cpu: dict[str, float]


class Server:
    """One `moray serve`."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        self._folder = folder
        config = folder / "deployment.yaml"
        config.write_text(yaml.safe_dump(shape.deployment()))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moray.cluster.cli", "serve", "--config", str(config), "--port", "0"],
            env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
            stdout=subprocess.PIPE,
            text=True,
        )
        timer = threading.Timer(START_S, self._process.kill)
        timer.start()
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if "ready: " in line), "")
        timer.cancel()
        if not line:
            raise RuntimeError(f"moray serve ended with {self._process.wait(10)} before it was ready")
        self.url = line.split("ready: ")[1].split()[0]
        found = re.fullmatch(r"http://([^:/]+):(\d+)/?", self.url)
        assert found is not None, self.url
        self.host, self.port = found[1], int(found[2])

    def end(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(90)

    def counts(self) -> Counts:
        status = httpx.get(f"{self.url}/v1/moray/status", timeout=30.0, trust_env=False).raise_for_status().json()
        names = {process["pid"]: process["role"] for process in status["processes"]}
        cpu: dict[str, float] = {}
        for process in descendants(os.getpid()):
            name = names.get(process.pid, "other")
            cpu[name] = cpu.get(name, 0.0) + _cpu_seconds(process.pid)
        cpu["other"] = cpu.get("other", 0.0) + time.process_time()
        routers = status["routers"]
        return Counts(
            time.monotonic(),
            sum(router["steps"] for router in routers),
            sum(router["generated_tokens"] for router in routers),
            sum(router["prompt_tokens"] for router in routers),
            sum(router["requests_finished"] for router in routers),
            cpu,
        )


@contextmanager
def serving(shape: Shape) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(shape, Path(folder))
        try:
            yield server
        finally:
            server.end()


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


class Streams:
    """A client that costs little: one thread, and it looks at no more of an answer than where it ends."""

    def __init__(self, server: Server, load: Load) -> None:
        self._server, self._load = server, load
        self._choice = random.Random(f"{load}")
        self._number = 0
        self._stopping = False

    async def measured(self, seconds: float) -> tuple[Counts, Counts]:
        """Before and after so many seconds of it."""
        tasks = [asyncio.create_task(self._stream()) for _ in range(self._load.streams)]
        await asyncio.sleep(WARM_S)
        before = await asyncio.to_thread(self._server.counts)
        await asyncio.sleep(seconds)
        after = await asyncio.to_thread(self._server.counts)
        self._stopping = True
        await asyncio.gather(*tasks)
        return before, after

    async def _stream(self) -> None:
        reader, writer = await asyncio.open_connection(self._server.host, self._server.port)
        try:
            while not self._stopping:
                body = self._body()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: moray\r\nContent-Length: {len(body)}\r\n"
                writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60.0)
                if not answer.startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(answer.decode(errors="replace"))
                await asyncio.wait_for(self._end(reader), 120.0)
        finally:
            writer.close()

    @staticmethod
    async def _end(reader: asyncio.StreamReader) -> None:
        end, last = b"\r\n0\r\n\r\n", b""
        while not last.endswith(end):
            data = await reader.read(1 << 16)
            if not data:
                raise RuntimeError("the server has closed the connection")
            last = (last + data)[-len(end) :]

    def _body(self) -> bytes:
        self._number += 1
        length = self._choice.choice(self._load.lengths(self._load.prompt))
        # Begins like no other prompt: pages that an earlier one has left behind are of no use.
        ids = [100 + self._number % 200, 100 + self._number // 200 % 200]
        ids += [100 + self._choice.randrange(200) for _ in range(length - 2)]
        request = {
            "model": MODEL,
            "prompt": ids,
            "max_tokens": self._choice.choice(self._load.lengths(self._load.answer)),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        return json.dumps(request).encode()


def run(server: Server, shape: Shape, load: Load | None, seconds: float) -> ServedRun:
    """What a server does under a load; without one, what it costs to be there."""
    if load is None:
        time.sleep(WARM_S)
        before = server.counts()
        time.sleep(seconds)
        after = server.counts()
        load = Load(0, 0, 0)
    else:
        before, after = asyncio.run(Streams(server, load).measured(seconds))
    cpu = {name: after.cpu[name] - before.cpu.get(name, 0.0) for name in after.cpu}
    return ServedRun(
        seconds=after.at - before.at,
        routers=shape.routers,
        hosts=shape.hosts,
        streams=load.streams,
        prompt=load.prompt,
        answer=load.answer,
        steps=after.steps - before.steps,
        tokens=after.generated - before.generated,
        prompts=after.prompts - before.prompts,
        requests=after.finished - before.finished,
        router_cpu=cpu.get("router", 0.0),
        host_cpu=cpu.get("expert_host", 0.0),
        other_cpu=sum(seconds for name, seconds in cpu.items() if name not in ("router", "expert_host")),
    )


# ---- the simulated one ------------------------------------------------------------------------------------------------


def simulated(shape: Shape, load: Load, calibration: Calibration, seconds: float = SIMULATED_S) -> float:
    """Tokens a second."""
    deployment = Deployment.from_dict(shape.deployment())
    config = ModelConfig.load(checkpoint_path(deployment.model))
    settings = router_settings(deployment, config)
    site = Site(
        config=config,
        table=next_placement(
            config, [host_name(i) for i in range(shape.hosts)], min_replicas=shape.min_replicas, spare_slots=0
        ),
        routers=tuple(router_name(i) for i in range(shape.routers)),
        settings=settings,
        costs=CpuCosts(
            calibration.constants,
            page_size=settings.page_size,
            processes=shape.routers + shape.hosts,
            replicas=shape.min_replicas > 1,
        ),
        wire=Wire.of_moray(config.hidden_size, compute(deployment, gpus=0).dtype),
    )
    trace = Closed(load.streams, Measured(load.lengths(load.prompt)), Measured(load.lengths(load.answer)))
    return simulate(site, trace, Options(seconds, WARM_S)).output_rate


def with_crowded_cores(calibration: Calibration, runs: Sequence[ServedRun]) -> Calibration:
    """With as much of the cores left where processes crowd them as the calibration's own runs tell of.

    Processes that take turns on a core wake and evict each other, and on a virtual machine neighbours do. How much is left is
    what makes the simulation miss the throughput of those runs least; none of those that are compared with it counts.
    """
    measured: dict[tuple[int, Load], list[float]] = {}
    for one in runs:
        load = Load(one.streams, one.prompt, one.answer)
        measured.setdefault((one.hosts, load), []).append(one.tokens / one.seconds)

    def tried(crowded: float) -> Calibration:
        return replace(calibration, constants=replace(calibration.constants, crowded=crowded))

    def missed(crowded: float) -> float:
        return statistics.mean(
            math.log(simulated(Shape(hosts=hosts), load, tried(crowded), CROWDED_S) / statistics.median(rates)) ** 2
            for (hosts, load), rates in measured.items()
        )

    most = round(calibration.constants.cores * CROWDED_PARTS)
    return tried(min((part / CROWDED_PARTS for part in range(most // 2, most + 1)), key=missed))


# ---- side by side -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Row:
    shape: Shape
    load: Load
    runs: list[ServedRun] = field(default_factory=list)
    simulated: float = 0.0

    @property
    def measured(self) -> float:
        return statistics.median(run.tokens / run.seconds for run in self.runs)

    def __str__(self) -> str:
        shape, load = self.shape, self.load
        rates = [run.tokens / run.seconds for run in self.runs]
        return (
            f"{shape.hosts:5} {shape.routers:7} {shape.min_replicas:6} {shape.token_budget:6} {load.streams:7} {load.prompt:6} "
            f"{load.answer:6} {self.measured:9.1f} ({min(rates):.0f} to {max(rates):.0f}) {self.simulated:9.1f} "
            f"{self.simulated / self.measured:6.2f}"
        )


def measured(rounds: int, seconds: float, *, calibrating: bool) -> tuple[list[Row], list[ServedRun], list[ServedRun]]:
    """Every shape under every load, and what is to calibrate by, once a round: the rows, idle runs, and those under load."""
    rows = {(shape, load): Row(shape, load) for shape, loads in CHECKED.items() for load in loads}
    idle: list[ServedRun] = []
    runs: list[ServedRun] = []
    for number in range(1, rounds + 1):
        for shape, loads in CALIBRATED.items() if calibrating else ():
            with serving(shape) as server:
                idle.append(run(server, shape, None, seconds))
                runs += [run(server, shape, load, seconds) for load in loads]
            rates = (f"{one.tokens / one.seconds:.1f}" for one in runs[-len(loads) :])
            print(f"round {number}: calibration with {shape.hosts} hosts:", *rates, "tokens/s", flush=True)
        for shape, loads in CHECKED.items():
            with serving(shape) as server:
                for load in loads:
                    found = run(server, shape, load, seconds)
                    rows[shape, load].runs.append(found)
                    print(f"round {number}: {shape} {load}: {found.tokens / found.seconds:.1f} tokens/s", flush=True)
    return list(rows.values()), idle, runs


def together(runs: Sequence[ServedRun]) -> ServedRun:
    """Runs as one long one."""
    counted = ("seconds", "steps", "tokens", "prompts", "requests", "router_cpu", "host_cpu", "other_cpu")
    return replace(runs[0], **{name: sum(getattr(one, name) for one in runs) for name in counted})


def print_rows(rows: Sequence[Row]) -> None:
    print("\nhosts routers copies budget streams prompt answer  measured (all)       simulated  ratio    [tokens/s]")
    for row in rows:
        print(row)
    errors = [abs(row.simulated / row.measured - 1) for row in rows]
    print(f"{len(rows)} configurations: error {statistics.mean(errors):.1%} on average, {max(errors):.1%} at most")


def print_published() -> list[dict[str, Any]]:
    print("\npublished deployment                    reported  simulated  ratio    [tokens/s of a node]")
    found = []
    for deployment in DEPLOYMENTS:
        comparison = compare(deployment)
        note = f"  not comparable: {deployment.caveat}" if deployment.caveat else ""
        print(
            f"{deployment.name:38} {deployment.reported:9.0f} {comparison.simulated:10.0f} {comparison.ratio:6.2f}{note}"
        )
        found.append({"name": deployment.name, "simulated": comparison.simulated, "ratio": comparison.ratio})
    print("\nconstants of these")
    for assumption in dict.fromkeys(a for deployment in DEPLOYMENTS for a in deployment.assumptions):
        print(f"  {assumption.value:12.5g} {assumption.unit:18} {assumption.name}: {assumption.source}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--calibration", type=Path, help="use this one instead of making one")
    parser.add_argument("--save-calibration", type=Path)
    parser.add_argument("--machine", action="store_true", help="leave published deployments out")
    parser.add_argument("--published", action="store_true", help="leave this machine out")
    parser.add_argument("--out", type=Path, help="write everything there as JSON")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if not options.published:
        rows, idle, runs = measured(options.rounds, options.seconds, calibrating=options.calibration is None)
        if options.calibration is None:
            calibration = calibrate(Deployment.from_dict(Shape().deployment()), together(idle), runs)
            calibration = with_crowded_cores(calibration, runs)
        else:
            calibration = Calibration.load(options.calibration)
        if options.save_calibration is not None:
            calibration.save(options.save_calibration)
        print(f"\nconstants of {calibration.machine}")
        for name, value in asdict(calibration.constants).items():
            print(f"  {name:16} {value:12.4g}")
        print("relative errors of fits:", {name: round(missed, 4) for name, missed in calibration.residuals.items()})
        for row in rows:
            row.simulated = simulated(row.shape, row.load, calibration)
        print_rows(rows)
        result["calibration"] = asdict(calibration)
        result["calibration_runs"] = [asdict(one) for one in (*idle, *runs)]
        result["rows"] = [asdict(row) | {"measured": row.measured} for row in rows]
    if not options.machine:
        result["published"] = print_published()
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
