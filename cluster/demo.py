"""`make demo`: start the embedded model on Ray + Serve, ask it one question, show its thinking and the answer."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

import httpx

from ..actors.deadline import Deadline

QUESTION = "Tom has 45 marbles and gives 18 to Ann. How many are left?"
ANSWER = 27

_READY_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if the answer was right."""
    parser = argparse.ArgumentParser(prog="make demo")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    options = parser.parse_args(arguments)
    url = f"http://127.0.0.1:{options.port}"
    print(f"$ moray serve tiny-r1 --experts 2 --port {options.port}", flush=True)
    # A process group of its own: Ctrl-C reaches this process alone, which then stops the server in order.
    server = subprocess.Popen(
        [sys.executable, "-m", "moray.cluster.cli", "serve", "tiny-r1", "--experts", "2", "--port", str(options.port)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    ready = threading.Event()
    speaker = threading.Thread(target=_pass_on, args=(server, ready), daemon=True)
    speaker.start()
    try:
        _wait_until_ready(server, ready)
        right = _ask(url)
        if right and not options.once:
            print(_invitation(url), flush=True)
            server.wait()
        return 0 if right else 1
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)
        speaker.join(1.0)  # for its last line


def _pass_on(server: subprocess.Popen[str], ready: threading.Event) -> None:
    """Show what the server says, and notice when it says that it is ready."""
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if "ready: " in line:
            ready.set()


def _wait_until_ready(server: subprocess.Popen[str], ready: threading.Event) -> None:
    deadline = Deadline.after(_READY_TIMEOUT_S)
    while not ready.wait(0.2):
        if server.poll() is not None:
            sys.exit(f"demo: the server ended with status {server.returncode}")
        if deadline.passed:
            sys.exit(f"demo: the server was not ready after {_READY_TIMEOUT_S:.0f} s")


def _ask(url: str) -> bool:
    body = {"model": "tiny-r1", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120.0, trust_env=False)
    response.raise_for_status()
    message = response.json()["choices"][0]["message"]
    print(f"\nyou:      {QUESTION}\n")
    for line in (message.get("reasoning_content") or "").splitlines():
        print(f"thinking: {line}")
    print(f"\nanswer:   {message['content']}\n", flush=True)
    right = str(ANSWER) in re.findall(r"\d+", message["content"] or "")
    if not right:
        print(f"demo: the answer should have been {ANSWER}", file=sys.stderr)
    return right


def _invitation(url: str) -> str:
    body = '{"model": "tiny-r1", "messages": [{"role": "user", "content": "What is 17 + 25?"}]}'
    return (
        f"The server goes on at {url} until Ctrl-C. Try:\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
    )


def _stop(server: subprocess.Popen[str]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
