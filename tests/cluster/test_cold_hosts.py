"""Clusters with a cold tier: the same tokens, and every host goes on being of its kind whatever happens to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.actors.expert_dispatch import ExpertDispatch
from moray.actors.expert_host import ExpertHost
from moray.actors.links import Frame
from moray.actors.messages import GenerateRequest, TokenOutput
from moray.actors.moe_frames import Kind, MoeHeader
from moray.actors.placement_table import is_cold
from moray.cluster.changes import Wanted
from moray.cluster.controller import Controller
from moray.cluster.ledger import MemoryLedger
from moray.cluster.local import LocalCluster
from moray.cluster.placement import plan_next
from moray.cluster.spawning import NoRoomError
from moray.configs.deployment import Deployment
from moray.configs.errors import ConfigError
from moray.model.compute import Compute
from moray.model.config import ModelConfig
from moray.model.sampling import SamplingParams
from moray.model.testing import SMALL_CONFIG

from .thread_cluster import PROMPT, ThreadSpawner, ask, deployment, eventually, tokens

COLD = {"hosts": 1, "slots": 2}


@pytest.fixture
def start(spawner: ThreadSpawner, checkpoint: Path) -> Iterator[Callable[..., Controller]]:
    started: list[Controller] = []

    def make(ledger: MemoryLedger | None = None, **settings: Any) -> Controller:
        described = deployment(checkpoint, **{"cold": COLD} | settings)
        started.append(Controller(described, spawner, ledger))
        started[-1].start()
        return started[-1]

    yield make
    for controller in reversed(started):
        controller.stop()


def asked(controller: Controller) -> int:
    """(token, expert) pairs that routers asked of cold hosts, and were answered."""
    reports = [router.report for router in controller._registry.routers.values()]
    return sum(view.pairs for report in reports if report for host, view in report.hosts.items() if is_cold(host))


def test_tokens_are_those_of_one_host(start: Callable[..., Controller], expected: list[int]) -> None:
    controller = start()
    assert list(controller.table.slots) == ["expert-host-0", "expert-host-1", "cold-host-0"]
    assert {len(layer) for layer in controller.table.slots["cold-host-0"]} == {2}
    assert tokens(ask(controller)) == expected
    eventually(lambda: asked(controller) > 0)
    assert controller.status().health == "ok"


def test_cold_hosts_take_over_within_the_step(
    start: Callable[..., Controller], spawner: ThreadSpawner, expected: list[int]
) -> None:
    controller = start(min_replicas=2, cold={"hosts": 1, "slots": 8})
    outputs = ask(controller, at=lambda count: spawner.hosts["expert-host-1"].kill() if count == 6 else None)
    assert tokens(outputs) == expected
    eventually(lambda: asked(controller) > 0)


def test_a_lost_cold_host_comes_back_as_one_and_takes_no_warm_process(
    start: Callable[..., Controller], spawner: ThreadSpawner, expected: list[int]
) -> None:
    controller = start(standby=1)
    eventually(lambda: "standby" in [process.state for process in controller.status().processes])
    outputs = ask(controller, at=lambda count: spawner.hosts["cold-host-0"].kill() if count == 6 else None)
    assert tokens(outputs) == expected
    eventually(lambda: controller.status().health == "ok")
    assert (spawner.made.count("cold-host-0"), spawner.made.count("standby")) == (2, 1)


def test_each_kind_is_scaled_by_itself(start: Callable[..., Controller], expected: list[int]) -> None:
    controller = start()
    assert controller.change(Wanted(experts=3)).added == ("expert-host-2",)
    assert controller.change(Wanted(cold=2)).added == ("cold-host-1",)
    assert [len(layers[0]) for layers in controller.table.slots.values()] == [2, 1, 1, 2, 2]
    assert tokens(ask(controller)) == expected
    change = controller.change(Wanted(drain=("cold-host-0",)))
    assert change.removed == ("cold-host-0",)
    assert change.cold_share_before > change.cold_share_after > 0
    assert controller.change(Wanted(experts=1, cold=0)).removed == ("expert-host-1", "expert-host-2", "cold-host-1")
    assert list(controller.table.slots) == ["expert-host-0"]
    with pytest.raises(ConfigError, match="at least one that is not cold"):
        controller.change(Wanted(drain=("expert-host-0",), cold=1))
    assert tokens(ask(controller)) == expected


def test_a_cold_host_without_room_is_missed_until_there_is_some(
    start: Callable[..., Controller], spawner: ThreadSpawner, expected: list[int]
) -> None:
    controller = start()

    def refuse(name: str) -> None:
        if spawner.room == 0:
            raise NoRoomError(f"{name} needs 1 more moray_cold")

    spawner.before, spawner.room = refuse, 0
    spawner.hosts["cold-host-0"].kill()
    eventually(lambda: list(controller.table.slots) == ["expert-host-0", "expert-host-1"])
    assert tokens(ask(controller)) == expected
    spawner.room = 10
    eventually(lambda: list(controller.table.slots) == ["expert-host-0", "expert-host-1", "cold-host-0"])


def test_the_next_controller_knows_both_kinds(
    start: Callable[..., Controller], spawner: ThreadSpawner, expected: list[int]
) -> None:
    ledger = MemoryLedger()
    first = start(ledger)
    first.change(Wanted(cold=2))
    first.leave()
    made = list(spawner.made)
    spawner.hosts["cold-host-1"].kill()
    second = start(ledger)
    eventually(lambda: second.status().health == "ok")
    assert (second._registry.wanted_hosts, second._registry.wanted_cold) == (2, 2)
    assert spawner.made == [*made, "cold-host-1"]
    assert second.change(Wanted(experts=3)).added == ("expert-host-2",)
    assert tokens(ask(second)) == expected


def in_one_process(checkpoint: Path, count: int, **cold: Any) -> tuple[dict[str, ExpertHost], list[int]]:
    """The hosts of a cluster in this process, ended, and so many tokens of it."""
    described = {"model": str(checkpoint), "experts": {"hosts": 2, "cold": COLD | cold}}
    cluster = LocalCluster(Deployment.from_dict(described))
    outputs: list[TokenOutput] = []
    cluster.router.submit(GenerateRequest("r", PROMPT, SamplingParams(count, temperature=0.0)), outputs.extend)
    while cluster.router.busy:
        cluster.router.step()
    cluster.close()
    return {host.host_id: host for host in cluster.hosts}, tokens(outputs)


def test_tokens_in_one_process(checkpoint: Path, expected: list[int]) -> None:
    hosts, found = in_one_process(checkpoint, 40)
    assert found == expected
    assert hosts["cold-host-0"].report().pairs > 0


def test_cold_hosts_are_asked_only_for_what_others_have_not(checkpoint: Path) -> None:
    """On a clock that stands still: nobody is ever late, whose work a cold host would get, too."""
    config = ModelConfig.load(checkpoint)
    table = plan_next(config, ["expert-host-0", "expert-host-1", "cold-host-0"], min_replicas=2, cold_slots=8).table
    hosts = {host_id: ExpertHost(host_id, compute=Compute.on_cpu()) for host_id in table.slots}
    for host_id, host in hosts.items():
        host.load(checkpoint, table.slots[host_id], epoch=table.epoch)
    links = {host_id: host.inline_link("router-0") for host_id, host in hosts.items()}
    dispatch = ExpertDispatch(table, links, clock=lambda: 0.0)
    hidden_states = torch.randn((16, config.hidden_size), generator=torch.Generator().manual_seed(2))
    topk_ids = torch.arange(32).remainder(config.n_routed_experts).view(16, 2)

    def layer() -> torch.Tensor:
        return dispatch.finish(dispatch.start(1, hidden_states, topk_ids, torch.full((16, 2), 0.5)))

    whole = layer()
    assert {host_id: host.report().pairs for host_id, host in hosts.items()} == {
        "expert-host-0": 16,
        "expert-host-1": 16,
        "cold-host-0": 0,
    }
    hosts["expert-host-1"].stop()
    assert torch.equal(layer(), whole)
    assert {host_id: host.report().pairs for host_id, host in hosts.items()} == {
        "expert-host-0": 32,
        "expert-host-1": 16,
        "cold-host-0": 16,
    }
    dispatch.close()


def test_hosts_of_other_arithmetic_answer_in_what_they_were_asked_in(checkpoint: Path) -> None:
    """As a CUDA router with a cold host has it: it sends bfloat16, the host computes in float32."""
    hidden_size = SMALL_CONFIG["hidden_size"]
    hidden_states = torch.randn((3, hidden_size), generator=torch.Generator().manual_seed(1)).bfloat16()
    pairs = torch.tensor([[0, 1, 2], [0, 0, 1]], dtype=torch.int32)
    answers = []
    for dtype, sent in ((torch.float32, hidden_states), (torch.float32, hidden_states.float())):
        host = ExpertHost("cold-host-0", compute=Compute.on_cpu(dtype))
        host.load(checkpoint, [[4, 5], [4, 5]], epoch=1)
        header, (answer,) = host.handle(Frame(MoeHeader(Kind.WORK, 1, 1, 1).pack(), (sent, pairs)))
        assert MoeHeader.unpack(header).kind is Kind.DONE
        assert answer.dtype == sent.dtype
        answers.append(answer)
        host.stop()
    assert torch.equal(answers[0], answers[1].bfloat16()), "computed in float32, then rounded once"


def test_cold_hosts_of_another_dtype_serve(checkpoint: Path) -> None:
    """The bits may differ from those of the others; that is what `experts.cold.dtype` says."""
    hosts, found = in_one_process(checkpoint, 8, dtype="float32")
    assert {host_id: host.compute.dtype for host_id, host in hosts.items()} == {
        "expert-host-0": torch.bfloat16,
        "expert-host-1": torch.bfloat16,
        "cold-host-0": torch.float32,
    }
    assert len(found) == 8


def test_nccl_reaches_no_cold_host(start: Callable[..., Controller]) -> None:
    with pytest.raises(ConfigError, match="cold hosts have no GPU; use link: auto"):
        Deployment.from_dict({"link": "nccl", "experts": {"cold": {"hosts": 1}}})
    controller = start(cold={"hosts": 0})
    registry = controller._registry
    registry.deployment = registry.deployment.model_copy(update={"link": "nccl"})
    with pytest.raises(ConfigError, match="cold hosts have no GPU; use link: auto"):
        controller.change(Wanted(cold=1), dry_run=True)
