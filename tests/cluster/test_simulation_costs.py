"""Cost models: bounds of GPUs, linear functions of CPUs, and the fits that their constants come out of."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from moray.actors.router import RouterSettings
from moray.actors.testing import SETTINGS
from moray.cluster.placement import plan_next
from moray.cluster.planning import assumptions
from moray.cluster.planning.gpu_kinds import gpu_kind
from moray.cluster.planning.nodes import NodeGroup
from moray.cluster.planning.plan import make_plan
from moray.cluster.planning.sizes import ModelSizes, model_sizes
from moray.cluster.simulation import parts_timing
from moray.cluster.simulation.calibration import ServedRun, fit, served_constants
from moray.cluster.simulation.costs import CostModel
from moray.cluster.simulation.cpu_costs import Calibration, CpuConstants, CpuCosts, Machine, pages
from moray.cluster.simulation.gpu_costs import MORAY, GpuCosts, PlannedLinks
from moray.cluster.simulation.parts_timing import Parts, Sample
from moray.cluster.simulation.published_kernels import HOPPER, DeepEp, hopper
from moray.configs.deployment import Deployment
from moray.configs.errors import ConfigError
from moray.model.compute import Compute
from moray.model.testing import write_random_checkpoint

from .plan_models import R1_CONFIG

H800 = NodeGroup("node", 1, 8, gpu_kind("H800"))
LINKS = PlannedLinks(remote=0.5, network=10e9, copies=20e9)


@pytest.fixture(scope="module")
def sizes() -> ModelSizes:
    return model_sizes(R1_CONFIG, Compute(torch.device("meta"), torch.bfloat16, keep_fp8=True))


def hopper_costs(sizes: ModelSizes, *, expanded: bool = False) -> GpuCosts:
    return GpuCosts(
        sizes, router=H800, host=H800, kernels=HOPPER, exchange=DeepEp(64, "low_latency"), expanded=expanded
    )


# ---- GPUs -------------------------------------------------------------------------------------------------------------

DEEP_GEMM = (
    (1, 64, 2112, 7168, 206), (1, 64, 24576, 1536, 289), (1, 64, 32768, 512, 219), (1, 64, 7168, 16384, 336),
    (1, 64, 4096, 7168, 287), (1, 64, 7168, 2048, 295), (1, 128, 2112, 7168, 352), (1, 128, 24576, 1536, 535),
    (1, 128, 32768, 512, 358), (1, 128, 7168, 16384, 645), (1, 128, 4096, 7168, 533), (1, 128, 7168, 2048, 510),
    (1, 4096, 2112, 7168, 1058), (1, 4096, 24576, 1536, 990), (1, 4096, 32768, 512, 590), (1, 4096, 7168, 16384, 1358),
    (1, 4096, 4096, 7168, 1304), (1, 4096, 7168, 2048, 1025), (4, 8192, 4096, 7168, 1297), (4, 8192, 7168, 2048, 1099),
    (8, 4096, 4096, 7168, 1288), (8, 4096, 7168, 2048, 1093), (1, 1024, 4096, 7168, 1233), (1, 1024, 7168, 2048, 925),
    (2, 512, 4096, 7168, 1040), (2, 512, 7168, 2048, 916), (4, 256, 4096, 7168, 932), (4, 256, 7168, 2048, 815),
)  # fmt: skip
"""Groups, M, N, K and TFLOPS of DeepGEMM's table."""


def test_the_constants_of_products_are_as_close_to_their_source_as_they_say() -> None:
    gpu = gpu_kind("H800")
    missed = []
    for groups, m, n, k, tflops in DEEP_GEMM:
        flops, moved = 2 * groups * m * n * k, groups * (n * k + m * k + 2 * m * n)
        reading = moved / (gpu.bandwidth * HOPPER.memory.value)
        computing = flops / (gpu.peak("fp8") * HOPPER.arithmetic.value)
        missed.append(math.log((math.hypot(reading, computing) + HOPPER.product_s.value) * tflops * 1e12 / flops))
    assert math.sqrt(sum(error**2 for error in missed) / len(missed)) == pytest.approx(0.13, abs=0.005)


