"""95 % confidence intervals of a proportion and of a mean."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.96  # standard deviations about the mean that hold 95 % of a normal distribution


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Of a proportion of n trials (Wilson 1927); also valid near 0 and 1 and for small n."""
    if n < 1:
        raise ValueError("there is no interval of a proportion of 0 trials")
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, seed: int = 0, samples: int = 10_000
) -> tuple[float, float]:
    """Of a mean: percentiles of the means of n values resampled with replacement (Efron 1979). NaN
    of one value: its resamples are all equal, which shows no variance."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("there is no interval of a mean of 0 values")
    if array.size == 1:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    at_once = max(1, 1_000_000 // array.size)  # samples that are drawn together: 8 MB of numbers
    counts = [min(at_once, samples - start) for start in range(0, samples, at_once)]
    means = [generator.choice(array, (count, array.size)).mean(axis=1) for count in counts]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
