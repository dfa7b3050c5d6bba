"""The flags of `moray plan`. What it does is imported when it is needed: the flags alone must not wait for torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...configs.deployment import EMBEDDED_MODEL, Deployment
from ...configs.errors import CheckpointError, ConfigError
from ..argument_types import above_zero, at_least_one, zero_or_more
from ..deployment_flags import deployment_with

if TYPE_CHECKING:
    from ...model.config import ModelConfig
    from .nodes import NodeGroup


def add_plan(commands: Any) -> None:
    """Add `plan` to the command's sub-parsers."""
    plan = commands.add_parser(
        "plan",
        help="say whether a model fits on nodes that need not exist yet, and what to expect there",
        description="Computes from a model's config.json, without its weights, what is where, what a step costs, how many "
        "tokens a second to expect, and what is short. Exit status 1 where it does not fit.",
    )
    plan.add_argument("model", metavar="MODEL", help=f"config.json, a directory with one, or {EMBEDDED_MODEL}")
    where = plan.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--nodes", metavar="LIST", help="NODESxGPUSxKIND as in 3x8xL40S, or 2xcpu:512 (GiB); with commas between"
    )
    where.add_argument(
        "--nodes-file", type=Path, metavar="FILE", help="YAML: GPUs, memory, network, disk, price of each group"
    )
    where.add_argument(
        "--from-cluster", nargs="?", const="auto", metavar="ADDRESS", help="the nodes of a running Ray cluster"
    )
    plan.add_argument("--memory", type=above_zero, metavar="GIB", help="each node's own memory")
    plan.add_argument("--network", type=above_zero, metavar="GBIT", help="each node's network, Gbit/s")
    plan.add_argument("--disk", type=above_zero, metavar="GB", help="what each node reads of the checkpoint, GB/s")
    plan.add_argument("--price", type=above_zero, metavar="PRICE", help="of all nodes together, an hour")
    plan.add_argument(
        "--config", type=Path, metavar="FILE", help="deployment file to plan for (see configs/deployments)"
    )
    plan.add_argument(
        "--experts", type=at_least_one, metavar="N", help="expert hosts (default: a GPU each, all that are left)"
    )
    plan.add_argument(
        "--cold", type=at_least_one, metavar="N", help="expert hosts of the cold tier, on nodes without GPUs"
    )
    plan.add_argument(
        "--cold-slots", type=at_least_one, metavar="N", help="experts of each layer that each of them holds"
    )
    plan.add_argument(
        "--skew",
        type=zero_or_more,
        default=0.0,
        metavar="S",
        help="the n-th expert of a layer is asked for as n ** -S, as was measured before (default 0: equally popular)",
    )
    plan.add_argument("--routers", type=at_least_one, metavar="N", help="routers")
    plan.add_argument("--min-replicas", type=at_least_one, metavar="N", help="copies of each expert")
    plan.add_argument("--kv-cache", choices=["auto", "fp8"], help="how KV pages are kept")
    plan.add_argument(
        "--context", type=at_least_one, metavar="TOKENS", help="of one request, prompt and answer (default 8192)"
    )
    plan.add_argument(
        "--cache-tokens", type=at_least_one, metavar="TOKENS", help="KV pages of each router (default: all that fit)"
    )
    plan.add_argument(
        "--batches", type=_numbers, metavar="LIST", help="requests at once to compute a step for, as in 1,32,256"
    )
    plan.add_argument("--json", action="store_true", help="print JSON, with every slot")
    plan.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the memory and a step")
    plan.set_defaults(run=_plan)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(at_least_one(part.strip()) for part in text.split(","))


def _plan(options: argparse.Namespace) -> int:
    import json
    import sys

    from rich.console import Console

    from .picture import draw
    from .plan import DEFAULT_BATCHES, make_plan
    from .report import show

    name, config = read_model(options.model)
    plan = make_plan(
        name,
        config,
        _nodes(options),
        _deployment(options),
        hosts=options.experts,
        context=options.context,
        cache_tokens=options.cache_tokens,
        batches=options.batches or DEFAULT_BATCHES,
        skew=options.skew,
    )
    if options.picture is not None:
        try:
            options.picture.write_text(draw(plan), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--picture {options.picture}: cannot be written ({error})") from error
    if options.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        show(plan, Console(width=None if sys.stdout.isatty() else _WIDTH))
    return 0 if plan.fits else 1


_WIDTH = 200
"""Of tables where nobody can say how wide the screen is."""


def read_model(model: str) -> tuple[str, ModelConfig]:
    """Name and architecture of a model given as a config.json, a directory with one, a URL, or the embedded one's name.

    Raises:
        ConfigError, CheckpointError: there is none, or it is of a model that cannot be served.
    """
    import json

    from ...configs.model_url import ModelUrl, is_model_url
    from ...model.config import ModelConfig
    from ..assembly import checkpoint_path

    if is_model_url(model):
        return ModelUrl.parse(model).name, ModelConfig.load(checkpoint_path(model, parts="metadata"))
    path = Path(model).expanduser()
    if not path.is_file():
        return Path(model).absolute().name, ModelConfig.load(checkpoint_path(model))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds {type(raw).__name__}, not an object")
    return path.stem if path.name != "config.json" else path.absolute().parent.name, ModelConfig.from_dict(
        raw, source=str(path)
    )


def _nodes(options: argparse.Namespace) -> tuple[NodeGroup, ...]:
    from .nodes import load_nodes, parse_nodes, with_figures

    if options.nodes is not None:
        groups = parse_nodes(options.nodes)
    elif options.nodes_file is not None:
        groups = load_nodes(options.nodes_file)
    else:
        from .ray_nodes import read_cluster

        groups = read_cluster(options.from_cluster)
    return with_figures(
        groups, memory_gib=options.memory, network_gbit_s=options.network, disk_gb_s=options.disk, price=options.price
    )


def _deployment(options: argparse.Namespace) -> Deployment:
    flags = {
        "routers.replicas": options.routers,
        "routers.kv_cache": options.kv_cache,
        "experts.min_replicas": options.min_replicas,
        "experts.cold.hosts": options.cold,
        "experts.cold.slots": options.cold_slots,
    }
    return deployment_with(options.config, flags, source="moray plan")
