"""What a token costs on its way from a router's step to the client, without a model: `python tests/bench/front.py`.

A scripted router gives every request one token a step, at a fixed pace, through the real server for fronts; a front in a
process of its own answers real HTTP streams. Printed is CPU time a token, in microseconds, of

    step     the router's step thread: handing a step's outputs over
    router   the rest of the router's process: encoding, sending
    front    the front's process: receiving, detokenising, SSE, HTTP

and the time from a request to its first chunk at an idle server (the router answers at once, so it is the front's share).
CPU time hardly depends on what else the machine does. `--serve` measures the same front behind Ray Serve's proxy, which is
one more process. Two versions are compared by running this file with another `moray` on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import psutil
import uvicorn

from moray.actors.front.app import create_app
from moray.actors.front.served_model import ServedModel
from moray.actors.messages import ClusterStatus, GenerateRequest, RouterStats, TokenOutput
from moray.actors.router import Router
from moray.actors.router_client import ClusterClient
from moray.actors.router_inbox import Sink
from moray.actors.router_server import RouterServer

SECRET = b"only for this benchmark"
CHECKPOINT = Path(__file__).resolve().parents[2] / "model" / "tiny_r1"
PATIENCE_S = 120.0
ANSWER = "Tom has 45 marbles and gives 18 to Ann. How many are left? This is 45 - 18. Compare 45 and 18.\n"


class ScriptedRouter:
    """As much of a router as its server for fronts uses: one token a step for each request, `rate` steps a second."""

    def __init__(self, tokens: list[int], rate: float) -> None:
        self.router_id = "router-0"
        self.closed: str | None = None
        self._tokens = tokens
        self._pause = 1 / rate
        self._wake = threading.Condition()
        self._active: dict[str, tuple[Sink, int, int]] = {}  # id -> where to, tokens given, tokens wanted
        self.spent_s = 0.0
        self.given = 0
        threading.Thread(target=self._steps, daemon=True).start()

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        with self._wake:
            self._active[request.request_id] = (sink, 0, request.sampling.max_tokens)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        with self._wake:
            self._active.pop(request_id, None)

    def stats(self) -> RouterStats:
        return RouterStats(self.router_id)

    def _steps(self) -> None:
        due = time.monotonic()
        while True:
            with self._wake:
                if not self._active:
                    self._wake.wait()
                    due = time.monotonic()
                batches: dict[Sink, list[TokenOutput]] = {}
                for request_id, (sink, given, wanted) in list(self._active.items()):
                    token = self._tokens[given % len(self._tokens)]
                    last = given + 1 == wanted
                    batches.setdefault(sink, []).append(
                        TokenOutput(request_id, [token], None, "length" if last else None)
                    )
                    if last:
                        del self._active[request_id]
                    else:
                        self._active[request_id] = (sink, given + 1, wanted)
            begin = time.thread_time()
            for sink, batch in batches.items():
                sink(batch)
            self.spent_s += time.thread_time() - begin
            self.given += sum(map(len, batches.values()))
            due += self._pause
            if self._active:
                time.sleep(max(0.0, due - time.monotonic()))


def run_router(rate: float) -> None:
    """The router's process: prints its address, then, for each line it reads, what its step thread has spent."""
    tokens = ServedModel.load(CHECKPOINT, name="m").tokenizer.encode(ANSWER, add_special_tokens=False)
    router = ScriptedRouter(tokens, rate)
    server = RouterServer(cast(Router, router), bind_host="127.0.0.1", secret=SECRET)
    print(json.dumps(server.address), flush=True)
    for _ in sys.stdin:
        print(json.dumps([router.spent_s, router.given]), flush=True)


def make_client(address: str, front_id: str) -> ClusterClient:
    """The engine behind the front: one router, no controller."""

    async def directory() -> dict[str, str]:
        return {"router-0": address}

    async def describe() -> ClusterStatus:
        return ClusterStatus("m", 1, "ok", "", [], [])

    return ClusterClient(directory, describe, secret=SECRET, front_id=front_id, restore_timeout_s=10.0)


def run_front(address: str) -> None:
    """The front's process, as `moray serve` has it without Ray: prints its URL and serves until its input ends."""

    async def main() -> None:
        client = make_client(address, "front-0")
        await client.connect()
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(client, ServedModel.load(CHECKPOINT, name="m"))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        threading.Thread(target=end_with_input, args=(server,), daemon=True).start()
        print(json.dumps(f"http://127.0.0.1:{listener.getsockname()[1]}"), flush=True)
        await server.serve(sockets=[listener])
        await client.aclose()

    # The event loop that `uvicorn.run` would take.
    with asyncio.Runner(loop_factory=uvicorn.Config("", loop="auto").get_loop_factory()) as runner:
        runner.run(main())


def end_with_input(server: uvicorn.Server) -> None:
    """Wait for the end of the standard input."""
    sys.stdin.read()
    server.should_exit = True


