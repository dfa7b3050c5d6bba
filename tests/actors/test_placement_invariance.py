"""An answer's bits do not depend on how many expert hosts there are, how they are linked, or who else is served.

Token ids and log-probabilities are compared for equality, never within a tolerance.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moray.actors.deadline import Deadline
from moray.actors.links import LinkKind, dial
from moray.actors.messages import GenerateRequest, TokenLogprobs
from moray.actors.router import Router, RouterSettings
from moray.actors.testing import SECRET, SETTINGS, EngineParts, Recorder, random_prompt, run
from moray.cluster.local import LLM
from moray.cluster.placement import even_placement
from moray.model.compute import Compute
from moray.model.config import ModelConfig
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint

from .processes import host_processes

Answer = tuple[list[int], list[TokenLogprobs]]

LENGTHS = (1, 7, 8, 9, 16, 33, 40, 64, 65, 3, 24, 50, 17, 32, 80, 12)
"""Prompt lengths around the page size of 8 and the tile sizes of the attention; some beyond any token budget used here."""

TOKENS = 10


def requests(config: ModelConfig) -> list[GenerateRequest]:
    """Every second one greedy, the others sampled with each filter; the last four share their first pages."""
    made = []
    shared = random_prompt(config, 99, 24)
    for index, length in enumerate(LENGTHS):
        prompt = random_prompt(config, index, length)
        if index >= len(LENGTHS) - 4:
            prompt = (shared + prompt)[: max(length, 10)]
        sampling = SamplingParams(TOKENS, temperature=0.0, logprobs=3)
        if index % 2:
            top_k, top_p, min_p = ((0, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05))[index // 2 % 4]
            sampling = SamplingParams(TOKENS, 0.8, top_k, top_p, min_p, seed=index * 0x9E3779B97F4A7C15, logprobs=3)
            sampling = replace(sampling, seed=sampling.seed % (1 << 64))
        made.append(GenerateRequest(f"request-{index}", prompt, sampling))
    return made


def answers(router: Router, wanted: Sequence[GenerateRequest], *, together: bool) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for group in [list(wanted)] if together else [[request] for request in wanted]:
        recorder = run(router, group)
        for request in group:
            found[request.request_id] = recorder.tokens(request.request_id), recorder.logprobs(request.request_id)
    return found


COMPUTE = {"float32": (Compute.on_cpu(), "float32"), "native": (Compute.native(), "bfloat16")}
"""What everything computes with, and the `dtype` of a deployment that means it."""


class Oracle:
    """One model, and the answers of one host inside one process to one request at a time."""

    def __init__(self, checkpoint: Path, kind: str) -> None:
        compute, dtype = COMPUTE[kind]
        self.parts = EngineParts(checkpoint, compute=compute)
        self.requests = requests(self.parts.config)
        # The page size orders the sums of attention: it is part of what is compared, unlike everything else here.
        routers = {"page_size": SETTINGS.page_size}
        with LLM(checkpoint, experts=1, dtype=dtype, max_context=128, routers=routers) as llm:
            self.expected = answers(llm.cluster.router, self.requests, together=False)
            greedy = [r for r in self.requests if r.sampling.temperature == 0]
            texts = llm.generate(
                [r.prompt_token_ids for r in greedy], max_tokens=TOKENS, temperature=0.0, ignore_eos=True
            )
        assert [a.token_ids for a in texts] == [self.expected[r.request_id][0] for r in greedy]
        assert all(len(tokens) == len(logprobs) == TOKENS for tokens, logprobs in self.expected.values())

    def check(self, router: Router, *, together: bool, some: slice = slice(None)) -> None:
        chosen = self.requests[some]
        found = answers(router, chosen, together=together)
        assert found == {r.request_id: self.expected[r.request_id] for r in chosen}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("fp8"), dtype="fp8", seed=3)


@pytest.fixture(scope="module", params=COMPUTE)
def oracle(request: pytest.FixtureRequest, checkpoint: Path) -> Oracle:
    torch.set_num_threads(1)
    return Oracle(checkpoint, request.param)


@pytest.fixture
def parts(oracle: Oracle) -> Iterator[EngineParts]:
    with contextlib.closing(oracle.parts) as parts:
        yield parts


@pytest.mark.parametrize("kind", ["inline", "shm", "gloo"])
@pytest.mark.parametrize("hosts", [1, 2, 3, 5], ids=lambda n: f"{n}-hosts")
def test_any_number_of_hosts(oracle: Oracle, parts: EngineParts, hosts: int, kind: LinkKind) -> None:
    router = parts.engine(hosts, kind)
    oracle.check(router, together=True)
    oracle.check(router, together=False, some=slice(2, 16, 5))
    assert router.scheduler.prefix_hit_tokens > 0, "the second time the prompts' pages must be found in the cache"


def test_replicas_share_the_tokens(oracle: Oracle, parts: EngineParts) -> None:
    oracle.check(parts.engine(3, replicas=2), together=True)


def test_the_clusters_own_placement(oracle: Oracle, parts: EngineParts) -> None:
    table = even_placement(parts.config, [f"expert-host-{i}" for i in range(3)])
    links = {host_id: parts.link(parts.host(host_id, table), "shm") for host_id in table.slots}
    oracle.check(parts.router(table, links), together=True)


CRAMPED = {
    "budget-16": replace(SETTINGS, token_budget=16),
    "budget-1": replace(SETTINGS, token_budget=1, max_running=1),
    "budget-37-running-5": replace(SETTINGS, token_budget=37, max_running=5),
    "budget-128": replace(SETTINGS, token_budget=128),
    "pages-16-of-8": replace(SETTINGS, pages=16),
    "pages-16-budget-24": replace(SETTINGS, pages=16, token_budget=24),
    "pages-17-running-3": replace(SETTINGS, pages=17, max_running=3),
}


@pytest.mark.parametrize("settings", CRAMPED.values(), ids=CRAMPED)
def test_any_chunking_and_any_shortage_of_pages(oracle: Oracle, parts: EngineParts, settings: RouterSettings) -> None:
    router = parts.engine(2, settings=settings)
    alone = settings.max_running == 1
    oracle.check(router, together=True, some=slice(3, 16, 6) if alone else slice(None))
    if settings is CRAMPED["pages-16-of-8"]:
        assert router.scheduler.preemptions > 0, "the pool was chosen too large for this test"


def test_whoever_is_preempted_whenever(oracle: Oracle, parts: EngineParts) -> None:
    """After every step one gives its pages back, in the middle of its prompt or of its answer."""
    router, recorder = parts.engine(2, settings=replace(SETTINGS, token_budget=40)), Recorder()
    for request in oracle.requests:
        router.submit(request, recorder)
    for step in itertools.count():
        if not router.busy:
            break
        router.step()
        if len(running := list(router.scheduler.running)) > 1:
            router.scheduler._preempt(running[1:][step % (len(running) - 1)])
        router.pool.check()
    assert router.stats().preemptions > 20
    found = {r.request_id: (recorder.tokens(r.request_id), recorder.logprobs(r.request_id)) for r in oracle.requests}
    assert found == oracle.expected


def test_prefix_cache_hits_change_nothing(oracle: Oracle, parts: EngineParts) -> None:
    router = parts.engine(2)
    for _ in range(3):
        before = router.scheduler.prefix_hit_tokens
        oracle.check(router, together=False, some=slice(5, 16, 3))
    assert router.scheduler.prefix_hit_tokens - before >= 100


@pytest.mark.parametrize(("kind", "hosts"), [("shm", 2), ("gloo", 3)])
@pytest.mark.parametrize("oracle", ["native"], indirect=True)  # starting processes costs seconds
def test_hosts_in_processes_of_their_own(oracle: Oracle, parts: EngineParts, kind: LinkKind, hosts: int) -> None:
    table = parts.table(hosts)
    with host_processes(parts, table, kind) as processes, contextlib.ExitStack() as linked:
        links = {}
        for host, process in processes.items():
            deadline = Deadline.after(30.0)
            links[host] = dial(process.address, secret=SECRET, identity="router-0", deadline=deadline)
            linked.callback(links[host].close)
        router = parts.router(table, links)
        oracle.check(router, together=True)
        oracle.check(router, together=False, some=slice(0, 16, 7))


def test_the_embedded_model() -> None:
    prompts = ["What is 2 + 3?", "Tell me a story about a fox.", "How many days are in a week?"]
    found = []
    chunked = {"token_budget": 16, "max_running": 4}
    for hosts, routers in ((1, {}), (4, {}), (3, chunked)):
        with LLM(experts=hosts, routers=routers) as llm:
            greedy = llm.generate(prompts, max_tokens=24, temperature=0.0)
            sampled = [llm.generate([prompt], max_tokens=24, temperature=0.7, seed=11)[0] for prompt in prompts]
            found.append((greedy, sampled))
    assert found[0] == found[1]
    assert found[0] == found[2]
