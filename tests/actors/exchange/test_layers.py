"""A layer that is done natively must be what Python alone makes of it, to the bit; and so must layers side by side."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from moray.actors import native_exchange, testing
from moray.actors.links import LinkKind
from moray.actors.messages import GenerateRequest
from moray.actors.pending_experts import PendingExperts
from moray.actors.placement_table import EMPTY
from moray.actors.testing import EngineParts, random_prompt
from moray.model.sampling import SamplingParams

from .played_hosts import LAYERS, PlayedCluster, lent, outcome
from .real_hosts import EXPERTS, Pair, run, step

Pairs = Callable[..., Pair]
Play = Callable[..., PlayedCluster]

# ---- one layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hosts", "replicas"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
def test_the_bits_are_those_of_python_alone(pair: Pairs, hosts: int, replicas: int) -> None:
    """One token's experts are on two hosts at most, so that others are not asked; hosts lack some of several tokens."""
    both = pair(hosts, replicas=replicas)
    both.warm()
    before = both.layers
    for tokens in (1, 2, 5, 64):
        for seed in range(3):
            for layer in (1, 2):
                both.assert_same(step(tokens, seed), layer)
    assert both.layers - before == 24
    both.assert_same_accounts()


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_any_number_of_experts_a_token(pair: Pairs, top_k: int) -> None:
    both = pair(3, replicas=2)
    both.warm()
    for tokens in (1, 7):
        both.assert_same(step(tokens, top_k=top_k))
    both.assert_same_accounts()


def test_the_same_expert_twice_in_a_token_and_all_tokens_to_one_expert(pair: Pairs) -> None:
    both = pair(2)
    both.warm()
    hidden_states, _, weights = step(6)
    for ids in (torch.full((6, 2), 5), torch.tensor([[2, 2], [7, 7], [2, 7], [7, 2], [0, 0], [0, 7]])):
        both.assert_same((hidden_states, ids, weights))
    both.assert_same_accounts()


def test_batches_that_grow_are_pythons_once(pair: Pairs) -> None:
    """Arenas have to be made then: for the request, and in 100 tokens' case for the reply alone."""
    both = pair(1)
    both.assert_same(step(4), native=False)
    for tokens, native in [(4, 1), (100, 0), (100, 1), (500, 0), (4, 1), (500, 1), (3000, 0), (3000, 1), (1, 1)]:
        both.assert_same(step(tokens), native=bool(native))
    both.assert_same_accounts()


def test_nothing_to_compute(pair: Pairs) -> None:
    both = pair(2)
    both.warm()
    both.assert_same(step(0), native=False)
    both.assert_same(step(3))


def test_hosts_tell_how_fast_they_are(pair: Pairs) -> None:
    both = pair(2)
    both.warm()
    for seed in range(70):
        both.assert_same(step(3, seed))
    assert all(0 < view.latency_s < 60 for view in both.native.host_views().values())
    assert both.native.wait_s > 0


# ---- what is left to Python ----------------------------------------------------------------------------------------------


def test_memory_that_is_not_contiguous(pair: Pairs) -> None:
    both = pair(2)
    both.warm()
    hidden_states, ids, weights = step(6)
    wide = hidden_states.repeat_interleave(2, 1)[:, ::2]
    turned = ids.t().contiguous().t(), weights.t().contiguous().t()
    assert not any(memory.is_contiguous() for memory in (wide, *turned))
    both.assert_same((wide, *turned))
    assert torch.equal(run(both.native, (wide, *turned)), run(both.python, (hidden_states, ids, weights)))


@pytest.mark.parametrize("kind", ["fp32 hidden states", "fp16 hidden states", "32 bits of ids"])
def test_other_dtypes_are_pythons(pair: Pairs, kind: str) -> None:
    both = pair(2)
    both.warm()
    hidden_states, ids, weights = step(6)
    if kind == "32 bits of ids":  # which are experts in 64 bits as well, and so is the memory behind them
        pairs = torch.zeros(2 * ids.numel(), dtype=torch.int32)[: ids.numel()].view_as(ids)
        pairs[:, 0] = ids.amax(1)
        ids = pairs
    else:
        hidden_states = hidden_states.to(torch.float32 if "32" in kind else torch.float16)
    both.assert_same((hidden_states, ids, weights), native=False)
    both.assert_same(step(6))


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("wrong", [EXPERTS, EXPERTS + 1, 1000, -1, -EXPERTS, -EXPERTS - 1])
def test_experts_that_do_not_exist_are_pythons_to_refuse(pair: Pairs, replicas: int, wrong: int) -> None:
    both = pair(2, replicas=replicas)
    both.warm()
    for place in ((0, 0), (5, 1)):
        hidden_states, ids, weights = step(6)
        ids[place] = wrong
        found = outcome(run, both.native, (hidden_states, ids, weights))
        assert found == outcome(run, both.python, (hidden_states, ids, weights))
        assert isinstance(found, tuple), "an error"
        assert lent(both.native) == []
    assert both.layers == 1
    both.assert_same(step(6))
    assert both.native.expert_tokens.tolist() == both.python.expert_tokens.tolist()


