"""What `moray status` prints."""

from __future__ import annotations

import io
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from moray.actors.messages import ClusterStatus, Event, ProcessStatus, RouterStats
from moray.cluster.status_text import age, print_status

NOW = 1_000_000.0

FINE = ClusterStatus(
    "tiny-r1",
    7,
    "ok",
    "",
    [
        ProcessStatus("expert-host-0", "expert_host", 11, "10.0.0.1", "ready", data_bytes_read=2_000_000),
        ProcessStatus("router-0", "router", 12, "10.0.0.1", "ready"),
    ],
    [
        RouterStats(
            "router-0",
            running=3,
            pages_total=10,
            pages_free=4,
            prompt_tokens=30,
            prefix_hit_tokens=90,
            generated_tokens=99,
        )
    ],
)


def lines(status: ClusterStatus) -> list[str]:
    """Printed as on a terminal of 160 columns, without colours and runs of spaces."""
    out = io.StringIO()
    print_status(asdict(status), Console(file=out, width=160), now=NOW)
    return [" ".join(line.split()) for line in out.getvalue().splitlines() if line.strip()]


def test_a_cluster_that_is_fine() -> None:
    assert lines(FINE) == [
        "tiny-r1 ok epoch 7 balance 1.00",
        "id role pid node state read detail",
        "expert-host-0 expert host 11 10.0.0.1 ready 2.0 MB",
        "router-0 router 12 10.0.0.1 ready 0.0 MB",
        "router running waiting pages free cached in use total hits tokens out",
        "router-0 3 0 4 0 0 10 75% 99",
    ]


def test_what_processes_compute_with() -> None:
    """The standby is on a GPU."""
    mixed = replace(
        FINE,
        processes=[
            replace(FINE.processes[0], instructions="avx2"),
            replace(FINE.processes[1], instructions="avx512_bf16"),
            ProcessStatus("standby-0", "expert_host", 13, "n", "standby"),
        ],
    )
    assert lines(mixed)[1:5] == [
        "id role pid node computes with state read detail",
        "expert-host-0 expert host 11 10.0.0.1 avx2 ready 2.0 MB",
        "router-0 router 12 10.0.0.1 avx512_bf16 ready 0.0 MB",
        "standby-0 expert host 13 n standby 0.0 MB",
    ]


def test_how_many_drafts_were_right() -> None:
    drafting = replace(FINE, routers=[replace(FINE.routers[0], drafted_tokens=40, accepted_tokens=38)])
    assert lines(drafting)[-2:] == [
        "router running waiting pages free cached in use total hits tokens out drafts right",
        "router-0 3 0 4 0 0 10 75% 99 38 of 40",
    ]


def test_what_is_wrong_stands_out() -> None:
    sick = replace(
        FINE,
        health="degraded",
        reason="expert-host-0 is stuck: silent for 4 s; [h1] is late",
        missing_replicas=8,
        min_replicas=2,
        balance=0.875,
        processes=[
            replace(FINE.processes[0], state="stuck", detail="silent for 4 s", data_bytes_copied=1_500_000),
            replace(FINE.processes[1], state="leaving"),
            ProcessStatus("standby-0", "expert_host", 13, "n", "standby"),
        ],
        routers=[
            RouterStats("r", late_hosts=["h1"], resent_shares=2, hedged_shares=5, fenced_hosts=1, unreachable_experts=4)
        ],
    )
    found = lines(sick)
    assert found[:3] == [
        "tiny-r1 degraded epoch 7 balance 0.88 8 experts below 2 replicas",
        "expert-host-0 is stuck: silent for 4 s",
        "[h1] is late",
    ]
    assert "expert-host-0 expert host 11 10.0.0.1 stuck 2.0 MB + 1.5 copied silent for 4 s" in found
    assert "router-0 router 12 10.0.0.1 leaving 0.0 MB" in found
    assert "standby-0 expert host 13 n standby 0.0 MB" in found
    assert "r: 4 unreachable, late h1, resent 2, hedged 5, fenced 1" in found


def test_the_last_events_the_newest_first() -> None:
    events = [Event(NOW - 600 + i, "restored", f"expert-host-{i}", 1.234, "by [standby-0]") for i in range(11)]
    found = lines(replace(FINE, events=[*events, Event(NOW - 5, "changed", "8")]))
    start = found.index("ago event of took detail")
    assert found[start + 1 : start + 3] == ["5 s changed 8", "10 min restored expert-host-10 1.23 s by [standby-0]"]
    assert len(found) == start + 11, "ten of them"


def test_without_the_controller_only_what_is_known() -> None:
    found = lines(ClusterStatus("tiny-r1", 0, "degraded", "the controller does not answer", [], FINE.routers))
    assert found[:2] == ["tiny-r1 degraded", "the controller does not answer"]
    assert found[-1].startswith("router-0")
    assert len(found) == 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text
