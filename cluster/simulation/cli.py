"""The flags of `moray simulate`. What it does is imported when it is needed: the flags alone must not wait for torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...configs.deployment import EMBEDDED_MODEL, Deployment
from ...configs.errors import ConfigError
from ..argument_types import LENGTHS_WRITTEN, above_zero, at_least_one
from ..deployment_flags import deployment_with

if TYPE_CHECKING:
    from ..planning.nodes import NodeGroup
    from ..planning.plan import Plan
    from .costs import CostModel
    from .engine import Progress
    from .failing import Failure
    from .trace import Trace

_DURATION_S = 120.0
"""Long enough for queues to settle at the rates that one would ask about."""

_WIDTH = 200
"""Of tables where nobody can say how wide the screen is."""


def add_simulate(commands: Any) -> None:
    """Add `simulate` to the command's sub-parsers."""
    simulate = commands.add_parser(
        "simulate",
        help="simulate a cluster under load: throughput, latencies, balance, what a failure does",
        description="A discrete-event simulation of a model on nodes that need not exist: requests go through the scheduler, "
        "the placement and the autoscaler of the real thing, over modelled devices and links. The same arguments always give "
        "the same result.",
    )
    simulate.add_argument("model", metavar="MODEL", help=f"config.json, a directory with one, or {EMBEDDED_MODEL}")
    _add_cluster(simulate)
    _add_trace(simulate)
    simulate.add_argument(
        "--duration",
        type=above_zero,
        metavar="SECONDS",
        help=f"of virtual time (default {_DURATION_S:g}; with --trace or --requests until all requests have ended)",
    )
    simulate.add_argument(
        "--warmup", type=above_zero, default=0.0, metavar="SECONDS", help="of these, so many are not measured"
    )
    simulate.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="SECONDS:NAME",
        help="have a process end at that time, as in 60:expert-host-3, with its device (60:router-0:gone), or a node with all "
        "that is on it (60:node0-1); may be repeated",
    )
    simulate.add_argument(
        "--autoscale",
        action="store_true",
        help="let expert hosts and routers come and go, as autoscale in --config says",
    )
    simulate.add_argument("--seed", type=_whole, default=0, metavar="N", help="of everything that is drawn (default 0)")
    simulate.add_argument(
        "--layer-draws",
        type=at_least_one,
        default=4,
        metavar="N",
        help="layers that a step draws; the others are like them",
    )
    simulate.add_argument("--json", action="store_true", help="print JSON, with the whole time line")
    simulate.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the time line")
    simulate.set_defaults(run=_simulate)


def _add_cluster(simulate: argparse.ArgumentParser) -> None:
    where = simulate.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--nodes", metavar="LIST", help="NODESxGPUSxKIND as in 3x8xL40S, or 2xcpu:512 (GiB); with commas between"
    )
    where.add_argument("--nodes-file", type=Path, metavar="FILE", help="YAML, as for `moray plan`")
    simulate.add_argument("--network", type=above_zero, metavar="GBIT", help="each node's network, Gbit/s")
    simulate.add_argument("--disk", type=above_zero, metavar="GB", help="what each node reads of the checkpoint, GB/s")
    simulate.add_argument("--config", type=Path, metavar="FILE", help="deployment file (see configs/deployments)")
    simulate.add_argument(
        "--experts", type=at_least_one, metavar="N", help="expert hosts (default: a GPU each, all that are left)"
    )
    simulate.add_argument("--routers", type=at_least_one, metavar="N", help="routers")
    simulate.add_argument("--min-replicas", type=at_least_one, metavar="N", help="copies of each expert")
    simulate.add_argument(
        "--spare-slots", type=_whole, metavar="N", help="of each host and layer, for copies of hot experts"
    )
    simulate.add_argument("--kv-cache", choices=["auto", "fp8"], help="how KV pages are kept")
    simulate.add_argument("--max-running", type=at_least_one, metavar="N", help="requests in a step of a router")
    simulate.add_argument("--token-budget", type=at_least_one, metavar="N", help="tokens in a step of a router")
    simulate.add_argument(
        "--cache-tokens", type=at_least_one, metavar="TOKENS", help="KV pages of each router (default: all that fit)"
    )
    simulate.add_argument(
        "--cpu-costs", type=Path, metavar="FILE", help="measured costs of one machine, whose cores all processes share"
    )


