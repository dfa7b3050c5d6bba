"""How long streams stand still while the cluster changes under them: `python tests/bench/elasticity.py`.

Starts `moray serve tiny-r1` with two routers and two copies of each expert, keeps 16 greedy streams running, and prints for
each event the longest gap between two tokens of any stream, beside the longest one of as much time without an event. Every
stream is compared with what it says undisturbed. Two to three minutes on two cores; close everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from moray.cluster.local import LLM

TOKENS = 200
START_S = 180.0
SETTLE_S = 4.0


@dataclass
class Streams:
    """Endless greedy streams, one thread each; `gaps` holds (when it ended, seconds) of every gap between two tokens."""

    url: str
    expected: list[list[int]]
    gaps: list[tuple[float, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    finished: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(len(self.expected))]
        for thread in threads:
            thread.start()
        return threads

    def _run(self, index: int) -> None:
        with httpx.Client(base_url=self.url, timeout=120.0, trust_env=False) as client:
            while not self.stop.is_set():
                try:
                    found = self._stream(client, index)
                except (httpx.HTTPError, RuntimeError) as error:
                    self.wrong.append(f"stream {index}: {error}")
                    return
                self.finished += 1
                if found != self.expected[index]:
                    self.wrong.append(f"stream {index} differs")

    def _stream(self, client: httpx.Client, index: int) -> list[int]:
        body = {
            "model": "tiny-r1",
            "prompt": prompt(index),
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        found: list[int] = []
        last = None
        with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                now = time.monotonic()
                if last is not None:
                    self.gaps.append((now, now - last))
                last = now
                found += event["choices"][0]["token_ids"]
        return found

    def longest(self, since: float) -> float:
        """The longest gap that ended after `since`, in seconds."""
        return max((gap for ended, gap in list(self.gaps) if ended >= since), default=0.0)


def prompt(index: int) -> list[int]:
    return [100 + (7 * index + i) % 200 for i in range(24 + index)]


def measured(streams: Streams, name: str, event: Callable[[], Any]) -> None:
    started = time.monotonic()
    time.sleep(SETTLE_S)
    calm, started = streams.longest(started), time.monotonic()
    event()
    took = time.monotonic() - started
    time.sleep(SETTLE_S)
    longest = 1000 * streams.longest(started)
    print(f"{name:34} {took:7.2f} s   longest gap {longest:6.0f} ms   calm {1000 * calm:5.0f} ms", flush=True)


def main() -> int:
    """Run every event once; 1 if a stream was lost or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--min-replicas", type=int, default=2)
    options = parser.parse_args()
    with LLM("tiny-r1") as llm:
        prompts = [prompt(index) for index in range(options.streams)]
        answers = llm.generate(prompts, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_RUNTIME_DIR": folder}
        config = Path(folder) / "deployment.yaml"
        experts = {"hosts": max(2, options.min_replicas), "min_replicas": options.min_replicas}
        config.write_text(yaml.safe_dump({"model": "tiny-r1", "experts": experts, "routers": {"replicas": 2}}))
        moray = [sys.executable, "-m", "moray.cluster.cli"]
        server = subprocess.Popen(
            [*moray, "serve", "--config", str(config), "--port", "0"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            return run(server, moray, environment, [answer.token_ids for answer in answers], options.min_replicas)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def run(
    server: subprocess.Popen[str],
    moray: list[str],
    environment: dict[str, str],
    expected: list[list[int]],
    replicas: int,
) -> int:
    assert server.stdout is not None
    line = next(line for line in server.stdout if "ready: " in line)
    url = line.split("ready: ")[1].split()[0]
    print(line.strip(), flush=True)

    def status() -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{url}/v1/moray/status", timeout=30.0, trust_env=False).json()
        return found

    def scale(hosts: int) -> None:
        subprocess.run(
            [*moray, "scale", "--experts", str(hosts)], env=environment, check=True, stdout=subprocess.DEVNULL
        )

    def kill(name: str, number: signal.Signals) -> None:
        before = next(p["pid"] for p in status()["processes"] if p["id"] == name)
        os.kill(before, number)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            found = status()
            pids = {p["id"]: p["pid"] for p in found["processes"] if p["state"] == "ready"}
            if found["health"] == "ok" and pids.get(name) not in (None, before):
                return
            time.sleep(0.1)
        raise TimeoutError(f"{name} was not restored within {START_S:.0f} s")

    streams = Streams(url, expected)
    threads = streams.start()
    try:
        measured(streams, f"scale {max(2, replicas)} -> 5 hosts", lambda: scale(5))
        measured(streams, "scale 5 -> 3 hosts", lambda: scale(3))
        measured(streams, f"kill -9 a host, {replicas} copies", lambda: kill("expert-host-1", signal.SIGKILL))
        measured(streams, "kill -9 a router of two", lambda: kill("router-0", signal.SIGKILL))
    finally:
        streams.stop.set()
        for thread in threads:
            thread.join(120)
    print(f"{streams.finished} streams of {TOKENS} tokens; {len(streams.wrong)} lost or different {streams.wrong[:3]}")
    return 1 if streams.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
