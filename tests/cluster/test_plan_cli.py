"""`moray plan` as a command: tables, JSON, the picture, and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moray.cluster.planning.cli import add_plan, read_model
from moray.configs.errors import CheckpointError, ConfigError

from .plan_models import R1

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but R1's config.json."""
    path = tmp_path_factory.mktemp("models") / "DeepSeek-R1"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(R1))
    return path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_plan(parser.add_subparsers(required=True))
    options = parser.parse_args(["plan", *map(str, arguments)])
    status: int = options.run(options)
    return status


def test_yes(r1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(r1, "--nodes", "3x8xL40S", "--network", 100, "--memory", 512, "--price", 24) == 0
    told = capsys.readouterr().out
    for expected in (
        "DeepSeek-R1 on 3x8xL40S: fits",
        "671.0B, 36.6B active a token",
        "688.6 GB",
        "70272 bytes of KV a token",
        "KV pages",
        "communication buffers",
        "CUDA context",
        "333728 tokens in the KV pages of each router",
        "23 hosts with 11 to 12 slots a layer, 1 copy of each expert",
        "price of a million",
        "limited by most",
        "taken for granted",
        "of 512 GiB",
    ):
        assert expected in told, expected
    assert "because" not in told


def test_no(r1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(r1 / "config.json", "--nodes", "1x8xH100") == 1
    told = capsys.readouterr().out
    assert "DeepSeek-R1 on 1x8xH100: does not fit" in told
    assert "because: all together: 680.1 GB needed, 650.0 GB usable of 684.2 GB" in told
    assert "smallest change: 8 H20 in place of the 8 GPUs there are (137 GB more)" in told
    assert "or: 2 more H100: 10 in all (171 GB more)" in told
    assert "tokens/s" not in told


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    run(*arguments, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_has_every_slot_and_every_assumption(r1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = as_json(capsys, r1, "--nodes", "17x1xL40S", "--batches", "1,16")
    assert plan["fits"]
    assert plan["bytes"]["on_disk"] == 688_574_839_360
    assert [step["batch"] for step in plan["steps"]] == [1, 16]
    slots = plan["table"]["slots"]
    assert len(slots) == 16
    assert {len(layer) for layers in slots.values() for layer in layers} == {16}
    assert sorted(e for layers in slots.values() for e in layers[0]) == list(range(256))
    assert len(plan["assumptions"]) > 15
    assert plan["devices"][0]["processes"][0]["memory"]["KV pages"] == 333728 * 70272


def test_flags_reach_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deployment.yaml").write_text("model: x\nrouters: {replicas: 3, page_size: 64}\n")
    flags = ["--routers", 2, "--kv-cache", "fp8", "--min-replicas", 2, "--experts", 5, "--context", 512]
    plan = as_json(
        capsys, "tiny-r1", "--nodes", "2x4xL4", "--config", tmp_path / "deployment.yaml", *flags, "--cache-tokens", 6400
    )
    assert plan["fits"], plan["problems"]
    assert plan["placement"]["hosts"] == 5
    assert plan["placement"]["replicas"] == [2, 2]
    assert plan["bytes"]["kv_per_token"] == 5 * (128 + 16 + 64)
    assert (plan["cache_tokens_per_router"], plan["requests_at_once"]) == (6400, 2 * 12)
    assert {process["id"] for device in plan["devices"] for process in device["processes"]} == {
        *(f"expert-host-{index}" for index in range(5)),
        "router-0",
        "router-1",
    }


def test_the_cold_tier_is_told_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["tiny-r1", "--nodes", "2x4xL4,2xcpu:16", "--cold", 2, "--cold-slots", 3, "--batches", "4"]
    assert run(*arguments, "--picture", tmp_path / "plan.svg") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 hosts with 3 slots a layer, for 37.5% of what experts are asked for, with experts equally popular" in told
    plan = as_json(capsys, *arguments, "--skew", "1.0")
    assert (plan["skew"], plan["placement"]["cold_hosts"], plan["placement"]["cold_slots"]) == (1.0, 2, 3)
    assert plan["placement"]["cold_share"] == pytest.approx(0.134, abs=0.001)
    assert as_json(capsys, *arguments, "--skew", "0")["placement"]["cold_share"] == 6 / 16
    with pytest.raises(SystemExit):
        run(*arguments, "--skew", "-1")
    assert "'-1': must be a number of at least 0" in capsys.readouterr().err


def test_the_picture_shows_memory_to_scale(r1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.svg"
    plan = as_json(capsys, r1, "--nodes", "17x1xL40S", "--picture", picture)
    root = ElementTree.fromstring(picture.read_text())
    assert root.tag == f"{SVG}svg"
    width = float(root.attrib["width"])
    bars: dict[str, list[float]] = {}
    for bar in root.iter(f"{SVG}rect"):
        title = bar.find(f"{SVG}title")
        if title is not None and title.text and ": " in title.text:
            bars.setdefault(title.text.split(":")[0], []).append(float(bar.attrib["width"]))
        if "x" in bar.attrib:
            assert 0 <= float(bar.attrib["x"]) <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width
    assert len(bars["CUDA context"]) == 17
    router, host = plan["devices"][0]["processes"][0], plan["devices"][1]["processes"][0]
    (pages,) = bars["KV pages"]
    assert pages / max(bars["weights"]) == pytest.approx(
        router["memory"]["KV pages"] / host["memory"]["weights"], rel=0.01
    )
    assert {"attention and gate", "dispatch", "experts", "combine"} <= bars.keys()
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert any(text and text.startswith("256 requests") for text in texts)


@pytest.mark.parametrize("nodes", ["1x8xH100", "8x8xL40S", "2xcpu"])
def test_there_is_a_picture_of_every_plan(nodes: str, r1: Path, tmp_path: Path) -> None:
    run(r1, "--nodes", nodes, "--picture", tmp_path / "plan.svg", "--batches", "4")
    ElementTree.parse(tmp_path / "plan.svg")


def test_a_model_of_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tiny-r1", "--nodes", "1xcpu:8") == 0
    told = capsys.readouterr().out
    assert "tiny-r1 on 1xcpu: fits" in told
    assert "8.5M, 3.6M active a token" in told


def test_models_that_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        read_model(str(tmp_path / "none"))
    for text, message in (("{", "cannot be read as JSON"), ("[]", "holds list"), ("{}", "architectures")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_model(str(tmp_path / "config.json"))


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--picture"):
        run("tiny-r1", "--nodes", "1xcpu", "--picture", tmp_path / "no" / "where.svg")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--nodes", "1xcpu", "--from-cluster"],
        ["--nodes", "1xcpu", "--routers", "0"],
        ["--nodes", "1xcpu", "--price", "-1"],
        ["--nodes", "1xcpu", "--batches", "1,,2"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("tiny-r1", *arguments)
    assert caught.value.code == 2
