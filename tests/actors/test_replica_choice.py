"""Replica choice: every pair goes to a replica of its expert, and the hosts' pairs come out even."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.replica_choice import choose_replicas, pour
from moray.cluster.shared_load import shared_load


def tables(replicas: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hosts of each expert's replicas [R, E] and their count [E]."""
    hosts = torch.zeros((max(map(len, replicas)), len(replicas)), dtype=torch.int64)
    for expert, where in enumerate(replicas):
        hosts[: len(where), expert] = torch.tensor(where)
    return hosts, torch.tensor([len(where) for where in replicas])


def pairs_per_host(choice: torch.Tensor, topk_ids: torch.Tensor, hosts: torch.Tensor, n: int) -> list[int]:
    return torch.bincount(hosts[choice, topk_ids].flatten(), minlength=n).tolist()


@st.composite
def steps(draw: st.DrawFn) -> tuple[torch.Tensor, list[list[int]], int]:
    n, experts = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    replicas = [
        draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True), f"replicas of {e}")
        for e in range(experts)
    ]
    tokens, k = draw(st.integers(0, 40)), draw(st.integers(1, min(4, experts)))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    rows = [generator.choice(experts, k, replace=False) for _ in range(tokens)]
    topk_ids = np.stack(rows) if rows else np.zeros((0, k), dtype=np.int64)
    return torch.from_numpy(topk_ids.astype(np.int64)), replicas, n


@settings(max_examples=200, deadline=None, derandomize=True)
@given(step=steps())
def test_any_step(step: tuple[torch.Tensor, list[list[int]], int]) -> None:
    topk_ids, replicas, n = step
    hosts, count = tables(replicas)
    choice = choose_replicas(topk_ids, hosts, count)
    assert choice.shape == topk_ids.shape
    assert choice.dtype == torch.int64
    assert bool((choice >= 0).all())
    assert bool((choice < count[topk_ids]).all())
    assert torch.equal(choice, choose_replicas(topk_ids, hosts, count)), "the same step, the same choice"
    busy = pairs_per_host(choice, topk_ids, hosts, n)
    if busy:
        by_row = torch.arange(len(topk_ids))[:, None] % count[topk_ids]
        assert max(busy) <= max(pairs_per_host(by_row, topk_ids, hosts, n)) + 1


def test_two_hosts_share_what_both_hold() -> None:
    # Expert 0 is on both hosts, 1 on the first alone: the second takes all of 0 until it is level.
    hosts, count = tables([[0, 1], [0]])
    topk_ids = torch.tensor([[0], [1], [0], [1], [0], [1], [0], [0]])
    choice = choose_replicas(topk_ids, hosts, count)
    assert pairs_per_host(choice, topk_ids, hosts, 2) == [4, 4]
    assert choice.flatten().tolist() == [0, 0, 1, 0, 1, 0, 1, 1], "runs, in the order of rows"


def test_faster_hosts_get_more() -> None:
    hosts, count = tables([[0, 1]])
    topk_ids = torch.zeros((40, 1), dtype=torch.int64)
    choice = choose_replicas(topk_ids, hosts, count, speed=[1.0, 3.0])
    assert pairs_per_host(choice, topk_ids, hosts, 2) == [10, 30]


def test_better_than_by_row_on_skewed_steps() -> None:
    generator = np.random.default_rng(0)
    weight = np.arange(1, 65, dtype=np.float64) ** -1.0
    replicas = [[e % 8, (e + 3) % 8] if e < 8 else [e % 8] for e in range(64)]
    hosts, count = tables(replicas)
    held = np.zeros((8, 64), dtype=np.bool_)
    for expert, where in enumerate(replicas):
        held[where, expert] = True
    worst: dict[str, list[float]] = {"row": [], "chosen": [], "best": []}
    for _ in range(20):
        rows = [generator.choice(64, 4, replace=False, p=weight / weight.sum()) for _ in range(64)]
        topk_ids = torch.from_numpy(np.stack(rows))
        by_row = torch.arange(64)[:, None] % count[topk_ids]
        worst["row"].append(max(pairs_per_host(by_row, topk_ids, hosts, 8)))
        worst["chosen"].append(max(pairs_per_host(choose_replicas(topk_ids, hosts, count), topk_ids, hosts, 8)))
        pairs = np.bincount(topk_ids.flatten().numpy(), minlength=64).astype(np.float64)
        worst["best"].append(float(shared_load(pairs, held, np.ones(8), until=1.0).max()))
    assert np.mean(worst["chosen"]) < 0.9 * np.mean(worst["row"])
    assert np.mean(worst["chosen"]) <= np.mean(worst["best"]) + 1.0, "tokens are whole: no better than one too many"


def test_pour() -> None:
    assert pour(6.0, [0.0, 2.0, 9.0], [1.0, 1.0, 1.0]) == pytest.approx([4.0, 2.0, 0.0])
    assert pour(8.0, [0.0, 0.0], [1.0, 3.0]) == pytest.approx([2.0, 6.0])
    assert pour(0.0, [5.0], [1.0]) == [0.0]