def test_attention_over_latents_takes_what_flash_mla_publishes(sizes: ModelSizes) -> None:
    costs, positions = hopper_costs(sizes), 128 * 4096
    alone = costs.router_layer(128, positions, positions, 4096) - costs.router_layer(128, 0, 0, 0)
    assert alone == pytest.approx(positions * 2 * 128 * (576 + 512) / (0.586 * 989e12))


def test_attention_of_one_long_sequence_with_few_heads_is_bound_by_reading(sizes: ModelSizes) -> None:
    few = model_sizes(replace(sizes.config, num_attention_heads=16), sizes.compute)
    costs = GpuCosts(few, router=H800, host=H800, kernels=HOPPER, exchange=LINKS)
    alone = costs.router_layer(1, 100_000, 100_000, 100_000) - costs.router_layer(1, 0, 0, 0)
    assert alone == pytest.approx(100_000 * 1152 / (0.896 * 3350e9))


def test_keys_and_values_of_cached_tokens_are_made_again_where_attention_expands_them(sizes: ModelSizes) -> None:
    costs = hopper_costs(sizes, expanded=True)
    fresh = costs.router_layer(1024, 600_000, 1024, 1024)
    assert costs.router_layer(1024, 600_000, 4096, 4096) > fresh
    assert hopper_costs(sizes).router_layer(1024, 600_000, 1024, 1024) > fresh, "absorbed attention computes more"


def test_a_host_is_bound_by_reading_few_rows_and_by_computing_many(sizes: ModelSizes) -> None:
    costs = hopper_costs(sizes)
    reading = sizes.expert.total / (3350e9 * HOPPER.memory.value)
    assert costs.host_layer(8, 8) == pytest.approx(8 * reading, rel=0.1)
    many = 1 << 17
    computing = 2 * many * sizes.expert_parameters / (1979e12 * HOPPER.arithmetic.value)
    assert costs.host_layer(many, 4) == pytest.approx(computing, rel=0.35)
    assert costs.host_layer(0, 0) == 0.0


def test_more_work_never_costs_less(sizes: ModelSizes) -> None:
    for costs in (hopper_costs(sizes), GpuCosts(sizes, router=H800, host=H800, kernels=MORAY, exchange=LINKS)):
        parts: list[Callable[[int], float]] = [
            lambda n, c=costs: c.router_layer(n, n * 100, n * 100, 100),  # type: ignore[misc]
            lambda n, c=costs: c.router_step(n, n, n, 0),  # type: ignore[misc]
            lambda n, c=costs: c.shared_experts(n),  # type: ignore[misc]
            lambda n, c=costs: c.host_layer(n, 4),  # type: ignore[misc]
            lambda n, c=costs: c.exchange(n, n, 8),  # type: ignore[misc]
        ]
        for part in parts:
            seconds = [part(count) for count in (1, 7, 64, 512, 4096)]
            assert seconds == sorted(seconds)
            assert seconds[0] > 0


def test_kernels_that_are_started_from_python_take_no_less_than_starting_them(sizes: ModelSizes) -> None:
    costs = GpuCosts(sizes, router=H800, host=H800, kernels=MORAY, exchange=LINKS)
    assert costs.router_layer(1, 1, 1, 1) >= assumptions.ROUTER_OPERATIONS.value * assumptions.OPERATION.value
    assert costs.host_layer(1, 1) >= assumptions.HOST_OPERATIONS.value * assumptions.OPERATION.value


@pytest.mark.parametrize(("ranks", "there", "back"), [(8, 77e-6, 114e-6), (64, 173e-6, 314e-6), (256, 194e-6, 360e-6)])
def test_low_latency_exchange_takes_what_deep_ep_publishes(ranks: int, there: float, back: float) -> None:
    rows = 128 * 8 * 7168
    assert DeepEp(ranks, "low_latency").seconds(rows, 0) == pytest.approx(there)
    assert DeepEp(ranks, "low_latency").seconds(0, 2 * rows) == pytest.approx(back)


def test_exchange_between_numbers_of_ranks_that_were_not_measured_is_between_their_times() -> None:
    rows = 128 * 8 * 7168
    assert 173e-6 < DeepEp(72, "low_latency").seconds(rows, 0) < 192e-6
    assert "between" in DeepEp(72, "low_latency").assumptions[0].source


