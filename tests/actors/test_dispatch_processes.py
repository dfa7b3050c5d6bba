"""Expert hosts in processes of their own that are stopped and killed with work in hand: streams go on, bit for bit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.actors.host_links import HostLinks
from moray.actors.messages import GenerateRequest
from moray.actors.router import Router
from moray.actors.testing import SECRET, EngineParts, Recorder, random_prompt, run
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint

from .processes import HostProcess, host_processes


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineParts]:
    torch.set_num_threads(1)
    with contextlib.closing(EngineParts(write_random_checkpoint(tmp_path_factory.mktemp("random"), seed=5))) as parts:
        yield parts


def requests(parts: EngineParts, name: str) -> list[GenerateRequest]:
    """Three of them; the names have nothing to do with the answers."""
    return [
        GenerateRequest(f"{name}{i}", random_prompt(parts.config, i, 7), SamplingParams(60, temperature=0.8, seed=i))
        for i in range(3)
    ]


@pytest.fixture(scope="module")
def undisturbed(parts: EngineParts) -> list[list[int]]:
    recorder = run(parts.engine(), requests(parts, "r"))
    return [recorder.tokens(f"r{i}") for i in range(3)]


@pytest.fixture(scope="module")
def processes(parts: EngineParts) -> Iterator[Mapping[str, HostProcess]]:
    with host_processes(parts, parts.table(3, replicas=2), "shm") as processes:
        yield processes


@pytest.fixture
def router(parts: EngineParts, processes: Mapping[str, HostProcess]) -> Iterator[Router]:
    """Runs, and mends its links, as in a router's process."""
    addresses = {host: [process.address] for host, process in processes.items()}
    links = HostLinks("router-0", addresses, link="shm", secret=SECRET, device=torch.device("cpu"))
    router, stopped = parts.router(parts.table(3, replicas=2), links.dial_those_there()), threading.Event()
    mending = threading.Thread(target=links.mend, args=(lambda: router.unlinked, router.set_link, stopped))
    mending.start()
    router.start()
    yield router
    stopped.set()
    router.stop()
    mending.join(10)
    assert not mending.is_alive()


def ask(router: Router, parts: EngineParts, name: str, *, after: int, event: Callable[[], None]) -> list[list[int]]:
    """The requests' tokens; `event` happens once the first has `after` of them."""
    recorder = Recorder()
    for request in requests(parts, name):
        router.submit(request, recorder)
    recorder.wait(f"{name}0", tokens=after)
    event()
    recorder.wait(*(f"{name}{i}" for i in range(3)))
    return [recorder.tokens(f"{name}{i}") for i in range(3)]


def eventually(condition: Callable[[], bool], every: float = 0.01) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(every)


def stop_at_once(pid: int) -> None:
    """Returns when no thread of the process runs any more: a signal alone is delivered while they go on."""
    os.kill(pid, signal.SIGSTOP)
    states = [task / "stat" for task in Path(f"/proc/{pid}/task").iterdir()]
    eventually(lambda: all(state.read_text().rpartition(")")[2].split()[0] == "T" for state in states), every=0)


def test_a_stopped_process_is_hedged_fenced_and_used_again(
    router: Router, parts: EngineParts, processes: Mapping[str, HostProcess], undisturbed: list[list[int]]
) -> None:
    victim = processes["expert-host-1"].pid

    def pairs() -> int:
        return router.dispatch.host_views()["expert-host-1"].pairs

    try:
        assert ask(router, parts, "a", after=20, event=lambda: os.kill(victim, signal.SIGSTOP)) == undisturbed
        stats = router.stats()
        assert stats.hedged_shares > 0
        assert (stats.requests_failed, stats.unreachable_experts) == (0, 0)
        eventually(lambda: router.stats().fenced_hosts == 1)
        assert router.unlinked == ["expert-host-1"]
        assert "expert-host-1" in router.stats().broken_links[0]
        before = pairs()
        assert ask(router, parts, "b", after=1, event=lambda: None) == undisturbed
        assert pairs() == before
    finally:
        os.kill(victim, signal.SIGCONT)
    eventually(lambda: router.unlinked == [] and not router.stats().broken_links)
    assert ask(router, parts, "c", after=1, event=lambda: None) == undisturbed
    assert pairs() > before, "a host that goes on is used again"


def test_a_process_that_is_killed_with_work_in_hand_costs_no_step(
    router: Router,
    parts: EngineParts,
    processes: Mapping[str, HostProcess],
    undisturbed: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victim, tries = processes["expert-host-2"].pid, 0
    armed, killed = threading.Event(), threading.Event()
    start, finish, forward = router.dispatch.start, router.dispatch.finish, router.model.sampled_states

    def stopped_before(*arguments: Any) -> Any:
        if armed.is_set() and not killed.is_set():
            stop_at_once(victim)  # so that it cannot have answered
        return start(*arguments)

    def killed_before(pending: Any) -> torch.Tensor:
        if armed.is_set() and not killed.is_set():
            has_work = bool(router.dispatch._hosts.lines["expert-host-2"].owed)
            os.kill(victim, signal.SIGKILL if has_work else signal.SIGCONT)
            if has_work:
                killed.set()
        return finish(pending)

    def counted(batch: Any) -> torch.Tensor:
        nonlocal tries
        tries += 1
        return forward(batch)

    monkeypatch.setattr(router.dispatch, "start", stopped_before)
    monkeypatch.setattr(router.dispatch, "finish", killed_before)
    monkeypatch.setattr(router.model, "sampled_states", counted)
    assert ask(router, parts, "a", after=20, event=armed.set) == undisturbed
    stats = router.stats()
    assert killed.is_set()
    assert stats.resent_shares > 0
    assert tries == stats.steps, "no step was tried again"
    assert (stats.requests_failed, stats.unreachable_experts, stats.fenced_hosts) == (0, 0, 0)
