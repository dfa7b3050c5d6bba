"""What `moray bench` does, and what it shows meanwhile."""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...actors.front.settings import load_api_keys
from ...configs.errors import ClusterError, ConfigError
from ..run_state import RunState
from ..simulation.trace import parse_lengths
from .connection import Address
from .load import Extent, Show, Tally
from .picture import draw
from .report import show
from .run import Plan, Watch, run
from .target import Server, probed
from .workload import FIRST_ID, Level, PromptForm, Workload, read_trace

HEARTBEAT_S = 5.0
"""Between two lines where there is no terminal."""

_WIDTH = 200
"""Of tables where nobody can say how wide the screen is."""


def bench(options: argparse.Namespace) -> int:
    """Measure, print, write.

    Returns:
        0; 1 if a load had no request answered.

    Raises:
        MorayError: a flag cannot be used, or a server does not answer at all.
    """
    for path in (options.out, options.picture):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no directory {path.parent}; create it first")
    workload = _workload(options)
    levels = _levels(options, workload)
    extent = Extent(options.requests, options.duration, options.warmup, options.timeout)
    wanted: PromptForm | None = None if options.prompts == "auto" else options.prompts
    form = "text" if options.chat or workload.has_texts else wanted
    servers = tuple(asyncio.run(probed(server, form=form)) for server in _servers(options))
    forms = {server.form for server in servers}
    if len(forms) > 1:
        raise ConfigError("one of the servers takes no token ids as a prompt: ask both alike, with --prompts text")
    plan = Plan(
        servers,
        workload,
        levels,
        rounds=options.rounds or (3 if len(servers) > 1 else 1),
        extent=extent,
        settings={name: str(value) for name, value in vars(options).items() if name != "run" and value is not None},
    )
    with shown(terminal=sys.stderr.isatty()) as watch:
        result = run(plan, watch=watch)
    show(result, Console() if sys.stdout.isatty() else Console(width=_WIDTH))
    if options.out is not None:
        options.out.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        options.picture.write_text(draw(result), encoding="utf-8")
    return 0 if all(part.figures.answered for part in result.parts) else 1


def _servers(options: argparse.Namespace) -> list[Server]:
    url = options.url or _here()
    first = _server(options, url, options.model, options.api_key_file)
    if options.against is None:
        for name in ("against_model", "against_api_key_file"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: there is no second server; name it with --against URL")
        return [replace(first, name="server")]
    second = _server(options, options.against, options.against_model, options.against_api_key_file)
    return [replace(first, name="A"), replace(second, name="B")]


def _server(options: argparse.Namespace, url: str, model: str | None, key_file: Path | None) -> Server:
    return Server(
        name="",
        address=Address.of(url),
        model=model or "",
        key=None if key_file is None else load_api_keys(key_file)[0],
        chat=options.chat,
        temperature=options.temperature,
    )


def _here() -> str:
    alive = [record for record in RunState().records() if record.server.alive]
    if not alive:
        raise ClusterError("no `moray serve` runs on this machine; start one, or name a server with --url")
    if len(alive) > 1:
        print(f"moray: {len(alive)} servers run here; taking the newest, {alive[0].url}", file=sys.stderr)
    return alive[0].url


def _workload(options: argparse.Namespace) -> Workload:
    if options.vocab <= FIRST_ID:
        raise ConfigError(f"--vocab {options.vocab}: must be above {FIRST_ID}, the first id that prompts are made of")
    return Workload(
        prompt=parse_lengths(options.prompt_tokens),
        output=parse_lengths(options.output_tokens),
        trace=None if options.trace is None else read_trace(options.trace),
        shared_prefix=options.shared_prefix,
        vocab_size=options.vocab,
        seed=secrets.randbits(32) if options.seed is None else options.seed,
    )


def _levels(options: argparse.Namespace, workload: Workload) -> tuple[Level, ...]:
    if options.rate is not None:
        return tuple(Level("rate", rate) for rate in options.rate)
    if options.concurrency is None and workload.has_times:
        return (Level("trace", 1.0),)
    return tuple(Level("concurrency", clients) for clients in options.concurrency or [1, 8, 32])


@contextmanager
def shown(*, terminal: bool) -> Iterator[Watch]:
    """Shows how far each part is, on standard error: a bar on a terminal, else a line every `HEARTBEAT_S` seconds."""
    if not terminal:
        yield _heartbeat
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, force_terminal=True), transient=True) as bars:

        def watch(title: str, extent: Extent) -> Show:
            for old in bars.task_ids:
                bars.remove_task(old)
            task = bars.add_task(title, total=extent.duration_s or extent.requests, told="")
            began = time.monotonic()

            def told(tally: Tally) -> None:
                seconds = time.monotonic() - began
                done = seconds if extent.duration_s else tally.answered + tally.failed
                bars.update(task, completed=done, told=_told(tally, seconds))

            return told

        yield watch


def _heartbeat(title: str, extent: Extent) -> Show:  # noqa: ARG001
    began = last = time.monotonic()

    def told(tally: Tally) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= HEARTBEAT_S:
            last = now
            print(f"moray bench: {title}: {_told(tally, now - began)}", file=sys.stderr, flush=True)

    return told


def _told(tally: Tally, seconds: float) -> str:
    failed = f", {tally.failed} failed" if tally.failed else ""
    rate = tally.tokens_so_far / seconds if seconds else 0.0
    return f"{tally.answered} answered{failed}, {len(tally.running)} under way, {rate:.0f} tokens/s, {seconds:.0f} s"