def test_short_prompts_are_attended_to_less_efficiently() -> None:
    assert hopper(1024).expanded_arithmetic.value < hopper(4096).expanded_arithmetic.value
    assert hopper(4096).expanded_arithmetic.value == HOPPER.expanded_arithmetic.value


def test_costs_of_a_plan_are_those_of_its_devices() -> None:
    deployment = Deployment.from_dict({"model": "r1"})
    groups = (NodeGroup("fast", 1, 8, gpu_kind("H200")), NodeGroup("slow", 2, 8, gpu_kind("A100-80G"), network=12.5e9))
    plan = make_plan("r1", R1_CONFIG, groups, deployment, batches=())
    assert plan.fits
    costs: CostModel = GpuCosts.from_layout(plan.sizes, plan.layout)
    assert costs.cores is None
    assert not costs.overlap
    slow = GpuCosts(plan.sizes, router=groups[0], host=groups[1], kernels=MORAY, exchange=LINKS)
    assert costs.host_layer(100, 10) == slow.host_layer(100, 10), "a layer waits for the slowest host"
    assert costs.router_layer(4, 400, 400, 100) == slow.router_layer(4, 400, 400, 100)
    # 7 of 23 hosts are beside the router.
    links = PlannedLinks(
        16 / 23, assumptions.NETWORK.value * assumptions.NETWORK_EFFICIENCY.value, assumptions.PCIE.value
    )
    assert costs.exchange(1 << 20, 0, 23) == links.seconds(1 << 20, 0)
    assert costs.exchange(0, 0, 23) == 0.0


# ---- CPUs -------------------------------------------------------------------------------------------------------------

NAMES = [field.name for field in fields(CpuConstants)]
CONSTANTS = CpuConstants(**{name: 2.0 ** -(10 + number) for number, name in enumerate(NAMES)})


def test_costs_of_cores_are_linear() -> None:
    c = replace(CONSTANTS, cores=2.0, crowded=1.5, background=0.25)
    costs = CpuCosts(c, page_size=32)
    assert (costs.cores, costs.crowded) == (1.75, 1.25)
    assert costs.router_step(5, 3, 3, 99) == c.step + 5 * c.step_token + 3 * c.step_row
    assert costs.router_step(5, 3, 4, 99) == c.step + 5 * c.step_token + 4 * c.step_row + c.admission
    assert costs.router_layer(5, 100, 100, 65) == (
        c.layer + 5 * c.layer_token + 100 * c.layer_position + 100 * c.layer_row + 3 * c.layer_page
    )
    assert costs.shared_experts(5) == c.shared + 5 * c.shared_token
    assert costs.host_layer(20, 7) == c.host + 7 * c.host_expert + 20 * c.host_pair
    assert costs.host_layer(0, 0) == 0.0
    assert costs.exchange(100, 0, 3) == c.exchange + 3 * c.frame + 100 * c.frame_byte
    assert costs.exchange(100, 50, 3) == costs.exchange(100, 0, 3) + costs.exchange(0, 50, 3)
    assert costs.front(6) == c.front + 6 * c.front_token
    assert costs.request(40) == c.request + 40 * c.request_token


def test_processes_that_share_cores_and_replicas_to_choose_among_cost_more() -> None:
    c = replace(CONSTANTS, router_process=0.5, host_process=0.25)
    two, four = CpuCosts(c, page_size=32), CpuCosts(c, page_size=32, processes=4)
    assert four.router_step(5, 3, 4, 99) == 2.0 * two.router_step(5, 3, 4, 99)
    assert four.router_layer(5, 100, 100, 65) == 2.0 * two.router_layer(5, 100, 100, 65)
    assert four.shared_experts(5) == 2.0 * two.shared_experts(5)
    assert four.exchange(100, 0, 3) == 2.0 * two.exchange(100, 0, 3)
    assert four.host_layer(20, 7) == 1.5 * two.host_layer(20, 7)
    assert CpuCosts(c, page_size=32, processes=1).host_layer(20, 7) == two.host_layer(20, 7)
    chosen = CpuCosts(c, page_size=32, replicas=True)
    assert chosen.exchange(100, 0, 3) == two.exchange(100, 0, 3) + c.choice
    assert chosen.exchange(0, 100, 3) == two.exchange(0, 100, 3), "what comes back needs no choice"


