"""All layers of a step in one native call give the bits, the accounts and the errors of the layers one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moray.actors.testing import EngineParts
from moray.model.compute import Compute
from moray.model.testing import write_random_checkpoint

from .whole_models import Model, Models, assert_equal, batch, batches, outputs

Make = Callable[..., Models]


@pytest.fixture
def models(parts: EngineParts) -> Iterator[Make]:
    """Makes hosts, and models that use them."""
    with contextlib.ExitStack() as stack:
        yield lambda *a, **o: stack.enter_context(contextlib.closing(Models(parts, *a, **o)))


def pairs(model: Model) -> dict[str, int]:
    return {host: view.pairs for host, view in model.dispatch.host_views().items()}


def assert_same_accounts(*models: Model) -> None:
    first, *others = models
    for other in others:
        assert other.dispatch.expert_tokens.tolist() == first.dispatch.expert_tokens.tolist()
        assert pairs(other) == pairs(first)
    for model in models:
        dispatch = model.dispatch
        assert (dispatch.resent_shares, dispatch.hedged_shares, dispatch.fenced_hosts) == (0, 0, 0)
        assert (dispatch.broken, dispatch.late_hosts) == ({}, [])
        model.assert_settled()


# ---- the same bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hosts", "replicas"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2)])
def test_the_bits_are_those_of_layers_one_by_one(models: Make, hosts: int, replicas: int) -> None:
    made = models(hosts, replicas=replicas)
    whole, single, python = made.model(), made.model(whole=False), made.model(native=False, whole=False)
    before = whole.layers
    wanted = outputs(python, batches())
    assert_equal(outputs(single, batches()), wanted)
    assert_equal(outputs(whole, batches()), wanted)
    calls = 2 * len(batches())
    assert whole.ran == [True] * calls
    assert whole.layers - before == calls * whole.routed
    assert_same_accounts(whole, single, python)


def test_no_shared_experts_and_several_dense_layers(tmp_path: Path) -> None:
    overrides = {"n_shared_experts": None, "first_k_dense_replace": 2, "num_hidden_layers": 4}
    path = write_random_checkpoint(tmp_path, overrides, dtype="fp8", seed=9)
    with (
        contextlib.closing(EngineParts(path, compute=Compute.native())) as parts,
        contextlib.closing(Models(parts, 2)) as made,
    ):
        whole, python = made.model(), made.model(native=False, whole=False)
        before = whole.layers
        assert_equal(outputs(whole, batches()), outputs(python, batches()))
        assert whole.layers - before == 2 * len(whole.ran) == 4 * len(batches())
        assert_same_accounts(whole, python)


def test_micro_batches_are_for_blocks(models: Make) -> None:
    made = models(2)
    whole, python = made.model(micro_batch_tokens=4), made.model(native=False, whole=False, micro_batch_tokens=4)
    some = [batch((0, 0, 7)), batch((1, 0, 8)), batch((0, 7, 1), (1, 8, 1), seed=1)]
    assert_equal(outputs(whole, some), outputs(python, some))
    assert whole.ran == [True] * 4, "eight tokens are two parts"
    assert_same_accounts(whole, python)
