"""Expert hosts that die, hang, refuse, or answer nonsense: requests pause or fail, the router lives."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moray.actors.deadline import Deadline
from moray.actors.expert_host import ExpertHost
from moray.actors.links import Frame, InlineLink, LinkKind
from moray.actors.messages import GenerateRequest
from moray.actors.moe_frames import Kind, MoeHeader
from moray.actors.placement_table import PlacementTable
from moray.actors.router import Router, RouterSettings
from moray.actors.testing import SETTINGS, EngineParts, Recorder, random_prompt, run
from moray.configs.errors import LinkError
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint

HASTY = replace(SETTINGS, restore_timeout_s=0.3)
Reply = tuple[bytes, Sequence[torch.Tensor]]
Twist = Callable[[Frame, Reply], list[Reply]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"), seed=5)


@pytest.fixture(scope="module")
def read_once(checkpoint: Path) -> EngineParts:
    return EngineParts(checkpoint)


@pytest.fixture
def parts(read_once: EngineParts) -> Iterator[EngineParts]:
    with contextlib.closing(read_once) as parts:
        yield parts


@pytest.fixture(scope="module")
def undisturbed(read_once: EngineParts) -> dict[str, list[int]]:
    with contextlib.closing(read_once) as parts:
        recorder = run(parts.engine(), requests(parts))
    return {r.request_id: recorder.tokens(r.request_id) for r in requests(read_once)}


def requests(parts: EngineParts) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            f"r{i}",
            random_prompt(parts.config, i, 5 + 13 * i),
            SamplingParams(12, temperature=0.0 if i % 2 else 0.9, seed=i),
        )
        for i in range(4)
    ]


class TwistedHost:
    """A real host behind an inline link whose replies are changed by `twist`, which may also send none or several."""

    def __init__(self, parts: EngineParts, host_id: str, table: PlacementTable, twist: Twist | None = None) -> None:
        self.host = parts.host(host_id, table)
        self.twist = twist
        self.seen: list[MoeHeader] = []
        self.link, self._end = InlineLink.pair("router-0", host_id)
        self._end.drive(self._answer)

    def _answer(self) -> None:
        frame = self._end.recv(deadline=Deadline.after(5.0))
        self.seen.append(MoeHeader.unpack(frame.header))
        reply = self.host.handle(frame)
        for header, tensors in [reply] if self.twist is None else self.twist(frame, reply):
            self._end.send(header, tensors, deadline=Deadline.after(0.2))


def twisted(
    parts: EngineParts, twist: Twist | None, settings: RouterSettings = HASTY, *, reply_timeout_s: float = 5.0
) -> tuple[Router, list[TwistedHost]]:
    """A router and two hosts, of which the first one's replies are twisted."""
    table = parts.table(2)
    hosts = [TwistedHost(parts, name, table, twist if not i else None) for i, name in enumerate(table.slots)]
    links = {name: host.link for name, host in zip(table.slots, hosts, strict=True)}
    return parts.router(table, links, settings, reply_timeout_s=reply_timeout_s), hosts


@pytest.mark.parametrize("kind", ["inline", "shm", "gloo"])
def test_requests_pause_while_a_host_is_away(
    parts: EngineParts, undisturbed: dict[str, list[int]], kind: LinkKind
) -> None:
    table = parts.table(3)
    hosts = {name: parts.host(name, table) for name in table.slots}
    router = parts.router(table, {name: parts.link(host, kind) for name, host in hosts.items()})
    router.start()
    recorder = Recorder()
    for request in requests(parts):
        router.submit(request, recorder)
    for lost in ("expert-host-1", "expert-host-2", "expert-host-1"):
        recorder.wait("r0", tokens=min(12, len(recorder.tokens("r0")) + 2))
        hosts[lost].stop()
        give_up = time.monotonic() + 20
        while not router.stats().unreachable_experts and router.busy and time.monotonic() < give_up:
            time.sleep(0.002)
        hosts[lost] = parts.host(lost, table)
        router.set_link(lost, parts.link(hosts[lost], kind))
    recorder.wait(*undisturbed)
    assert {name: recorder.tokens(name) for name in undisturbed} == undisturbed
    stats = router.stats()
    assert (stats.requests_finished, stats.requests_failed) == (4, 0)
    router.stop()
    assert router.pool.in_use == 0


