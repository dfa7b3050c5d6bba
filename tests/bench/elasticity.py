"""What changes and losses cost streams that run meanwhile: `python tests/bench/elasticity.py`.

Starts `moray serve tiny-r1` with two routers and some copies of each expert, keeps greedy streams running, and has happen to
it, one after the other: hosts added and removed, experts moved, hosts killed and stopped, a router killed, the controller
killed. For each event it prints how long it took, and the longest gap between two tokens of any stream meanwhile, median and
maximum over `--runs`, beside the longest one of as much time without an event. Every stream is compared with what it says
undisturbed. About three minutes a run on two cores; close everything else.

With `--throughput` it measures the tokens a second of all streams instead: with all hosts, with one killed and kept away, and
with all again. What is lost is compared with the host's share of the hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from moray.cluster.chaos.target import View, not_whole
from moray.cluster.chaos.traffic import Question, Traffic, running
from moray.cluster.local import LLM
from moray.cluster.run_state import descendants

TOKENS = 200
START_S = 240.0
WHOLE_S = 180.0
SETTLE_S = 4.0
STOPPED_S = 6.0
"""Longer than a process may be silent before it counts as stuck, shorter than it takes to be replaced."""

ROUTERS = 2


def questions(count: int) -> list[Question]:
    return [
        Question(tuple(100 + (7 * index + i) % 200 for i in range(24 + index)), TOKENS, 0.0, 0)
        for index in range(count)
    ]


def undisturbed(asked: list[Question]) -> dict[Question, list[int]]:
    with LLM("tiny-r1") as llm:
        answers = llm.generate(
            [list(question.prompt) for question in asked], max_tokens=TOKENS, temperature=0.0, ignore_eos=True
        )
    return {question: answer.token_ids for question, answer in zip(asked, answers, strict=True)}


class Server:
    """One `moray serve`, and what is done to it."""

    def __init__(self, folder: Path, deployment: dict[str, Any]) -> None:
        self._environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        config = folder / "deployment.yaml"
        config.write_text(yaml.safe_dump(deployment))
        self._moray = [sys.executable, "-m", "moray.cluster.cli"]
        self._process = subprocess.Popen(
            [*self._moray, "serve", "--config", str(config), "--port", "0"],
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = ""
        self._home: dict[str, int] = {}

    def wait_ready(self) -> None:
        timer = threading.Timer(START_S, self._process.kill)
        timer.start()
        assert self._process.stdout is not None
        line = next(line for line in self._process.stdout if "ready: " in line)
        timer.cancel()
        print(line.strip(), flush=True)
        self.url = line.split("ready: ")[1].split()[0]
        self._home = self.view().counts()

    def end(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(90)

    def view(self) -> View:
        found = httpx.get(f"{self.url}/v1/moray/status", timeout=30.0, trust_env=False).raise_for_status()
        return View.of(found.json())

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=180.0, trust_env=False)

    def pid(self, name: str) -> int:
        return next(p.pid for p in self.view().processes if p.id == name)

    def hosts(self) -> list[str]:
        return sorted(p.id for p in self.view().of_role("expert_host"))

    def command(self, *arguments: str) -> None:
        subprocess.run(
            [*self._moray, *arguments], env=self._environment, check=True, stdout=subprocess.DEVNULL, timeout=WHOLE_S
        )

    def scale(self, hosts: int) -> None:
        self.command("scale", "--experts", str(hosts))
        self._home["expert_host"] = hosts
        self.wait_whole()

    def kill(self, name: str) -> None:
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        self.wait_whole(gone=[pid])

    def stop(self, name: str) -> None:
        pid = self.pid(name)
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(STOPPED_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        self.wait_whole()

    def wait_whole(self, gone: list[int] | None = None) -> None:
        deadline = time.monotonic() + WHOLE_S
        reason = "nothing was asked"
        while time.monotonic() < deadline:
            try:
                reason = not_whole(self.view(), self._home, gone or [])
            except httpx.HTTPError as error:
                reason = repr(error)
            if not reason:
                return
            time.sleep(0.1)
        raise TimeoutError(f"not whole again within {WHOLE_S:.0f} s: {reason}")

    @contextlib.contextmanager
    def without(self, name: str) -> Iterator[None]:
        """One host is killed, and whatever is started in its place is stopped as soon as it is seen, until the end."""
        # Of those that Ray has in store one may become the host that comes next.
        known = {p.pid for p in descendants(self._process.pid) if not title(p.pid).startswith("ray::IDLE")}
        held: set[int] = set()
        over = threading.Event()

        def hold() -> None:
            while not over.wait(0.02):
                for process in descendants(self._process.pid):
                    if process.pid not in known | held and "ray::ExpertHost" in title(process.pid):
                        os.kill(process.pid, signal.SIGSTOP)
                        held.add(process.pid)

        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        victim = self.pid(name)
        os.kill(victim, signal.SIGKILL)
        try:
            yield
        finally:
            over.set()
            holder.join()
            for pid in held:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        self.wait_whole(gone=[victim])


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


class Gaps:
    """For each event the seconds it took, and the longest gaps with it and before it, a value for each run."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self.rows: dict[str, list[dict[str, float]]] = {}

    def measure(self, name: str, event: Callable[[], Any]) -> None:
        started = time.monotonic()
        time.sleep(SETTLE_S)
        calm = self._traffic.longest_gap(started, time.monotonic())
        started = time.monotonic()
        event()
        took = time.monotonic() - started
        time.sleep(SETTLE_S)
        gap = self._traffic.longest_gap(started, time.monotonic())
        self.rows.setdefault(name, []).append({"seconds": took, "gap_ms": 1000 * gap, "calm_ms": 1000 * calm})
        print(f"  {name:34} {took:7.2f} s   longest gap {1000 * gap:6.0f} ms   calm {1000 * calm:5.0f} ms", flush=True)

    def table(self) -> dict[str, dict[str, float]]:
        """Median and maximum of the gaps, medians of the rest, by event."""
        return {
            name: {
                "seconds": statistics.median(row["seconds"] for row in rows),
                "gap_ms_median": statistics.median(row["gap_ms"] for row in rows),
                "gap_ms_max": max(row["gap_ms"] for row in rows),
                "calm_ms_median": statistics.median(row["calm_ms"] for row in rows),
                "runs": len(rows),
            }
            for name, rows in self.rows.items()
        }


