"""How sure is a figure? 95 % intervals of a share and of a mean."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.96  # of a normal distribution, 95 % lie so many standard deviations about the mean


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Of a share of n trials (Wilson 1927): sensible near 0 and 1 and for small n too."""
    if n < 1:
        raise ValueError("a share of no trials has no interval")
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, seed: int = 0, samples: int = 10_000
) -> tuple[float, float]:
    """Of a mean: what the mean would be, had other values of the same kind been drawn (Efron 1979,
    percentiles of means of n values drawn from the n with replacement)."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("a mean of no values has no interval")
    generator = np.random.default_rng(seed)
    means = [generator.choice(array, array.size).mean() for _ in range(samples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
