"""The deployment files that ship: Serve takes them, they describe deployments, and `moray plan` says what they say of it."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

import moray
from moray.actors.placement_table import is_cold
from moray.cluster.planning.nodes import load_nodes, parse_nodes, with_figures
from moray.cluster.planning.plan import Plan, make_plan
from moray.configs.deployment import Deployment
from moray.model.config import ModelConfig

from ..cluster.plan_models import R1
from .serve_schema import ServeDeploySchema

FOLDER = Path(moray.__file__).parent / "configs" / "deployments"
SERVE_FILES = sorted(path.stem for path in FOLDER.glob("serve-*.yaml"))
R1_FILES = [name for name in SERVE_FILES if name.startswith("serve-r1-")]


def test_there_is_one_for_each_class_of_machines() -> None:
    assert {
        "serve-tiny-r1",
        "serve-r1-4x8-24gb",
        "serve-r1-3x8-24gb-cold",
        "serve-r1-3x8-48gb",
        "serve-r1-2x8-80gb",
    } <= set(SERVE_FILES)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_describes_a_deployment(path: Path) -> None:
    Deployment.load(path)


@pytest.mark.parametrize("name", SERVE_FILES)
def test_serve_takes_it(name: str) -> None:
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    schema = ServeDeploySchema.model_validate(raw)
    assert schema.proxy_location == "HeadOnly"
    assert raw["http_options"] == {"host": "127.0.0.1", "port": 8000}
    (application,) = raw["applications"]
    assert application["import_path"] == "moray.cluster.serve_app:build"
    assert application["route_prefix"] == "/"
    assert Deployment.from_dict(application["args"]) == Deployment.load(FOLDER / f"{name}.yaml")


def command_in(text: str) -> list[str]:
    """The `moray plan` of a file's comment, as words."""
    lines = text.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("#     moray plan "))
    found = [lines[first].removeprefix("#")]
    while found[-1].endswith("\\"):
        found.append(lines[first + len(found)].removeprefix("#"))
    return shlex.split(" ".join(line.removesuffix("\\") for line in found))


@cache
def planned(name: str) -> tuple[Plan, dict[str, str]]:
    """The plan that the file's comment asks for, and the flags it asks with."""
    words = command_in((FOLDER / f"{name}.yaml").read_text())
    assert words[:3] == ["moray", "plan", "DeepSeek-R1/config.json"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    nodes = flags.get("--nodes-file")
    groups = parse_nodes(flags["--nodes"]) if nodes is None else load_nodes(Path(moray.__file__).parent / nodes)
    plan = make_plan(
        "DeepSeek-R1",
        ModelConfig.from_dict(R1),
        groups if nodes else with_figures(groups, network_gbit_s=float(flags["--network"])),
        Deployment.load(FOLDER / f"{name}.yaml"),
        hosts=int(flags["--experts"]),
        cache_tokens=int(flags["--cache-tokens"]),
        batches=[int(batch) for batch in flags["--batches"].split(",")],
        skew=float(flags.get("--skew", 0)),
    )
    return plan, flags


@pytest.mark.parametrize("name", R1_FILES)
def test_the_plan_is_of_this_file(name: str) -> None:
    deployment, (_, flags) = Deployment.load(FOLDER / f"{name}.yaml"), planned(name)
    assert flags.keys() - {"--skew"} in (
        {"--config", "--nodes", "--network", "--experts", "--cache-tokens", "--batches"},
        {"--config", "--nodes-file", "--experts", "--cache-tokens", "--batches"},
    )
    assert flags["--config"] == f"configs/deployments/{name}.yaml"
    assert int(flags["--experts"]) == deployment.experts.hosts
    assert int(flags["--cache-tokens"]) == deployment.routers.cache_tokens
    assert deployment.max_context is not None
    assert deployment.max_context <= deployment.routers.cache_tokens


@pytest.mark.parametrize("name", R1_FILES)
def test_it_fits(name: str) -> None:
    plan, _ = planned(name)
    assert plan.problems == ()
    assert all(not step.notes for step in plan.steps)


@pytest.mark.parametrize("name", R1_FILES)
def test_its_comment_is_what_the_plan_says(name: str) -> None:
    plan, _ = planned(name)
    assert "".join(f"# {line}\n" for line in said(plan)) in (FOLDER / f"{name}.yaml").read_text()


def said(plan: Plan) -> list[str]:
    """A plan in a few lines."""
    routers = max(device.used for device in plan.layout.routers.values()) / 1e9
    hosts = max(device.used for host, device in plan.layout.hosts.items() if not is_cold(host)) / 1e9
    (card,) = {device.capacity for device in plan.layout.routers.values()}
    assert card is not None
    speeds = [f"{s.tokens_per_user:.1f} each and {s.tokens_in_all:.0f} in all with {s.batch}" for s in plan.steps]
    where = plan.placement
    assert where is not None
    cold = [f"{device.used / 1e9:.1f}" for host, device in plan.layout.hosts.items() if is_cold(host)]
    told = f"    the servers take {' and '.join(cold)} GB, and {where.cold_share:.1%} of what experts are asked for"
    return [
        "It says:",
        f"    a router takes {routers:.1f} GB of a card's {card / 1e9:.1f} GB, the fullest host {hosts:.1f} GB",
        *([told] if cold else []),
        f"    KV pages for {plan.requests_at_once} requests of {plan.context} tokens at once",
        f"    tokens a second: {'; '.join(speeds)}",
    ]