def _add_trace(simulate: argparse.ArgumentParser) -> None:
    load = simulate.add_mutually_exclusive_group(required=True)
    load.add_argument("--rate", type=above_zero, metavar="R", help="requests a second, at random times")
    load.add_argument("--clients", type=at_least_one, metavar="N", help="clients that send one request after the other")
    load.add_argument(
        "--trace", type=Path, metavar="FILE", help="JSON lines with arrival_s, prompt_tokens and output_tokens each"
    )
    simulate.add_argument(
        "--prompt", default="1024", metavar="TOKENS", help=f"of prompts: {LENGTHS_WRITTEN} (default 1024)"
    )
    simulate.add_argument("--output", default="512", metavar="TOKENS", help="generated, likewise (default 512)")
    simulate.add_argument("--requests", type=at_least_one, metavar="N", help="with --clients: so many in all")
    simulate.add_argument(
        "--prefixes", metavar="COUNTxTOKENS", help="each prompt begins with one of so many texts, as in 4x600"
    )
    simulate.add_argument(
        "--skew", default="uniform", metavar="SHAPE", help="of the experts' load: uniform, zipf:0.8 or lognormal:1.0"
    )
    simulate.add_argument("--drift", type=above_zero, metavar="SECONDS", help="after so long other experts are hot")