def test_single_tokens_go_through_the_pages_together_and_prompts_after_them() -> None:
    assert pages(300, 300, 200, 32) == 7, "two sequences with one token each"
    assert pages(64 * 65 // 2, 64, 64, 32) == 2, "one prompt"
    assert pages(1000 + 64 * 65 // 2, 1064, 1000, 32) == 64, "one token of a long sequence, and a prompt"


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    calibration = Calibration(CONSTANTS, Machine("a cpu", 2, "3.11", "2.13", "tiny-r1"), {"layer": 0.05})
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    assert {a.value for a in calibration.assumptions} == set(asdict(CONSTANTS).values())
    assert all("a cpu" in a.source for a in calibration.assumptions)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"constants": {}}', '{"constants": {"step": 1}, "machine": {}, "residuals": {}}']
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.json"):
        Calibration.load(tmp_path / "c.json")
    with pytest.raises(ConfigError, match=r"gone\.json"):
        Calibration.load(tmp_path / "gone.json")


def test_a_fit_finds_constants_again() -> None:
    samples: list[Sample] = [
        ({"a": 1.0, "b": n, "c": n * n}, 1e-3 + 2e-5 * n + 3e-9 * n * n) for n in (1, 3, 10, 100, 1000)
    ]
    found, missed = fit(samples)
    assert found == pytest.approx({"a": 1e-3, "b": 2e-5, "c": 3e-9})
    assert missed == pytest.approx(0.0, abs=1e-9)


def test_a_fit_has_no_negative_constants_and_says_what_it_misses() -> None:
    generator = random.Random(0)
    samples: list[Sample] = [({"a": 1.0, "b": n}, 1.0 - 0.01 * n + generator.uniform(0, 0.1)) for n in range(20)]
    found, missed = fit(samples)
    assert found["b"] == 0.0
    assert found["a"] > 0.5
    assert 0.01 < missed < 0.3
    with pytest.raises(ConfigError, match="1 samples for 2 constants"):
        fit(samples[:1])


# ---- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    settings: RouterSettings = replace(SETTINGS, max_context=260, token_budget=256, max_running=64, pages=1024)
    compute = Compute(torch.device("cpu"), torch.float32, keep_fp8=False)
    yield Parts.load(write_random_checkpoint(tmp_path_factory.mktemp("random"), seed=3), compute, lambda _: settings)
    torch.set_num_threads(before)


def test_what_a_router_does_is_timed_part_by_part(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_timing, "_compositions", lambda _: [[(0, 16)], [(40, 1)] * 4])
    monkeypatch.setattr(parts_timing, "cpu_seconds", lambda run: (run(), 1.0)[1])
    monkeypatch.setattr(parts_timing, "_shared_seconds", lambda *_: 0.25)
    assert parts_timing.layer_samples(parts) == [], "the same time for few and many layers tells nothing"
    steps = parts_timing.step_samples(parts, lambda *_: 0.5)
    assert {seconds for _, seconds in steps} == {0.5}
    assert {(work["step_token"], work["step_row"]) for work, _ in steps} == {
        (1, 1), (4, 4), (16, 16), (48, 48), (64, 1), (256, 1),
    }  # fmt: skip
    assert [seconds for _, seconds in parts_timing.shared_samples(parts)] == [0.25] * 5


def test_a_router_with_native_kernels_is_timed(tmp_path: Path) -> None:
    """As every CPU is calibrated that has them."""
    settings: RouterSettings = replace(SETTINGS, max_context=260, token_budget=256, max_running=64, pages=1024)
    checkpoint = write_random_checkpoint(tmp_path, dtype="fp8", seed=3)
    steps = parts_timing.step_samples(Parts.load(checkpoint, Compute.native(), lambda _: settings), lambda *_: 0.0)
    assert len(steps) == 6
    assert all(seconds > 0 for _, seconds in steps)


def test_hosts_in_processes_of_their_own_are_timed(parts: Parts) -> None:
    found = parts_timing.link_samples(parts, most_hosts=1, layers=2)
    assert len(found.router) == len(found.host)
    for work, seconds in (*found.router, *found.host):
        assert seconds >= 0
        assert all(count > 0 for count in work.values())
    assert {work["host"] for work, _ in found.host} == {1.0}
    assert max(work["host_expert"] for work, _ in found.host) == parts.config.n_routed_experts


def test_what_hosts_are_asked_for_is_counted(parts: Parts) -> None:
    import numpy as np

    config = parts.config
    table = plan_next(config, ["a", "b"]).table
    everything = np.arange(config.n_routed_experts)[None, :]
    asked = parts_timing._asked(table, everything, list(config.moe_layers))
    assert sum(experts for _, _, experts in asked.values()) == config.n_routed_experts
    assert {rows for rows, _, _ in asked.values()} == {1.0}


def test_the_fronts_side_is_what_routers_and_hosts_leave_of_a_servers_time(parts: Parts) -> None:
    alone = replace(CONSTANTS, front=0.0, front_token=0.0, request=0.0, request_token=0.0, cores=2.0, background=0.0)
    idle = ServedRun(10.0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0.1, 0.1, 0.8)
    runs = []
    for steps, tokens, prompts, requests in (
        (100, 200, 40, 2),
        (90, 900, 300, 10),
        (80, 1600, 100, 25),
        (50, 300, 2000, 40),
        (70, 500, 10, 60),
    ):
        other = 0.8 + steps * 4e-3 + tokens * 3e-4 + requests * 0.02 + prompts * 1e-5
        runs.append(
            ServedRun(
                10.0, 1, 2, 4, 20, 100, steps, tokens, prompts, requests, 0.1 + steps * 0.01, 0.1 + steps * 0.01, other
            )
        )
    constants, missed = served_constants(alone, parts, idle, runs)
    assert constants.background == pytest.approx(0.1)
    assert constants.front == pytest.approx(4e-3)
    assert constants.front_token == pytest.approx(3e-4)
    assert constants.request == pytest.approx(0.02)
    assert constants.request_token == pytest.approx(1e-5)
    assert constants.wake > 0, "there is more time in a step than anybody has worked"
    assert missed["front of a server"] == pytest.approx(0.0, abs=1e-6)
    assert json.dumps(missed)
    assert constants.cores == alone.cores


def test_what_processes_cost_more_together_is_told_by_servers_of_several_sizes(parts: Parts) -> None:
    none = dict.fromkeys(NAMES, 0.0)
    alone = CpuConstants(**none | {"layer_row": 1e-6, "host": 1e-4, "cores": 2.0, "crowded": 2.0})
    layers, moe = parts.config.num_hidden_layers, len(parts.config.moe_layers)
    idle = ServedRun(10.0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0)
    runs = []
    for hosts, streams, prompt, steps, tokens, requests in (
        (1, 1, 50, 100, 100, 2),
        (1, 8, 200, 60, 420, 40),
        (2, 4, 90, 90, 350, 9),
        (3, 6, 400, 80, 470, 30),
        (3, 2, 10, 70, 140, 1),
        (3, 9, 900, 10, 90, 5),
    ):
        times = 1.5 + 0.3 * (hosts - 1)
        decoded = (tokens - requests) / steps * (prompt + 25)
        # In the last layer what was decoded and what is sampled of prompts.
        rows = (layers - 1) * round(decoded) + round(decoded + requests / steps * prompt)
        router = steps * rows * 1e-6 * times + steps * 1e-3 + tokens * 2e-5 + requests * 5e-4
        host = steps * moe * hosts * 1e-4 * times
        runs.append(ServedRun(10.0, 1, hosts, streams, prompt, 50, steps, tokens, 0, requests, router, host, 0.1))
    constants, missed = served_constants(alone, parts, idle, runs)
    assert constants.router_process == pytest.approx(0.2)
    assert constants.host_process == pytest.approx(0.2)
    assert constants.layer_row == pytest.approx(1.5e-6)
    assert constants.step == pytest.approx(1e-3)
    assert constants.step_row == pytest.approx(2e-5)
    assert constants.admission == pytest.approx(5e-4)
    assert constants.host == pytest.approx(1.5e-4)
    alone_s = runs[0].router_cpu + runs[0].host_cpu
    assert constants.wake == pytest.approx((10.0 - alone_s) / (2 * moe * 100)), "where there is one stream"
    assert missed["routers of a server"] == pytest.approx(0.0, abs=1e-6)
