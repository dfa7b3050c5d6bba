"""The same tokens whatever carries them: one process, two hosts over shared memory, three over gloo."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import moray
from moray import LLM

from .serve_process import KEY, Serve

pytestmark = pytest.mark.ray

TOKENS = 24
MODEL = Path(moray.__file__).parent / "model" / "tiny_r1"


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    shared = [rng.randrange(64, 400) for _ in range(40)]
    return [shared[: 40 * (i % 2)] + [rng.randrange(64, 400) for _ in range(rng.randrange(1, 90))] for i in range(16)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Greedy continuations from one process with one expert host."""
    with LLM("tiny-r1") as llm:
        answers = [llm.generate([p], max_tokens=TOKENS, temperature=0, ignore_eos=True)[0] for p in prompts()]
    return [answer.token_ids for answer in answers]


@pytest.fixture(scope="module")
def local_server(serve_factory: Callable[..., Serve]) -> Iterator[Serve]:
    serve = serve_factory("tiny-r1", "--local", "--experts", "2").wait_ready()
    yield serve
    serve.take_down()


def continuation(client: httpx.Client, prompt: list[int]) -> list[int]:
    body = {
        "model": "tiny-r1",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = client.post("/v1/completions", json=body).raise_for_status().json()
    token_ids: list[int] = answer["choices"][0]["token_ids"]
    return token_ids


def check(serve: Serve, expected: list[list[int]], *, key: str | None = None) -> None:
    with serve.client(key=key) as client:
        alone = [continuation(client, prompt) for prompt in prompts()]
        with ThreadPoolExecutor(len(expected)) as threads:
            together = list(threads.map(lambda prompt: continuation(client, prompt), prompts()))
    assert alone == expected
    assert together == expected


def test_one_process_over_http(local_server: Serve, expected: list[list[int]]) -> None:
    check(local_server, expected)


def test_two_hosts_over_shared_memory(shm_server: Serve, expected: list[list[int]]) -> None:
    check(shm_server, expected)


def test_three_hosts_over_gloo(gloo_server: Serve, expected: list[list[int]]) -> None:
    assert len(gloo_server.status(key=KEY)["processes"]) == 5
    check(gloo_server, expected, key=KEY)


def test_every_process_reads_its_slices_and_nothing_else(shm_server: Serve, gloo_server: Serve) -> None:
    """Sizes are taken from the file itself, by nothing but its published layout."""
    file = MODEL / "model.safetensors"
    with file.open("rb") as opened:
        (header_bytes,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(header_bytes))
    sizes = {name: e["data_offsets"][1] - e["data_offsets"][0] for name, e in header.items() if name != "__metadata__"}
    config = json.loads((MODEL / "config.json").read_text())
    experts, first, mtp = (config[k] for k in ("n_routed_experts", "first_k_dense_replace", "num_hidden_layers"))
    layers = mtp + 1  # by default the MTP layer is served on CPUs, but its copies of embedding and head are not read

    def of_expert(layer: int, expert: int) -> int:
        start = f"model.layers.{layer}.mlp.experts.{expert}."
        return sum(size for name, size in sizes.items() if name.startswith(start))

    for serve, hosts, key in ((shm_server, 2, None), (gloo_server, 3, KEY)):
        read = {p["id"]: (p["data_bytes_read"], p["header_bytes_read"]) for p in serve.status(key=key)["processes"]}
        for host in range(hosts):
            # Host i of n holds every n-th expert, starting one further each layer (`even_placement`).
            held = [
                (layer, e)
                for layer in range(first, layers)
                for e in range((host + layer - first) % hosts, experts, hosts)
            ]
            assert read[f"expert-host-{host}"] == (sum(of_expert(*slot) for slot in held), 8 + header_bytes)
        routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
        copies = sum(sizes[f"model.layers.{mtp}.{name}.weight"] for name in ("embed_tokens", "shared_head.head"))
        assert read["router-0"] == (sum(sizes.values()) - routed - copies, 8 + header_bytes)
