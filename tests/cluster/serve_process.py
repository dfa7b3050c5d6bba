"""`moray serve` as a process of a test: started as a user starts it, watched, and always taken down again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from moray.cluster.run_state import ProcessId, descendants, end_processes

START_S = 240.0
"""A start takes ten seconds on two idle cores; tests of a loaded machine must not fail for that."""

END_S = 90.0

KEY = "sk-test-0123456789"
"""The key of servers that ask for one."""


def eventually(check: Callable[[], Any], what: str, *, within_s: float = 60.0) -> Any:
    """Ask until the answer is true, and return it; fails with `what` when the time is up."""
    deadline = time.monotonic() + within_s
    while not (found := check()):
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.05)
    return found


def stream_ids(client: httpx.Client, prompt: list[int], tokens: int, started: list[int]) -> list[int]:
    """The `tokens` tokens of one greedy stream, which are also put into `started` as they come."""
    body = {
        "model": "tiny-r1",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                started += event["choices"][0]["token_ids"]
    return started


class Serve:
    """One `moray serve` process."""

    def __init__(self, folder: Path, arguments: list[str], *, runtime: Path | None = None) -> None:
        self.folder = folder
        self.runtime = runtime or folder / "runtime"
        self.runtime.mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(self.runtime)}
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moray.cluster.cli", "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environment,
            )
        self.seen: set[ProcessId] = set()

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    @property
    def url(self) -> str:
        found = re.search(r"^moray: ready: (\S+)", self.stdout, re.MULTILINE)
        assert found, self.stdout
        return found[1]

    def processes(self) -> set[ProcessId]:
        """Every process seen below this one so far."""
        self.seen |= set(descendants(self.process.pid))
        return self.seen

    def wait_ready(self) -> Serve:
        def ready() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.stdout}{self.stderr}"
            return "moray: ready: " in self.stdout

        eventually(ready, f"moray serve is ready; it said: {self.stdout}", within_s=START_S)
        self.processes()
        return self

    def client(self, *, timeout_s: float = 120.0, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, timeout=timeout_s, headers=headers, trust_env=False)

    def status(self, *, key: str | None = None) -> Any:
        with self.client(key=key) as client:
            return client.get("/v1/moray/status").raise_for_status().json()

    def end(self, *signals: signal.Signals) -> int:
        """Send signals one after the other and wait; the exit status."""
        self.processes()
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(END_S)

    def leftovers(self) -> list[ProcessId]:
        return [process for process in self.seen if process.alive]

    def records(self) -> list[Path]:
        return list(self.runtime.glob("moray/*"))

    def take_down(self) -> None:
        """End it whatever state it is in, so that no test leaves a process to the next one."""
        if self.process.poll() is None:
            self.processes()
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        end_processes(self.seen)