def run_events(server: Server, gaps: Gaps, hosts: int) -> None:
    """Every event once; at the end there are as many hosts as at the beginning."""
    up, down = hosts + 3, hosts + 1
    gaps.measure(f"scale {hosts} -> {up} hosts", lambda: server.scale(up))
    gaps.measure(f"scale {up} -> {down} hosts", lambda: server.scale(down))
    for time_of_two in ("rebalance", "rebalance again"):
        gaps.measure(time_of_two, lambda: server.command("rebalance"))
    first, second, *_ = server.hosts()
    gaps.measure("kill -9 a host", lambda: server.kill(second))
    gaps.measure("kill -9 another host", lambda: server.kill(first))
    gaps.measure("SIGSTOP a host", lambda: server.stop(server.hosts()[-1]))
    gaps.measure("kill -9 a router of two", lambda: server.kill("router-0"))
    gaps.measure("kill -9 the controller", lambda: server.kill("controller"))
    gaps.measure(f"scale {down} -> {hosts} hosts", lambda: server.scale(hosts))


def rate(traffic: Traffic, seconds: float) -> float:
    """Tokens a second of all streams from now on."""
    started, tokens = time.monotonic(), traffic.tokens
    time.sleep(seconds)
    return (traffic.tokens - tokens) / (time.monotonic() - started)


def run_throughput(server: Server, traffic: Traffic, seconds: float) -> dict[str, float]:
    """Tokens a second before, during and after the loss of one host."""
    hosts = server.hosts()
    time.sleep(SETTLE_S)
    before = rate(traffic, seconds)
    with server.without(hosts[-1]):
        time.sleep(SETTLE_S)  # that a death costs a gap is measured elsewhere
        during = rate(traffic, seconds)
    time.sleep(SETTLE_S)
    after = rate(traffic, seconds)
    share = 1 / len(hosts)
    # Both sides of the loss, so that what the machine did slower or faster over the run is taken out.
    lost = 1 - during / ((before + after) / 2)
    found = {"before": before, "during": during, "after": after, "lost": lost, "lost_over_share": lost / share}
    print(
        f"  tokens/s {before:7.1f} before, {during:7.1f} with one of {len(hosts)} hosts away, {after:7.1f} after: "
        f"{lost:.1%} lost, {lost / share:.2f} x its share",
        flush=True,
    )
    return found


def measured(options: argparse.Namespace, server: Server, traffic: Traffic) -> dict[str, Any]:
    """All runs, with what sums them up printed."""
    if options.throughput:
        runs = [run_throughput(server, traffic, options.seconds) for _ in range(options.runs)]
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(f"median of {len(runs)}: {medians['lost']:.1%} lost, {medians['lost_over_share']:.2f} x the host's share")
        return {"throughput": medians, "runs": runs}
    gaps = Gaps(traffic)
    for number in range(options.runs):
        print(f"run {number + 1} of {options.runs}", flush=True)
        run_events(server, gaps, options.hosts)
    table = gaps.table()
    print(f"{'event':34} {'seconds':>8} {'gap ms, median':>15} {'maximum':>8} {'calm':>6}")
    for name, row in table.items():
        print(
            f"{name:34} {row['seconds']:8.2f} {row['gap_ms_median']:15.0f} {row['gap_ms_max']:8.0f} "
            f"{row['calm_ms_median']:6.0f}"
        )
    return {"events": table, "runs": gaps.rows}


def main() -> int:
    """Run everything; 1 if a stream was lost or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--hosts", type=int, default=2, help="expert hosts to begin with")
    parser.add_argument("--min-replicas", type=int, default=2)
    parser.add_argument("--standby", type=int, default=0, help="warm processes")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--throughput", action="store_true", help="measure tokens a second around the loss of a host")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement of tokens a second")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    if options.throughput and options.standby:
        parser.error("--throughput keeps a lost host away, and a standby would take its place: leave --standby out")
    answers = undisturbed(questions(options.streams))
    with tempfile.TemporaryDirectory() as folder:
        experts = {
            "hosts": options.hosts,
            "min_replicas": options.min_replicas,
            "standby": options.standby,
            "max_hosts": max(8, options.hosts + 3),
        }
        server = Server(Path(folder), {"model": "tiny-r1", "experts": experts, "routers": {"replicas": ROUTERS}})
        try:
            server.wait_ready()
            traffic = Traffic(server.client, "tiny-r1", answers, streams=options.streams, seed=0, hang_up_share=0.0)
            with running(traffic):
                found = measured(options, server, traffic)
        finally:
            server.end()
    counts = traffic.counts
    wrong = counts["altered"] + counts["lost"] + counts["refused"]
    print(f"{counts['finished']} streams of {TOKENS} tokens; {wrong} lost, refused or different {traffic.failures[:3]}")
    if options.out is not None:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        options.out.write_text(json.dumps({"settings": settings, "requests": counts, **found}, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
