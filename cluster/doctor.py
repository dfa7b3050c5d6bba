"""`moray doctor`: whether this machine, or a cluster, is fit to serve, and what to do where it is not."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.deployment import EMBEDDED_MODEL, Deployment
from ..configs.errors import MorayError
from .argument_types import above_zero

if TYPE_CHECKING:
    from ..model.config import ModelConfig
    from .diagnosis.collect import Wish
    from .diagnosis.examination import Examination

_WIDTH = 120
"""Of tables in a log."""

_LINK_SECONDS = 1.0
"""For each link and direction: TCP is at its pace within a few tenths of a second."""


def add_doctor(commands: Any) -> None:
    """Add `doctor` to the command's sub-parsers."""
    doctor = commands.add_parser(
        "doctor",
        help="check this machine, or a cluster, before serving",
        description="Says what was found and what to do about it, one line each. Exit status 1 if anything must be mended.",
    )
    doctor.add_argument(
        "--address",
        help="check every node of this Ray cluster (`auto`: the one on this machine), and the links between",
    )
    doctor.add_argument("--model", metavar="MODEL", help=f"checkpoint to look for, or {EMBEDDED_MODEL}")
    doctor.add_argument("--config", type=Path, metavar="FILE", help="deployment file whose needs to check")
    doctor.add_argument(
        "--link-seconds",
        type=above_zero,
        default=_LINK_SECONDS,
        metavar="S",
        help=f"how long to load each link, each way (default {_LINK_SECONDS:g})",
    )
    doctor.add_argument(
        "--quick",
        action="store_true",
        help="of links, measure round trips only; else each node takes some four seconds more",
    )
    doctor.add_argument("--kernels", action="store_true", help="list which path each kernel takes on this machine")
    doctor.add_argument("--json", action="store_true", help="print JSON, with all facts")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .diagnosis.kernel_paths import kernel_paths
    from .diagnosis.report import show, show_kernels

    deployment = Deployment.load(options.config) if options.config else None
    model = options.model or (deployment.model if deployment else "")
    if options.address is None:
        examination = examine_here(model, deployment)
    else:
        with _progress(quiet=options.json) as progress:
            examination = examine_ray(
                options.address,
                model,
                deployment,
                link_seconds=0.0 if options.quick else options.link_seconds,
                progress=progress,
            )
    kernels = kernel_paths() if options.kernels or options.address is None else []
    if options.json:
        print(json.dumps(examination.to_dict() | {"kernels": [asdict(path) for path in kernels]}, indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else _WIDTH)
        show(examination, console)
        show_kernels(kernels, console, whole=options.kernels)
    return 1 if examination.failed else 0


def examine_here(model: str, deployment: Deployment | None) -> Examination:
    """Examine this machine; starts nothing.

    Args:
        model: checkpoint to look for; "" for none.
        deployment: whose needs to check; None for none.
    """
    import socket

    from .diagnosis.collect import collect
    from .diagnosis.cpu_checks import check_instructions
    from .diagnosis.deployment_checks import check_deployment
    from .diagnosis.examination import Examination
    from .diagnosis.node_checks import check_node

    facts = collect(_wish(socket.gethostname(), model, deployment))
    findings = check_node(facts) + check_instructions([facts], deployment)
    if deployment is not None:
        findings += check_deployment(deployment, _config(model, deployment), [facts], {})
    return Examination((facts,), tuple(findings))


def examine_ray(
    address: str,
    model: str,
    deployment: Deployment | None,
    *,
    link_seconds: float,
    progress: Callable[[str], None],
) -> Examination:
    """Examine every node of a Ray cluster, and the links between them; see `examine_here`.

    Raises:
        ClusterError: Ray is not there.
    """
    from .diagnosis.cluster_checks import check_access
    from .diagnosis.cpu_checks import check_instructions
    from .diagnosis.deployment_checks import check_deployment
    from .diagnosis.examination import examine_cluster
    from .diagnosis.link_checks import R1_NEEDS, token_needs
    from .diagnosis.ray_probes import ray_probes

    config = _config(model, deployment) if model else None
    with ray_probes(address) as probes:
        examination = examine_cluster(
            probes,
            replace(_wish("", model, deployment), in_ray=True),
            link_seconds=link_seconds,
            needs=R1_NEEDS if config is None else token_needs(Path(model).name, config),
            progress=progress,
        )
    # What has joined the cluster is what the cluster asks for; unset, Ray takes it for `token`.
    findings = [check_access(os.environ.get("RAY_AUTH_MODE", "token"))]
    findings += check_instructions(examination.nodes, deployment)
    if deployment is not None:
        offered = {probe.node: probe.ray for probe in probes}
        findings += check_deployment(deployment, config, examination.nodes, offered)
    return examination.plus(findings)


def _wish(node: str, model: str, deployment: Deployment | None) -> Wish:
    from .diagnosis.collect import Wish

    if deployment is None:
        return Wish(node, model=model)
    return Wish(node, model=model, weights_dir=deployment.weights_dir or "", front_port=deployment.front.port)


def _config(model: str, deployment: Deployment | None) -> ModelConfig | None:
    """Of the model, if it can be read here; whether the nodes can read it, they say themselves.

    Of a URL settings and tokenizer are fetched, some megabytes, as serving would fetch them.
    """
    from ..model.config import ModelConfig
    from ..model.progress import NoProgress
    from .assembly import checkpoint_path

    weights_dir = deployment.weights_dir if deployment else None
    try:
        path = checkpoint_path(model, weights_dir=weights_dir, parts="metadata", progress=NoProgress())
        return ModelConfig.load(path)
    except MorayError:
        return None


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Shows what is being done on a terminal's last line; elsewhere nothing."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status("asking Ray for its nodes") as status:
        yield status.update
