"""One expert host: what it loads, whom it serves, what it refuses, how it ends."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.actors.background import LOWEST
from moray.actors.deadline import Deadline
from moray.actors.expert_host import ExpertHost
from moray.actors.links import Frame, Link, LinkAddress, LinkKind, dial
from moray.actors.moe_frames import Kind, MoeHeader
from moray.actors.reports import HostReport
from moray.actors.testing import SECRET
from moray.configs.errors import ClusterError, HandshakeError, LinkError, PeerDiedError
from moray.kernels.experts import ExpertWeights, grouped_mlp, swiglu_mlp
from moray.model.compute import Compute, instructions_used
from moray.model.loading import load_experts, open_model
from moray.model.testing import WeightDtype, write_random_checkpoint
from moray.model.weights import mlp_weights

SLOTS = ((4, 1, 6), (0, 7))
"""Experts of layers 1 and 2."""

HIDDEN = 192


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("fp8"), dtype="fp8", seed=9)


@pytest.fixture
def host(checkpoint: Path) -> Iterator[ExpertHost]:
    host = ExpertHost("expert-host-0", compute=Compute.on_cpu())
    host.load(checkpoint, SLOTS, epoch=3)
    yield host
    host.stop()


@dataclass
class Work:
    """A request frame: by default two tokens through slots 0 and 2 of layer 1."""

    layer: int = 1
    epoch: int = 3
    rows: tuple[int, ...] = (0, 1, 1)
    slots: tuple[int, ...] = (0, 0, 2)
    tokens: int = 2
    kind: Kind = Kind.WORK
    sequence: int = 7

    @property
    def header(self) -> bytes:
        return MoeHeader(self.kind, self.layer, self.epoch, self.sequence).pack()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        hidden = torch.randn(self.tokens, HIDDEN, generator=torch.Generator().manual_seed(self.sequence))
        return hidden, torch.tensor([self.rows, self.slots], dtype=torch.int32)


def expected(checkpoint: Path, work: Work) -> torch.Tensor:
    """Each pair by itself, with weights read by other means than the host's slots."""
    config, opened = open_model(checkpoint)
    held = [(work.layer, SLOTS[work.layer - 1][slot]) for slot in work.slots]
    stored, _ = load_experts(opened, config, sorted(set(held)))
    hidden, _ = work.tensors
    rows = [
        swiglu_mlp(hidden[row : row + 1], mlp_weights(stored[key], Compute.on_cpu()))
        for row, key in zip(work.rows, held, strict=True)
    ]
    return torch.cat(rows)


def ask(link: Link, work: Work) -> tuple[MoeHeader, tuple[torch.Tensor, ...]]:
    link.send(work.header, work.tensors, deadline=Deadline.after(20))
    frame = link.recv(deadline=Deadline.after(20))
    return MoeHeader.unpack(frame.header), tuple(t.clone() for t in frame.tensors)


@pytest.mark.parametrize("work", [Work(), Work(layer=2, rows=(0, 1, 0), slots=(0, 0, 1))], ids=["layer-1", "layer-2"])
@pytest.mark.parametrize("kind", ["inline", "shm", "gloo"])
def test_answers_each_pair_in_order(host: ExpertHost, checkpoint: Path, kind: LinkKind, work: Work) -> None:
    with contextlib.closing(connect(host, kind)) as link:
        header, tensors = ask(link, work)
    assert header == MoeHeader(Kind.DONE, work.layer, 3, 7)
    (outputs,) = tensors
    assert torch.equal(outputs, expected(checkpoint, work))


def connect(host: ExpertHost, kind: LinkKind, router: str = "router-0") -> Link:
    if kind == "inline":
        return host.inline_link(router)
    address = host.listen(kind, bind_host="127.0.0.1", secret=SECRET)
    return dial(address, secret=SECRET, identity=router, deadline=Deadline.after(20))


