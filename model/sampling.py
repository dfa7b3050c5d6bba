"""How one request's tokens are chosen and when it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..configs.errors import RequestError


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

    def check(self) -> None:
        """Refuse values that nothing could be sampled with.

        Raises:
            RequestError: names the field and the value.
        """
        self._check_integer("max_tokens", self.max_tokens, least=1)
        self._check_integer("top_k", self.top_k, least=0)
        self._check_integer("seed", self.seed, least=-(1 << 63), most=(1 << 64) - 1)
        if self.logprobs is not None:
            self._check_integer("logprobs", self.logprobs, least=0)
        for token in self.stop_token_ids:
            self._check_integer("stop_token_ids", token, least=0)
        self._check_number("temperature", self.temperature, least=0.0, most=math.inf)
        self._check_number("top_p", self.top_p, least=0.0, most=1.0)
        self._check_number("min_p", self.min_p, least=0.0, most=1.0)

    @staticmethod
    def _check_integer(name: str, value: object, *, least: int, most: int | None = None) -> None:
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or value < least
            or (most is not None and value > most)
        ):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise RequestError(f"{name} is {value!r}, must be an integer {bounds}", param=name)

    @staticmethod
    def _check_number(name: str, value: object, *, least: float, most: float) -> None:
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not least <= value <= most
            or value == math.inf
        ):
            bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise RequestError(f"{name} is {value!r}, must be a finite number {bounds}", param=name)
