"""How unevenly a gate's tokens fall on the experts, and how that changes with time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...configs.errors import ConfigError
from ..replica_counts import Floats
from ..synthetic_load import lognormal_load, zipf_load

_STEPS = 8
"""Into which the way from one distribution of the load to the next is divided."""


@dataclass(frozen=True, slots=True)
class Skew:
    """The shape of the experts' load.

    Attributes:
        kind: "uniform", "zipf" or "lognormal".
        parameter: Zipf's exponent, or the logarithm's standard deviation.
        drift_s: after so many seconds other experts are hot; what is between passes smoothly. None: never.
    """

    kind: str = "uniform"
    parameter: float = 0.0
    drift_s: float | None = None

    def __str__(self) -> str:
        shape = self.kind if self.kind == "uniform" else f"{self.kind} {self.parameter:g}"
        return shape if self.drift_s is None else f"{shape}, others hot every {self.drift_s:g} s"


UNIFORM = Skew()
"""All experts are asked for equally often."""


def parse_skew(text: str, *, drift_s: float | None = None) -> Skew:
    """A skew as written on the command line: uniform, zipf:EXPONENT or lognormal:SIGMA.

    Raises:
        ConfigError: it is not written so.
    """
    kind, _, rest = text.partition(":")
    try:
        parameter = float(rest) if rest else math.nan
    except ValueError:
        parameter = -1.0
    if text != "uniform" and (kind not in ("zipf", "lognormal") or not 0 <= parameter < math.inf):
        raise ConfigError(f"--skew {text!r}: must be uniform, zipf:EXPONENT as in zipf:0.8, or lognormal:SIGMA")
    return Skew(kind, 0.0 if text == "uniform" else parameter, drift_s)


class ExpertPopularity:
    """The share of a layer's (token, expert) pairs that each expert gets.

    A token never picks an expert twice, so no share is above 1 / `top_k`; what is cut off there goes to the others.

    Args:
        skew: the shape.
        layers, experts, top_k: of the model.
        seed: of which experts are hot.
    """

    def __init__(self, skew: Skew, layers: int, experts: int, top_k: int, *, seed: int) -> None:
        self._skew = skew
        self._shape = layers, experts
        self._top_k = top_k
        self._seed = seed
        self._made: dict[int, Floats] = {}

    def phase(self, now: float) -> int:
        """Number of the span of time in which shares do not change."""
        return 0 if self._skew.drift_s is None else int(now / self._skew.drift_s * _STEPS)

    def shares(self, phase: int) -> Floats:
        """[L, E] shares, each layer's sum 1."""
        whole, part = divmod(phase, _STEPS)
        before = self._distribution(whole)
        if not part:
            return before
        return before + (self._distribution(whole + 1) - before) * (part / _STEPS)

    def _distribution(self, number: int) -> Floats:
        if number not in self._made:
            for old in [n for n in self._made if n < number - 1]:
                del self._made[old]
            layers, experts = self._shape
            seed = self._seed * 1_000_003 + number
            load = np.ones(self._shape)
            if self._skew.kind == "zipf":
                load = zipf_load(layers, experts, exponent=self._skew.parameter, seed=seed)
            elif self._skew.kind == "lognormal":
                load = lognormal_load(layers, experts, sigma=self._skew.parameter, seed=seed)
            self._made[number] = _cut(load / load.sum(axis=1, keepdims=True), 1 / self._top_k)
        return self._made[number]


def _cut(shares: Floats, most: float) -> Floats:
    """Shares [L, E] with none above `most`: what is cut off goes to the others in proportion."""
    while True:
        over = shares > most * (1 + 1e-12)
        if not over.any():
            return shares
        full = shares >= most * (1 - 1e-12)
        rest = np.where(full, 0.0, shares)
        room = 1 - full.sum(axis=1, keepdims=True) * most
        scale = np.divide(
            room, rest.sum(axis=1, keepdims=True), out=np.zeros_like(room), where=rest.any(axis=1, keepdims=True)
        )
        shares = np.where(full, most, rest * scale)
