"""Hosts that are lost, late, stuck or refuse within a layer: others take over at once, and the bits stay the same."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from moray.configs.errors import ExpertsUnavailableError

from .scripted_hosts import FIRST_LAYER, ScriptedCluster

BOTH = ((0, 1, 2, 3), (0, 1, 2, 3))
THREE = ((0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 0, 1))


def counts(cluster: ScriptedCluster) -> tuple[int, int, int]:
    dispatch = cluster.dispatch
    return dispatch.resent_shares, dispatch.hedged_shares, dispatch.fenced_hosts


def test_nothing_wrong() -> None:
    cluster = ScriptedCluster(*THREE)
    for layer in (3, 4):
        assert cluster.run(layer) < 0.02
    assert counts(cluster) == (0, 0, 0)
    assert [host.seen for host in cluster.hosts.values()] == [[3, 4]] * 3
    views = cluster.dispatch.host_views()
    assert all(view.linked and view.overdue_s == 0 and 0.004 <= view.latency_s < 0.02 for view in views.values())
    assert sum(view.pairs for view in views.values()) == 22 * 12


@pytest.mark.parametrize("when", ["sending", "waiting"])
@pytest.mark.parametrize("hosts", [BOTH, THREE], ids=["two", "three"])
def test_a_lost_hosts_pairs_go_to_others_within_the_layer(hosts: tuple[tuple[int, ...], ...], when: str) -> None:
    cluster = ScriptedCluster(*hosts)
    if when == "sending":
        cluster[0].dies_when_sent = True
    else:
        cluster[0].before_wait = lambda seconds: setattr(cluster[0], "dead", True)
    assert cluster.run() < 0.05
    resent, hedged, fenced = counts(cluster)
    assert 1 <= resent < len(hosts)
    assert (hedged, fenced) == (0, 0)
    assert list(cluster.dispatch.broken) == ["h0"]
    assert cluster.dispatch.missing == 0
    cluster.run()
    assert cluster[0].closed
    cluster.relink(0)
    cluster.run()
    assert cluster[0].seen == [FIRST_LAYER]
    assert cluster.dispatch.broken == {}


def test_all_hosts_but_one_are_lost() -> None:
    cluster = ScriptedCluster(*[range(4)] * 5)
    for index in range(4):
        cluster[index].dies_when_sent = True
    assert cluster.run() < 0.05
    assert (cluster.dispatch.missing, cluster.dispatch.unlinked) == (0, ["h0", "h1", "h2", "h3"])


def test_without_another_replica_the_layer_fails_and_can_be_tried_again() -> None:
    cluster = ScriptedCluster((0, 1), (2, 3))
    cluster[0].before_wait = lambda seconds: setattr(cluster[0], "dead", True)
    with pytest.raises(ExpertsUnavailableError, match=r"4 \(layer, expert\) pairs .* h0: closed the connection"):
        cluster.run(tokens=20)
    with pytest.raises(ExpertsUnavailableError, match="h0"):
        cluster.run()
    assert cluster[1].seen == [FIRST_LAYER], "nothing is sent while experts are missing"
    cluster.relink(0)
    for _ in range(3):
        assert cluster.run() < 0.05
    assert counts(cluster) == (0, 0, 0)


def test_a_refusal_is_taken_elsewhere_and_the_host_spared_for_a_while() -> None:
    cluster = ScriptedCluster(*BOTH)
    cluster[0].refuses = True
    assert cluster.run() < 0.05
    assert counts(cluster) == (1, 0, 0)
    assert cluster.dispatch.broken == {"h0": "h0 refused its work: out of memory"}
    cluster.run()
    assert cluster[0].seen == [FIRST_LAYER]
    cluster[0].refuses = False
    cluster.clock.now += 2
    cluster.run()
    assert len(cluster[0].seen) == 2
    assert cluster.dispatch.broken == {}


def test_an_expert_that_only_a_refusing_host_has_is_asked_of_it_again() -> None:
    cluster = ScriptedCluster((0, 1, 2, 3, 4), (0, 1, 2, 3))
    cluster[0].refuses = True
    for _ in range(3):
        with pytest.raises(ExpertsUnavailableError, match="h0 refused its work: out of memory"):
            cluster.run(experts=[0, 4])
    assert len(cluster[0].seen) == 3
    cluster[0].refuses = False
    cluster.run(experts=[0, 4])
    assert (len(cluster[0].seen), cluster.dispatch.broken) == (4, {})


@pytest.mark.parametrize("hosts", [BOTH, THREE], ids=["two", "three"])
def test_a_stopped_host_costs_little_and_then_nothing(hosts: tuple[tuple[int, ...], ...]) -> None:
    cluster = ScriptedCluster(*hosts)
    cluster[0].frozen = True
    assert 0.05 < cluster.run() < 0.1
    resent, hedged, fenced = counts(cluster)
    assert 1 <= hedged < len(hosts)
    assert (resent, fenced) == (0, 0)
    assert cluster.dispatch.late_hosts == ["h0"]
    for _ in range(5):
        assert cluster.run() < 0.02
    assert cluster[0].seen == [FIRST_LAYER], "a late host is given nothing that others have"
    view = cluster.dispatch.host_views()["h0"]
    assert view.linked
    assert 0 < view.overdue_s < 0.2
    assert cluster.dispatch.missing == 0


def test_a_late_hosts_reply_is_dropped_and_it_is_a_host_like_others_again() -> None:
    cluster = ScriptedCluster(*BOTH)
    cluster[0].frozen = True
    cluster.run()
    cluster[0].frozen = False
    for _ in range(2):
        assert cluster.run() < 0.02
    assert cluster.dispatch.late_hosts == []
    assert cluster.dispatch.host_views()["h0"].overdue_s == 0
    assert len(cluster[0].seen) == 1, "it is spared for some time"
    cluster.clock.now += 0.25
    assert cluster.run() < 0.02
    assert len(cluster[0].seen) == 2
    assert counts(cluster) == (0, 1, 0)


def test_a_host_that_was_late_is_asked_where_no_other_has_its_experts() -> None:
    cluster = ScriptedCluster((0, 1, 2, 3, 4), (0, 1, 2, 3))
    cluster[0].frozen = True
    cluster.run(experts=[0, 1])
    cluster[0].frozen = False
    for _ in range(2):
        cluster.run(experts=[0, 1])
    assert cluster.dispatch.late_hosts == []
    seen = len(cluster[0].seen)
    assert cluster.run(experts=[0, 4]) < 0.02
    assert len(cluster[0].seen) == seen + 1


def test_the_late_host_may_answer_before_the_one_that_was_asked_instead() -> None:
    cluster = ScriptedCluster(*BOTH)
    cluster[0].frozen = True
    cluster[1].takes_s = 0.001

    def slow_down(seconds: float) -> None:
        if len(cluster[1].seen) == 2:  # its own share, and now the late host's
            cluster[0].frozen, cluster[1].takes_s = False, 0.5

    cluster[1].before_wait = slow_down
    assert cluster.run() < 0.1
    cluster[1].before_wait, cluster[1].takes_s = lambda seconds: None, 0.004
    cluster.clock.now += 0.5
    for _ in range(3):
        cluster.run()
    assert counts(cluster)[1] == 1
    assert cluster.dispatch.late_hosts == []


def test_hosts_that_stop_one_after_the_other() -> None:
    cluster = ScriptedCluster(*[range(4)] * 4)
    for index in range(3):
        cluster[index].frozen = True
    assert cluster.run() < 0.15
    assert cluster.dispatch.late_hosts == ["h0", "h1", "h2"]
    assert cluster.run() < 0.02
    thaws_at = cluster.clock.now + 0.5
    cluster[1].before_wait = lambda seconds: setattr(cluster[1], "frozen", cluster.clock.now < thaws_at)
    cluster[3].dies_when_sent = True
    assert 0.5 < cluster.run() < 0.55, "late ones are asked where nobody else is left, and all of them listened to"
    assert (cluster.dispatch.unlinked, cluster.dispatch.late_hosts) == (["h3"], ["h0", "h2"])


def test_an_expert_that_only_a_late_host_has_is_waited_for() -> None:
    cluster = ScriptedCluster((0, 1, 2, 3, 4), (0, 1, 2, 3))
    cluster[0].frozen = True
    thaws_at = cluster.clock.now + 4
    cluster[0].before_wait = lambda seconds: setattr(cluster[0], "frozen", cluster.clock.now < thaws_at)
    assert 4 < cluster.run(tokens=30, experts=[0, 1, 4]) < 4.1
    assert cluster.dispatch.late_hosts == []
    assert counts(cluster) == (0, 1, 0), "hedged is what another host has"
    assert cluster.run(experts=[0, 4]) < 0.05


def test_work_only_a_late_host_can_do_is_given_to_it_without_a_wait_to_send() -> None:
    """It owes two frames then; what it is not asked for queues on this side."""
    cluster = ScriptedCluster((0, 1, 2, 3, 4), (0, 1, 2, 3), reply_timeout_s=3.0)
    cluster[0].frozen = True
    cluster.run(experts=[0, 1, 2, 3])
    with pytest.raises(ExpertsUnavailableError, match=r"h0: was silent for 3\.\d+ s"):
        cluster.run(experts=[4, 1])
    assert counts(cluster) == (0, 1, 1)
    assert cluster.dispatch.missing == 2
    cluster.relink(0)
    assert cluster.run(experts=[4, 1]) < 0.05


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_host_that_stays_silent_is_fenced(busy: bool, caplog: pytest.LogCaptureFixture) -> None:
    cluster = ScriptedCluster(*BOTH)
    cluster[0].frozen = True
    cluster.run()
    began = cluster.clock.now
    while not cluster[0].closed:
        assert cluster.clock.now < began + 1.2
        if busy:
            cluster.run()
        else:
            cluster.clock.now += 0.1
            cluster.dispatch.check()
    assert cluster.clock.now > began + 0.8
    assert counts(cluster) == (0, 1, 1)
    assert cluster.dispatch.late_hosts == []
    assert not cluster.dispatch.host_views()["h0"].linked
    assert sum("event=fenced host=h0 silent_s=1.0" in line for line in caplog.messages) == 1
    cluster.run()
    cluster.relink(0)
    cluster.run()
    assert cluster[0].seen == [FIRST_LAYER]


def test_nothing_is_known_of_a_host_at_first_so_that_it_gets_more_time() -> None:
    cluster = ScriptedCluster(*BOTH, warm=False)
    cluster[0].takes_s = cluster[1].takes_s = 0.9
    assert cluster.run() < 1
    assert counts(cluster) == (0, 0, 0)
    cluster[0].frozen = True
    assert 1 < cluster.run() < 2.2
    assert cluster.dispatch.late_hosts == ["h0"]


def test_jitter_is_not_lateness() -> None:
    cluster = ScriptedCluster(*THREE)
    chance = random.Random(0)
    for _ in range(200):
        for host in cluster.hosts.values():
            host.takes_s = 0.004 if chance.random() < 0.9 else 0.055
        cluster.run()
    assert counts(cluster) == (0, 0, 0)


def test_a_long_prompt_is_not_lateness_but_a_stopped_host_is_found_beside_it() -> None:
    cluster = ScriptedCluster(*BOTH)
    for _ in range(10):
        for host in cluster.hosts.values():
            host.takes_s = 0.3
        cluster.run(tokens=300)
        for host in cluster.hosts.values():
            host.takes_s = 0.004
        cluster.run()
    assert counts(cluster) == (0, 0, 0)
    cluster[1].frozen = True
    assert cluster.run() < 0.1


def test_a_host_that_is_slow_for_good_is_tried_now_and_then() -> None:
    cluster = ScriptedCluster(*BOTH)
    cluster[0].takes_s = 0.15
    began = cluster.clock.now
    for _ in range(2000):
        cluster.run()
    taken = cluster.clock.now - began
    hedged = cluster.dispatch.hedged_shares
    assert 3 <= hedged < 12, "the pauses grow"
    assert taken < 2000 * 0.01, "the other one does its work"
    assert cluster.dispatch.fenced_hosts == 0
    cluster[0].takes_s = 0.004
    cluster.clock.now += 20.0
    seen = len(cluster[0].seen)
    for _ in range(10):
        cluster.run()
    assert len(cluster[0].seen) >= seen + 9, "fast again, it is a host like the other"


def test_time_in_which_the_router_itself_was_held_up_does_not_count() -> None:
    cluster = ScriptedCluster(*BOTH)
    pauses = iter([3.0])
    cluster[0].takes_s = 0.03

    def held_up(seconds: float) -> None:
        if seconds:
            cluster.clock.now += next(pauses, 0.0)

    cluster[0].before_wait = held_up
    cluster.run()
    assert next(pauses, None) is None
    assert counts(cluster) == (0, 0, 0)


def test_pairs_are_counted_once_however_often_they_are_sent() -> None:
    cluster = ScriptedCluster(*BOTH, warm=False)
    expected = np.zeros((2, 4), dtype=np.int64)

    def run(layer: int) -> None:
        state = cluster._generator.get_state()
        _, topk_ids, _ = cluster.step()
        cluster._generator.set_state(state)
        expected[layer - FIRST_LAYER] += torch.bincount(topk_ids.flatten(), minlength=4).numpy()
        cluster.run(layer)

    for layer in [3, 4] * 10:
        run(layer)
    cluster[0].frozen = True
    run(3)
    cluster[1].refuses = True
    cluster[0].frozen = False
    run(4)
    cluster[1].dies_when_sent = True
    cluster.clock.now += 2
    run(4)
    assert min(counts(cluster)[:2]) >= 1
    assert np.array_equal(cluster.dispatch.expert_tokens, expected)


def test_a_new_table_is_adopted_while_a_host_is_late() -> None:
    cluster = ScriptedCluster(*THREE)
    cluster[0].frozen = True
    cluster.run()
    table = cluster.place(2, (0, 1, 4, 5), (2, 3, 4, 5), (0, 1, 2, 3))
    for host in cluster.hosts.values():
        host.serve(table)
    cluster.dispatch.adopt(table, {})
    assert cluster.run() < 0.02
    assert cluster.dispatch.late_hosts == ["h0"]
    cluster.dispatch.adopt(cluster.place(3, *THREE), {})
    for host in cluster.hosts.values():
        host.serve(cluster.dispatch.table)
    cluster[0].frozen = False
    for _ in range(2):
        cluster.run()
    assert cluster.dispatch.late_hosts == []
    shorter = cluster.place(4, (), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5))
    without = type(shorter)(4, FIRST_LAYER, 6, {h: s for h, s in shorter.slots.items() if h != "h0"})
    for host in cluster.hosts.values():
        host.serve(without)
    cluster.dispatch.adopt(without, {})
    assert cluster[0].closed
    assert list(cluster.dispatch.host_views()) == ["h1", "h2"]
    cluster.run()


@pytest.mark.parametrize("seed", range(12))
def test_any_faults_in_any_order(seed: int) -> None:
    """As long as an expert has a host that answers, every result is right, no send waits, and little time is lost."""
    chance = random.Random(seed)
    cluster = ScriptedCluster(*[[e for e in range(6) if (e + h) % 4 < 2] for h in range(4)], reply_timeout_s=5.0)
    for round in range(120):
        # Hosts h and h + 1 share experts: one of the first two and one of the last two may be in trouble, not neighbours.
        trouble = chance.choice([(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
        for index in range(4):
            host = cluster[index]
            if host.dead or host.closed:
                if chance.random() < 0.5:
                    cluster.relink(index)
            elif index not in trouble:
                host.frozen = host.refuses = host.dies_when_sent = False
            elif chance.random() < 0.4:
                setattr(host, chance.choice(["frozen", "refuses", "dies_when_sent"]), True)
            cluster[index].takes_s = chance.choice([0.001, 0.004, 0.02])
        if chance.random() < 0.1:
            cluster.dispatch.check()
        try:
            cluster.run(3 + round % 2, tokens=chance.choice([1, 4, 40]))
        except ExpertsUnavailableError:
            usable = {i for i in range(4) if not (cluster[i].dead or cluster[i].closed or cluster[i].refuses)}
            reached = {e for i in usable for e in cluster.table.slots[f"h{i}"][0]}
            assert reached != set(range(6)), "every expert had a host"
        cluster.clock.now += chance.choice([0.0, 0.01, 0.3])
    for index in range(4):
        if cluster[index].closed or cluster[index].dead:
            cluster.relink(index)
        cluster[index].frozen = cluster[index].refuses = cluster[index].dies_when_sent = False
    cluster.clock.now += 2
    for _ in range(4):
        cluster.run()
    assert cluster.dispatch.late_hosts == []
    assert cluster.dispatch.missing == 0
