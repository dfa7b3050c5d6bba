"""`moray scale`, `rebalance` and `drain` against a controller that answers at once: what is asked, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from moray.cluster import admin
from moray.cluster.changes import Change, Wanted
from moray.cluster.cli import main
from moray.configs.errors import ClusterError, ConfigError

PLAN = Change(
    epoch=2,
    added=("expert-host-2",),
    moved=10,
    total=48,
    balance_before=0.6251,
    balance_after=0.97,
)
DONE = replace(PLAN, seconds=1.24)
NOTHING = Change(epoch=1, total=48)


class Response:
    """What a call through a Serve handle returns."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    def result(self, *, timeout_s: float) -> Any:
        assert timeout_s > 0
        return self.answer()


class Method:
    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def remote(self, *arguments: Any) -> Response:
        return Response(lambda: self.method(*arguments))


class FakeController:
    """Has `answers` for a plan and for the change, and knows what it was asked."""

    def __init__(self, plan: Change | Exception, done: Change | Exception = DONE) -> None:
        self.answers = {True: plan, False: done}
        self.asked: list[tuple[Wanted, bool]] = []
        self.progress: tuple[int, int] | Exception | None = (5, 5)
        self.change = Method(self._change)
        self.change_progress = Method(lambda: self._given(self.progress))

    def _change(self, wanted: Wanted, dry_run: bool) -> Change:
        self.asked.append((wanted, dry_run))
        change: Change = self._given(self.answers[dry_run])
        return change

    @staticmethod
    def _given(answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def moray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command against a fake controller."""

    def run(controller: FakeController, arguments: str) -> tuple[int, str, str]:
        @contextmanager
        def reached(address: str) -> Iterator[FakeController]:
            assert address == "10.0.0.1:6379"
            yield controller

        monkeypatch.setattr(admin, "controller_at", reached)
        status = main([*arguments.split(), "--address", "10.0.0.1:6379"])
        return status, *capsys.readouterr()

    return run


Moray = Callable[..., tuple[int, str, str]]


def test_the_plan_comes_first_then_what_was_done(moray: Moray) -> None:
    controller = FakeController(PLAN)
    status, out, err = moray(controller, "scale --experts 3")
    assert controller.asked == [(Wanted(experts=3), True), (Wanted(experts=3), False)]
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "plan: add expert-host-2; move 10 of 48 experts",
        "balance: 0.63 -> 0.97",
        "done: epoch 2 after 1.2 s; no request was stopped",
    ]


def test_the_cold_tier_is_scaled_by_itself_and_its_load_shown(moray: Moray) -> None:
    controller = FakeController(replace(PLAN, added=("cold-host-1",), cold_share_before=0.125, cold_share_after=0.0114))
    _, out, _ = moray(controller, "scale --cold 0 --dry-run")
    assert controller.asked == [(Wanted(cold=0), True)]
    assert out.splitlines()[1:] == ["balance: 0.63 -> 0.97", "load of the cold hosts: 12.5% -> 1.1%"]


def test_a_dry_run_prints_the_plan_and_asks_no_more(moray: Moray) -> None:
    controller = FakeController(replace(PLAN, added=(), removed=("expert-host-0", "expert-host-1")))
    status, out, _ = moray(controller, "drain expert-host-0 expert-host-1 --dry-run")
    assert controller.asked == [(Wanted(drain=("expert-host-0", "expert-host-1")), True)]
    assert status == 0
    assert out.startswith("plan: remove expert-host-0, expert-host-1; move 10 of 48 experts\n")
    assert "done" not in out


def test_json_is_all_that_is_printed(moray: Moray) -> None:
    controller = FakeController(PLAN, replace(DONE, shortages=("short of it",)))
    status, out, _ = moray(controller, "rebalance --json")
    assert status == 0
    assert json.loads(out) == {
        "epoch": 2,
        "added": ["expert-host-2"],
        "removed": [],
        "moved": 10,
        "total": 48,
        "balance_before": 0.6251,
        "balance_after": 0.97,
        "cold_share_before": 0.0,
        "cold_share_after": 0.0,
        "shortages": ["short of it"],
        "seconds": 1.24,
    }
    status, out, _ = moray(controller, "rebalance --json --dry-run")
    assert (status, json.loads(out)["seconds"]) == (0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("scale --experts 2", "as you ask"), ("rebalance", "no move of experts would win enough")],
)
def test_where_nothing_is_to_be_done_nothing_is_done(moray: Moray, arguments: str, said: str) -> None:
    controller = FakeController(NOTHING)
    status, out, _ = moray(controller, arguments)
    assert [dry_run for _, dry_run in controller.asked] == [True]
    assert status == 0
    assert out.startswith("nothing to do: ")
    assert said in out
    assert json.loads(moray(controller, f"{arguments} --json")[1])["epoch"] == 1


def test_copies_are_asked_for_also_where_nothing_moves_for_them(moray: Moray) -> None:
    """Or a later plan would know nothing of them."""
    controller = FakeController(NOTHING, NOTHING)
    status, out, _ = moray(controller, "scale --replicas 3:7=2")
    assert [dry_run for _, dry_run in controller.asked] == [True, False]
    assert controller.asked[1][0] == Wanted(replicas={(3, 7): 2})
    assert status == 0
    assert out.splitlines() == [
        "nothing to do: no expert has to move for it",
        "done: epoch 1 after 0.0 s; no request was stopped",
    ]


def test_routers_alone_move_no_expert(moray: Moray) -> None:
    change = Change(epoch=1, added=("router-1", "router-2"), total=48)
    _, out, _ = moray(FakeController(change, change), "scale --routers 3")
    assert out.splitlines()[0] == "plan: add router-1, router-2"
    assert "balance" not in out


def test_shortages_are_named_once_and_not_by_the_hundred(moray: Moray) -> None:
    short = tuple(f"expert {e} of layer 3 has 1 of 2 replicas: the hosts have too few slots" for e in range(7))
    plan = replace(PLAN, shortages=short)
    _, out, _ = moray(FakeController(plan, replace(plan, seconds=1.0)), "scale --experts 3")
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("short: ")] == [
        *(f"short: {text}" for text in short[:5]),
        "short: and 2 more like these (--json names all)",
    ]
    _, out, _ = moray(FakeController(PLAN, replace(DONE, shortages=short[:1])), "scale --experts 3")
    assert out.splitlines()[-1] == f"short: {short[0]}", "what came up only when it was done is told then"


def task_error(cause: Exception) -> Exception:
    error: Exception = RayTaskError("change", "Traceback: far too much of it", cause)
    return error


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (task_error(ClusterError("3 more expert hosts of 1 CPU each need 2 more CPUs")), "need 2 more CPUs"),
        (
            task_error(ConfigError("replicas 99:0=2: layers with experts\n are 3 to 60")),
            "layers with experts are 3 to 60",
        ),
        (task_error(KeyError("epoch")), "far too much of it"),
        (RayActorError(), "cannot be asked"),
        (TimeoutError(), "did not answer within"),
    ],
)
def test_errors_are_one_line(moray: Moray, error: Exception, said: str, planned: bool) -> None:
    controller = FakeController(error) if planned else FakeController(PLAN, error)
    status, out, err = moray(controller, "scale --experts 3")
    assert status == 1
    assert ("plan: " in out, "done" in out) == (not planned, False)
    assert err.startswith("moray: error: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_progress_that_nobody_tells_does_not_stop_the_change(moray: Moray) -> None:
    controller = FakeController(PLAN)
    controller.progress = TimeoutError()
    status, out, _ = moray(controller, "scale --experts 3")
    assert status == 0
    assert "done: " in out
