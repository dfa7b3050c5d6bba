"""The simulation's parts by themselves: virtual time, traces, skews, draws of layers, devices and cores."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moray.actors.placement_table import PlacementTable
from moray.cluster.planning.traffic import done_frame, work_frame
from moray.cluster.simulation.draws import ExpertDraws, ReplicaChoice, Wire, draw_counts
from moray.cluster.simulation.events import VirtualTime
from moray.cluster.simulation.machines import Machines, OwnDevices, SharedCores
from moray.cluster.simulation.skew import ExpertPopularity, Skew, parse_skew
from moray.cluster.simulation.trace import (
    Arrival,
    Closed,
    Even,
    Fixed,
    Listed,
    LogNormal,
    Poisson,
    Prefixes,
    parse_lengths,
    read_trace,
)
from moray.configs.errors import ConfigError

from .simulation_sites import PLAIN, SMALL_CONFIG, small_site

# ---- virtual time ---------------------------------------------------------------------------------------------------


def test_actions_run_in_the_order_of_their_times_then_of_asking() -> None:
    clock, seen = VirtualTime(), list[tuple[str, float]]()

    def note(name: str) -> None:
        seen.append((name, clock.now))

    clock.at(2.0, lambda: note("late"))
    clock.at(1.0, lambda: note("first"))

    def soon() -> None:
        clock.after(0.0, lambda: note("third"))

    clock.at(1.0, soon)
    clock.at(1.0, lambda: note("second"))
    clock.at(1.5, lambda: note("never")).cancel()
    clock.at(9.0, lambda: note("beyond"))
    clock.run(until=5.0)
    assert seen == [("first", 1.0), ("second", 1.0), ("third", 1.0), ("late", 2.0)]
    assert clock.now == 5.0


def test_every_goes_on_until_somebody_stops_it() -> None:
    clock, at = VirtualTime(), list[float]()
    clock.every(0.5, lambda: at.append(clock.now))
    clock.at(1.75, clock.stop)
    clock.run()
    assert at == [0.5, 1.0, 1.5]
    assert clock.now == 1.75


# ---- traces ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_requests_and_another_gives_others() -> None:
    def of(seed: int) -> list[Arrival]:
        return list(itertools.islice(Poisson(3.0, LogNormal(100, 400), Fixed(7), seed=seed).arrivals(), 50))

    assert of(1) == of(1) != of(2)
    times = [arrival.at for arrival in of(1)]
    assert times == sorted(times)


def test_lengths() -> None:
    generator = np.random.default_rng(0)
    drawn = sorted(LogNormal(100, 400).draw(generator) for _ in range(20_000))
    assert 95 < drawn[10_000] < 105
    assert 380 < drawn[19_000] < 420
    assert {Fixed(5).draw(generator) for _ in range(9)} == {5}


def test_lengths_as_written(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text("3\n5\n")
    generator = np.random.default_rng(0)
    assert {parse_lengths(f"file:{file}").draw(generator) for _ in range(50)} == {3, 5}
    assert parse_lengths("12") == Fixed(12)
    assert parse_lengths("3-5") == Even(3, 5)
    assert {parse_lengths("3-5").draw(generator) for _ in range(50)} == {3, 4, 5}
    assert parse_lengths("lognormal:100:400") == LogNormal(100, 400)
    file.write_text("0\n")
    for wrong, told in (
        ("0", "at least 1"),
        ("many", "must be tokens: a number"),
        ("8-4", "end where it begins"),
        ("lognormal:400:100", "below the 95th percentile"),
        ("lognormal:400", "lognormal:MEDIAN:P95"),
        (f"file:{file}", "at least 1 on each line"),
        ("file:/nowhere", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=told):
            parse_lengths(wrong)


def test_a_closed_loop_sends_the_next_request_when_one_has_ended() -> None:
    trace = Closed(3, Fixed(5), Fixed(2), requests=4)
    assert [arrival.at for arrival in trace.arrivals()] == [0.0] * 3
    assert trace.next_of_client(7.5) == Arrival(7.5, 5, 2)
    assert trace.next_of_client(8.0) is None


def test_a_trace_of_one_of_several_twins() -> None:
    assert len(list(Closed(6, Fixed(5), Fixed(2)).shared_by(3).arrivals())) == 2
    with pytest.raises(ConfigError, match="multiple of 4"):
        Closed(6, Fixed(5), Fixed(2)).shared_by(4)
    listed = Listed([Arrival(float(at), 1, 1) for at in range(5)])
    assert [arrival.at for arrival in listed.shared_by(2).arrivals()] == [0.0, 2.0, 4.0]


def test_prefixes_leave_every_prompt_a_token_of_its_own() -> None:
    first = next(Poisson(1.0, Fixed(10), Fixed(1), prefixes=Prefixes(1, 500)).arrivals())
    assert (first.prefix, first.prefix_tokens) == (0, 9)


def test_a_trace_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 2}\n\n'
        '{"arrival_s": 1.5, "prompt_tokens": 9, "output_tokens": 1, "prefix": 4, "prefix_tokens": 6}\n'
    )
    assert list(read_trace(path).arrivals()) == [Arrival(0.0, 8, 2), Arrival(1.5, 9, 1, prefix=4, prefix_tokens=6)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nonsense", "line 1: is not JSON"),
        ("[1]", "line 1: must be an object"),
        ('{"arrival_s": 0, "prompt_tokens": 8}', "no output_tokens"),
        ('{"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 1, "user": 3}', "no such field: user"),
        ('{"arrival_s": -1, "prompt_tokens": 8, "output_tokens": 1}', "arrival_s = -1"),
        ('{"arrival_s": 0, "prompt_tokens": 1.5, "output_tokens": 1}', "prompt_tokens = 1.5"),
        ("", "holds no request"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=told):
        read_trace(path)


def test_a_trace_out_of_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="sort them"):
        Listed([Arrival(2.0, 1, 1), Arrival(1.0, 1, 1)])


# ---- skew -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [Skew(), Skew("zipf", 1.2), Skew("lognormal", 1.0)])
def test_no_expert_has_more_than_one_of_each_tokens_picks(skew: Skew) -> None:
    shares = ExpertPopularity(skew, 3, 64, 8, seed=0).shares(0)
    assert shares.shape == (3, 64)
    assert np.allclose(shares.sum(axis=1), 1.0)
    assert shares.max() <= (1 + 1e-9) / 8
    assert shares.min() > 0


def test_with_drift_others_become_hot_step_by_step() -> None:
    popularity = ExpertPopularity(Skew("zipf", 1.0, drift_s=80.0), 1, 64, 4, seed=0)
    assert [popularity.phase(at) for at in (0.0, 9.9, 10.0, 80.0)] == [0, 0, 1, 8]
    first, between, then = (popularity.shares(phase)[0] for phase in (0, 4, 8))
    assert np.array_equal(between, first + (then - first) * 0.5)
    assert int(first.argmax()) != int(then.argmax())
    assert ExpertPopularity(Skew("zipf", 1.0), 1, 64, 4, seed=0).phase(1e9) == 0


def test_a_skew_as_written() -> None:
    assert parse_skew("uniform") == Skew()
    assert parse_skew("zipf:0.8", drift_s=60.0) == Skew("zipf", 0.8, 60.0)
    for wrong in ("zipf", "zipf:x", "zipf:-1", "flat", "uniform:1"):
        with pytest.raises(ConfigError, match="zipf:EXPONENT"):
            parse_skew(wrong)


# ---- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 17, 1000])
def test_counts_of_a_draw(tokens: int) -> None:
    shares = ExpertPopularity(Skew("zipf", 1.2), 1, 16, 4, seed=0).shares(0)[0]
    counts = draw_counts(shares, tokens, 4, np.random.default_rng(0))
    assert counts.sum() == tokens * 4
    assert 0 <= counts.min() <= counts.max() <= tokens


def test_where_all_weight_is_on_too_few_experts_the_others_get_the_rest() -> None:
    shares = np.array([0.5, 0.5, 0.0, 0.0])
    assert draw_counts(shares, 5, 3, np.random.default_rng(0))[:2].tolist() == [5, 5]


def draws_of(table: PlacementTable, choice: ReplicaChoice = "least_busy") -> ExpertDraws:
    return ExpertDraws(
        table,
        {},
        popularity=ExpertPopularity(Skew("zipf", 0.8), 4, 16, 4, seed=0),
        costs=PLAIN,
        wire=Wire.of_moray(64, torch.bfloat16),
        choice=choice,
        top_k=4,
        seed=0,
    )


@pytest.mark.parametrize("choice", ["least_busy", "even"])
def test_a_draw_asks_for_every_pair_once(choice: ReplicaChoice) -> None:
    draws = draws_of(small_site(min_replicas=2).table, choice)
    for tokens in (1, 3, 32):
        draw = draws.draw(tokens, 0.0)
        assert draw.pairs.sum() == tokens * 4
        assert len(draw.hosts) == len(set(draw.hosts.tolist())) == len(draw.seconds)
        assert draw.seconds.tolist() == [PLAIN.host] * len(draw.hosts)
        assert 0 < draw.balance <= 1


def test_tokens_that_are_shared_out_step_by_step_are_balanced_better() -> None:
    table = small_site(min_replicas=2).table
    poured, dealt = (draws_of(table, choice) for choice in ("least_busy", "even"))
    assert sum(poured.draw(512, 0.0).balance for _ in range(32)) > sum(dealt.draw(512, 0.0).balance for _ in range(32))


def test_lost_hosts_are_not_asked() -> None:
    draws = draws_of(small_site(min_replicas=2).table)
    draws.exclude({"expert-host-1"})
    assert draws.unreachable == 0
    assert all(1 not in draws.draw(32, 0.0).hosts for _ in range(16))
    draws.exclude({"expert-host-0", "expert-host-1", "expert-host-2"})
    assert draws.unreachable > 0


@pytest.mark.parametrize(("rows", "pairs"), [(1, 1), (8, 24), (512, 1600)])
def test_bytes_on_the_wire_are_those_of_the_frames(rows: int, pairs: int) -> None:
    hidden = SMALL_CONFIG.hidden_size
    wire = Wire.of_moray(hidden, torch.bfloat16)
    # Parts of a payload are padded, and headers' numbers packed, to fewer bytes than these.
    slack = 64
    assert abs(wire.sent(rows, pairs, 1) - work_frame(rows, pairs, hidden, torch.bfloat16).total) <= slack
    assert abs(wire.received(rows, pairs, 1) - done_frame(pairs, hidden, torch.bfloat16).total) <= slack


# ---- machines -------------------------------------------------------------------------------------------------------


class Watched:
    """Machines whose work notes when it is done."""

    def __init__(self, machines: Machines, clock: VirtualTime) -> None:
        self.machines, self.clock = machines, clock
        self.done: dict[str, float] = {}
        self.lost: dict[str, float] = {}

    def compute(self, name: str, who: str, seconds: float, latency_s: float = 0.0) -> None:
        self.machines.compute(who, seconds, lambda: self.note(name), latency_s=latency_s)

    def ask(self, name: str, hosts: dict[int, float]) -> None:
        self.machines.ask(
            np.array(list(hosts)),
            np.array(list(hosts.values())),
            lambda: self.note(name),
            lambda left: self.lost.update({name: left}),
        )

    def note(self, name: str) -> None:
        self.done[name] = self.clock.now


def own(hosts: int) -> Watched:
    clock = VirtualTime()
    return Watched(OwnDevices(clock, hosts), clock)


def shared(hosts: int, cores: float, crowded: float | None = None) -> Watched:
    clock = VirtualTime()
    return Watched(SharedCores(clock, hosts, cores, cores if crowded is None else crowded), clock)


def test_a_device_does_one_thing_after_the_other_beside_the_others() -> None:
    at = own(2)
    at.ask("first", {0: 1.0, 1: 2.0})
    at.ask("second", {0: 1.0})
    at.compute("router", "router-0", 3.0, latency_s=0.5)
    at.compute("router again", "router-0", 1.0)
    at.clock.run()
    assert at.done == {"first": 2.0, "second": 2.0, "router": 3.5, "router again": 4.0}
    assert [at.machines.busy_s(host) for host in (0, 1)] == [2.0, 2.0]


def test_a_host_has_computed_what_it_has_until_now() -> None:
    at = own(1)
    at.ask("long", {0: 4.0})
    at.clock.run(until=1.0)
    assert at.machines.busy_s(0) == 1.0


def test_work_of_twins_keeps_a_host_from_what_others_ask_later() -> None:
    clock = VirtualTime()
    at = Watched(OwnDevices(clock, 1, times=3), clock)
    at.ask("first", {0: 1.0})
    at.ask("second", {0: 1.0})
    clock.run()
    assert at.done == {"first": 1.0, "second": 4.0}
    clock.run(until=9.0)
    assert at.machines.busy_s(0) == 6.0


@pytest.mark.parametrize("make", [lambda: own(2), lambda: shared(2, 8.0)])
def test_who_waits_for_a_lost_host_is_not_answered(make: Callable[[], Watched]) -> None:
    at = make()
    at.ask("of both", {0: 4.0, 1: 2.0})
    at.ask("of one", {1: 1.0})
    at.clock.run(until=1.0)
    found = at.machines.lose(0)
    at.ask("later", {0: 1.0, 1: 1.0})
    at.clock.run()
    assert "of both" not in at.done
    assert "later" not in at.done
    assert at.machines.busy_s(0) == 1.0
    given_up = at.machines.give_up(0)
    for ask in [*found, *given_up]:
        ask.lost(ask.left)
    assert at.lost["later"] == 1.0
    assert 0 < at.lost["of both"] <= 1.0
    at.machines.revive(0)
    at.ask("again", {0: 1.0})
    before = at.clock.now
    at.clock.run()
    assert at.done["again"] == before + 1.0


def test_what_nobody_waits_for_any_more_is_not_done() -> None:
    for at in (own(1), shared(1, 1.0)):
        ask = at.machines.ask(np.array([0]), np.array([4.0]), lambda: None, lambda left: None)
        at.machines.withdraw(ask)
        at.ask("next", {0: 1.0})
        at.compute("forgotten", "router-0", 1.0)
        at.machines.forget("router-0")
        at.clock.run()
        assert at.done == {"next": 1.0}


def test_processes_share_the_cores() -> None:
    at = shared(2, 2.0)
    at.compute("router", "router-0", 1.0)
    at.ask("hosts", {0: 1.0, 1: 1.0})
    at.clock.run()
    # Three on two cores: each at two thirds of a core.
    assert at.done == {"router": 1.5, "hosts": 1.5}
    assert at.machines.busy_s(0) == 1.0


def test_more_processes_than_cores_get_less_done() -> None:
    at = shared(2, 1.75, 1.5)
    at.ask("hosts", {0: 1.75, 1: 1.75})
    at.clock.run()
    assert at.done == {"hosts": 2.0}, "two on two cores, of which others take a quarter of one"
    at.compute("router", "router-0", 1.0)
    at.ask("crowd", {0: 1.0, 1: 1.0})
    at.clock.run()
    assert at.done == {"hosts": 2.0, "router": 4.0, "crowd": 4.0}


def test_who_has_cores_to_spare_gets_no_more_than_one() -> None:
    at = shared(1, 8.0)
    at.ask("alone", {0: 2.0})
    at.compute("router", "router-0", 1.0)
    at.compute("then", "router-0", 0.5)
    at.clock.run()
    assert at.done == {"alone": 2.0, "router": 1.0, "then": 1.5}


def test_cores_go_to_whoever_has_something_to_do_at_the_moment() -> None:
    at = shared(2, 1.0)
    at.ask("short", {0: 1.0})
    at.ask("long", {1: 3.0})
    at.clock.run()
    # Half a core each until the short one is done at 2, then all of it.
    assert at.done == {"short": 2.0, "long": 4.0}
