"""`moray simulate` as a command: tables, JSON, the picture, and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moray.cluster.cli import main
from moray.cluster.simulation.cli import add_simulate, parse_failure
from moray.cluster.simulation.failing import Failure
from moray.configs.errors import ConfigError

from .simulation_sites import SMALL

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but a config.json."""
    path = tmp_path_factory.mktemp("models") / "small-r1"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SMALL))
    return path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_simulate(parser.add_subparsers(required=True))
    options = parser.parse_args(["simulate", *map(str, arguments)])
    status: int = options.run(options)
    return status


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run(*arguments, "--json") == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


ON_GPUS = ("--nodes", "2x4xL40S", "--network", 100, "--prompt", 64, "--output", 8, "--duration", 2)


def test_tables_and_picture(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "line.svg"
    arguments = (*ON_GPUS, "--rate", 20, "--skew", "zipf:0.8", "--min-replicas", 2, "--fail", "1:expert-host-2")
    assert run(model, *arguments, "--picture", picture) == 0
    told = capsys.readouterr().out
    for expected in (
        "small-r1 on 2x4xL40S",
        "20 requests a second, prompts of 64, answers of 8 tokens; experts zipf 0.8",
        "1 router, 7 expert hosts",
        "to the first token",
        "between tokens",
        "time line",
        "expert-host-2 failed at 1 s",
        "0 requests failed",
        "taken for granted",
        "one way between machines",
        "starting without loading",
    ):
        assert expected in told, expected
    root = ElementTree.fromstring(picture.read_text())
    assert root.tag == f"{SVG}svg"
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert "generated" in titles
    assert any("failed expert-host-2" in title for title in titles)


def test_the_same_command_says_the_same(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--duration", 1, "--clients", 8, "--prefixes", "2x32", "--drift", 1, "--skew", "zipf:1")
    arguments = (model, *ON_GPUS, *load, "--routers", 2)
    first = as_json(capsys, *arguments)
    assert first == as_json(capsys, *arguments)
    assert first != as_json(capsys, *arguments, "--seed", 1)
    assert first["routers"] == 2
    assert first["prefix_hit_tokens"] > 0
    assert first["output_rate"] == first["output_tokens"]
    assert len(first["moments"]) == 100
    assert {entry["source"] for entry in first["assumptions"]}


def test_a_trace_ends_by_itself(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"arrival_s": i / 4, "prompt_tokens": 20 + i, "output_tokens": 1 + i} for i in range(5)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    told = as_json(capsys, model, "--nodes", "2x4xL40S", "--trace", trace)
    assert (told["finished"], told["output_tokens"], told["prompt_tokens"]) == (5, 15, 110)


def test_the_embedded_model_on_a_machine_without_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    told = as_json(
        capsys, "tiny-r1", "--nodes", "1xcpu:8", "--experts", 2, "--clients", 2, "--requests", 4, "--prompt", 20, "--output", 4
    )  # fmt: skip
    assert (told["finished"], told["hosts"], told["output_tokens"]) == (4, 2, 16)


def test_with_autoscale_the_policy_is_that_of_the_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = tmp_path / "deployment.yaml"
    deployment.write_text(
        "autoscale:\n  routers: {enabled: true, max_routers: 2, waiting_per_router: 1, up_after_s: 0.5}\n"
        "routers: {max_running: 2}\nsupervision: {heartbeat_s: 0.25, stuck_after_s: 1}\n"
    )
    arguments = (model, *ON_GPUS, "--clients", 40, "--experts", 4, "--config", deployment, "--output", 400)
    told = as_json(capsys, *arguments, "--autoscale")
    assert [h["what"] for h in told["happenings"]][:1] == ["autoscale"]
    assert "requests wait" in told["happenings"][0]["detail"]
    assert as_json(capsys, *arguments)["happenings"] == []
    deployment.write_text("routers: {max_running: 2}\n")
    with pytest.raises(ConfigError, match="enables neither"):
        run(*arguments, "--autoscale")


def test_failures_as_written() -> None:
    assert parse_failure("60:expert-host-3") == Failure(60.0, "expert-host-3")
    assert parse_failure("1.5:router-0:gone") == Failure(1.5, "router-0", gone=True)
    for wrong in ("60", "x:router-0", "60:router-0:lost", ":router-0"):
        with pytest.raises(ConfigError, match="SECONDS:NAME"):
            parse_failure(wrong)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--rate", 1, "--fail", "1:expert-host-99"), "no such process or node"),
        (("--rate", 1, "--prompt", "long"), "must be tokens: a number"),
        (("--rate", 1, "--skew", "heavy"), "--skew 'heavy'"),
        (("--rate", 1, "--requests", 5), "goes with --clients"),
        (("--rate", 1, "--prefixes", "3"), "COUNTxTOKENS"),
        (("--trace", "/nowhere.jsonl"), "/nowhere.jsonl: cannot be read"),
        (("--rate", 1, "--warmup", 3), "leaves nothing"),
        (("--rate", 1, "--picture", "/nowhere/line.svg"), "--picture /nowhere/line.svg: cannot be written"),
        (("--rate", 1, "--experts", 99), "does not fit on these nodes"),
        (("--rate", 1, "--cpu-costs", "/nowhere.json"), "use --nodes 1xcpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_said(model: Path, arguments: tuple[object, ...], told: str) -> None:
    duration = () if "--trace" in arguments else ("--duration", 2)
    with pytest.raises(ConfigError) as error:
        run(model, "--nodes", "2x4xL40S", *duration, *arguments)
    assert told in str(error.value)


def test_it_is_a_command_of_moray(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["simulate", str(model), "--nodes", "2x4xL40S", "--rate", "1", "--skew", "heavy"])
    assert status == 1
    assert "moray: error: --skew 'heavy'" in capsys.readouterr().err