@pytest.mark.parametrize("wrong", [1 << 16, 1 << 32, (1 << 32) + 1, -(1 << 32), (1 << 63) - 1])
def test_no_more_bits_of_an_expert_are_dropped(pair: Pairs, wrong: int) -> None:
    both = pair(2)
    both.warm()
    hidden_states, ids, weights = step(6)
    ids[3, 1] = wrong
    found = outcome(run, both.native, (hidden_states, ids, weights))
    assert found == outcome(run, both.python, (hidden_states, ids, weights))
    assert isinstance(found, tuple)
    both.assert_same(step(6))


def test_more_keys_than_16_bits_are_pythons(play: Play) -> None:
    far = [EMPTY] * 33_000
    for held, layers in (([(0, 1, 2), (*far, 3)], 0), ([(0, 1, 2), (*far[:20_000], 3)], 3)):
        cluster = play(*held)
        cluster.run()
        for layer in (3, 4, 3):
            cluster.run(layer=layer)
        assert cluster.layers == layers


def test_hosts_over_other_links_are_pythons(parts: EngineParts, pair: Pairs) -> None:
    both = pair(2)
    both.warm()
    links: Sequence[LinkKind] = "inline", "gloo"
    for link in links:
        both.native.set_link("expert-host-1", parts.link(both.hosts["expert-host-1"], link))
        both.assert_same(step(30), native=False)
        assert lent(both.native) == []
    hidden_states, _, weights = step(2)
    both.assert_same((hidden_states, torch.tensor([[0, 2], [4, 6]]), weights), native=True)  # host 0 has the even ones


# ---- several at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    [
        "+A1 +B1 -A1 -B1 +A2 +B2 -A2 -B2",
        "+A1 +B1 -B1 -A1 +B2 +A2 -A2 -B2",
        "+A1 +B1 -A1 +A2 -B1 +B2 -A2 -B2",
        "+A1 +B1 -B1 +B2 -A1 +A2 -B2 -A2",
        "+A1 -A1 +B1 +A2 -B1 +B2 -B2 -A2",
    ],
)
def test_two_micro_batches(pair: Pairs, order: str) -> None:
    """+ starts a batch's layer, - finishes it."""
    both = pair(2, replicas=2)
    both.warm()
    for seed in range(4):
        steps = {
            name: (step(tokens, 10 * seed + layer), layer)
            for tokens, batch in ((3, "A"), (4, "B"))
            for layer, name in ((1, f"{batch}1"), (2, f"{batch}2"))
        }
        claims: dict[str, PendingExperts] = {}
        for action in order.split():
            name = action[1:]
            one, layer = steps[name]
            if action.startswith("+"):
                claims[name] = both.native.start(layer, *one)
            else:
                assert torch.equal(both.native.finish(claims.pop(name)), run(both.python, one, layer))
        assert not claims
    both.assert_same(step(5))
    both.assert_same_accounts()


