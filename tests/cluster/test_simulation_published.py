"""Published deployments: the simulation comes within 30% of each, with constants that were not taken from any of them."""

from __future__ import annotations

import pytest

from moray.cluster.planning.assumptions import Assumption
from moray.cluster.planning.sizes import model_sizes
from moray.cluster.simulation.published import DEEPSEEK_V3, DEPLOYMENTS, Published, compare
from moray.model.compute import Compute

from .plan_models import R1_CONFIG

COMPARABLE = [deployment for deployment in DEPLOYMENTS if not deployment.caveat]


@pytest.mark.parametrize("deployment", COMPARABLE, ids=lambda deployment: deployment.name)
def test_the_simulation_comes_within_30_percent(deployment: Published) -> None:
    comparison = compare(deployment)
    assert 0.7 <= comparison.ratio <= 1.3, f"{comparison.simulated:.0f} of {deployment.reported:.0f} tokens/s a node"


def test_a_simulation_gives_the_same_twice() -> None:
    deployment = next(d for d in COMPARABLE if d.stage == "prefill")
    assert compare(deployment) == compare(deployment)


def test_both_stages_and_more_than_one_operator_are_among_those_that_are_compared() -> None:
    assert {d.stage for d in COMPARABLE} == {"prefill", "decode"}
    assert len({d.name.split()[0] for d in COMPARABLE}) > 1
    assert all(d.source for d in DEPLOYMENTS)


def test_every_constant_has_a_source_and_is_not_a_guess() -> None:
    found: set[Assumption] = {assumption for d in DEPLOYMENTS for assumption in d.assumptions}
    assert found
    for assumption in found:
        assert assumption.source, assumption
        assert "guess" not in assumption.source, assumption


def test_the_architecture_is_the_published_one() -> None:
    import torch

    compute = Compute(torch.device("meta"), torch.bfloat16, keep_fp8=True)
    here, there = model_sizes(DEEPSEEK_V3, compute), model_sizes(R1_CONFIG, compute)
    assert here.parameters == there.parameters
    assert here.disk_total == there.disk_total
