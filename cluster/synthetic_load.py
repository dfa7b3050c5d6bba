"""Made-up expert loads for trying placements without a model: the shapes that measured loads have, from a seed."""

from __future__ import annotations

import numpy as np

from .replica_counts import Floats


def lognormal_load(layers: int, experts: int, *, sigma: float = 1.0, seed: int = 0) -> Floats:
    """[L, E] independent loads whose logarithm has standard deviation `sigma`."""
    load: Floats = np.random.default_rng(seed).lognormal(0.0, sigma, (layers, experts))
    return load


def zipf_load(layers: int, experts: int, *, exponent: float = 1.0, seed: int = 0) -> Floats:
    """[L, E] the n-th busiest expert of a layer has load n ** -exponent; which one that is differs from layer to layer."""
    generator = np.random.default_rng(seed)
    ranked = np.arange(1, experts + 1, dtype=np.float64) ** -exponent
    return np.stack([ranked[generator.permutation(experts)] for _ in range(layers)])


def with_noise(load: Floats, share: float, *, seed: int) -> Floats:
    """`load` as another measurement would find it: every value off by a normal error of relative size `share`."""
    noise = np.random.default_rng(seed).normal(1.0, share, load.shape)
    noisy: Floats = load * np.maximum(0.0, noise)
    return noisy