def test_reads_exactly_its_slots(checkpoint: Path) -> None:
    """Three FP8 matrices an expert with a scale each 128x128 block, and one header."""
    host = ExpertHost("expert-host-0", compute=Compute.on_cpu())
    read = host.load(checkpoint, SLOTS, epoch=1)
    config, _ = open_model(checkpoint)
    h, n = config.hidden_size, config.moe_intermediate_size
    blocks = -(-h // 128) * -(-n // 128)
    assert read.data == 5 * 3 * (h * n + 4 * blocks)
    assert read.headers > 0
    nothing = host.load(checkpoint, ((), ()), epoch=2)
    assert nothing.data == 0


REFUSED = {
    "epoch": (Work(epoch=4), "placement epoch 4 is not served here; [3] are"),
    "layer-without-experts": (Work(layer=0), "KeyError"),
    "layer-too-high": (Work(layer=3), "KeyError"),
    "slot": (Work(slots=(0, 0, 3)), "KeyError"),
    "slot-negative": (Work(slots=(-1, 0, 0)), "KeyError"),
    "row": (Work(rows=(0, 1, 2)), "index"),
    "row-negative": (Work(rows=(-1, 0, 1)), "index"),
    "kind": (Work(kind=Kind.DONE), "expected WORK"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_and_goes_on(host: ExpertHost, checkpoint: Path, case: str) -> None:
    work, reason = REFUSED[case]
    link = connect(host, "shm")
    header, tensors = ask(link, work)
    assert (header.kind, header.sequence, tensors) == (Kind.FAILED, 7, ())
    assert header.reason.startswith("expert-host-0: layer ")
    assert reason in header.reason
    assert ask(link, Work())[0].kind is Kind.DONE
    link.close()


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (torch.zeros(2, HIDDEN),),
        (torch.zeros(2, HIDDEN), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(2, HIDDEN), torch.zeros(3, 2, dtype=torch.int32)),
        (torch.zeros(2, HIDDEN), torch.zeros(2, 3)),
        (torch.zeros(HIDDEN), torch.zeros(2, 3, dtype=torch.int32)),
        (torch.zeros(2, HIDDEN + 1), torch.zeros(2, 3, dtype=torch.int32)),
        (torch.zeros(2, HIDDEN).double(), torch.zeros(2, 3, dtype=torch.int32)),
    ],
    ids=["none", "one", "pairs-1d", "pairs-of-3", "pairs-float", "hidden-1d", "hidden-wide", "hidden-double"],
)
def test_refuses_tensors_that_are_no_work(host: ExpertHost, tensors: tuple[torch.Tensor, ...]) -> None:
    header, outputs = host.handle(Frame(Work().header, tensors))
    assert MoeHeader.unpack(header).kind is Kind.FAILED
    assert outputs == []


def test_an_over_long_reason_is_cut() -> None:
    header = MoeHeader(Kind.FAILED, 1, 2, 3, "é" * 10_000).pack()
    assert len(header) <= 4096
    assert MoeHeader.unpack(header).reason.startswith("éé")


@pytest.mark.parametrize("header", [b"", b"garbage", b"\x07" + bytes(20)], ids=["empty", "short", "unknown-kind"])
def test_garbage_drops_that_router_only(host: ExpertHost, header: bytes) -> None:
    good = connect(host, "shm", "router-0")
    address = host.listen("shm", bind_host="127.0.0.1", secret=SECRET)
    bad = dial(address, secret=SECRET, identity="router-1", deadline=Deadline.after(20))
    bad.send(header, [], deadline=Deadline.after(20))
    with pytest.raises(PeerDiedError):
        bad.recv(deadline=Deadline.after(20))
    assert ask(good, Work())[0].kind is Kind.DONE
    for link in (good, bad):
        link.close()


def test_serves_routers_at_the_same_time(host: ExpertHost, checkpoint: Path) -> None:
    address = host.listen("shm", bind_host="127.0.0.1", secret=SECRET)
    wrong: list[str] = []

    def router(number: int) -> None:
        link = dial(address, secret=SECRET, identity=f"router-{number}", deadline=Deadline.after(20))
        for sequence in range(20):
            work = Work(sequence=100 * number + sequence, layer=1 + sequence % 2, slots=(0, 0, 1))
            header, (outputs,) = ask(link, work)
            if header.sequence != work.sequence or not torch.equal(outputs, results[work.sequence]):
                wrong.append(f"router {number}, {work}")
        link.close()

    results = {
        100 * n + s: expected(checkpoint, Work(sequence=100 * n + s, layer=1 + s % 2, slots=(0, 0, 1)))
        for n in range(2)
        for s in range(20)
    }
    threads = [threading.Thread(target=router, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_the_epoch_before_is_served_with_its_own_slots(host: ExpertHost, checkpoint: Path) -> None:
    link = connect(host, "inline")
    (old,) = ask(link, Work())[1]
    host.load(checkpoint, ((6, 4, 1), (7,)), epoch=4)
    assert torch.equal(ask(link, Work(epoch=3))[1][0], old)
    assert torch.equal(ask(link, Work(epoch=4, slots=(1, 1, 0)))[1][0], old)
    host.retire(4)
    header, _ = ask(link, Work(epoch=3))
    assert "epoch 3 is not served here; [4] are" in header.reason
    link.close()


def test_a_new_epoch_reads_only_what_is_new(host: ExpertHost, checkpoint: Path) -> None:
    """Experts that another epoch holds stay where they are; those that none holds any more are freed."""
    link = connect(host, "inline")
    (of_expert_4,) = ask(link, Work(slots=(0, 0, 0)))[1]
    assert host.load(checkpoint, ((6, 4, 1), (7,)), epoch=4).data == 0
    one_expert = host.load(checkpoint, ((2, 4), (7,)), epoch=5).data
    assert one_expert > 0
    assert torch.equal(ask(link, Work(epoch=5, slots=(1, 1, 1)))[1][0], of_expert_4)
    host.retire(5)
    assert host.load(checkpoint, SLOTS, epoch=6).data == 3 * one_expert
    link.close()


def test_nothing_is_served_before_it_is_loaded() -> None:
    host = ExpertHost("expert-host-0", compute=Compute.on_cpu())
    link = host.inline_link("router-0")
    assert "not served here; [] are" in ask(link, Work())[0].reason
    host.stop()


def test_stop_ends_links_and_threads(checkpoint: Path) -> None:
    before = set(threading.enumerate())
    host = ExpertHost("expert-host-0", compute=Compute.on_cpu())
    host.load(checkpoint, SLOTS, epoch=3)
    addresses: list[LinkAddress] = [host.listen(kind, bind_host="127.0.0.1", secret=SECRET) for kind in ("shm", "gloo")]
    links = [
        dial(address, secret=SECRET, identity=f"router-{i}", deadline=Deadline.after(20))
        for address in addresses
        for i in range(2)
    ]
    links.append(host.inline_link("router-2"))
    for link in links:
        assert ask(link, Work())[0].kind is Kind.DONE
    host.stop()
    host.stop()
    for link in links:
        with pytest.raises(LinkError):
            ask(link, Work())
        link.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(LinkError):
        dial(addresses[0], secret=SECRET, identity="router-9", deadline=Deadline.after(1))


def test_a_router_with_another_secret_is_refused(host: ExpertHost) -> None:
    address = host.listen("shm", bind_host="127.0.0.1", secret=SECRET)
    with pytest.raises(HandshakeError):
        dial(address, secret=b"another secret of 16 bytes", identity="router-0", deadline=Deadline.after(20))


def test_headers_are_read_once(checkpoint: Path) -> None:
    """A load beside serving does not parse the headers of a large checkpoint again, and their bytes are reported once."""
    host = ExpertHost("", compute=Compute.on_cpu())
    host.warm_up(checkpoint)
    host.become("expert-host-0")
    headers = host.load(checkpoint, SLOTS, epoch=1).headers
    assert headers == open_model(checkpoint)[1].header_bytes
    assert host.load(checkpoint, ((2,), ()), epoch=2).headers == 0


def test_a_host_that_stands_by_becomes_one_once(checkpoint: Path) -> None:
    host = ExpertHost("", compute=Compute.on_cpu())
    for attempt in (
        lambda: host.load(checkpoint, SLOTS, epoch=3),
        lambda: host.listen("shm", bind_host="127.0.0.1", secret=SECRET),
        lambda: host.inline_link("router-0"),
    ):
        with pytest.raises(ClusterError, match=r"a host that stands by cannot .*: have it become one first"):
            attempt()
    host.become("expert-host-5")
    assert host.host_id == "expert-host-5"
    host.load(checkpoint, SLOTS, epoch=3)
    link = connect(host, "shm")
    assert link.peer == "expert-host-5"
    assert torch.equal(ask(link, Work())[1][0], expected(checkpoint, Work()))
    with pytest.raises(ClusterError, match="expert-host-5 cannot become expert-host-6"):
        host.become("expert-host-6")
    assert host.host_id == "expert-host-5"
    host.stop()
    link.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("keep_fp8", [True, False])
def test_warming_up_computes_in_the_models_shape_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: WeightDtype, keep_fp8: bool
) -> None:
    path = write_random_checkpoint(tmp_path / "model", {"num_hidden_layers": 2}, dtype=dtype)
    computed: list[tuple[list[int], str]] = []

    def recorded(x: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        output = grouped_mlp(x, rows, slots, weights)
        assert not output.any()
        computed.append((list(output.shape), type(weights[0].down).__name__))
        return output

    monkeypatch.setattr("moray.actors.warm_up.grouped_mlp", recorded)
    host = ExpertHost("", compute=Compute(torch.device("cpu"), torch.bfloat16, keep_fp8=keep_fp8))
    host.warm_up(path)
    kind = "BlockWeight" if keep_fp8 and dtype == "fp8" else "Tensor"
    assert computed == [([tokens, HIDDEN], kind) for tokens in (1, 16, 32, 64)]
    assert host.report() == HostReport((), 0.0, 0, 0, instructions_used(host.compute))


def test_reports_what_it_serves_and_has_computed(host: ExpertHost, checkpoint: Path) -> None:
    link = connect(host, "shm")
    before = host.report()
    assert (before.epochs, before.busy_s, before.pairs) == ((3,), 0.0, 0)
    config, _ = open_model(checkpoint)
    assert before.resident_bytes == 5 * 3 * config.hidden_size * config.moe_intermediate_size * 4
    ask(link, Work())
    after = host.report()
    assert (after.epochs, after.pairs, after.resident_bytes) == ((3,), 3, before.resident_bytes)
    assert after.busy_s > 0
    ask(link, Work(slots=(0, 0, 3)))  # refused: it has computed nothing
    assert host.report().pairs == 3
    link.close()


def test_waiting_for_ones_turn_is_not_being_busy(host: ExpertHost) -> None:
    """And a report waits for nobody's turn."""
    link = connect(host, "shm")
    with host._one_at_a_time:
        link.send(Work().header, Work().tensors, deadline=Deadline.after(20))
        assert not link.wait(deadline=Deadline.after(0.2))
        assert host.report().busy_s == 0.0
    link.recv(deadline=Deadline.after(20))
    assert host.report().busy_s > 0.0
    link.close()


def test_a_gentle_load_runs_in_the_background_unless_the_host_serves(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[int] = []
    own = os.getpriority(os.PRIO_PROCESS, 0)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        weights.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return load_experts(*args, **kwargs)

    monkeypatch.setattr("moray.actors.expert_loading.load_experts", recorded)
    host = ExpertHost("expert-host-0", compute=Compute.on_cpu())
    host.load(checkpoint, ((0,), ()), epoch=1, gently=True)
    host.load(checkpoint, ((1,), ()), epoch=2, gently=True)
    assert weights == [LOWEST, own]
    other = ExpertHost("expert-host-1", compute=Compute.on_cpu())
    other.load(checkpoint, ((0,), ()), epoch=1)
    assert weights[-1] == own
