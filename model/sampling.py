"""How one request's tokens are chosen and when it ends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling part of a request.

    Attributes:
        max_tokens: at most this many tokens are generated.
        temperature: 0 picks the most likely token; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        seed: 64 bits; with the token's position it determines the noise, so an answer can be continued anywhere.
        logprobs: report the chosen token's log-probability and those of this many most likely tokens; None reports none.
        stop_token_ids: generation ends after any of these (the model's end-of-sequence ids unless ignored).
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
