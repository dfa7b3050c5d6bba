"""`moray bench` as a command: tables, JSON, picture, two servers in turn, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moray.cluster.bench.command import shown
from moray.cluster.bench.load import Extent, Tally
from moray.cluster.bench.run import SCHEMA
from moray.cluster.cli import main

from .scripted_server import DONE, Reply, ScriptedServer, message, obedient, refusal, usage

SVG = "{http://www.w3.org/2000/svg}"
SMALL = ("--prompt-tokens", "3-6", "--output-tokens", 4, "--requests", 5, "--seed", 3)


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)])


def test_tables_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "found.json", tmp_path / "found.svg"
    with ScriptedServer(model="r1") as server:
        given = ("--url", server.url, *SMALL, "--concurrency", "1,3", "--out", out, "--picture", picture)
        assert bench(*given, "--shared-prefix", 2) == 0
    told = capsys.readouterr().out
    for expected in (f"r1 at {server.url}", "1 stream ", "3 streams", "tok/s", "p50 / p95 / p99", "seed 3"):
        assert expected in told
    found = json.loads(out.read_text())
    assert found["schema"] == SCHEMA
    assert found["settings"]["prompt_tokens"] == "3-6"
    assert found["workload"]["seed"] == 3
    assert found["workload"]["shared_prefix"] == 2
    assert found["servers"][0]["fields"] == ["ignore_eos", "return_token_ids", "stream_options"]
    assert [part["level"]["value"] for part in found["parts"]] == [1, 3]
    for part in found["parts"]:
        assert part["outcomes"] == {"ok": 5}
        assert part["output_tokens"] == 20
        assert [answer["output_tokens"] for answer in part["answers"]] == [4] * 5
        assert part["ttft"]["count"] == 5
        assert part["itl"]["count"] <= 15
    root = ElementTree.fromstring(picture.read_text())
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert any(title.startswith("server, 3 streams: ") for title in titles)
    assert "server, 1 stream" in titles


def test_two_servers_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def noting(name: str) -> Any:
        def reply(body: dict[str, Any]) -> Reply:
            order.append(name)
            return obedient(body)

        return reply

    out, picture = tmp_path / "found.json", tmp_path / "found.svg"
    with ScriptedServer(noting("A"), model="ours") as first, ScriptedServer(noting("B"), model="theirs") as second:
        order.clear()
        load = ("--concurrency", 2, "--rounds", 2, "--warmup", 1, "--out", out, "--picture", picture)
        assert bench("--url", first.url, "--against", second.url, *SMALL, *load) == 0
        asked = [[body["prompt"] for body in server.asked if body["max_tokens"] == 4] for server in (first, second)]
    runs = [(name, len(list(group))) for name, group in itertools.groupby(order)]
    assert runs == [("A", 1), ("B", 1), ("A", 6), ("B", 6), ("A", 6), ("B", 6)], "probes, then A B A B"
    assert sorted(asked[0]) == sorted(asked[1]), "both are asked the same"
    told = capsys.readouterr().out
    assert "A over B" in told
    assert "2 streams, round 2" in told
    found = json.loads(out.read_text())
    assert [(part["server"], part["round"]) for part in found["parts"]] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    (ratios,) = found["ratios"]
    assert ratios["output tokens/s"]["rounds"] == 2
    assert ratios["output tokens/s"]["least"] <= ratios["output tokens/s"]["median"]
    assert "B, 2 streams" in picture.read_text()


def test_what_a_server_had_in_its_cache(capsys: pytest.CaptureFixture[str]) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return Reply([message("x", [7], "stop"), usage(len(body["prompt"]), 1, cached=2), DONE])

    with ScriptedServer(reply) as server:
        assert bench("--url", server.url, "--prompt-tokens", 6, "--requests", 5, "--concurrency", 1) == 0
    told = capsys.readouterr().out
    assert "1 stream: 10 of 30 prompt tokens came from the server's cache" in told
    assert "5 answers are shorter than was asked for" in told


def test_a_server_against_itself_is_asked_nothing_twice() -> None:
    with ScriptedServer() as server:
        assert bench("--url", server.url, "--against", server.url + "/v1", *SMALL, "--concurrency", 1) == 0
        prompts = [tuple(body["prompt"]) for body in server.asked if body["max_tokens"] == 4]
    assert len(set(prompts)) == len(prompts) == 2 * 3 * (5 + 2)


def test_a_rate_and_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    line = {"arrival_s": 0.01, "prompt_tokens": 7, "output_tokens": 3}
    trace.write_text("\n".join([json.dumps(line)] * 3))
    with ScriptedServer() as server:
        assert bench("--url", server.url, "--model", "x", *SMALL, "--rate", "500,900") == 0
        told = capsys.readouterr().out
        assert "500 requests/s" in told
        assert "900 requests/s" in told
        assert all(body["model"] == "x" for body in server.asked)
        server.asked.clear()
        assert bench("--url", server.url, "--trace", trace, "--warmup", 0) == 0
        assert "the trace's times" in capsys.readouterr().out
        assert [len(body["prompt"]) for body in server.asked[1:]] == [7, 7, 7]


def test_what_went_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    replies = itertools.count()

    def reply(body: dict[str, Any]) -> Reply:
        return refusal(429, "the queue is full") if next(replies) > 2 else obedient(body)

    with ScriptedServer(reply) as server:
        assert bench("--url", server.url, *SMALL, "--concurrency", 1, "--warmup", 0) == 0
        assert "3 of 5 requests: HTTP 429 (the queue is full)" in capsys.readouterr().out.replace("\n", " ")
        assert bench("--url", server.url, *SMALL, "--concurrency", 1, "--warmup", 0) == 1, "not even a plain request"
        assert "does not answer a plain request: HTTP 429: the queue is full" in capsys.readouterr().err


def test_no_answer_at_all_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    replies = itertools.count()
    with ScriptedServer(lambda body: refusal(500, "bug") if next(replies) else obedient(body)) as server:
        assert bench("--url", server.url, *SMALL, "--concurrency", 1, "--warmup", 0) == 1
    assert "5 of 5 requests: HTTP 500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--url", "nowhere"), "is no server's URL"),
        (("--prompt-tokens", "many"), "must be tokens"),
        (("--vocab", 100), "must be above 100"),
        (("--trace", "/nowhere"), "cannot be read"),
        (("--out", "/nowhere/x.json"), "no directory /nowhere"),
        (("--against-model", "x"), "name it with --against"),
    ],
)
def test_flags_that_cannot_be_used(
    arguments: tuple[object, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--url", "http://127.0.0.1:9", *arguments) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("--concurrency", "1,0"), ("--rate", "x"), ("--seed", "-1"), ("--rate", "1", "--concurrency", "1")]
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        bench(*arguments)


def test_two_servers_are_asked_alike(capsys: pytest.CaptureFixture[str]) -> None:
    def no_ids(body: dict[str, Any]) -> Reply:
        return refusal(400, "no ids") if isinstance(body["prompt"], list) else obedient(body)

    with ScriptedServer() as first, ScriptedServer(no_ids) as second:
        assert bench("--url", first.url, "--against", second.url, *SMALL) == 1
        assert "--prompts text" in capsys.readouterr().err


def test_progress_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.cluster.bench.command.HEARTBEAT_S", 0.0)
    with shown(terminal=False) as watch:
        watch("8 streams", Extent(10, None, 0, 1.0))(Tally(answered=3, failed=1, tokens=0.0))
    assert capsys.readouterr().err == "moray bench: 8 streams: 3 answered, 1 failed, 0 under way, 0 tokens/s, 0 s\n"


@pytest.mark.parametrize("extent", [Extent(10, None, 0, 1.0), Extent(None, 5.0, 0, 1.0)])
def test_progress_on_a_terminal(extent: Extent, capsys: pytest.CaptureFixture[str]) -> None:
    with shown(terminal=True) as watch:
        watch("8 streams", extent)(Tally(answered=3))
        watch("9 streams", extent)(Tally(answered=10))
    assert "9 streams" in capsys.readouterr().err
