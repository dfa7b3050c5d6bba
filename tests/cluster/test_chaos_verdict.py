"""When `moray chaos` passes and when it fails, from what it has seen."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
from rich.console import Console

from moray.cluster.chaos.leaks import (
    DESCRIPTORS_ALLOWED,
    RESIDENT_ALLOWED,
    Snapshot,
    Use,
    leaks,
    left_over,
    page_leaks,
)
from moray.cluster.chaos.traffic import Answer, Question, Traffic, ask, judged, questions, running, undisturbed
from moray.cluster.chaos.verdict import Happened, Verdict
from moray.cluster.run_state import ProcessId
from moray.configs.errors import ClusterError

GOOD = Verdict(
    seed=1,
    model="m",
    streams=2,
    seconds=60.0,
    requests={"finished": 10, "cancelled": 2, "altered": 0, "lost": 0, "refused": 1},
    calm_gap_s=0.05,
    events=(
        Happened(1.0, "kill-host", "expert-host-1", 3.0, 0.2),
        Happened(5.0, "kill-host", "expert-host-0", 2.0, 0.4),
        Happened(9.0, "drain-host", "the cluster", 0.0, 0.0, failed="no room"),
    ),
)


def test_a_good_run() -> None:
    assert GOOD.passed
    assert GOOD.gaps() == {"kill-host": (2, 0.4, 0.4)}
    data = json.loads(json.dumps(GOOD.to_dict()))
    assert (data["passed"], data["reasons"], data["events"][0]["subject"]) == (True, [], "expert-host-1")
    out = io.StringIO()
    GOOD.show(Console(file=out, width=120))
    assert "passed: nothing was lost, altered or leaked" in out.getvalue()
    assert "10 finished, 2 cancelled, 0 altered" in out.getvalue()
    assert "drain-host at 9.0 s could not be done: no room" in out.getvalue()
    assert "could not be done: no room" in GOOD.events[2].line()
    assert "whole again after   3.0 s" in GOOD.events[0].line()
    never = replace(GOOD, events=(replace(GOOD.events[0], whole_s=None), *GOOD.events[1:]))
    never.show(Console(file=out, width=120))
    assert "never" in out.getvalue()
    assert "not whole again" in never.events[0].line()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (replace(GOOD, requests={**GOOD.requests, "altered": 1}), "1 requests altered"),
        (replace(GOOD, requests={**GOOD.requests, "lost": 2}), "2 requests lost"),
        (replace(GOOD, requests={**GOOD.requests, "finished": 0}), "no request finished"),
        (replace(GOOD, leaks=("3 pages",)), "leak: 3 pages"),
        (replace(GOOD, problems=("not whole again",)), "not whole again"),
        (replace(GOOD, events=GOOD.events[2:]), "nothing was done"),
    ],
)
def test_a_bad_run(bad: Verdict, reason: str) -> None:
    assert not bad.passed
    assert any(reason in found for found in bad.reasons)
    out = io.StringIO()
    bad.show(Console(file=out, width=120))
    assert f"failed: {bad.reasons[0]}" in out.getvalue()


# ---- leaks ----------------------------------------------------------------------------------------------------------

ROUTER = {
    "router_id": "router-0",
    "pages_free": 6,
    "pages_cached": 4,
    "pages_total": 10,
    "pages_in_use": 0,
    "running": 0,
    "waiting": 0,
}
HOST_USE = Use("expert-host-0", "expert_host", 10, 50, 20, frozenset({1, 2, 3}), 300 << 20)
ROUTER_USE = Use("router-0", "router", 11, 60, 30, frozenset({1, 2, 3}), 400 << 20)
IDLE = Snapshot(
    counts={"expert_host": 1, "router": 1},
    routers=[ROUTER],
    actors={"ExpertHostWorker": 1, "RouterWorker": 1, "ServeReplica:moray:front": 1},
    uses=(HOST_USE, ROUTER_USE),
    names=frozenset({"plasma"}),
)


def test_nothing_leaked() -> None:
    assert leaks(IDLE, IDLE) == []
    restored = replace(HOST_USE, pid=99, descriptors=HOST_USE.descriptors + DESCRIPTORS_ALLOWED)
    assert leaks(IDLE, replace(IDLE, uses=(restored, ROUTER_USE), names=frozenset())) == []


@pytest.mark.parametrize(
    ("after", "found"),
    [
        (replace(IDLE, routers=[{**ROUTER, "pages_free": 5}]), "5 KV pages free + 4 cached of 10, 0 in use"),
        (replace(IDLE, routers=[{**ROUTER, "pages_free": 5, "pages_in_use": 1}]), "1 in use at idle"),
        (replace(IDLE, routers=[{**ROUTER, "running": 1}]), "1 requests running"),
        (replace(IDLE, counts={"expert_host": 2, "router": 1}), "2 processes of expert_host, 1 before"),
        (replace(IDLE, actors={**IDLE.actors, "ExpertHostWorker": 2}), "2 Ray processes of ExpertHostWorker, 1 before"),
        (
            replace(IDLE, uses=(replace(HOST_USE, descriptors=51 + DESCRIPTORS_ALLOWED), ROUTER_USE)),
            "expert-host-0 (pid 10): 67 open files",
        ),
        (
            replace(IDLE, uses=(replace(HOST_USE, pid=99, descriptors=51 + DESCRIPTORS_ALLOWED), ROUTER_USE)),
            "expert-host-0 (pid 99): 67 open files",
        ),
        (
            replace(IDLE, uses=(HOST_USE, replace(ROUTER_USE, resident=2 * ROUTER_USE.resident + RESIDENT_ALLOWED))),
            "router-0 (pid 11): 896 MiB of memory, 400 before",
        ),
        (
            replace(IDLE, uses=tuple(replace(use, arenas=frozenset({1, 2, 3, 4})) for use in IDLE.uses)),
            "4 pieces of shared memory shared by two processes, 3 at most for 1 links",
        ),
        (
            replace(IDLE, uses=(replace(HOST_USE, arenas=frozenset(range(1, 7))), ROUTER_USE)),
            "3 pieces of shared memory of lost links, 2 at most",
        ),
        (replace(IDLE, names=frozenset({"plasma", "new"})), "1 new entries in /dev/shm: new"),
    ],
)
def test_each_leak(after: Snapshot, found: str) -> None:
    (leak,) = leaks(IDLE, after)
    assert found in leak


def test_pages_of_each_router() -> None:
    assert page_leaks([ROUTER, {**ROUTER, "router_id": "router-1", "pages_cached": 3}])[0].startswith("router-1: ")


def test_what_is_left_over() -> None:
    """A process that lives, and one that has ended and was not reaped; not what belongs to the cluster, nor what is gone."""
    program = "import sys; sys.stdin.read()"
    children = [subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) for _ in range(4)]
    seen = [ProcessId.of(child.pid) for child in children]
    alive, current, zombie, gone = children
    try:
        for child in (zombie, gone):
            assert child.stdin is not None
            child.stdin.close()
        gone.wait(20)
        give_up = time.monotonic() + 20
        while (known := seen[2]) is not None and known.alive:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        found = left_over([process for process in seen if process is not None], [current.pid])
        assert [line.split()[0] for line in found] == [str(alive.pid), str(zombie.pid)]
        assert "state Z" in found[1]
    finally:
        for child in children:
            child.kill()
            child.wait(20)
            assert child.stdin is not None
            child.stdin.close()


# ---- traffic --------------------------------------------------------------------------------------------------------

QUESTION = Question((100, 101), 4, 0.0, 7)
WANTED = [1, 2, 3, 4]


def events(*chunks: object) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)


def tokens(*ids: int) -> dict[str, object]:
    return {"choices": [{"token_ids": list(ids)}]}


def client(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(base_url="http://test", transport=httpx.MockTransport(answer))


def one(response: httpx.Response, *, hang_up_after: int | None = None) -> Answer:
    with client(lambda request: response) as asking:
        return judged(ask(asking, QUESTION.body("m"), hang_up_after=hang_up_after), WANTED)


DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("response", "outcome", "detail"),
    [
        (httpx.Response(200, text=events(tokens(1, 2), tokens(3, 4)) + DONE), "finished", ""),
        (httpx.Response(200, text=events(tokens(1, 2), tokens(3)) + DONE), "altered", "3 tokens of 4 came"),
        (httpx.Response(200, text=events(tokens(1, 2), tokens(2, 3, 4)) + DONE), "altered", "from token 2 on"),
        (httpx.Response(200, text=events(tokens(1, 2, 3, 4, 4)) + DONE), "altered", "5 tokens of 4"),
        (httpx.Response(200, text=events(tokens(1, 2))), "lost", "without an end"),
        (httpx.Response(200, text=events(tokens(9)) + ""), "altered", "from token 0 on"),
        (httpx.Response(200, text=events(tokens(1), {"error": {"message": "gone"}})), "lost", "gone"),
        (httpx.Response(429, text="full"), "refused", "429: full"),
        (httpx.Response(503, text="down"), "refused", "503"),
        (httpx.Response(500, text="broken"), "lost", "500: broken"),
    ],
)
def test_what_became_of_a_request(response: httpx.Response, outcome: str, detail: str) -> None:
    answer = one(response)
    assert (answer.outcome, detail in answer.detail) == (outcome, True), answer


def test_hanging_up() -> None:
    assert (
        one(httpx.Response(200, text=events(tokens(1, 2), tokens(3, 4)) + DONE), hang_up_after=2).outcome == "cancelled"
    )
    assert one(httpx.Response(200, text=events(tokens(1, 9), tokens(3, 4))), hang_up_after=2).outcome == "altered"


def test_a_connection_that_breaks() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody is there")

    with client(refuse) as asking:
        assert ask(asking, QUESTION.body("m")) == Answer("lost", [], "ConnectError: nobody is there")


def test_questions() -> None:
    asked = questions(3)
    assert asked == questions(3) != questions(4)
    assert len({question.max_tokens for question in asked}) > 5
    assert {question.temperature == 0 for question in asked} == {True, False}
    assert all(100 <= token < 300 for question in asked for token in question.prompt)


def echo(request: httpx.Request) -> httpx.Response:
    """Answers with the prompt's first token, counted on."""
    body = json.loads(request.content)
    ids = [body["prompt"][0] + i for i in range(body["max_tokens"])]
    return httpx.Response(200, text=events(*(tokens(token) for token in ids)) + DONE)


