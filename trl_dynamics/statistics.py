"""Statistics: do two rankings of the same pairs agree (Spearman, bootstrap intervals); quantiles of Student's t.

N pairs   R resamples   G distinct values   C clusters   S steps, or checkpoints
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

# Below this Spearman correlation a ranking is called unstable (the thesis' first "next check", 2509.19554).
STABLE = 0.9
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Agreement:
    """Spearman's correlation of two rankings of the same pairs, with a 95 % bootstrap interval.

    All three are NaN where one side does not vary.
    """

    value: float
    low: float
    high: float
    num_pairs: int


@dataclass(frozen=True)
class Stability:
    """Agreement of every two steps' rankings.

    Args:
        steps (`list`): The S steps or checkpoints, in order.
        value_SS, low_SS, high_SS (`np.ndarray`): Spearman's correlation and its 95 % interval; 1 on the diagonal.
        num_pairs (`int`): N.
    """

    steps: list
    value_SS: np.ndarray
    low_SS: np.ndarray
    high_SS: np.ndarray
    num_pairs: int

    def consecutive(self) -> pd.DataFrame:
        """A row per two neighbouring steps: `before`, `after`, `value`, `low`, `high`."""
        next_to = {name: np.diag(getattr(self, f"{name}_SS"), k=1) for name in ("value", "low", "high")}
        return pd.DataFrame({"before": self.steps[:-1], "after": self.steps[1:], **next_to})

    def share_below(self, level: float = STABLE, *, surely: bool = False, consecutive: bool = True) -> float:
        """Share of the stretches between two steps whose correlation is below `level`; NaN where there is none.

        Args:
            surely (`bool`): Count those alone whose whole interval is below.
            consecutive (`bool`): Stretches between neighbours; otherwise those between any two steps.
        """
        found_SS = self.high_SS if surely else self.value_SS
        values = np.diag(found_SS, k=1) if consecutive else found_SS[np.triu_indices(len(self.steps), k=1)]
        values = values[~np.isnan(values)]
        return float((values < level).mean()) if len(values) else np.nan


def rank_agreement(
    first_N: Sequence[float],
    second_N: Sequence[float],
    clusters: Sequence[Sequence] = (),
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """Spearman's correlation over pairs, ties at their mean rank, and a percentile interval of the bootstrap.

    Args:
        first_N, second_N (`Sequence[float]`): The same pairs' values.
        clusters (`Sequence`): What is drawn again. None: pairs. One label per pair, as `[probe_ids]`: all pairs of a
            label together. Two, as `[observers, updates]`: both by themselves, a pair counting as often as one times
            the other was drawn, since pairs that share a side are not independent (Owen 2007, pigeonhole bootstrap).
        num_resamples (`int`): Of the bootstrap.
        seed (`int`): Of the bootstrap.

    Raises:
        ValueError: If the two differ in length, there are fewer than 3 pairs, or a value is not finite.
    """
    first_N, second_N = np.asarray(first_N, dtype=float), np.asarray(second_N, dtype=float)
    if first_N.shape != second_N.shape or first_N.ndim != 1 or len(first_N) < 3:
        raise ValueError(f"got {first_N.shape} and {second_N.shape} values, expected the same pairs twice, at least 3")
    if not (np.isfinite(first_N).all() and np.isfinite(second_N).all()):
        raise ValueError("a value is missing or infinite; leave out its pair on both sides")
    weight_RN = _resampled(len(first_N), clusters, num_resamples, np.random.default_rng(seed))
    value = float(weighted_spearman(first_N, second_N, np.ones((1, len(first_N))))[0])
    drawn_R = weighted_spearman(first_N, second_N, weight_RN)
    drawn_R = drawn_R[~np.isnan(drawn_R)]
    low, high = np.quantile(drawn_R, [0.025, 0.975]) if len(drawn_R) and not np.isnan(value) else (np.nan, np.nan)
    return Agreement(value, float(low), float(high), len(first_N))


def pair_sides(shape: tuple[int, int]) -> list[np.ndarray]:
    """Observer and update of each pair of a flattened (O, U) table: `clusters` of [`rank_agreement`]."""
    return list(np.indices(shape).reshape(2, -1))


def weighted_spearman(first_N: np.ndarray, second_N: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
    """(R,) Spearman's correlation of pairs that each count `weight_RN` times; NaN where a side does not vary."""
    total_R1 = weight_RN.sum(axis=1, keepdims=True)
    ranks = [_midranks(values_N, weight_RN) for values_N in (first_N, second_N)]
    ranks = [rank_RN - (weight_RN * rank_RN).sum(axis=1, keepdims=True) / total_R1 for rank_RN in ranks]
    a_RN, b_RN = ranks
    with np.errstate(invalid="ignore"):
        spread_R = np.sqrt((weight_RN * a_RN**2).sum(axis=1) * (weight_RN * b_RN**2).sum(axis=1))
        return (weight_RN * a_RN * b_RN).sum(axis=1) / spread_R


def _midranks(values_N: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
    """(R, N) rank of each pair among all copies, those of one value at the mean of their ranks."""
    distinct, which_N = np.unique(values_N, return_inverse=True)
    copies_RG = np.zeros((len(weight_RN), len(distinct)))
    np.add.at(copies_RG.T, which_N, weight_RN.T)
    return (copies_RG.cumsum(axis=1) - (copies_RG - 1) / 2)[:, which_N]


def _resampled(
    num_pairs: int, clusters: Sequence[Sequence], num_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """(R, N) how often each pair is in each resample; those in which no pair is are left out."""
    weight_RN = np.ones((num_resamples, num_pairs))
    for labels_N in clusters or [np.arange(num_pairs)]:
        distinct, which_N = np.unique(np.asarray(labels_N), return_inverse=True)
        if len(which_N) != num_pairs:
            raise ValueError(f"clusters has {len(which_N)} labels, expected one for each of {num_pairs} pairs")
        drawn_RC = rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=num_resamples)
        weight_RN = weight_RN * drawn_RC[:, which_N]
    return weight_RN[weight_RN.sum(axis=1) > 0]


def rank_stability(
    values: Mapping[object, Sequence[float]], clusters: Sequence[Sequence] = (), *, seed: int = 0
) -> Stability:
    """Agreement between every two steps.

    Args:
        values (`Mapping`): By step, in order, the same pairs' values.
        clusters, seed: As in [`rank_agreement`].

    Raises:
        ValueError: If there are fewer than 2 steps, and as [`rank_agreement`].
    """
    steps, columns = list(values), list(values.values())
    if len(steps) < 2:
        raise ValueError(f"got the steps {steps}, expected at least 2 to compare")
    value_SS, low_SS, high_SS = (np.eye(len(steps)) for _ in range(3))
    for i, j in zip(*np.triu_indices(len(steps), k=1), strict=True):
        found = rank_agreement(columns[i], columns[j], clusters, seed=seed)
        for matrix_SS, number in zip((value_SS, low_SS, high_SS), (found.value, found.low, found.high), strict=True):
            matrix_SS[i, j] = matrix_SS[j, i] = number
    return Stability(steps, value_SS, low_SS, high_SS, len(columns[0]))


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for 1 and 2, else by Cornish-Fisher's expansion, to a hundredth."""
    if freedom <= 2:
        return (12.706205, 4.302653)[freedom - 1]
    z = 1.959964
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def t_quantile(standard_errors: float, freedom: int) -> float:
    """How many standard errors give the normal law's error rate under Student's t (Cornish-Fisher expansion)."""
    z = standard_errors
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