def run_serve(address: str) -> None:
    """The same front behind Ray Serve's proxy."""
    import ray
    from fastapi import FastAPI
    from ray import serve

    class Front:
        async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
            self._client = make_client(address, "front-0")
            await self._client.connect()

        def __serve_build_asgi_app__(self) -> FastAPI:
            return create_app(self._client, ServedModel.load(CHECKPOINT, name="m"))

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    front = serve.deployment(name="front", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    serve.run(front(serve.ingress()(Front)).bind(), name="bench", route_prefix="/")
    print(json.dumps(f"http://127.0.0.1:{port}"), flush=True)
    sys.stdin.read()
    ray.shutdown()


@contextlib.contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process of this script; it ends when its input does."""
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(PATIENCE_S)


def answer_of(process: subprocess.Popen[str]) -> Any:
    """The next line of a child that is JSON; Ray prints others."""
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(ValueError):
            return json.loads(line)
    raise RuntimeError("the process ended before it answered")


class Streams:
    """HTTP streams over bare sockets: reads and drops what comes."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        assert where.hostname is not None
        assert where.port is not None
        self._address = (where.hostname, where.port)

    def request(self, max_tokens: int) -> bytes:
        body = json.dumps(
            {
                "model": "m",
                "messages": [{"role": "user", "content": "How many are left?"}],
                "max_tokens": max_tokens,
                "stream": True,
                "ignore_eos": True,
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        return head.encode() + body

    def first_chunk_ms(self) -> float:
        """From sending one request to its first chunk with text."""
        with socket.create_connection(self._address, PATIENCE_S) as sock:
            begin = time.perf_counter()
            sock.sendall(self.request(3))
            seen = b""
            while b'"reasoning_content":"' not in seen:
                data = sock.recv(1 << 16)
                assert data, seen
                seen += data
            took = 1e3 * (time.perf_counter() - begin)
            while sock.recv(1 << 16):
                pass
            return took

    def run(self, count: int, max_tokens: int) -> int:
        """All streams at once to their end; events received."""
        events = 0
        with selectors.DefaultSelector() as waiting:
            for _ in range(count):
                sock = socket.create_connection(self._address, PATIENCE_S)
                sock.sendall(self.request(max_tokens))
                waiting.register(sock, selectors.EVENT_READ)
            while waiting.get_map():
                ready = waiting.select(PATIENCE_S)
                assert ready, "the streams stand still"
                for key, _ in ready:
                    sock = cast(socket.socket, key.fileobj)
                    data = sock.recv(1 << 16)
                    events += data.count(b"data: ")
                    if not data:
                        waiting.unregister(sock)
                        sock.close()
        return events


def cpu_s(process: psutil.Process) -> float:
    """CPU time of a process so far, in nanosecond steps where the kernel tells."""
    with contextlib.suppress(OSError):
        total = 0
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9
    times = process.cpu_times()
    return float(times.user + times.system)


def measured(front: subprocess.Popen[str], router: subprocess.Popen[str], arguments: argparse.Namespace) -> None:
    """Run the streams and print the table."""
    url = answer_of(front)
    streams = Streams(url)
    below = [psutil.Process(front.pid), *psutil.Process(front.pid).children(recursive=True)]
    fronts = {name: found for found in below if (name := kind_of(found, front.pid)) is not None}
    streams.run(4, 20)
    firsts = [streams.first_chunk_ms() for _ in range(arguments.firsts)]
    print(f"first chunk   {statistics.median(firsts):8.2f} ms  (median of {len(firsts)}, one at a time)")
    header = ["streams", "step", "router", *fronts, "events/token"]
    print("".join(f"{name:>14}" for name in header) + "   CPU us a token")
    for count in arguments.streams:
        before = spent(fronts, router)
        events = streams.run(count, arguments.steps)
        after = spent(fronts, router)
        given = after["given"] - before["given"]
        row = [1e6 * (after[name] - before[name]) / given for name in after if name != "given"]
        print(f"{count:>14}" + "".join(f"{value:>14.1f}" for value in row) + f"{events / given:>14.2f}", flush=True)


def kind_of(process: psutil.Process, front_pid: int) -> str | None:
    """Column of a process of the front's side; None for those that tokens do not pass."""
    title = " ".join(process.cmdline())
    if "ProxyActor" in title:
        return "proxy"
    if "ServeReplica:bench:front" in title:
        return "front"
    return "front" if process.pid == front_pid and "--serve" not in process.cmdline() else None


def spent(fronts: dict[str, psutil.Process], router: subprocess.Popen[str]) -> dict[str, float]:
    """CPU seconds so far by column, and tokens given."""
    assert router.stdin is not None
    router.stdin.write("\n")
    router.stdin.flush()
    step, given = answer_of(router)
    rest = cpu_s(psutil.Process(router.pid)) - step
    return {"step": step, "router": rest, **{name: cpu_s(found) for name, found in fronts.items()}, "given": given}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--steps", type=int, default=200, help="tokens of each stream")
    parser.add_argument("--rate", type=float, default=50.0, help="steps a second")
    parser.add_argument("--firsts", type=int, default=50, help="requests for the time to the first chunk")
    parser.add_argument("--serve", action="store_true", help="behind Ray Serve's proxy")
    parser.add_argument("--as-router", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--as-front", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_router:
        return run_router(arguments.rate)
    if arguments.as_front is not None:
        return (run_serve if arguments.serve else run_front)(arguments.as_front)
    with child("--as-router", "--rate", str(arguments.rate)) as router:
        address = answer_of(router)
        options = ["--serve"] if arguments.serve else []
        with child("--as-front", address, *options) as front:
            measured(front, router, arguments)
    return None


if __name__ == "__main__":
    main()