def test_a_calm_cluster_must_agree_with_itself() -> None:
    asked = questions(1, count=6)
    with client(echo) as asking:
        answers = undisturbed(asking, "m", asked)
    assert answers == {q: [q.prompt[0] + i for i in range(q.max_tokens)] for q in asked}
    calls: list[int] = []

    def fickle(request: httpx.Request) -> httpx.Response:
        calls.append(len(calls))
        body = json.loads(request.content)
        return httpx.Response(200, text=events(tokens(*[calls[-1]] * body["max_tokens"])) + DONE)

    with client(fickle) as asking, pytest.raises(ClusterError, match="two answers"):
        undisturbed(asking, "m", asked)
    with client(lambda request: httpx.Response(503, text="no")) as asking, pytest.raises(ClusterError, match="503: no"):
        undisturbed(asking, "m", asked)


def test_traffic_counts_and_compares() -> None:
    asked = questions(1, count=6)
    with client(echo) as asking:
        answers = undisturbed(asking, "m", asked)
    spoilt = asked[0]
    answers[spoilt] = [0, *answers[spoilt][1:]]
    traffic = Traffic(lambda: client(echo), "m", answers, streams=3, seed=5)
    with running(traffic):
        give_up = time.monotonic() + 30
        while not all(traffic.counts[outcome] for outcome in ("finished", "cancelled", "altered")):
            assert time.monotonic() < give_up, traffic.counts
            time.sleep(0.01)
    counts = traffic.counts
    assert (counts["lost"], counts["refused"]) == (0, 0)
    assert len(traffic.failures) == counts["altered"]
    assert "differ from token 0 on" in traffic.failures[0]
    assert traffic.counts == counts, "it has stopped"


def test_gaps() -> None:
    traffic = Traffic(lambda: client(echo), "m", {QUESTION: WANTED}, streams=2, seed=0)
    now = time.monotonic()
    traffic._streams[0].gaps += [(now - 10, now - 9), (now - 5, now - 2)]
    traffic._streams[1].gaps += [(now - 8, now - 7.5)]
    assert traffic.longest_gap(now - 11, now - 8.5) == pytest.approx(1)
    assert traffic.longest_gap(now - 8.2, now - 6) == pytest.approx(0.5)
    assert traffic.longest_gap(now - 4, now) == pytest.approx(3), "what began before belongs to it too"
    assert traffic.longest_gap(now - 1, now) == 0
    traffic._streams[1].last = now - 6
    assert traffic.longest_gap(now - 1, now) >= 6, "a stream that stands still now"