def test_a_replica_takes_over_at_once(parts: EngineParts, undisturbed: dict[str, list[int]]) -> None:
    router = parts.engine(3, "shm", replace(HASTY, restore_timeout_s=0.0), replicas=2)
    hosts = [part for part in parts.opened if isinstance(part, ExpertHost)]
    recorder = Recorder()
    for request in requests(parts):
        router.submit(request, recorder)
    for step in range(1000):
        if not router.busy:
            break
        if step == 4:
            hosts[1].stop()
        router.step()
    assert {name: recorder.tokens(name) for name in undisturbed} == undisturbed
    assert router.stats().unreachable_experts == 0
    assert ["expert-host-1" in text for text in router.stats().broken_links] == [True]


def failed(router: Router, parts: EngineParts) -> str:
    """Run one request that must fail within the restore timeout; its error."""
    recorder = Recorder()
    (request, *_) = requests(parts)
    router.submit(request, recorder)
    give_up = time.monotonic() + 20
    while router.busy and time.monotonic() < give_up:
        router.step()
        router.pool.check()
    end = recorder.end("r0")
    assert end is not None, "the request neither failed nor ended"
    assert end.finish_reason == "error"
    assert end.error is not None
    assert router.pool.in_use == 0
    return end.error


def test_requests_fail_when_a_host_stays_away(parts: EngineParts) -> None:
    router, (host, _) = twisted(parts, None)
    host.link.close()
    error = failed(router, parts)
    assert "8 (layer, expert) pairs have no reachable replica" in error
    assert "waited 0 s for them to be restored" in error
    assert router.stats().requests_failed == 1


def test_a_missing_link_counts_as_a_lost_host(parts: EngineParts) -> None:
    table = parts.table(2)
    router = parts.router(table, {"expert-host-0": parts.link(parts.host("expert-host-0", table), "inline")}, HASTY)
    assert router.stats().unreachable_experts == 8
    assert "no link to expert-host-1" in failed(router, parts)


def test_waiting_for_experts_starts_anew_for_each_loss(parts: EngineParts) -> None:
    """A loss that nobody waited for to the end must not shorten the wait of a later one."""
    router, (host, _) = twisted(parts, None, replace(HASTY, restore_timeout_s=0.2))
    recorder = Recorder()
    router.submit(requests(parts)[0], recorder)
    host.link.close()
    router.step()
    router.cancel("r0")
    assert not router.step()
    time.sleep(0.25)
    router.submit(requests(parts)[1], recorder)
    router.step()
    router.step()
    assert recorder.end("r1") is None


def header_of(frame: Frame, **changes: object) -> bytes:
    return MoeHeader.unpack(frame.header)._replace(**{"kind": Kind.DONE, **changes}).pack()  # type: ignore[arg-type]


