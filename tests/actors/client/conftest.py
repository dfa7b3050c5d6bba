"""One small model for every test of a front's client, and routers that end with their test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

from moray.actors.links import handshake
from moray.actors.messages import GenerateRequest
from moray.actors.testing import EngineParts
from moray.model.testing import write_random_checkpoint

from .answers import Answer, request, undisturbed


@pytest.fixture(autouse=True)
def _a_wire_is_no_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `Wire` stands for the network itself, which has no address: the handshake would find out that it is a relay."""
    monkeypatch.setattr(handshake, "_place", lambda *_, **__: b"")


@pytest.fixture(scope="session")
def read_once(tmp_path_factory: pytest.TempPathFactory) -> EngineParts:
    return EngineParts(write_random_checkpoint(tmp_path_factory.mktemp("random"), seed=5))


@pytest.fixture
def parts(read_once: EngineParts) -> Iterator[EngineParts]:
    with contextlib.closing(read_once) as parts:
        yield parts


@pytest.fixture
def routers() -> Iterator[contextlib.ExitStack]:
    """Routers entered here are closed after the test."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def various(read_once: EngineParts) -> tuple[list[GenerateRequest], dict[str, Answer]]:
    """Requests and their answers: greedy and seeded, with log-probabilities and stop tokens or without, and with prompts
    around page boundaries."""
    requests = []
    for i in range(16):
        prompt = (1, 7, 8, 9, 16, 23, 40, 61)[i // 2]
        requests.append(
            request(
                read_once,
                f"r{i}",
                prompt,
                max_tokens=40,
                temperature=0.0 if i % 4 == 0 else 0.9,
                seed=i,
                logprobs=None if i % 8 == 7 else i % 3,
            )
        )
    plain = undisturbed(read_once, requests)
    # Some end at a stop token instead, well after the death.
    for i in (2, 5, 9, 12):
        tokens = plain[f"r{i}"][0]
        stop = next(token for token in tokens[25:] if token not in tokens[:25])
        requests[i] = replace(requests[i], sampling=replace(requests[i].sampling, stop_token_ids=(stop,)))
    expected = undisturbed(read_once, requests)
    assert sorted(reason or "" for _, _, reason in expected.values()) == ["length"] * 12 + ["stop"] * 4
    return requests, expected
