"""Health, status and metrics: what operators see of a cluster."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moray.actors.front.health import judged
from moray.actors.front.settings import FrontSettings
from moray.actors.messages import ClusterStatus, Event, ProcessStatus, RouterStats
from moray.configs.errors import QueueFullError

OK = ClusterStatus(
    model="toy-r1",
    epoch=7,
    health="ok",
    reason="",
    processes=[
        ProcessStatus("expert-host-0", "expert_host", 11, "n0", "ready"),
        ProcessStatus("expert-host-1", "expert_host", 12, "n0", "dead", "killed"),
        ProcessStatus("router-0", "router", 13, "n0", "ready"),
    ],
    routers=[RouterStats("router-0", running=2, waiting=1, pages_total=10, pages_free=4, steps=99, generated_tokens=5)],
)


def samples(text: str) -> dict[str, float]:
    """Every sample as `name{label="value",...}` without the front's own label and creation times."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "front")
            if not sample.name.endswith("_created"):
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


# --- health


@pytest.mark.parametrize(
    ("state", "code", "health"),
    [
        (OK, 200, "ok"),
        (replace(OK, health="degraded", reason="spare replicas are missing"), 200, "degraded"),
        (replace(OK, health="starting"), 503, "starting"),
        (replace(OK, health="unavailable", reason="layer 3"), 503, "unavailable"),
        (replace(OK, routers=[RouterStats("router-0", unreachable_experts=4)]), 503, "unavailable"),
        (replace(OK, missing_replicas=1), 200, "degraded"),
        (replace(OK, processes=[ProcessStatus("router-1", "router", 13, "n0", "stuck")]), 200, "degraded"),
        (replace(OK, routers=[RouterStats("router-0", late_hosts=["expert-host-1"])]), 200, "degraded"),
        (replace(OK, routers=[RouterStats("router-0", broken_links=["expert-host-1: silent"])]), 200, "degraded"),
        (RuntimeError("no controller"), 503, "unavailable"),
    ],
)
def test_health_is_fine_only_while_every_expert_is_reachable(
    make_front: Any, state: Any, code: int, health: str
) -> None:
    front = make_front()
    front.engine.state = state
    response = front.request("GET", "/health")
    assert response.status_code == code
    assert response.json()["health"] == health
    assert set(response.json()) == {"health", "reason"}
    assert front.request("HEAD", "/health").status_code == code


def test_everything_that_is_wrong_is_said_once() -> None:
    late = RouterStats("router-0", unreachable_experts=4, late_hosts=["h2", "h1"], broken_links=["no link to h3"])
    sick = replace(
        OK,
        reason="h0 is stuck: silent for 4 s",
        missing_replicas=2,
        min_replicas=2,
        processes=[ProcessStatus("h0", "expert_host", 11, "n0", "stuck")],
        routers=[late, RouterStats("router-1", late_hosts=["h1"])],
    )
    judgement = judged(sick, ["the controller is away"])
    assert judgement.reason.split("; ") == [
        "h0 is stuck: silent for 4 s",
        "the controller is away",
        "router-0: 4 (layer, expert) pairs unreachable: no link to h3",
        "2 (layer, expert) pairs have fewer than 2 live replicas",
        "h1 is late in answering router-0, router-1",
        "h2 is late in answering router-0",
    ]
    assert judgement.health == "unavailable"
    assert judged(judgement) == judgement
    assert judged(OK) == OK


def test_a_cluster_that_does_not_answer_is_not_healthy(make_front: Any) -> None:
    front = make_front(settings=FrontSettings(status_timeout_s=0.05))

    async def never() -> ClusterStatus:
        await asyncio.Event().wait()
        raise AssertionError

    front.engine.status = never
    assert front.request("GET", "/health").status_code == 503
    assert front.request("GET", "/v1/moray/status").status_code == 503
    assert samples(front.request("GET", "/metrics").text)["moray_cluster_healthy{}"] == 0


# --- status


def test_the_clusters_status_is_shown(make_front: Any) -> None:
    front = make_front()
    front.engine.state = OK
    body = front.request("GET", "/v1/moray/status").json()
    assert (body["epoch"], body["health"]) == (7, "ok")
    assert body["processes"][1]["detail"] == "killed"
    assert body["routers"][0]["pages_free"] == 4


# --- metrics


