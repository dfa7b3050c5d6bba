"""What reading a stream costs the client of `moray bench`, beside httpx and aiohttp.

    python tests/bench/http_client.py [--events 20000] [--streams 32] [--rate 5000] [--rounds 5]

Another process sends events as a server's steps do: one to each stream, then a pause, so that each is a read of its own. CPU
time is what is compared, not the clock: on a machine with few cores the other process is what is slow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import aiohttp
import httpx

from moray.cluster.bench.connection import Address
from moray.cluster.bench.load import Extent, measure
from moray.cluster.bench.target import Server
from moray.cluster.bench.workload import Level, Workload
from moray.cluster.simulation.trace import Fixed


def event(number: int) -> bytes:
    """One token's message, as Moray's front writes it."""
    choice = {"index": 0, "text": " so", "logprobs": None, "finish_reason": None, "token_ids": [number % 500]}
    frame = {"id": f"cmpl-{'0' * 32}", "object": "text_completion", "created": 1700000000, "model": "tiny-r1"}
    return f"data: {json.dumps({**frame, 'choices': [choice], 'usage': None})}\n\n".encode()


async def serve(events: int, pause_s: float) -> None:
    """The other process: answer every request with so many events, a pause between each two."""
    chunks = [b"%x\r\n%s\r\n" % (len(event(n)), event(n)) for n in range(500)]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    done = b"data: [DONE]\n\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in asked.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                writer.write(head)
                for number in range(events):
                    writer.write(chunks[number % len(chunks)])
                    await asyncio.sleep(pause_s)
                writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(done), done))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def with_bench(url: str, streams: int) -> int:
    """As `moray bench` reads it."""
    server = Server("dummy", Address.of(url), "m")
    workload = Workload(Fixed(1), Fixed(1), None, 0, 500, 0)
    extent = Extent(streams, None, 0, 120.0)
    found = await measure(server, workload, Level("concurrency", streams), extent, "one")
    assert all(answer.ok for answer in found.answers), found.answers[0]
    return sum(answer.output_tokens for answer in found.answers)


async def with_httpx(url: str, streams: int) -> int:
    """As a plain client of httpx reads it."""
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120.0, trust_env=False) as client:

        async def one() -> int:
            tokens = 0
            async with client.stream("POST", "/v1/completions", json={}) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        tokens += len(json.loads(line[6:])["choices"][0]["token_ids"])
            return tokens

        return sum(await asyncio.gather(*(one() for _ in range(streams))))


async def with_aiohttp(url: str, streams: int) -> int:
    """As a plain client of aiohttp reads it."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=streams)) as session:

        async def one() -> int:
            tokens = 0
            async with session.post(f"{url}/v1/completions", json={}) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        tokens += len(json.loads(line[6:])["choices"][0]["token_ids"])
            return tokens

        return sum(await asyncio.gather(*(one() for _ in range(streams))))


WAYS: dict[str, Callable[[str, int], Awaitable[int]]] = {
    "moray bench": with_bench,
    "aiohttp": with_aiohttp,
    "httpx": with_httpx,
}


def main() -> None:
    """Print CPU time for each event, and how many a core could take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20000, help="in all")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=5000, help="events a second, over all streams")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        return asyncio.run(serve(options.serve, options.streams / options.rate))
    each = options.events // options.streams
    command = [sys.executable, __file__, "--serve", str(each)]
    command += ["--streams", str(options.streams), "--rate", str(options.rate)]
    costs: dict[str, list[float]] = {name: [] for name in WAYS}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            for _ in range(options.rounds):
                for name, way in WAYS.items():

                    async def timed(way: Callable[[str, int], Awaitable[int]] = way) -> float:
                        began = time.process_time()
                        tokens = await way(url, options.streams)
                        assert tokens == each * options.streams, (tokens, each * options.streams)
                        return (time.process_time() - began) / tokens

                    costs[name].append(asyncio.run(timed()))
        finally:
            server.terminate()
    print(f"{'':>12}{'us an event':>14}{'events/s a core':>18}   median of {options.rounds}, {options.streams} streams")
    for name, seconds in costs.items():
        middle = statistics.median(seconds)
        print(f"{name:>12}{middle * 1e6:>14.1f}{1 / middle:>18.0f}")
    return None


if __name__ == "__main__":
    main()