@pytest.mark.parametrize("wait_us", [0, 200, 30_000_000])
@pytest.mark.parametrize("seed", range(4))
def test_claims_in_any_order_some_of_them_abandoned(
    pair: Pairs, seed: int, wait_us: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native waits that end at once, now and then, and with the answers."""
    chance = random.Random(seed + wait_us)
    hosts = chance.choice([1, 2, 3])
    both = pair(hosts, replicas=chance.randint(1, hosts))
    both.warm()
    steps = [(step(chance.choice([1, 2, 9]), 100 * seed + n), chance.choice([1, 2])) for n in range(12)]
    wanted = [run(both.python, *one) for one in steps]
    claims: list[tuple[int, PendingExperts]] = []
    monkeypatch.setattr(native_exchange, "_WAIT_US", wait_us)
    for _ in range(150):
        action = chance.choice(["start", "start", "finish", "finish", "finish", "abandon", "check"])
        if action == "start" and len(claims) < 5:
            number = chance.randrange(len(steps))
            one, layer = steps[number]
            claims.append((number, both.native.start(layer, *one)))
        elif action == "finish" and claims:
            number, claim = claims.pop(chance.randrange(len(claims)))
            assert torch.equal(both.native.finish(claim), wanted[number])
        elif action == "abandon" and claims and chance.random() < 0.5:
            claims.pop(chance.randrange(len(claims)))
        elif action == "check":
            both.native.check()
    for number, claim in claims:
        assert torch.equal(both.native.finish(claim), wanted[number])
    assert both.layers > 1 or wait_us < 1_000_000, "some of it was native"
    assert (both.native.resent_shares, both.native.fenced_hosts) == (0, 0)
    assert lent(both.native) == []


def test_an_answer_in_a_links_memory_is_kept_while_the_next_layer_comes_there(play: Play) -> None:
    """The first claim's replies have come, but it is redeemed last; the second is asked and summed natively meanwhile."""
    cluster = play((0, 1, 2), (3, 4, 5))
    cluster.warm()
    first, second, later = cluster.step(), cluster.step(), [cluster.step() for _ in range(4)]
    a, b = cluster.dispatch.start(3, *first), cluster.dispatch.start(4, *second)
    cluster.answer_all()
    cluster.dispatch.check()  # takes the replies
    before = cluster.layers
    for one in later:
        cluster.run(one)
    assert cluster.layers - before == len(later)
    assert torch.equal(cluster.dispatch.finish(b), cluster.expected(second))
    assert torch.equal(cluster.dispatch.finish(a), cluster.expected(first))


# ---- claims that nobody redeems ------------------------------------------------------------------------------------------


@pytest.fixture(params=["answered", "not yet"])
def abandoned(request: pytest.FixtureRequest, play: Play) -> PlayedCluster:
    """A step was given up between `start` and `finish`."""
    cluster = play((0, 1, 2, 3), (2, 3, 4, 5))
    cluster.warm()
    assert cluster.exchange
    cluster.dispatch.start(3, *cluster.step())
    assert cluster.exchange.claim is not None
    if request.param == "answered":
        cluster.answer_all()
    return cluster


def assert_usable(cluster: PlayedCluster) -> None:
    """Its layers are right, and once nothing is owed any more, native."""
    for layer in (3, 4):
        cluster.run(layer=layer)
    before = cluster.layers
    cluster.run()
    assert cluster.layers - before == 1
    assert lent(cluster.dispatch) == []
    dispatch = cluster.dispatch
    assert (dispatch.resent_shares, dispatch.hedged_shares, dispatch.fenced_hosts) == (0, 0, 0)


def test_further_layers_after_an_abandoned_claim(abandoned: PlayedCluster) -> None:
    assert_usable(abandoned)


def test_a_check_after_an_abandoned_claim(abandoned: PlayedCluster) -> None:
    abandoned.dispatch.check()
    assert abandoned.exchange
    assert abandoned.exchange.claim is None
    assert_usable(abandoned)


def test_a_new_link_after_an_abandoned_claim(abandoned: PlayedCluster) -> None:
    old = abandoned.hosts.pop("h1")
    new = abandoned.hosts["h1"] = type(old)("h1", abandoned.table)
    abandoned.dispatch.set_link("h1", new.router_end)
    old.close()
    abandoned.run(abandoned.step(40))
    assert_usable(abandoned)


def test_a_new_table_after_an_abandoned_claim(abandoned: PlayedCluster) -> None:
    abandoned.answer_all()  # hosts serve the epoch of before until it is retired
    table = abandoned.place(2, (5, 4, 3, 2, 1), (0, 1, 2))
    for host in abandoned.hosts.values():
        host.table = table
    abandoned.dispatch.adopt(table, {})
    assert_usable(abandoned)
    for tokens in (1, 30):
        abandoned.run(abandoned.step(tokens))


def test_a_host_that_leaves_the_table_after_an_abandoned_claim(abandoned: PlayedCluster) -> None:
    abandoned.answer_all()
    table = abandoned.place(2, (0, 1, 2, 3, 4, 5))
    abandoned.hosts.pop("h1").link.close()
    abandoned[0].table = table
    abandoned.dispatch.adopt(table, {})
    abandoned.run(abandoned.step(40))
    assert_usable(abandoned)


def test_an_abandoned_claim_that_is_never_answered_makes_its_hosts_late(play: Play) -> None:
    cluster = play((0, 1), (2, 3))
    cluster.warm()
    cluster.dispatch.start(3, *cluster.step())
    cluster.clock.now += 1.5
    cluster.dispatch.check()
    assert cluster.dispatch.late_hosts == ["h0", "h1"]
    cluster.clock.now += 20
    cluster.dispatch.check()
    assert cluster.dispatch.unlinked == ["h0", "h1"]
    assert cluster.dispatch.fenced_hosts == 2


# ---- all of it -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [1, 2])
def test_the_same_tokens_with_and_without(parts: EngineParts, monkeypatch: pytest.MonkeyPatch, hosts: int) -> None:
    lengths: Sequence[int] = (1, 9, 40)
    requests = [
        GenerateRequest(f"r{n}", random_prompt(parts.config, n, length), SamplingParams(8, temperature=0.0, logprobs=2))
        for n, length in enumerate(lengths)
    ]
    found = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(testing, "native_exchange", lambda: None)
        router = parts.engine(hosts, "shm")
        claims = router.dispatch._native
        assert (claims is not None) == native
        recorder = testing.run(router, requests)
        found.append([(recorder.tokens(r.request_id), recorder.logprobs(r.request_id)) for r in requests])
        if claims is not None:
            assert claims.exchange.layers >= LAYERS * 4
    assert found[0] == found[1]
