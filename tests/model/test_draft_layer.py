"""The MTP layer over pages against its readable twin, and against what tiny-r1's training made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import moray
from moray.kernels.experts import MlpWeights
from moray.kernels.mla import Segment
from moray.model.checkpoint import Checkpoint
from moray.model.compute import Compute
from moray.model.config import ModelConfig
from moray.model.draft_layer import DraftBatch, DraftLayer
from moray.model.loading import load_dense, load_experts, open_model
from moray.model.moe import LocalExperts
from moray.model.reference import reference_draft_logits, reference_logits
from moray.model.testing import write_random_checkpoint
from moray.model.transformer import ForwardBatch, Transformer
from moray.model.weights import RouterWeights, mlp_weights, router_weights

PAGE = 8
CPU = Compute.on_cpu()
TABLE = [5, 2, 9, 0, 7, 3, 11, 4]


class Model:
    """A checkpoint with its MTP layer, and all experts."""

    def __init__(self, path: Path) -> None:
        self.config, checkpoint = open_model(path, verify="headers", drafts="on")
        self.weights = self._router_weights(checkpoint)
        slots = [(layer, e) for layer in self.config.moe_layers for e in range(self.config.n_routed_experts)]
        stored, _ = load_experts(checkpoint, self.config, slots)
        self.experts: dict[int, dict[int, MlpWeights]] = {}
        for (layer, expert), weights in stored.items():
            self.experts.setdefault(layer, {})[expert] = mlp_weights(weights, CPU)
        routed = LocalExperts(self.experts)
        self.model = Transformer(
            self.config, self.weights, routed, pages=12, page_size=PAGE, max_context=PAGE * len(TABLE), compute=CPU
        )
        assert self.weights.draft is not None
        self.layer = DraftLayer(self.model, self.weights.draft, routed)

    def _router_weights(self, checkpoint: Checkpoint) -> RouterWeights:
        return router_weights(self.config, load_dense(checkpoint, self.config)[0], CPU)

    def steps(self, tokens: Sequence[int], ends: Sequence[int]) -> dict[int, torch.Tensor]:
        """The layer's logits at the last position of each chunk, the chunks ending before the positions `ends`."""
        found, start = {}, 0
        for end in ends:
            segment = Segment(0, end - start, start, TABLE)
            hidden_states = self.model.hidden_states(ForwardBatch(tokens[start:end], [segment], []))
            kept: list[torch.Tensor] = []

            def choose(
                _: Sequence[int], logits: torch.Tensor, number: int, kept: list[torch.Tensor] = kept
            ) -> list[int]:
                kept.append(logits[0])
                assert number == 0
                return [int(logits[0].argmax())]

            batch = DraftBatch(range(end - start), tokens[start + 1 : end + 1], [segment], [1])
            drafts = self.layer.draft(hidden_states, batch, choose)
            assert drafts == [[int(kept[0].argmax())]]
            found[end - 1], start = kept[0], end
        return found


@pytest.mark.parametrize("ends", [(40,), (1, 2, 3, 40), (7, 8, 9, 24, 25, 26, 40)], ids=str)
def test_equals_the_readable_form_in_any_chunks(tmp_path: Path, ends: tuple[int, ...]) -> None:
    model = Model(write_random_checkpoint(tmp_path, seed=3, mtp=True))
    tokens = torch.randint(0, model.config.vocab_size, (41,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = reference_draft_logits(model.config, model.weights, model.experts, tokens)
    model.model.cache.fill_(float("nan"))  # what was not written must not be read
    for position, logits in model.steps(tokens, ends).items():
        torch.testing.assert_close(logits, expected[position], rtol=1e-4, atol=1e-4)


def test_tiny_r1_guesses_what_comes_after_the_next_token() -> None:
    """So the layer's inputs are those it was trained with."""
    model = Model(Path(moray.__file__).parent / "model" / "tiny_r1")
    prompt = [0, 3, 37, 72, 65, 84]
    with torch.inference_mode():
        tokens = list(prompt)
        while len(tokens) < 48:
            tokens.append(int(reference_logits(model.config, model.weights, model.experts, tokens)[-1].argmax()))
        guesses = reference_draft_logits(model.config, model.weights, model.experts, tokens).argmax(-1).tolist()
    start = len(prompt)
    right = [guess == token for guess, token in zip(guesses[start - 2 : -1], tokens[start:], strict=True)]
    assert sum(right) >= 0.9 * len(right), right


def test_chains_drafts_as_far_as_its_pages_reach(tmp_path: Path) -> None:
    model = Model(write_random_checkpoint(tmp_path, seed=3, mtp=True))
    tokens = list(range(20, 20 + PAGE))
    segment = Segment(0, PAGE - 2, 0, TABLE[:1])
    hidden_states = model.model.hidden_states(ForwardBatch(tokens[:-2], [segment], []))
    batch = DraftBatch(range(PAGE - 2), tokens[1:-1], [segment], [6])
    numbers = []

    def choose(going: Sequence[int], _: torch.Tensor, number: int) -> list[int]:
        numbers.append(number)
        return [7 for _ in going]

    assert model.layer.draft(hidden_states, batch, choose) == [[7, 7, 7]]
    assert numbers == [0, 1, 2]
    none = DraftBatch(range(PAGE - 2), tokens[1:-1], [segment], [0])
    assert model.layer.draft(hidden_states, none, choose) == [[]]
    assert model.layer.draft(hidden_states, batch, lambda going, _, __: [-1 for _ in going]) == [[]]


def test_a_model_without_one_has_none() -> None:
    config = ModelConfig.load(Path(moray.__file__).parent / "model" / "tiny_r1")
    assert (config.draft_layers, list(config.moe_layers), config.cached_layers) == (0, [1, 2, 3, 4], 5)
    drafting = config.with_draft_layer()
    assert (drafting.draft_layers, list(drafting.moe_layers), drafting.cached_layers) == (1, [1, 2, 3, 4, 5], 6)
