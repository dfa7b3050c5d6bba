"""All layers of a step in one native call give the bits, the accounts and the errors of the layers one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from moray.actors import testing
from moray.actors.links import LinkKind
from moray.actors.messages import GenerateRequest
from moray.actors.placement_table import COLD_HOST, PlacementTable
from moray.actors.testing import EngineParts, random_prompt
from moray.kernels.attention_plan import Segment
from moray.model.compute import Compute
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint

from .real_hosts import router_ends
from .whole_models import Model, Models, assert_equal, batch, batches, outputs, run_of

Make = Callable[..., Models]

SPARED = 2
"""Of `batches()`, those of which `forward` takes only the sampled rows through the last layer: in a run of its own."""


@pytest.fixture
def models(parts: EngineParts) -> Iterator[Make]:
    """Makes hosts, and models that use them."""
    with contextlib.ExitStack() as stack:
        yield lambda *a, **o: stack.enter_context(contextlib.closing(Models(parts, *a, **o)))


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineParts]:
    path = write_random_checkpoint(tmp_path_factory.mktemp("drafting"), dtype="fp8", seed=4, mtp=True)
    with contextlib.closing(EngineParts(path, compute=Compute.native(), drafts="on")) as parts:
        yield parts


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
    assert whole.ran == [True] * (calls + SPARED)
    assert whole.layers - before == calls * whole.routed
    assert_same_accounts(whole, single, python)


def test_where_experts_have_several_replicas_native_code_chooses(models: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = models(3, replicas=2)
    whole, python = made.model(), made.model(native=False, whole=False)
    whole.warm()
    python.warm()

    def never(*_: object) -> NoReturn:
        raise AssertionError("nothing is left to Python")

    monkeypatch.setattr(whole.dispatch, "start", never)
    assert_equal(outputs(whole, batches()), outputs(python, batches()))
    assert pairs(whole) == pairs(python), "and the same ones"


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
        assert whole.ran == [True] * (2 * len(batches()) + SPARED)
        assert whole.layers - before == 4 * len(batches())
        assert_same_accounts(whole, python)


def test_micro_batches_are_for_blocks(models: Make) -> None:
    made = models(2)
    whole, python = made.model(micro_batch_tokens=4), made.model(native=False, whole=False, micro_batch_tokens=4)
    some = [batch((0, 0, 7)), batch((1, 0, 8)), batch((0, 7, 1), (1, 8, 1), seed=1)]
    assert_equal(outputs(whole, some), outputs(python, some))
    assert whole.ran == [True] * 4, "eight tokens are two parts"
    assert_same_accounts(whole, python)


def test_where_experts_share_the_cores_there_is_one_part(models: Make) -> None:
    made = models(2)
    whole = made.model(micro_batch_tokens=4, elsewhere=lambda: False)
    python = made.model(native=False, whole=False, micro_batch_tokens=4)
    some = [batch((0, 0, 7)), batch((1, 0, 8))]
    assert_equal(outputs(whole, some), outputs(python, some))
    assert whole.ran == [True] * 4, "eight tokens too"


# ---- other tables, links and hosts ---------------------------------------------------------------------------------------


def assert_same_batches(made: Models, *, native: bool = True) -> None:
    """All batches, natively."""
    whole, python = made.made
    before, ran = whole.layers, len(whole.ran)
    assert_equal(outputs(whole, batches()), outputs(python, batches()))
    assert all(whole.ran[ran:])
    assert (whole.layers - before == 2 * len(batches()) * whole.routed) == native
    assert_same_accounts(whole, python)


def test_a_new_table_is_used_from_the_next_step_on(models: Make, checkpoint: Path) -> None:
    """Experts change hosts, and a host leaves: keys of the table before would lead to slots of other experts."""
    made = models(3)
    made.model()
    made.model(native=False, whole=False)
    assert_same_batches(made)
    first, second, third = made.table.slots.values()
    swapped = {"expert-host-0": second, "expert-host-1": first, "expert-host-2": third}
    two = made.parts.table(2).slots
    for epoch, slots in enumerate((swapped, {host: two[host][::-1] for host in two}), start=2):
        for host in made.hosts:
            if host.host_id in slots:
                host.load(checkpoint, slots[host.host_id], epoch=epoch)
        for model in made.made:
            model.dispatch.adopt(replace(made.table, epoch=epoch, slots=slots), {})
            model.warm()
        assert_same_batches(made)


def test_a_new_link_is_used_from_the_next_step_on(models: Make) -> None:
    made = models(2)
    whole = made.model()
    made.model(native=False, whole=False)
    assert_same_batches(made)
    old = router_ends(whole.dispatch)
    for host in made.hosts:
        whole.dispatch.set_link(host.host_id, made.parts.link(host, "shm"))
    for model in made.made:
        model.warm()
    sent = [end._state.sent for end in old]
    assert_same_batches(made)
    assert [end._state.sent for end in old] == sent


@pytest.mark.parametrize("kind", ["inline", "gloo"])
def test_a_host_over_another_link_is_asked_by_python(models: Make, kind: LinkKind) -> None:
    made = models(2)
    whole = made.model()
    made.model(native=False, whole=False)
    whole.dispatch.set_link("expert-host-1", made.parts.link(made.hosts[1], kind))
    assert_same_batches(made, native=False)


def with_cold(parts: EngineParts) -> PlacementTable:
    """A cold host has replicas of everything that two others hold."""
    table = parts.table(2)
    return replace(table, slots={**table.slots, f"{COLD_HOST}0": parts.table(1).slots["expert-host-0"]})


@pytest.mark.parametrize("what", ["late", "slow_until", "refused_until"])
def test_who_is_asked_follows_how_the_hosts_are(models: Make, parts: EngineParts, what: str) -> None:
    made = models(3, table=with_cold(parts))
    whole, python = made.model(), made.model(native=False, whole=False)
    first, second, cold = router_ends(whole.dispatch)
    for bad in (False, True, False):
        for model in made.made:
            line = model.dispatch._hosts.lines["expert-host-0"]
            setattr(line, what, bad if what == "late" else model.clock() + 1000 * bad)
            model.warm()
        before = [end._state.sent for end in (first, second, cold)]
        layers = whole.layers
        assert_equal(outputs(whole, batches()), outputs(python, batches()))
        assert whole.layers - layers == 2 * len(batches()) * whole.routed
        asked = [end._state.sent > sent for end, sent in zip((first, second, cold), before, strict=True)]
        assert asked == [not bad, True, bad]
        assert pairs(whole) == pairs(python)
    assert all(whole.ran)


def test_what_was_described_once_is_described_again_for_other_routes(models: Make, parts: EngineParts) -> None:
    made = models(3, table=with_cold(parts))
    whole = made.model()
    run, layers = run_of(whole.dispatch), whole.transformer._layers
    one = batch((0, 0, 3))
    whole.transformer.hidden_states(one)
    routes, described = run._routes, run._described
    whole.transformer.hidden_states(one)
    assert run._routes is routes
    assert run._described is described
    whole.transformer.forward(batch((1, 0, 40)))
    assert run._described is described, "also where the last layer is run apart"
    assert run._layers is layers
    whole.dispatch._hosts.lines["expert-host-0"].late = True
    whole.transformer.hidden_states(one)
    assert run._routes is not routes
    for mapping, table in ((routes, described), (run._routes, run._described)):
        keys = [layer.routes.keys for layer in table[1:]]
        assert keys == [where.keys.ctypes.data for where in mapping.values()]


# ---- accounts ------------------------------------------------------------------------------------------------------------


def test_hosts_tell_how_fast_they_are(models: Make) -> None:
    made = models(2)
    whole = made.model()
    lines = list(whole.dispatch._hosts.lines.values())
    seen = [line.latency._all.seen for line in lines]
    sums, waited = pairs(whole), whole.dispatch.wait_s
    for number in range(20):
        whole.transformer.hidden_states(batch((0, number, 1), (1, number, 3), seed=number))
    views = whole.dispatch.host_views()
    assert all(0 < view.latency_s < 60 for view in views.values())
    assert all(line.latency._all.seen - before <= 20 * whole.routed for line, before in zip(lines, seen, strict=True))
    assert all(line.latency._all.seen > before for line, before in zip(lines, seen, strict=True))
    assert sum(pairs(whole).values()) - sum(sums.values()) == 20 * whole.routed * 4 * 2
    assert whole.dispatch.wait_s > waited


# ---- routers -------------------------------------------------------------------------------------------------------------


def requests(parts: EngineParts) -> list[GenerateRequest]:
    """Prompts of several lengths, greedy and sampled."""
    return [
        GenerateRequest(
            f"r{number}",
            random_prompt(parts.config, number, length),
            SamplingParams(10, temperature=temperature, seed=number, logprobs=2),
        )
        for number, (length, temperature) in enumerate([(1, 0.0), (9, 0.8), (40, 0.0), (23, 1.0), (70, 0.0)])
    ]


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize(("hosts", "replicas"), [(1, 1), (2, 1), (2, 2)])
def test_routers_give_the_same_tokens(drafting: EngineParts, hosts: int, replicas: int, drafts: int) -> None:
    found = []
    settings = replace(testing.SETTINGS, draft_tokens=drafts)
    for whole in (True, False):
        router = drafting.engine(hosts, "shm", settings, replicas=replicas)
        run = run_of(router.dispatch)
        if not whole:
            router.model._run_layers = None
        recorder = testing.run(router, requests(drafting))
        found.append([(recorder.tokens(r.request_id), recorder.logprobs(r.request_id)) for r in requests(drafting)])
        assert bool(run._described) == whole
        assert run.exchange.layers > 0
    assert found[0] == found[1]


@pytest.mark.parametrize(("link", "shares_cores", "parts"), [("shm", True, 1), ("shm", False, 2), ("gloo", True, 2)])
def test_two_parts_are_for_experts_elsewhere(
    drafting: EngineParts, link: LinkKind, shares_cores: bool, parts: int
) -> None:
    router = drafting.engine(2, link, replace(testing.SETTINGS, shares_cores=shares_cores))
    router.model.micro_batch_tokens = 4
    assert len(router.model._parts([Segment(0, 8, 0, [0])])) == parts
