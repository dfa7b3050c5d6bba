"""Several layers' work on its way at once: answers lie in the links' memory until summed, and none overwrites another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from moray.actors.links import LinkKind
from moray.actors.testing import EngineParts
from moray.kernels.combine import combine, combine_parts, combine_reference
from moray.model.testing import write_random_checkpoint


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineParts]:
    path = write_random_checkpoint(tmp_path_factory.mktemp("model"), seed=3)
    with contextlib.closing(EngineParts(path, torch.bfloat16)) as parts:
        yield parts


Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def step(parts: EngineParts, tokens: int, seed: int) -> Step:
    config, generator = parts.config, torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, config.n_routed_experts, generator=generator).topk(config.num_experts_per_tok).indices
    hidden = torch.randn(tokens, config.hidden_size, generator=generator).to(torch.bfloat16)
    return hidden, experts, torch.rand(experts.shape, generator=generator)


@pytest.mark.parametrize("kind", ["inline", "shm", "gloo"])
def test_layers_can_be_finished_in_any_order(parts: EngineParts, kind: LinkKind) -> None:
    dispatch = parts.engine(3, kind).dispatch
    layer = parts.config.moe_layers[0]
    with torch.inference_mode():
        steps = [step(parts, tokens, seed) for seed, tokens in enumerate((4, 9, 4, 4, 1, 4, 4))]  # more than slots
        alone = [dispatch.finish(dispatch.start(layer, *one)) for one in steps]
        for order in [list(reversed(range(7))), [1, 0, 3, 2, 5, 4, 6], [6, 0, 5, 1, 4, 2, 3], list(range(7))]:
            claims = [dispatch.start(layer, *one) for one in steps]
            for number in order:
                assert torch.equal(dispatch.finish(claims[number]), alone[number]), f"{number} in {order}"
        again = [dispatch.finish(dispatch.start(layer, *one)) for one in steps]
    assert all(map(torch.equal, again, alone))
    assert (dispatch.resent_shares, dispatch.hedged_shares) == (0, 0)


def test_hosts_give_the_same_bits_however_many_there_are(parts: EngineParts) -> None:
    layer = parts.config.moe_layers[-1]
    found = []
    for hosts, kind in ((1, "inline"), (2, "shm"), (3, "shm")):
        dispatch = parts.engine(hosts, kind).dispatch  # type: ignore[arg-type]
        with torch.inference_mode():
            found.append([dispatch.finish(dispatch.start(layer, *step(parts, t, t))) for t in (1, 2, 5, 30)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "width"), [(0, 3, 40), (1, 8, 40), (7, 1, 16), (5, 3, 4096), (40, 8, 1024)]
)
def test_parts_are_combined_as_a_whole_is(tokens: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    outputs = torch.randn(tokens, top_k, width, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    flat, order = outputs.flatten(0, 1), torch.randperm(top_k * tokens, generator=generator)
    parts = [(some.numpy(), flat[some]) for some in order.split(5)]
    expected = combine_reference(outputs, weights)
    assert torch.equal(combine_parts(parts, weights, like=outputs[:, 0]), expected)
    assert torch.equal(combine(outputs, weights), expected)
