"""What a plan says that a layer sends: against the frames that a router and its hosts really exchange."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moray.actors.links import InlineLink
from moray.actors.links.wire import MessageType, encode, plan_payload
from moray.cluster.local import LocalCluster
from moray.cluster.planning.traffic import LayerTraffic, done_frame, random_experts, work_frame
from moray.configs.deployment import Deployment

from .plan_models import R1_CONFIG


def test_frames_of_r1s_width_are_exact() -> None:
    """Hidden states in bf16, then two int32 a pair: nothing is padded but to the next tensor's 64 bytes."""
    assert work_frame(3, 5, 7168, torch.bfloat16).payload == 3 * 14336 + 5 * 8
    assert done_frame(5, 7168, torch.bfloat16).payload == 5 * 14336


@pytest.mark.parametrize(("tokens", "experts"), [(1, {}), (7, {}), (40, {"min_replicas": 2}), (9, {"spare_slots": 3})])
def test_a_layers_messages_are_those_of_the_plan(
    tokens: int, experts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, int, int]] = []
    send = InlineLink.send

    def recorded(self: InlineLink, header: bytes, tensors: Sequence[torch.Tensor], **options: Any) -> None:
        payload = plan_payload(tensors)
        sent.append((self.peer, payload.nbytes, len(encode(MessageType.FRAME, 0, header, payload))))
        send(self, header, tensors, **options)

    deployment: dict[str, Any] = {"experts": {"hosts": 3, **experts}}
    cluster = LocalCluster(Deployment.from_dict(deployment))
    config = cluster.config
    try:
        topk_ids = torch.from_numpy(random_experts(config, tokens, seed=5))
        hidden = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(1))
        monkeypatch.setattr(InlineLink, "send", recorded)
        dispatch = cluster.router.dispatch
        dispatch.finish(dispatch.start(3, hidden, topk_ids, torch.ones(topk_ids.shape)))
        traffic = LayerTraffic(cluster.table, hidden_size=config.hidden_size, dtype=hidden.dtype)
        shares = traffic.shares(3, topk_ids.numpy())
    finally:
        cluster.close()
    asked = [entry for entry in sent if entry[0] in cluster.table.slots]
    answered = Counter((payload, control) for peer, payload, control in sent if peer not in cluster.table.slots)
    assert sorted(asked) == sorted((host, s.dispatch.payload, s.dispatch.control) for host, s in shares.items())
    assert answered == Counter((s.combine.payload, s.combine.control) for s in shares.values())


def test_chosen_experts_are_those_a_gate_can_choose() -> None:
    chosen = random_experts(R1_CONFIG, 500, seed=3)
    assert chosen.shape == (500, 8)
    assert all(len(set(row)) == 8 for row in chosen.tolist())
    assert max(len(set(row // 32)) for row in chosen) <= R1_CONFIG.topk_group
    load = np.bincount(chosen.flatten(), minlength=256)
    assert load.max() < 3 * load.mean(), "nobody is a favourite"
    assert np.array_equal(chosen, random_experts(R1_CONFIG, 500, seed=3))
