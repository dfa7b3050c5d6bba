"""`LLM`: the whole cluster in one process, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moray
from moray.actors.local_engine import LocalEngine
from moray.actors.messages import GenerateRequest, TokenOutput
from moray.cluster.local import LLM, LocalCluster
from moray.configs.deployment import Deployment
from moray.configs.errors import ConfigError, ContextTooLongError, RequestError, RouterLostError
from moray.kernels.cpu.library import Instructions, native
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint

PROMPT = [5, 9, 200, 31]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"), dtype="fp8", seed=8)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, experts=2, max_context=256) as llm:
        yield llm


def test_it_is_the_face_of_the_package() -> None:
    assert moray.LLM is LLM
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        moray.Nothing  # noqa: B018


def test_texts_and_ids(llm: LLM) -> None:
    ids = llm.cluster.model.tokenizer.encode("Hello")
    as_text, as_ids = (
        llm.generate(["Hello"], max_tokens=9, temperature=0.0, ignore_eos=True, chat=False)[0],
        llm.generate([ids], max_tokens=9, temperature=0.0, ignore_eos=True)[0],
    )
    assert as_text == as_ids
    assert len(as_ids.token_ids) == 9
    assert as_ids.finish_reason == "length"
    in_chat = llm.generate(["Hello"], max_tokens=9, temperature=0.0, ignore_eos=True)[0]
    assert in_chat.token_ids != as_ids.token_ids


def test_answers_keep_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [[i, 7, i] for i in range(40)]
    together = llm.generate(prompts, max_tokens=3, temperature=0.0, ignore_eos=True)
    assert together == [llm.generate([p], max_tokens=3, temperature=0.0, ignore_eos=True)[0] for p in prompts]


def test_more_prompts_than_the_queue_holds(checkpoint: Path) -> None:
    limits = {"max_waiting": 2, "max_running": 3, "token_budget": 16, "cache_tokens": 256}
    with LLM(checkpoint, routers=limits) as llm:
        answers = llm.generate([[i] for i in range(20)], max_tokens=3, temperature=0.0, ignore_eos=True)
    assert [len(answer.token_ids) for answer in answers] == [3] * 20


def test_seeds(llm: LLM) -> None:
    def answer(seed: int) -> list[int]:
        return llm.generate([PROMPT], max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True)[0].token_ids

    assert answer(1) == answer(1)
    assert len({tuple(answer(seed)) for seed in range(5)}) == 5


def test_an_end_token_ends(llm: LLM) -> None:
    free = llm.generate([PROMPT], max_tokens=200, temperature=1.0, seed=4, ignore_eos=True)[0]
    assert 1 in free.token_ids, "choose another seed: this one never samples the end token"
    ended = llm.generate([PROMPT], max_tokens=200, temperature=1.0, seed=4)[0]
    assert ended.token_ids == free.token_ids[: free.token_ids.index(1) + 1]
    assert ended.finish_reason == "stop"


def test_without_max_tokens_the_context_is_filled(llm: LLM) -> None:
    (answer,) = llm.generate([[3] * 230], temperature=0.0, ignore_eos=True)
    assert len(answer.token_ids) == 26


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "kind"),
    [
        ([PROMPT, [3] * 300], {"max_tokens": 2}, ContextTooLongError),
        ([PROMPT, []], {}, RequestError),
        ([PROMPT, [272]], {}, RequestError),
        ([PROMPT, [-1]], {}, RequestError),
        ([PROMPT], {"max_tokens": 0}, RequestError),
        ([PROMPT], {"temperature": -1.0}, RequestError),
        ([PROMPT], {"top_p": 7.0}, RequestError),
        ("one text", {}, RequestError),
    ],
    ids=["too-long", "empty", "no-such-token", "negative", "max_tokens", "temperature", "top_p", "text-for-list"],
)
def test_refusals_leave_it_usable(llm: LLM, prompts: Any, settings: dict[str, Any], kind: type[RequestError]) -> None:
    with pytest.raises(kind):
        llm.generate(prompts, **settings)
    assert not llm.cluster.router.busy
    assert llm.cluster.router.pool.in_use == 0
    assert len(llm.generate([PROMPT], max_tokens=2, temperature=0.0, ignore_eos=True)[0].token_ids) == 2


def test_an_interrupt_leaves_it_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate([PROMPT], max_tokens=6, temperature=0.0, ignore_eos=True)
    forward = llm.cluster.router.model.sampled_states
    steps = iter(range(3))

    def interrupted(batch: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return forward(batch)

    monkeypatch.setattr(llm.cluster.router.model, "sampled_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT], max_tokens=50, temperature=0.0, ignore_eos=True)
    monkeypatch.undo()
    assert llm.cluster.router.pool.in_use == 0
    assert llm.generate([PROMPT], max_tokens=6, temperature=0.0, ignore_eos=True) == expected


def test_closing(checkpoint: Path) -> None:
    llm = LLM(checkpoint)
    llm.close()
    llm.close()
    with pytest.raises(RouterLostError, match="shutting down"):
        llm.generate([PROMPT])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 9}, "experts.hosts = 9"),
        ({"experts": 0}, "experts.hosts = 0"),
        ({"dtype": "int4"}, "dtype = 'int4'"),
        ({"pages": 3}, "pages: no such setting"),
        ({"max_context": 5000}, "max_context = 5000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(checkpoint: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        LLM(checkpoint, **settings)
    assert message in str(refusal.value)


def test_status_and_bytes(llm: LLM, checkpoint: Path) -> None:
    status = llm.cluster.status()
    assert (status.health, status.reason, status.model) == ("ok", "", checkpoint.name)
    assert [p.id for p in status.processes] == ["expert-host-0", "expert-host-1", "router-0"]
    assert all(p.data_bytes_read > 0 for p in status.processes)
    hosts = [p.data_bytes_read for p in status.processes if p.role == "expert_host"]
    assert hosts[0] == hosts[1]


def test_instructions_of_cpus(checkpoint: Path) -> None:
    library = native()
    assert library is not None
    best = library.best.name.lower()
    if library.best is Instructions.GENERIC:  # which nobody uses unasked
        best = f"torch {torch.backends.cpu.get_cpu_capability().lower()}"
    try:
        with LLM(checkpoint, experts=2, cpu_instructions="generic") as llm:
            assert library.used is Instructions.GENERIC
            assert {process.instructions for process in llm.cluster.status().processes} == {"generic"}
            before = llm.generate([PROMPT], max_tokens=6, temperature=0.0, ignore_eos=True)
        with LLM(checkpoint, cpu_instructions="generic") as llm:
            assert llm.generate([PROMPT], max_tokens=6, temperature=0.0, ignore_eos=True) == before
        with LLM(checkpoint) as llm:
            assert library.used is library.best
            assert {process.instructions for process in llm.cluster.status().processes} == {best}
        with LLM(checkpoint, dtype="float32") as llm:
            assert all(process.instructions.startswith("torch ") for process in llm.cluster.status().processes)
    finally:
        library.use(library.best)


@pytest.fixture
def cluster(checkpoint: Path) -> Iterator[LocalCluster]:
    with contextlib.closing(LocalCluster(Deployment.from_dict({"model": str(checkpoint)}))) as cluster:
        cluster.router.start()
        yield cluster


def request(name: str = "r", max_tokens: int = 6) -> GenerateRequest:
    return GenerateRequest(name, PROMPT, SamplingParams(max_tokens, temperature=0.0))


def test_the_engine_answers_streams(cluster: LocalCluster, llm: LLM) -> None:
    async def run() -> list[TokenOutput]:
        engine = LocalEngine(cluster.router, cluster.status)
        assert (await engine.status()).health == "ok"
        return [output async for output in engine.generate(request())]

    outputs = asyncio.run(run())
    (expected,) = llm.generate([PROMPT], max_tokens=6, temperature=0.0, ignore_eos=True)
    assert [token for output in outputs for token in output.token_ids] == expected.token_ids


def test_closing_a_stream_cancels_and_a_closed_loop_hurts_nobody(cluster: LocalCluster) -> None:
    async def run(name: str) -> None:
        engine = LocalEngine(cluster.router, cluster.status)
        outputs = engine.generate(request(name, max_tokens=1500))
        await anext(outputs)
        await outputs.aclose()

    for i in range(5):  # each loop closes while the router still has an output for it
        asyncio.run(run(f"r{i}"))

    async def last() -> list[TokenOutput]:
        return [output async for output in LocalEngine(cluster.router, cluster.status).generate(request("last"))]

    assert sum(len(output.token_ids) for output in asyncio.run(last())) == 6
    assert cluster.router.stats().requests_cancelled == 5
    assert cluster.router.pool.in_use == 0
