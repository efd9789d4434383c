"""Effects: how much a mean over probes changed between two steps, and how sure that is.

A change counts when it is larger than its minimum effect and larger than two standard errors over the probes (more
for few probes: Student's t).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from trl_dynamics.statistics import t_quantile

# Smallest changes worth a word, nats per token. Typical runs move by 0.1 to 1; float32 noise is below 1e-4.
MIN_EFFECT = 0.05
STANDARD_ERRORS = 2.0
MIN_PROBES = 4

COUNTS = (
    f"a change counts when it exceeds both its threshold and {STANDARD_ERRORS:g} standard errors over probes "
    f"(more for few probes, by Student's t; at least {MIN_PROBES} probes)"
)


@dataclass(frozen=True)
class Effect:
    """Mean change over probes with its standard error; NaN where nothing could be paired."""

    mean: float
    se: float
    num_probes: int

    @property
    def known(self) -> bool:
        return self.num_probes > 0

    def up(self, minimum: float = MIN_EFFECT, standard_errors: float = STANDARD_ERRORS) -> bool:
        """Whether the mean rose by more than `minimum` and by more than its noise."""
        if self.num_probes < MIN_PROBES:
            return False
        return self.mean >= minimum and self.mean > t_quantile(standard_errors, self.num_probes - 1) * self.se

    def down(self, minimum: float = MIN_EFFECT, standard_errors: float = STANDARD_ERRORS) -> bool:
        """Whether the mean fell by more than `minimum` and by more than its noise."""
        return Effect(-self.mean, self.se, self.num_probes).up(minimum, standard_errors)

    def __str__(self) -> str:
        if np.isnan(self.se):
            return f"{self.mean:+.2f} (one probe)" if self.known else "by an unknown amount"
        digits = 2 if self.se >= 0.01 else 3
        return f"{self.mean:+.{digits}f} ± {self.se:.{digits}f}"


def clustered_effect(delta: np.ndarray | pd.DataFrame) -> Effect:
    """Mean over types of the mean over probes, with a standard error that knows a probe's types move together.

    A probe's share in the mean's error is sum_t r_pt / sqrt(n_t (n_t - 1)) / T, r_pt what is left of the mean of type
    t over its n_t probes; squares of shares are added (CR2 of cluster-robust variances, exact for unrelated types),
    and multiplied by what they miss for types that move together. Without holes that is s / sqrt(n) of the probes'
    means. NaN where no type has two probes.

    Args:
        delta: probes x types, NaN where a probe lacks a type.
    """
    values = np.asarray(delta, dtype=float)
    present = ~np.isnan(values)
    values, present = values[:, present.any(axis=0)], present[:, present.any(axis=0)]
    num_probes = int(present.any(axis=1).sum())
    if num_probes == 0:
        return Effect(np.nan, np.nan, 0)
    counts = present.sum(axis=0)
    means = np.where(present, values, 0.0).sum(axis=0) / counts
    left = np.where(present, values - means, 0.0)
    repeated = counts > 1
    if not repeated.any():
        return Effect(float(means.mean()), np.nan, num_probes)
    scale = np.sqrt(counts * (counts - 1.0))
    share = (left[:, repeated] / scale[repeated]).sum(axis=1) / len(means)
    variance = _missed(left, present, counts, scale) * (share**2).sum()
    return Effect(float(means.mean()), float(np.sqrt(variance)), num_probes)


def _missed(left: np.ndarray, present: np.ndarray, counts: np.ndarray, scale: np.ndarray) -> float:
    """The variance of the mean over the expected sum of squared shares, for types of one variance and correlation.

    Of types s and t with n_st probes in common, residuals' products add up to their covariance times
    k_st = n_st (1 - 1/n_s - 1/n_t + n_st / (n_s n_t)) on average, which also tells the correlation. Types with one
    probe have no residuals; they are taken to vary as the others do.
    """
    common = present.T.astype(float) @ present
    expected = common * (1 - 1 / counts[:, None] - 1 / counts) + common**2 / np.outer(counts, counts)
    of_mean = common / np.outer(counts, counts)
    repeated, same = counts > 1, np.eye(len(counts), dtype=bool)
    seen, scales = np.outer(repeated, repeated), np.outer(scale, scale)
    of_shares = np.divide(expected, scales, out=np.zeros_like(expected), where=seen)
    products, others = left.T @ left, seen & ~same
    variance = products[same].sum() / expected[same].sum()
    pairs = expected[others].sum()
    covariance = products[others].sum() / pairs if pairs > 0 else 0.0
    correlation = min(max(covariance / variance, 0.0), 1.0) if variance > 0 else 0.0
    true, found = (v[same].sum() + correlation * v[~same].sum() for v in (of_mean, of_shares))
    return float(true / found)
