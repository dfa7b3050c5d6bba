"""`moray bench` against a whole server: tiny-r1, in this process, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moray.cluster.cli import main
from moray.cluster.listening import check_port
from moray.cluster.local_server import LocalServer
from moray.configs.deployment import Deployment


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = check_port("127.0.0.1", 0)
    deployment = Deployment.from_dict(
        {"model": "tiny-r1", "experts": {"hosts": 2}, "front": {"host": "127.0.0.1", "port": port}}
    )
    server = LocalServer(deployment)
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


def bench(url: str, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    out = tmp_path / "found.json"
    assert main(["bench", "--url", url, "--out", str(out), *map(str, arguments)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_every_token_is_counted(url: str, tmp_path: Path) -> None:
    found = bench(
        url, tmp_path, "--concurrency", 3, "--requests", 4, "--prompt-tokens", 20, "--output-tokens", 6, "--warmup", 1
    )
    assert found["servers"][0]["model"] == "tiny-r1"
    assert found["servers"][0]["fields"] == ["ignore_eos", "return_token_ids", "stream_options"]
    (part,) = found["parts"]
    assert part["outcomes"] == {"ok": 4}
    assert (part["output_tokens"], part["prompt_tokens"]) == (24, 80)
    assert (part["short"], part["miscounted"], part["counted_by"]) == (0, 0, {"token_ids": 4})
    assert part["ttft"]["count"] == 4
    assert 0 < part["ttft"]["p50"] <= part["latency"]["longest"] <= part["seconds"]


def test_chat_and_text(url: str, tmp_path: Path) -> None:
    sizes = ("--concurrency", 2, "--requests", 2, "--prompt-tokens", 30, "--output-tokens", 4, "--warmup", 0)
    for arguments in (("--chat",), ("--prompts", "text")):
        found = bench(url, tmp_path, *sizes, *arguments)
        (part,) = found["parts"]
        assert part["outcomes"] == {"ok": 2}
        assert part["output_tokens"] == 8
        assert 40 < part["prompt_tokens"] < 80, "text of about as many tokens, by the server's own count"
        assert 0.5 < found["servers"][0]["characters_per_token"] < 2.5
