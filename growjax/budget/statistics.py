"""Means of paired differences: intervals, tests and corrections; all random draws are fixed.

Values are differences of scores, one for each seed. If runs have the losses of their held-out windows,
they are a matrix of seeds and windows. The windows are a sample of text, as the seeds are a sample of
initial parameters and orders, and the interval counts the errors of both (crossed random effects).
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


Interval = tuple[float, float]

# Up to this number of values, every pattern of signs is tried
_EXACT = 16
# The draws of a bootstrap over seeds and windows, and how many of them are in memory at once
DRAWS, _CHUNK = 2000, 250


class Spread(NamedTuple):
    """A mean, its standard error, and the degrees of freedom of Student's t for it."""

    mean: float
    error: float
    degrees: float

    def interval(self, confidence: float = 0.95) -> Interval:
        """The interval of the mean by Student's t."""
        from scipy.stats import t

        half = float(t.ppf((1 + confidence) / 2, self.degrees)) * self.error
        return self.mean - half, self.mean + half

    def p(self) -> float:
        """The two-sided p of the hypothesis that the mean is 0."""
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        from scipy.stats import t

        return float(2 * t.sf(abs(self.mean) / self.error, self.degrees))

    def p_equivalent(self, margin: float) -> float:
        """The p of two one-sided tests: small if the mean is surely within `margin` of 0.

        It is the larger p of two hypotheses, that the mean is at most -margin and that it is at least
        margin (Schuirmann 1987). It is below 0.05 exactly if the 90% interval is within the margin.
        """
        inside = margin - abs(self.mean)
        if self.error == 0:
            return 0.0 if inside > 0 else 1.0
        from scipy.stats import t

        return float(t.sf(inside / self.error, self.degrees))


# Seeds alone --------------------------------------------------------------------------------------


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The interval of a mean by Student's t; not a number below two values."""
    return spread(values).interval(confidence) if len(values) > 1 else (np.nan, np.nan)


def bca_interval(values: Sequence[float], confidence: float = 0.95, draws: int = 9999) -> Interval:
    """The interval of a mean by the bootstrap, corrected for bias and acceleration (Efron 1987)."""
    if len(values) < 2:
        return np.nan, np.nan
    if deviation(values) == 0:  # equal values, of which SciPy would make NaN
        return values[0], values[0]
    from scipy.stats import bootstrap  # SciPy's statistics take a second to import

    rng = np.random.default_rng(0)
    result = bootstrap(
        (np.asarray(values),), np.mean, confidence_level=confidence, n_resamples=draws, rng=rng
    )
    low, high = result.confidence_interval
    return float(low), float(high)


def sign_flip(values: Sequence[float], draws: int = 100_000) -> float:
    """The p of the sign-flip test: the share of sign patterns whose mean is at least as far from 0.

    All patterns are tried for up to 16 values, and `draws` random ones for more.
    """
    x = np.asarray(values, np.float64)
    if len(x) <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(x))))
    else:
        rng = np.random.default_rng(0)
        signs = np.concatenate(
            [np.ones((1, len(x))), rng.choice((1.0, -1.0), size=(draws, len(x)))]
        )
    sums = np.abs(signs @ x)
    # The tolerance counts sums that are equal up to rounding
    return float(np.mean(sums >= abs(x.sum()) * (1 - 1e-12)))


def holm(p: Sequence[float]) -> list[float]:
    """The p of several tests, adjusted by Holm's method (1979).

    At any level, the chance of one false rejection or more among all these tests is then at most that
    level.
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min((len(p) - rank) * p[i], 1.0))
        adjusted[i] = highest
    return adjusted


def detectable(values: Sequence[float], power: float = 0.8) -> float:
    """The mean difference that as many values of this spread detect at level 0.05 with this power."""
    if len(values) < 2:
        return np.nan
    from scipy.stats import t

    degrees = len(values) - 1
    factor = float(t.ppf(0.975, degrees) + t.ppf(power, degrees))
    return factor * deviation(values) / len(values) ** 0.5


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample; 0 below two values."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


# Seeds and windows --------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> Spread:
    """The spread of a mean over seeds; it needs two values or more."""
    error = deviation(values) / len(values) ** 0.5
    return Spread(statistics.fmean(values), error, len(values) - 1)


def crossed(sums: np.ndarray, weights: np.ndarray) -> Spread:
    """The spread of a mean over seeds and windows, which are both samples.

    **Arguments**

    - `sums`: (seeds, windows), differences of the windows' summed losses.
    - `weights`: (windows,), their numbers of predictions, which all seeds share.

    The variance is that of the seeds' means plus that of the windows' (by residuals, since the difference
    per prediction is a ratio of sums). The interaction of seeds and windows is in both terms, so the
    error is, if anything, too large. Degrees of freedom are Satterthwaite's (1946).
    """
    seeds, windows = sums.shape
    total = weights.sum()
    by_seed = sums.sum(1) / total
    mean = by_seed.mean()
    residuals = sums.mean(0) - mean * weights
    of_seeds = by_seed.var(ddof=1) / seeds
    of_windows = windows / (windows - 1) * (residuals**2).sum() / total**2
    variance = of_seeds + of_windows
    if variance == 0:
        return Spread(float(mean), 0.0, seeds - 1)
    degrees = variance**2 / (of_seeds**2 / (seeds - 1) + of_windows**2 / (windows - 1))
    return Spread(float(mean), float(variance**0.5), float(degrees))


def resampled(
    sums: np.ndarray, weights: np.ndarray, confidence: float = 0.95, draws: int = DRAWS
) -> Interval:
    """The interval of a mean over seeds and windows by a bootstrap over both, with fixed draws.

    Shapes are as in `crossed`. Each draw takes seeds and windows with replacement, whole rows and columns
    (the pigeonhole bootstrap of Owen 2007). A percentile interval over a few seeds is too narrow, so the
    deviations that the draw of seeds causes are multiplied by `widening`.
    """
    seeds, rng = len(sums), np.random.default_rng(0)
    by_seed = window_draws(sums, weights, rng, draws)
    drawn = widening(seeds, confidence) * seed_draws(seeds, rng, draws)
    means = by_seed.mean(1) + (drawn * by_seed).sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def window_draws(
    sums: np.ndarray, weights: np.ndarray, rng: np.random.Generator, draws: int = DRAWS
) -> np.ndarray:
    """(draws, seeds), the mean per prediction of each seed over windows drawn with replacement."""
    windows, means = len(weights), []
    for start in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - start)
        drawn = rng.integers(0, windows, (size, windows))
        # Count how often each window was drawn with one bincount over the chunk: an offset keeps the
        # windows of different draws apart
        drawn += windows * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * windows).reshape(size, windows)
        counts = counts.astype(np.float64)
        means.append(counts @ sums.T / (counts @ weights)[:, None])
    return np.concatenate(means)


def seed_draws(seeds: int, rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """(draws, seeds), the shares of seeds drawn with replacement, minus equal shares."""
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds - 1 / seeds


def widening(seeds: int, confidence: float = 0.95) -> float:
    """The factor that makes a bootstrap's interval over few values as wide as Student's t.

    Hesterberg, "What Teachers Should Know About the Bootstrap", 2015.
    """
    from scipy.stats import norm, t

    tail = (1 + confidence) / 2
    return float((seeds / (seeds - 1)) ** 0.5 * t.ppf(tail, seeds - 1) / norm.ppf(tail))
