"""The commands that change a running cluster, or try it out: their flags, and what is wrong with them before anything is asked.

What they do is in `admin.py` and `chaos/`, imported when it is needed: the flags alone must not wait for Ray.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .argument_types import above_zero, at_least_one
from .changes import Wanted

Replicas = tuple[tuple[int, int], int]
"""(model layer, expert), and copies of it."""

_REPLICAS = re.compile(r"(\d+):(\d+)=(\d+)", re.ASCII)


def add_admin_commands(commands: Any) -> None:
    """Add `scale`, `rebalance`, `drain` and `chaos` to the command's sub-parsers."""
    _add_scale(commands)
    _add_rebalance(commands)
    _add_drain(commands)
    _add_chaos(commands)


def _add_scale(commands: Any) -> None:
    scale = commands.add_parser(
        "scale",
        help="change the number of expert hosts, routers or copies of an expert while requests run",
        description="Prints the plan, loads what moves beside what is served, and has routers change over between steps.",
    )
    scale.add_argument("--experts", type=at_least_one, metavar="N", help="expert hosts there should be")
    scale.add_argument(
        "--cold", type=_whole, metavar="N", help="expert hosts there should be in the cold tier, on CPUs"
    )
    scale.add_argument("--routers", type=at_least_one, metavar="N", help="routers there should be")
    scale.add_argument(
        "--replicas",
        type=_replicas,
        nargs="+",
        action="extend",
        default=[],
        metavar="LAYER:EXPERT=N",
        help="copies an expert of a layer should have at least from now on; 0 forgets what was asked before",
    )
    _add_change_options(scale)
    scale.set_defaults(run=_scale, refuse=scale.error)


def _add_rebalance(commands: Any) -> None:
    rebalance = commands.add_parser(
        "rebalance",
        help="move experts for the load that was measured, while requests run",
        description="Moves as few experts as it takes, and none where too little would be won.",
    )
    _add_change_options(rebalance)
    rebalance.set_defaults(run=_rebalance)


def _add_drain(commands: Any) -> None:
    drain = commands.add_parser(
        "drain",
        help="empty and end expert hosts while requests run",
        description="Brings what only these hosts hold to the others, then ends them; none comes in their place.",
    )
    drain.add_argument("hosts", nargs="+", metavar="HOST", help="an expert host's id, as `moray status` shows it")
    _add_change_options(drain)
    drain.set_defaults(run=_drain)


def _add_chaos(commands: Any) -> None:
    chaos = commands.add_parser(
        "chaos",
        help="break a running cluster in every way, under traffic, and judge the answers",
        description="Kills, stops, slows and cuts off processes of a running cluster in an order that the seed determines, "
        "while streams run through it, and compares every token with an undisturbed run. Not for a cluster in use.",
    )
    chaos.add_argument("--seed", type=_whole, default=0, metavar="S", help="determines the faults (default 0)")
    chaos.add_argument("--minutes", type=above_zero, default=1.0, metavar="M", help="for how long (default 1)")
    chaos.add_argument("--url", help="the server (default: the one `moray serve` runs on this machine)")
    chaos.add_argument("--api-key-file", type=Path, metavar="FILE", help="file whose first key to use")
    chaos.add_argument("--address", help="Ray's address (default: that of the `moray serve` on this machine)")
    chaos.add_argument(
        "--faults", type=_names, metavar="LIST", help="only these, with commas between (default: all that can be done)"
    )
    chaos.add_argument("--streams", type=at_least_one, default=16, metavar="N", help="streams at once (default 16)")
    chaos.add_argument("--json", action="store_true", help="print JSON")
    chaos.set_defaults(run=_chaos)


def _add_change_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--address", help="Ray's address (default: that of the `moray serve` on this machine)")
    command.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")
    command.add_argument("--json", action="store_true", help="print JSON")


# ---- values -------------------------------------------------------------------------------------------------------------


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 0")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: must be names with commas between")
    return names


def _replicas(text: str) -> Replicas:
    found = _REPLICAS.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be LAYER:EXPERT=N, as in 3:7=2 for two copies of expert 7 of layer 3; 3:7=0 forgets that"
        )
    layer, expert, copies = (int(part) for part in found.groups())
    return (layer, expert), copies


# ---- commands -----------------------------------------------------------------------------------------------------------


def _scale(options: argparse.Namespace) -> int:
    if options.experts is None and options.cold is None and options.routers is None and not options.replicas:
        options.refuse(
            "what should there be? Give at least one of --experts N, --cold N, --routers N, --replicas LAYER:EXPERT=N"
        )
    return _change(options, Wanted(options.experts, options.routers, _all_replicas(options), cold=options.cold))


def _all_replicas(options: argparse.Namespace) -> dict[tuple[int, int], int]:
    asked: Sequence[Replicas] = options.replicas
    found: dict[tuple[int, int], int] = {}
    for (layer, expert), copies in asked:
        if found.setdefault((layer, expert), copies) != copies:
            options.refuse(
                f"argument --replicas: {layer}:{expert}={found[layer, expert]} and {layer}:{expert}={copies}: give one of them"
            )
    return found


def _rebalance(options: argparse.Namespace) -> int:
    return _change(options, Wanted(rebalance=True))


def _drain(options: argparse.Namespace) -> int:
    return _change(options, Wanted(drain=tuple(dict.fromkeys(options.hosts))))


def _change(options: argparse.Namespace, wanted: Wanted) -> int:
    from .admin import change

    return change(options.address, wanted, dry_run=options.dry_run, as_json=options.json)


def _chaos(options: argparse.Namespace) -> int:
    from .chaos.run import chaos

    return chaos(
        url=options.url,
        address=options.address,
        seed=options.seed,
        minutes=options.minutes,
        faults=options.faults,
        streams=options.streams,
        as_json=options.json,
        key_file=options.api_key_file,
    )
