"""The flags of `moray bench`. What it does is imported when it is needed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..argument_types import LENGTHS_WRITTEN, above_zero, at_least_one, zero_or_more


def add_bench(commands: Any) -> None:
    """Add `moray bench`."""
    bench = commands.add_parser(
        "bench",
        help="measure a server's latency and throughput over HTTP",
        description="Measure a server that speaks OpenAI's API, or two in turn: time to the first token, between tokens, "
        "and throughput, at each of the given loads.",
    )
    bench.add_argument("--url", help="the server (default: the one `moray serve` runs on this machine)")
    bench.add_argument("--model", help="what to ask it for (default: the first it lists)")
    bench.add_argument("--api-key-file", type=Path, metavar="FILE", help="file whose first key to use")
    bench.add_argument("--against", metavar="URL", help="a second server: measured in turn, A B A B; prints ratios")
    bench.add_argument("--against-model", metavar="MODEL", help="what to ask the second one for")
    bench.add_argument("--against-api-key-file", type=Path, metavar="FILE", help="key of the second one")
    bench.add_argument(
        "--rounds", type=at_least_one, help="how often to measure everything (default 1; 3 with --against)"
    )
    load = bench.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        type=_list_of(at_least_one),
        metavar="N,...",
        help="clients that send one request after another",
    )
    load.add_argument("--rate", type=_list_of(above_zero), metavar="R,...", help="requests a second, at random times")
    bench.add_argument(
        "--requests", type=at_least_one, metavar="N", help="of each load (default: 4 for each client, 100)"
    )
    bench.add_argument("--duration", type=above_zero, metavar="SECONDS", help="send nothing new after so long")
    bench.add_argument(
        "--warmup", type=_whole, default=2, metavar="N", help="requests before each load, not counted (default 2)"
    )
    bench.add_argument(
        "--timeout", type=above_zero, default=600.0, metavar="SECONDS", help="for each request (default 600)"
    )
    bench.add_argument("--prompt-tokens", default="128", metavar="TOKENS", help=f"{LENGTHS_WRITTEN} (default 128)")
    bench.add_argument("--output-tokens", default="64", metavar="TOKENS", help="likewise (default 64)")
    bench.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="prompts and lengths from ShareGPT's JSON, or JSON lines with prompt or prompt_tokens, and output_tokens",
    )
    bench.add_argument(
        "--shared-prefix", type=_whole, default=0, metavar="TOKENS", help="all prompts begin with the same so many more"
    )
    bench.add_argument("--chat", action="store_true", help="ask /v1/chat/completions, not /v1/completions")
    bench.add_argument("--prompts", choices=["auto", "ids", "text"], default="auto", help="how to send made-up prompts")
    bench.add_argument(
        "--vocab", type=at_least_one, default=512, metavar="N", help="token ids of prompts are below it (default 512)"
    )
    bench.add_argument("--temperature", type=zero_or_more, default=0.0, help="of the answers (default 0)")
    bench.add_argument(
        "--seed",
        type=_whole,
        help="of prompts, lengths and times (default: another each time, or a server would find the last prompts in its cache)",
    )
    bench.add_argument("--out", type=Path, metavar="FILE.json", help="write everything that was measured")
    bench.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw throughput and latencies")
    bench.set_defaults(run=_bench)


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 0")
    return int(text)


def _list_of(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    return lambda text: [kind(part.strip()) for part in text.split(",")]


def _bench(options: argparse.Namespace) -> int:
    from .command import bench

    return bench(options)