def _whole(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else at_least_one(text)


def _simulate(options: argparse.Namespace) -> int:
    import json
    import sys

    from rich.console import Console

    from .cluster import site_from_plan
    from .engine import Options, simulate
    from .picture import draw
    from .report import Simulated, show
    from .skew import parse_skew

    trace = _trace(options)
    chosen = Options(
        duration_s=options.duration or (_DURATION_S if trace.endless else None),
        warmup_s=options.warmup,
        skew=parse_skew(options.skew, drift_s=options.drift),
        blocks=options.layer_draws,
        failures=tuple(parse_failure(text) for text in options.fail),
        seed=options.seed,
    )
    plan = _plan(options)
    costs, assumed = _costs(options, plan)
    site = site_from_plan(plan, costs)
    with _progress(chosen.duration_s, quiet=options.json) as progress:
        result = simulate(site, trace, chosen, progress=progress)
    title = f"{plan.model} on {', '.join(str(group) for group in plan.groups)}"
    simulated = Simulated(title, site, trace, chosen, result, assumed)
    if options.picture is not None:
        try:
            options.picture.write_text(draw(simulated), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--picture {options.picture}: cannot be written ({error})") from error
    if options.json:
        print(json.dumps(simulated.to_dict(), indent=2))
    else:
        show(simulated, Console(width=None if sys.stdout.isatty() else _WIDTH))
    return 0


def _trace(options: argparse.Namespace) -> Trace:
    from .trace import Closed, Poisson, parse_lengths, read_trace

    if options.requests is not None and options.clients is None:
        raise ConfigError("--requests: goes with --clients; a rate is ended by --duration, and a trace by itself")
    if options.trace is not None:
        if options.prefixes is not None:
            raise ConfigError("--prefixes: goes with --rate or --clients; a trace says itself what its prompts share")
        return read_trace(options.trace)
    prompt, output, prefixes = parse_lengths(options.prompt), parse_lengths(options.output), _prefixes(options.prefixes)
    if options.rate is not None:
        return Poisson(options.rate, prompt, output, seed=options.seed, prefixes=prefixes)
    return Closed(options.clients, prompt, output, seed=options.seed, requests=options.requests, prefixes=prefixes)


def _prefixes(text: str | None) -> Any:
    from .trace import Prefixes

    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if found is None:
        raise ConfigError(f"--prefixes {text!r}: must be COUNTxTOKENS, as in 4x600")
    return Prefixes(int(found[1]), int(found[2]))


def parse_failure(text: str) -> Failure:
    """A failure as written on the command line: SECONDS:NAME, or SECONDS:NAME:gone.

    Raises:
        ConfigError: it is not written so.
    """
    from .failing import Failure

    found = re.fullmatch(r"(\d+(?:\.\d+)?):([^:]+)(:gone)?", text, re.ASCII)
    if found is None:
        raise ConfigError(f"--fail {text!r}: must be SECONDS:NAME, as in 60:expert-host-3, perhaps with :gone after it")
    return Failure(float(found[1]), found[2], gone=found[3] is not None)


def _plan(options: argparse.Namespace) -> Plan:
    from ..planning.cli import read_model
    from ..planning.plan import make_plan

    name, config = read_model(options.model)
    return make_plan(
        name,
        config,
        _nodes(options),
        _deployment(options),
        hosts=options.experts,
        cache_tokens=options.cache_tokens,
        batches=(),
    )


def _nodes(options: argparse.Namespace) -> tuple[NodeGroup, ...]:
    from ..planning.nodes import load_nodes, parse_nodes, with_figures

    groups = parse_nodes(options.nodes) if options.nodes is not None else load_nodes(options.nodes_file)
    return with_figures(groups, network_gbit_s=options.network, disk_gb_s=options.disk)


def _deployment(options: argparse.Namespace) -> Deployment:
    scales = None if options.autoscale and options.config else bool(options.autoscale)  # None: as the file says
    flags = {
        "routers.replicas": options.routers,
        "routers.kv_cache": options.kv_cache,
        "routers.speculate": "off",  # it is not simulated
        "routers.max_running": options.max_running,
        "routers.token_budget": options.token_budget,
        "experts.min_replicas": options.min_replicas,
        "experts.spare_slots": options.spare_slots,
        "autoscale.experts.enabled": scales,
        "autoscale.routers.enabled": scales,
    }
    deployment = deployment_with(options.config, flags, source="moray simulate")
    policies = deployment.autoscale
    if options.autoscale and not (policies.experts.enabled or policies.routers.enabled):
        raise ConfigError(f"--autoscale: {options.config} enables neither autoscale.experts nor autoscale.routers")
    return deployment


def _costs(options: argparse.Namespace, plan: Plan) -> tuple[CostModel, tuple[Any, ...]]:
    """What everything costs, and the constants it rests on."""
    from .cpu_costs import Calibration, CpuCosts
    from .gpu_costs import GpuCosts

    if not plan.fits:
        raise ConfigError(
            f"{plan.model} does not fit on these nodes: {'; '.join(plan.problems)}; `moray plan` says what would help"
        )
    if options.cpu_costs is None:
        costs = GpuCosts.from_layout(plan.sizes, plan.layout)
        return costs, costs.assumptions
    if len(plan.groups) > 1 or plan.groups[0].count > 1 or plan.groups[0].gpus:
        raise ConfigError("--cpu-costs: are those of one machine without GPUs: use --nodes 1xcpu")
    calibration = Calibration.load(options.cpu_costs)
    deployment = plan.deployment
    costs_of_cores = CpuCosts(
        calibration.constants,
        page_size=deployment.routers.page_size,
        processes=deployment.routers.replicas + deployment.experts.hosts,
        replicas=deployment.experts.min_replicas > 1,
    )
    return costs_of_cores, calibration.assumptions


@contextmanager
def _progress(duration_s: float | None, *, quiet: bool) -> Iterator[Progress | None]:
    """A bar of virtual time on a terminal, and nothing elsewhere."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if quiet or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("simulated"), BarColumn(), TextColumn("{task.completed:.0f} s"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulated", total=duration_s)
        yield lambda now: bar.update(task, completed=now)
