"""Weights over a link: bit for bit what reading gives, in parts of any size, and nothing else than what was meant."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from moray.actors.deadline import Deadline
from moray.actors.expert_host import ExpertHost
from moray.actors.links import Frame, InlineLink, Link, LinkKind, dial
from moray.actors.moe_frames import Kind, MoeHeader
from moray.actors.testing import SECRET
from moray.actors.weight_copy import Layout, TensorForm, WeightCopier, mlp_layout, plan_frames, tensors_of
from moray.configs.errors import LinkError, PeerDiedError, PeerTimeoutError
from moray.kernels.experts import MlpWeights
from moray.model.checkpoint import Checkpoint
from moray.model.compute import Compute
from moray.model.config import ModelConfig
from moray.model.loading import expert_layout, load_experts
from moray.model.testing import WeightDtype, write_random_checkpoint
from moray.model.weights import mlp_weights

CPU = torch.device("cpu")
SLOTS = ((4, 1, 6), (0, 7))
FP32 = Compute.on_cpu()
BF16 = Compute.on_cpu(torch.bfloat16)
FP8 = Compute(CPU, torch.bfloat16, keep_fp8=True)

Write = Callable[[WeightDtype], Path]


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Write:
    written: dict[str, Path] = {}

    def write(dtype: WeightDtype) -> Path:
        if dtype not in written:
            written[dtype] = write_random_checkpoint(tmp_path_factory.mktemp(dtype), dtype=dtype, seed=9)
        return written[dtype]

    return write


@pytest.fixture
def start() -> Iterator[Callable[[Path, Compute], ExpertHost]]:
    """Makes hosts with `SLOTS` of a checkpoint; stops them after the test."""
    with contextlib.ExitStack() as stack:

        def start(checkpoint: Path, compute: Compute) -> ExpertHost:
            host = ExpertHost("expert-host-0", compute=compute)
            stack.callback(host.stop)
            host.load(checkpoint, SLOTS, epoch=3)
            return host

        yield start


def connect(host: ExpertHost, kind: LinkKind) -> Link:
    address = host.listen(kind, bind_host="127.0.0.1", secret=SECRET)
    return dial(address, secret=SECRET, identity="expert-host-1", deadline=Deadline.after(20))


def layout_of(checkpoint: Path, compute: Compute, layer: int = 1, expert: int = 4) -> Layout:
    opened, config = Checkpoint.open(checkpoint), ModelConfig.load(checkpoint)
    return mlp_layout(expert_layout(opened, config, layer, expert), compute)


def read(checkpoint: Path, compute: Compute, keys: Sequence[tuple[int, int]]) -> list[MlpWeights]:
    stored, _ = load_experts(Checkpoint.open(checkpoint), ModelConfig.load(checkpoint), keys)
    return [mlp_weights(stored[key], compute) for key in keys]


def assert_same_bits(ours: MlpWeights, expected: MlpWeights) -> None:
    for mine, theirs in zip(tensors_of(ours), tensors_of(expected), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
        assert mine.is_contiguous()


def copier(link: Link, **settings: int) -> WeightCopier:
    return WeightCopier(link, epoch=5, device=CPU, silence_s=20, **settings)


FORMS: dict[str, tuple[WeightDtype, Compute]] = {
    "fp8-kept": ("fp8", FP8),
    "fp8-decoded": ("fp8", FP32),
    "fp8-decoded-to-bf16": ("fp8", BF16),
    "bf16": ("bfloat16", BF16),
    "fp32-though-fp8-would-be-kept": ("float32", FP8),
}


@pytest.mark.parametrize("form", FORMS)
def test_copied_is_bit_for_bit_what_is_read(
    checkpoint_of: Write, start: Callable[[Path, Compute], ExpertHost], form: str
) -> None:
    dtype, compute = FORMS[form]
    checkpoint = checkpoint_of(dtype)
    link = connect(start(checkpoint, compute), "shm")
    layout = layout_of(checkpoint, compute)
    assert len(layout) == (4 if form == "fp8-kept" else 2)
    copied = dict(copier(link).copy(1, [6, 4], layout))
    expected = read(checkpoint, compute, [(1, 6), (1, 4)])
    assert list(copied) == [6, 4]
    for weights, reference in zip(copied.values(), expected, strict=True):
        assert_same_bits(weights, reference)
    link.close()


def test_copying_imports_nothing(checkpoint_of: Write, start: Callable[[Path, Compute], ExpertHost]) -> None:
    """Some of torch is imported when it is first used, in seconds that a host which serves does not have."""
    checkpoint = checkpoint_of("fp8")
    link = connect(start(checkpoint, FP8), "shm")
    before = set(sys.modules)
    assert dict(copier(link).copy(1, [4], layout_of(checkpoint, FP8))).keys() == {4}
    assert set(sys.modules) - before == set()
    link.close()


@pytest.mark.parametrize("kind", ["inline", "shm", "gloo"])
@pytest.mark.parametrize("frame_bytes", [3_000, 70_000, 1 << 20])
def test_in_parts_of_any_size_over_any_link(
    checkpoint_of: Write, start: Callable[[Path, Compute], ExpertHost], kind: LinkKind, frame_bytes: int
) -> None:
    """From a few rows, by way of parts with the end of one tensor and the beginning of the next, to all at once."""
    checkpoint = checkpoint_of("fp8")
    link = connect(start(checkpoint, FP8), kind)
    copying = copier(link, frame_bytes=frame_bytes)
    for layer, experts in ((1, [4, 6]), (2, [7])):
        copied = dict(copying.copy(layer, experts, layout_of(checkpoint, FP8)))
        for expert, reference in zip(experts, read(checkpoint, FP8, [(layer, e) for e in experts]), strict=True):
            assert_same_bits(copied[expert], reference)
    link.close()


def test_pieces_cover_every_row_once_within_the_limit(checkpoint_of: Write) -> None:
    layout = layout_of(checkpoint_of("fp8"), FP8)
    for limit in (1, 192, 193, 5_000, 100_000, 1 << 30):
        frames = plan_frames(layout, [3, 5], limit)
        rows = [(p.expert, p.tensor, row) for frame in frames for p in frame for row in range(p.start, p.stop)]
        assert rows == [(e, t, row) for e in (3, 5) for t in range(4) for row in range(layout[t].rows)]
        for frame in frames:
            nbytes = sum((p.stop - p.start) * layout[p.tensor].empty(1, CPU).nbytes for p in frame)
            assert nbytes <= limit or (len(frame) == 1 and frame[0].stop - frame[0].start == 1)
    assert len(plan_frames(layout, [3, 5], 1 << 30)) == 1


def test_a_frame_has_no_more_pieces_than_a_link_takes() -> None:
    layout = (TensorForm(2, 1, torch.float32), TensorForm(1, 1, torch.float32))
    frames = plan_frames(layout, range(40), 1 << 20)
    assert [len(frame) for frame in frames] == [64, 16]


def test_given_while_the_host_computes(checkpoint_of: Write, start: Callable[[Path, Compute], ExpertHost]) -> None:
    """Weights are given in the thread of their link, whoever computes meanwhile, and for however long."""
    checkpoint = checkpoint_of("fp8")
    host = start(checkpoint, FP32)
    link = connect(host, "shm")
    with host._one_at_a_time:
        assert dict(copier(link).copy(1, [4], layout_of(checkpoint, FP32))).keys() == {4}
    link.close()


REFUSALS = {
    "other dtype": (BF16, 1, 4, r"expert 4 is held as .*torch.float32.*, asked for as .*torch.bfloat16.*: read it"),
    "fp8": (FP8, 1, 4, r".*asked for as \[\*, 192\] torch.float8_e4m3fn"),
    "expert": (FP32, 1, 5, "expert 5 is not held here"),
    "layer": (FP32, 2, 4, "expert 4 is not held here"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_for_a_reason(checkpoint_of: Write, start: Callable[[Path, Compute], ExpertHost], case: str) -> None:
    compute, layer, expert, reason = REFUSALS[case]
    checkpoint = checkpoint_of("fp8")
    link = connect(start(checkpoint, FP32), "shm")
    with pytest.raises(
        LinkError, match=rf"refused to give weights: expert-host-0: layer {layer}: ValueError: {reason}"
    ):
        list(copier(link).copy(layer, [expert], layout_of(checkpoint, compute)))
    link.close()


def outlines(layout: Layout) -> list[torch.Tensor]:
    return [form.empty(0, CPU) for form in layout]


MALFORMED: dict[str, Callable[[list[torch.Tensor]], list[torch.Tensor]]] = {
    "nothing": lambda _: [],
    "float pieces": lambda forms: [torch.zeros(1, 4), *forms],
    "pieces of three": lambda forms: [torch.zeros(1, 3, dtype=torch.int64), *forms],
    "flat pieces": lambda forms: [torch.zeros(4, dtype=torch.int64), *forms],
    "no forms": lambda _: [torch.tensor([[4, 0, 0, 1]])],
    "one form too few": lambda forms: [torch.tensor([[4, 0, 0, 1]]), *forms[:-1]],
    "flat forms": lambda forms: [torch.tensor([[4, 0, 0, 1]]), *(form.flatten() for form in forms)],
    "no such tensor": lambda forms: [torch.tensor([[4, 2, 0, 1]]), *forms],
    "negative tensor": lambda forms: [torch.tensor([[4, -1, 0, 1]]), *forms],
    "rows beyond the end": lambda forms: [torch.tensor([[4, 0, 0, 321]]), *forms],
    "negative rows": lambda forms: [torch.tensor([[4, 0, -1, 1]]), *forms],
    "no rows": lambda forms: [torch.tensor([[4, 0, 1, 1]]), *forms],
    "negative expert": lambda forms: [torch.tensor([[-4, 0, 0, 1]]), *forms],
}


@pytest.mark.parametrize("case", MALFORMED)
def test_requests_that_are_none_are_refused(
    checkpoint_of: Write, start: Callable[[Path, Compute], ExpertHost], case: str
) -> None:
    checkpoint = checkpoint_of("fp8")
    host = start(checkpoint, FP32)
    forms = outlines(layout_of(checkpoint, FP32))
    tensors = tuple(MALFORMED[case](forms))
    header, given = host.handle(Frame(MoeHeader(Kind.FETCH, 1, 5, 8).pack(), tensors))
    refusal = MoeHeader.unpack(header)
    assert (refusal.kind, refusal.sequence, given) == (Kind.FAILED, 8, [])
    header, given = host.handle(Frame(MoeHeader(Kind.FETCH, 1, 5, 9).pack(), (torch.tensor([[4, 0, 0, 320]]), *forms)))
    assert MoeHeader.unpack(header) == MoeHeader(Kind.WEIGHTS, 1, 5, 9)
    assert [list(tensor.shape) for tensor in given] == [[320, 192]]


Answer = Callable[[MoeHeader, tuple[torch.Tensor, ...]], tuple[bytes, list[torch.Tensor]]]

WRONG: dict[str, tuple[Answer, str]] = {
    "no header": (lambda _header, tensors: (b"?", list(tensors)), "sent a reply that is none"),
    "another sequence": (
        lambda header, tensors: (MoeHeader(Kind.WEIGHTS, 1, 5, header.sequence + 1).pack(), list(tensors)),
        "sent WEIGHTS 2 as reply to FETCH 1",
    ),
    "another kind": (
        lambda header, tensors: (MoeHeader(Kind.DONE, 1, 5, header.sequence).pack(), list(tensors)),
        "sent DONE 1 as reply to FETCH 1",
    ),
    "too few": (
        lambda header, tensors: (MoeHeader(Kind.WEIGHTS, 1, 5, header.sequence).pack(), list(tensors[:1])),
        "instead of",
    ),
    "another dtype": (
        lambda header, tensors: (
            MoeHeader(Kind.WEIGHTS, 1, 5, header.sequence).pack(),
            [tensor.to(torch.bfloat16) for tensor in tensors],
        ),
        r"sent .*torch.bfloat16.* instead of .*torch.float32",
    ),
    "another shape": (
        lambda header, tensors: (
            MoeHeader(Kind.WEIGHTS, 1, 5, header.sequence).pack(),
            [tensor.T for tensor in tensors],
        ),
        "instead of",
    ),
}


def tampering(host: ExpertHost, answer: Answer) -> Link:
    """A link to a host whose WEIGHTS are tampered with on the way."""
    ours, theirs = InlineLink.pair("expert-host-1", "expert-host-0")

    def handle() -> None:
        frame = theirs.recv(deadline=Deadline.after(20))
        header, tensors = host.handle(frame)
        wrong, others = answer(MoeHeader.unpack(header), tuple(tensors))
        theirs.send(wrong, others, deadline=Deadline.after(20))

    theirs.drive(handle)
    return ours


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_what_was_asked_for_is_not_taken(
    checkpoint_of: Write, start: Callable[[Path, Compute], ExpertHost], case: str
) -> None:
    answer, reason = WRONG[case]
    checkpoint = checkpoint_of("fp8")
    with (
        contextlib.closing(tampering(start(checkpoint, FP32), answer)) as link,
        pytest.raises(LinkError, match=reason),
    ):
        list(copier(link).copy(1, [4], layout_of(checkpoint, FP32)))


def test_silence_has_a_deadline(checkpoint_of: Write) -> None:
    ours, theirs = InlineLink.pair("expert-host-1", "expert-host-0")
    silent = WeightCopier(ours, epoch=5, device=CPU, silence_s=0.01)
    with pytest.raises(PeerTimeoutError):
        list(silent.copy(1, [4], layout_of(checkpoint_of("fp8"), FP32)))
    for link in (ours, theirs):
        link.close()


def test_a_host_that_goes_away_is_noticed(checkpoint_of: Write) -> None:
    ours, theirs = InlineLink.pair("expert-host-1", "expert-host-0")
    threading.Timer(0.01, theirs.close).start()
    with pytest.raises(PeerDiedError):
        list(copier(ours).copy(1, [4], layout_of(checkpoint_of("fp8"), FP32)))
    ours.close()


def test_two_requests_are_on_their_way_at_a_time(
    checkpoint_of: Write, start: Callable[[Path, Compute], ExpertHost]
) -> None:
    """The source copies the next part while this end takes the one before; more would fill the link."""
    checkpoint = checkpoint_of("fp8")
    host = start(checkpoint, FP32)
    ours, theirs = InlineLink.pair("expert-host-1", "expert-host-0")
    layout = layout_of(checkpoint, FP32)
    frames = plan_frames(layout, [4], 10_000)
    assert len(frames) > 4
    unanswered: list[int] = []

    def serve() -> None:
        answered = 0
        pending: list[Frame] = []
        while answered < len(frames):
            while theirs.wait(deadline=Deadline.after(0.0 if pending else 20)):
                pending.append(theirs.recv(deadline=Deadline.after(20)))
            unanswered.append(len(pending))
            theirs.send(*host.handle(pending.pop(0)), deadline=Deadline.after(20))
            answered += 1

    thread = threading.Thread(target=serve)
    thread.start()
    assert dict(copier(ours, frame_bytes=10_000).copy(1, [4], layout)).keys() == {4}
    thread.join(20)
    assert max(unanswered) <= 2
    for link in (ours, theirs):
        link.close()