NONSENSE: dict[str, tuple[Twist, str]] = {
    "one-row-less": (lambda f, r: [(r[0], [r[1][0][:-1]])], "answered"),
    "one-row": (lambda f, r: [(r[0], [r[1][0][:1]])], "answered"),
    "narrow": (lambda f, r: [(r[0], [r[1][0][:, :1]])], "answered"),
    "other-dtype": (lambda f, r: [(r[0], [r[1][0].double()])], "torch.float64"),
    "no-tensor": (lambda f, r: [(r[0], [])], "answered nothing"),
    "two-tensors": (lambda f, r: [(r[0], [*r[1], *r[1]])], "answered"),
    "short-header": (lambda f, r: [(b"abc", r[1])], "sent a reply that is none"),
    "unknown-kind": (lambda f, r: [(b"\x09" + r[0][1:], r[1])], "sent a reply that is none"),
    "work": (lambda f, r: [(f.header, r[1])], "sent WORK"),
    "from-the-past": (
        lambda f, r: [(header_of(f, sequence=MoeHeader.unpack(f.header).sequence - 1), r[1])],
        "as reply",
    ),
    "from-the-future": (lambda f, r: [(header_of(f, sequence=10**6), r[1])], "as reply to"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_drops_the_host_not_the_router(parts: EngineParts, case: str) -> None:
    twist, message = NONSENSE[case]
    router, (host, _) = twisted(parts, twist)
    assert message in failed(router, parts)
    assert router.stats().unreachable_experts == 8
    with pytest.raises(LinkError):
        host.link.check()
    table = parts.table(2)
    router.set_link("expert-host-0", TwistedHost(parts, "expert-host-0", table).link)
    run(router, requests(parts))
    assert router.stats().unreachable_experts == 0


def refuse(frame: Frame, reply: Reply) -> list[Reply]:
    return [(header_of(frame, kind=Kind.FAILED, reason="expert-host-0: out of memory"), [])]


def test_a_host_that_refuses_fails_requests_in_time_and_blocks_no_other(parts: EngineParts) -> None:
    router, (host, other) = twisted(parts, refuse)
    error = failed(router, parts)
    assert "expert-host-0 refused its work: expert-host-0: out of memory" in error
    assert 2 < len(host.seen) < 100, "retried with pauses"
    assert len(other.seen) == len(host.seen) or len(other.seen) == 0
    assert router.stats().unreachable_experts == 8, "a host that refuses its work must not look healthy"
    assert "out of memory" in router.stats().broken_links[0]


def test_a_host_that_stops_refusing_is_used_again(parts: EngineParts, undisturbed: dict[str, list[int]]) -> None:
    refusals = iter(range(6))

    def twist(frame: Frame, reply: Reply) -> list[Reply]:
        return [reply] if next(refusals, None) is None else refuse(frame, reply)

    router, _ = twisted(parts, twist, SETTINGS)
    recorder = run(router, requests(parts))
    assert {name: recorder.tokens(name) for name in undisturbed} == undisturbed
    assert (router.stats().unreachable_experts, router.stats().broken_links) == (0, [])


def test_a_silent_host_is_taken_for_dead(parts: EngineParts) -> None:
    router, _ = twisted(parts, lambda frame, reply: [], reply_timeout_s=0.1)
    assert "expert-host-0: was silent for 0.1" in failed(router, parts)
    assert router.stats().unreachable_experts == 8


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_a_slow_host_is_dropped_and_the_others_replies_stay_in_order(
    parts: EngineParts, undisturbed: dict[str, list[int]], kind: LinkKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = parts.table(2)
    hosts = [parts.host(name, table) for name in table.slots]
    slow = hosts[0]._run

    def hang(*arguments: object) -> Sequence[torch.Tensor]:
        time.sleep(1.0)
        return slow(*arguments)  # type: ignore[arg-type]

    links = {host.host_id: parts.link(host, kind) for host in hosts}
    router = parts.router(table, links, reply_timeout_s=0.3)
    recorder = Recorder()
    for request in requests(parts):
        router.submit(request, recorder)
    router.step()
    monkeypatch.setattr(hosts[0], "_run", hang)
    while not router.stats().unreachable_experts:
        router.step()
    monkeypatch.undo()
    router.set_link("expert-host-0", parts.link(hosts[0], kind))
    while router.busy:
        router.step()
    assert {name: recorder.tokens(name) for name in undisturbed} == undisturbed


def test_logits_that_are_no_numbers_fail_their_request_alone(
    parts: EngineParts, undisturbed: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    router = parts.engine()
    head, steps = router.model.logits, itertools.count()

    def overflowing(sampled: torch.Tensor) -> torch.Tensor:
        logits = head(sampled).clone()
        if next(steps) == 5:
            logits[1, 7] = math.nan
        return logits

    monkeypatch.setattr(router.model, "logits", overflowing)
    recorder = run(router, requests(parts))
    end = recorder.end("r1")
    assert end is not None
    assert (end.finish_reason, end.error) == ("error", "the model's logits for this request hold a NaN or an infinity")
    assert recorder.tokens("r1") == undisturbed["r1"][:5]
    assert {r: recorder.tokens(r) for r in ("r0", "r2", "r3")} == {r: undisturbed[r] for r in ("r0", "r2", "r3")}
    assert router.pool.in_use == 0
