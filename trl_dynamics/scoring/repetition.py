"""How repetitive sequences of token ids are: four numbers, each with a slow reference in the tests.

Ids are those of an answer's own tokens, without the end-of-turn token that closed it.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np


def distinct_share(ids: Sequence[int], n: int) -> float:
    """Distinct n-grams over all n-grams (distinct-n, Li et al. 2016, arXiv 1510.03055; 1 - it is seq-rep-n of
    Welleck et al. 2020, arXiv 1908.04319).

    Unit: share in (0, 1]; NaN for fewer than n tokens. Falls with length even in good text, so compare answers of
    about equal length. A loop of period p and length T has at most p distinct n-grams, a share of p / (T - n + 1).
    """
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def longest_repeat(ids: Sequence[int]) -> int:
    """Length of the longest run of tokens that stands at two places, which may overlap (longest repeated substring).

    max { l : ids[i : i + l] = ids[j : j + l] for some i < j }.

    Unit: tokens, 0 if no token occurs twice. A loop of period p that fills T tokens gives T - p.
    """
    return max((length for _, _, length in _equal_runs(ids)), default=0)


def repeat_share(ids: Sequence[int]) -> float:
    """Share of the tokens that lie in a run which stands right after itself (a tandem repeat).

    |union of [i, i + 2p) over all i, p with ids[i : i + p] = ids[i + p : i + 2p]| / len(ids).

    Unit: share in [0, 1]; NaN without tokens. A doubled token counts, so good text has a few percent; a loop has 1.
    """
    if not len(ids):
        return math.nan
    covered = np.zeros(len(ids), dtype=bool)
    for lag, start, length in _equal_runs(ids):
        if length >= lag:
            covered[start : start + length + lag] = True
    return float(covered.mean())


def same_shares(answers: Sequence[Sequence[int]]) -> list[float]:
    """For each answer, the share of the other prompts that are answered with the very same tokens.

    (number of j != i with answers[j] = answers[i]) / (number of answers - 1).

    Unit: share in [0, 1]; NaN for a single answer. Different prompts that deserve different answers give 0.
    """
    counts = Counter(map(tuple, answers))
    others = len(answers) - 1
    return [(counts[tuple(ids)] - 1) / others if others else math.nan for ids in answers]


def _equal_runs(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Every maximal run of positions t with ids[t] = ids[t + lag], for every lag: (lag, start, length)."""
    values = np.asarray(ids)
    for lag in range(1, len(values)):
        equal = np.concatenate([[False], values[:-lag] == values[lag:], [False]])
        edges = np.flatnonzero(equal[1:] != equal[:-1])
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            yield lag, int(start), int(end - start)
