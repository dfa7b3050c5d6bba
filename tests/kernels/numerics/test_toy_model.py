"""A whole model through the Triton kernels: router, inline links and expert hosts, FP8 weights as they are stored.

The reference is the same arithmetic (W8A8, the same KV pages) through the CPU path of every kernel, in the same process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moray.actors.messages import GenerateRequest
from moray.actors.testing import SETTINGS, EngineParts, random_prompt, run
from moray.kernels import interpreter, launch
from moray.model.compute import Compute
from moray.model.sampling import SamplingParams
from moray.model.testing import WeightDtype, write_random_checkpoint

TOKENS = 3
TOY = replace(SETTINGS, page_size=16, pages=16)
CPU = torch.device("cpu")


def requests(parts: EngineParts) -> list[GenerateRequest]:
    """A greedy prompt of more than a page, and a sampled one of less."""
    greedy = SamplingParams(TOKENS, temperature=0.0)
    sampled = SamplingParams(TOKENS, temperature=0.8, top_k=40, top_p=0.95, seed=7)
    lengths = ((21, greedy), (5, sampled))
    return [
        GenerateRequest(f"request-{length}", random_prompt(parts.config, length, length), sampling)
        for length, sampling in lengths
    ]


@contextlib.contextmanager
def engine_parts(checkpoint: Path, compute: Compute) -> Iterator[EngineParts]:
    with contextlib.closing(EngineParts(checkpoint, compute=compute)) as parts:
        yield parts


def tokens(parts: EngineParts, hosts: int, *, together: bool) -> dict[str, list[int]]:
    router = parts.engine(hosts, settings=TOY)
    wanted = requests(parts)
    found: dict[str, list[int]] = {}
    for group in [wanted] if together else [[request] for request in wanted]:
        recorder = run(router, group)
        found |= {request.request_id: recorder.tokens(request.request_id) for request in group}
    assert all(len(ids) == TOKENS for ids in found.values())
    return found


@pytest.mark.parametrize(
    ("stored", "fp8_kv"), [("fp8", False), ("fp8", True), ("bfloat16", False)], ids=["fp8", "fp8-pages-fp8", "bf16"]
)
def test_token_for_token(stored: WeightDtype, fp8_kv: bool, device: torch.device, tmp_path: Path) -> None:
    """Activations in fp32: in bf16 the paths round apart, and a random model has near-ties that show it."""
    checkpoint = write_random_checkpoint(tmp_path / "toy", {"num_hidden_layers": 2}, dtype=stored, seed=11)
    reference = Compute(CPU, torch.float32, keep_fp8=True, fp8_kv=fp8_kv)
    launch.interpreted_architecture = None  # the CPU path of every kernel, until further notice
    with engine_parts(checkpoint, reference) as parts:
        expected = tokens(parts, 1, together=False)
    if device.type == "cpu":
        interpreter.install()
    with engine_parts(checkpoint, replace(reference, device=device)) as parts:
        assert tokens(parts, 2, together=True) == expected