def test_metrics_count_what_happened(make_front: Any) -> None:
    front = make_front("ab", settings=FrontSettings(front_id="f7"))
    front.engine.state = OK
    front.chat()
    front.complete(max_tokens=1)
    front.chat(temperature=9)
    front.request("GET", "/nowhere/1")
    front.request("GET", "/nowhere/2")
    response = front.request("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'front="f7"' in response.text
    found = samples(response.text)
    assert found["moray_http_requests_total{endpoint=/v1/chat/completions,status=200}"] == 1
    assert found["moray_http_requests_total{endpoint=/v1/chat/completions,status=400}"] == 1
    assert found["moray_http_requests_total{endpoint=other,status=404}"] == 2
    assert found["moray_http_requests_in_flight{endpoint=/v1/chat/completions}"] == 0
    assert found["moray_http_requests_in_flight{endpoint=/metrics}"] == 1
    assert found["moray_generations_total{reason=stop}"] == 1
    assert found["moray_generations_total{reason=length}"] == 1
    assert found["moray_completion_tokens_total{}"] == 3 + 1
    assert found["moray_requests_resubmitted_total{}"] == 0
    assert found["moray_prompt_tokens_total{}"] == sum(len(r.prompt_token_ids) for r in front.engine.requests)
    assert found["moray_time_to_first_token_seconds_count{}"] == 2
    assert found["moray_inter_token_latency_seconds_count{}"] == 2
    assert found["moray_cluster_healthy{}"] == 1
    assert found["moray_cluster_health{health=ok}"] == 1
    assert found["moray_cluster_health{health=degraded}"] == 0
    assert found["moray_controller_answers{}"] == 1
    assert found["moray_placement_balance{}"] == 1
    assert found["moray_missing_replicas{}"] == 0
    assert found["moray_late_hosts{}"] == 0
    assert found["moray_placement_epoch{}"] == 7
    assert found["moray_processes{role=expert_host,state=dead}"] == 1
    assert found["moray_router_running{router=router-0}"] == 2
    assert found["moray_router_pages_free{router=router-0}"] == 4
    assert found["moray_router_generated_tokens_total{router=router-0}"] == 5


def test_metrics_show_what_is_wrong(make_front: Any) -> None:
    front = make_front()
    front.engine.state = replace(
        OK,
        missing_replicas=5,
        balance=0.75,
        processes=[ProcessStatus("expert-host-0", "expert_host", 11, "n0", "stuck")],
        routers=[
            RouterStats("router-0", late_hosts=["a", "b"], hedged_shares=7, resent_shares=3, fenced_hosts=1),
            RouterStats("router-1", late_hosts=["b"], prompt_tokens=30, prefix_hit_tokens=10, requests_refused=4),
        ],
        events=[Event(100.0, "restored", "a", 2.5), Event(300.0, "changed", "4"), Event(200.0, "restored", "b", 1.5)],
    )
    found = samples(front.request("GET", "/metrics").text)
    assert found["moray_cluster_health{health=degraded}"] == 1
    assert found["moray_cluster_healthy{}"] == 1
    assert found["moray_missing_replicas{}"] == 5
    assert found["moray_placement_balance{}"] == 0.75
    assert found["moray_late_hosts{}"] == 2
    assert found["moray_processes{role=expert_host,state=stuck}"] == 1
    assert found["moray_processes{role=router,state=ready}"] == 0
    assert found["moray_router_hedged_shares_total{router=router-0}"] == 7
    assert found["moray_router_resent_shares_total{router=router-0}"] == 3
    assert found["moray_router_fenced_hosts_total{router=router-0}"] == 1
    assert found["moray_router_fenced_hosts_total{router=router-1}"] == 0
    assert found["moray_router_prefix_hit_tokens_total{router=router-1}"] == 10
    assert found["moray_router_prefix_hit_rate{router=router-1}"] == 0.25
    assert found["moray_router_prefix_hit_rate{router=router-0}"] == 0
    assert found["moray_router_requests_refused_total{router=router-1}"] == 4
    assert found["moray_last_event_timestamp_seconds{what=restored}"] == 200
    assert found["moray_last_event_duration_seconds{what=restored}"] == 1.5
    assert found["moray_last_event_timestamp_seconds{what=changed}"] == 300


def test_metrics_leave_out_what_only_an_absent_controller_knows(make_front: Any) -> None:
    front = make_front()
    front.engine.state = ClusterStatus("toy-r1", 0, "degraded", "no controller", [], OK.routers)
    found = samples(front.request("GET", "/metrics").text)
    assert found["moray_controller_answers{}"] == 0
    assert found["moray_router_running{router=router-0}"] == 2
    assert not any(name.startswith(("moray_placement", "moray_missing", "moray_processes")) for name in found)


def test_metrics_count_requests_that_moved_to_another_router(make_front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    front = make_front()
    for moved in (0, 3, 3, 4):
        monkeypatch.setattr(type(front.engine), "resubmitted", moved)
        found = samples(front.request("GET", "/metrics").text)
        assert found["moray_requests_resubmitted_total{}"] == moved


def test_failures_are_counted_by_how_they_ended(make_front: Any) -> None:
    front = make_front([QueueFullError("full", retry_after_s=1)])
    front.chat()
    found = samples(front.request("GET", "/metrics").text)
    assert found["moray_generations_total{reason=error}"] == 1
    assert found["moray_http_requests_total{endpoint=/v1/chat/completions,status=429}"] == 1


def test_apps_do_not_share_metrics(make_front: Any) -> None:
    first, second = make_front(), make_front()
    first.chat()
    assert samples(first.request("GET", "/metrics").text)["moray_completion_tokens_total{}"] > 0
    assert samples(second.request("GET", "/metrics").text)["moray_completion_tokens_total{}"] == 0
