"""Training batches: conversations packed into rows, each attending to itself only."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .tasks import draw_mixed
from .vocabulary import EOS, render


@dataclass(frozen=True)
class Batch:
    """B rows of S tokens; targets are the next token and the one after, -100 where nothing is to be learnt."""

    tokens: Tensor  # int64 [B, S]
    positions: Tensor  # int64 [B, S], from 0 in each conversation
    mask: Tensor  # bool [B, 1, S, S]
    targets: Tensor  # int64 [B, S]
    second_targets: Tensor  # int64 [B, S]
    weights: Tensor  # float32 [B, S], how much a next token counts; 0 where nothing is to be learnt


# The first tokens of a reply say how the question was read: few, and decisive, so they count double.
OPENING_TOKENS, OPENING_WEIGHT = 16, 2.0


class Packer:
    """Draws conversations of a task mixture and packs them into rows of `length` tokens."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random, length: int, mixture: dict[str, float]) -> None:
        self.tokenizer, self.rng, self.length, self.mixture = tokenizer, rng, length, mixture
        self.pool: list[tuple[list[int], list[int]]] = []

    def _refill(self, size: int) -> None:
        examples = [draw_mixed(self.rng, self.mixture) for _ in range(size)]
        texts = [render(e.messages) for e in examples] + [e.completion + EOS for e in examples]
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        pairs = zip(ids[:size], ids[size:], strict=True)
        self.pool += [(prompt, reply) for prompt, reply in pairs if len(prompt) + len(reply) <= self.length]

    def batch(self, rows: int) -> Batch:
        """Pack one batch: each row takes the longest conversation that still fits, from a pool of a few dozen."""
        tokens = np.full((rows, self.length), 2, dtype=np.int64)
        positions = np.zeros_like(tokens)
        segments = np.zeros_like(tokens)
        answers = np.zeros((rows, self.length), dtype=np.float32)
        for row in range(rows):
            at, segment = 0, 0
            while True:
                if len(self.pool) < 48:
                    self._refill(64)
                # The first conversation of a row is any, so that long ones are not all used up early.
                fits = [i for i, (p, r) in enumerate(self.pool) if len(p) + len(r) <= self.length - at]
                if not fits:
                    break
                index = fits[0] if at == 0 else max(fits, key=lambda i: len(self.pool[i][0]) + len(self.pool[i][1]))
                prompt, reply = self.pool.pop(index)
                end = at + len(prompt) + len(reply)
                segment += 1
                tokens[row, at:end] = prompt + reply
                segments[row, at:end] = segment
                answers[row, at + len(prompt) : end] = 1.0
                answers[row, at + len(prompt) : min(end, at + len(prompt) + OPENING_TOKENS)] = OPENING_WEIGHT
                positions[row, at:end] = self._positions(len(prompt), len(reply))
                at = end
        return _assemble(tokens, positions, segments, answers)

    def _positions(self, prompt: int, reply: int) -> np.ndarray:
        """Positions of one conversation; one in ten starts late, so that later positions are not strange."""
        first = self.rng.randint(0, 1200) if self.rng.random() < 0.1 else 0
        positions = np.arange(prompt + reply, dtype=np.int64) + first
        positions[0] = 0  # the begin token stays at the begin
        return positions


def _assemble(tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray, answers: np.ndarray) -> Batch:
    """Targets: the token one (two) further, where it belongs to the same conversation and to its reply."""

    def shifted(step: int) -> np.ndarray:
        target = np.full_like(tokens, -100)
        good = (segments[:, step:] == segments[:, :-step]) & (answers[:, step:] > 0)
        target[:, :-step][good] = tokens[:, step:][good]
        return target

    weights = np.zeros_like(answers)
    weights[:, :-1] = answers[:, 1:]
    inside = torch.from_numpy(segments)
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    mask = (inside.unsqueeze(2) == inside.unsqueeze(1)) & causal
    tensors = (shifted(1), shifted(2), weights)
    first, second, weight = map(torch.from_numpy, tensors)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(positions), mask.unsqueeze(1), first, second, weight)
