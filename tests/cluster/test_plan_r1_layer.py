"""A MoE layer of DeepSeek-R1's full width, run for real, against what a plan says of it: bytes held, read and sent.

64 of the 256 experts, in FP8, on two hosts that are processes of their own: 2.8 GB of weights, the width of R1 everywhere.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from moray.actors.deadline import Deadline
from moray.actors.links import Frame, Link, LinkKind, dial
from moray.actors.links.wire import MessageType, encode, plan_payload
from moray.actors.messages import GenerateRequest
from moray.actors.testing import SECRET, EngineParts, random_prompt, run
from moray.cluster.planning.sizes import ModelSizes
from moray.cluster.planning.traffic import HostShare, LayerTraffic
from moray.kernels.combine import combine_reference
from moray.kernels.experts import swiglu_mlp
from moray.model.compute import Compute
from moray.model.loading import load_experts, open_model
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint
from moray.model.weights import mlp_weights

from ..actors.processes import HostProcess, host_processes
from .plan_models import R1

EXPERTS, HOSTS = 64, 2
COMPUTE = Compute(torch.device("cpu"), torch.bfloat16, keep_fp8=True)
REPLY_S = 200.0
"""Two slow cores decode 44M weights an expert; nothing here is about time."""


class CountingLink(Link):
    """A link that keeps what went over it: (payload bytes, control bytes) of each frame, in each direction."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.peer, self.kind = link.peer, link.kind
        self.sent: list[tuple[int, int]] = []
        self.received: list[tuple[int, int]] = []

    def send(self, header: bytes, tensors: Sequence[torch.Tensor], *, deadline: Deadline) -> None:
        self.sent.append(_frame_bytes(header, tensors))
        self._link.send(header, tensors, deadline=deadline)

    def recv(self, *, deadline: Deadline) -> Frame:
        frame = self._link.recv(deadline=deadline)
        self.received.append(_frame_bytes(frame.header, frame.tensors))
        return frame

    def wait(self, *, deadline: Deadline) -> bool:
        return self._link.wait(deadline=deadline)

    def check(self) -> None:
        self._link.check()

    def close(self) -> None:
        self._link.close()


def _frame_bytes(header: bytes, tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    payload = plan_payload(tensors)
    return payload.nbytes, len(encode(MessageType.FRAME, 0, header, payload))


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """R1 cut down to its first MoE layer, with the first 64 experts, and few words."""
    overrides = {
        **R1,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "n_routed_experts": EXPERTS,
        "num_nextn_predict_layers": 0,
        "vocab_size": 512,
    }
    path = tmp_path_factory.mktemp("r1") / "layer"
    yield write_random_checkpoint(path, overrides, dtype="fp8", shards=8, draw_codes=True)
    shutil.rmtree(path)  # three runs' folders would be kept


@pytest.fixture(scope="module")
def parts(layer: Path) -> Iterator[EngineParts]:
    parts = EngineParts(layer, compute=COMPUTE)
    yield parts
    parts.close()


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_a_layer_of_r1_is_what_the_plan_says(parts: EngineParts, kind: LinkKind) -> None:
    config, sizes, table = parts.config, ModelSizes(parts.config, COMPUTE), parts.table(HOSTS)
    traffic = LayerTraffic(table, hidden_size=config.hidden_size, dtype=COMPUTE.dtype)
    assert (config.hidden_size, config.moe_intermediate_size) == (7168, 2048)
    with host_processes(parts, table, kind) as processes, contextlib.ExitStack() as stack:
        for host in processes.values():
            assert host.resident_bytes == EXPERTS // HOSTS * sizes.expert.total == 32 * 44_050_944
            assert host.data_bytes_read == EXPERTS // HOSTS * sizes.disk_expert.total == 32 * 44_050_944
        links = {name: CountingLink(_dialled(process)) for name, process in processes.items()}
        router = parts.router(table, links, reply_timeout_s=REPLY_S)
        stack.callback(router.stop)

        planned: dict[str, list[HostShare]] = {name: [] for name in links}
        asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        answered: list[torch.Tensor] = []
        start, finish = router.dispatch.start, router.dispatch.finish

        def recorded_start(index: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> object:
            for name, share in traffic.shares(index, ids.numpy()).items():
                planned[name].append(share)
            asked.append((hidden.clone(), ids.clone(), weights.clone()))
            return start(index, hidden, ids, weights)

        def recorded_finish(pending: object) -> torch.Tensor:
            answered.append(finish(pending).clone())  # type: ignore[arg-type]
            return answered[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(router.dispatch, "start", recorded_start)
            patch.setattr(router.dispatch, "finish", recorded_finish)
            request = GenerateRequest("r1", random_prompt(config, 3, 3), SamplingParams(max_tokens=2, temperature=0.0))
            recorder = run(router, [request])

    assert len(recorder.tokens("r1")) == 2
    assert [len(hidden) for hidden, _, _ in asked] == [3, 1], "a prefill of three tokens and a step of one"
    for name, link in links.items():
        assert link.sent == [(share.dispatch.payload, share.dispatch.control) for share in planned[name]]
        assert link.received == [(share.combine.payload, share.combine.control) for share in planned[name]]
        for share in planned[name]:
            assert share.dispatch.payload == share.rows * 7168 * 2 + share.pairs * 2 * 4
            assert share.combine.payload == share.pairs * 7168 * 2
    pairs = Counter(int(expert) for _, ids, _ in asked for expert in ids.flatten())
    assert sum(share.pairs for shares in planned.values() for share in shares) == pairs.total() == 4 * 8
    assert router.dispatch.expert_tokens[0].tolist() == [pairs[expert] for expert in range(EXPERTS)]
    # The last step's token, by hand: the same bits as from two processes.
    expected = _by_hand(parts.checkpoint, *asked[-1])
    assert torch.equal(answered[-1], expected)


def _dialled(process: HostProcess) -> Link:
    return dial(process.address, secret=SECRET, identity="router-0", deadline=Deadline.after(30.0))


def _by_hand(path: Path, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """What one token's experts give, read from the checkpoint and computed one after the other."""
    config, checkpoint = open_model(path, verify="headers")
    ids: npt.NDArray[np.int64] = topk_ids.numpy()
    outputs = []
    for expert in ids[0].tolist():
        stored, _ = load_experts(checkpoint, config, [(0, expert)])
        outputs.append(swiglu_mlp(hidden, mlp_weights(stored[0, expert], COMPUTE)))
    return combine_reference(torch.stack(outputs, dim=1), topk_weights)
