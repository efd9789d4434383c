"""Agreement of rankings and its intervals, against pandas and repeated draws."""

import numpy as np
import pandas as pd
import pytest

from trl_dynamics.statistics import rank_agreement, rank_stability, weighted_spearman


def draw(num_pairs: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=num_pairs)
    return first, first + noise * rng.normal(size=num_pairs)


def by_pandas(first, second) -> float:
    return pd.DataFrame({"a": first, "b": second}).corr("spearman").loc["a", "b"]


def test_the_correlation_is_spearmans_with_ties_at_their_mean_rank():
    first, second = draw(40, 0)
    for digits in (0, 3):
        a, b = first.round(digits), second.round(digits)
        assert rank_agreement(a, b).value == pytest.approx(by_pandas(a, b), abs=1e-12)


def test_pairs_that_count_several_times_are_pairs_repeated():
    first, second = (values.round(1) for values in draw(12, 1))
    weight_RN = np.random.default_rng(0).integers(0, 4, size=(20, 12))
    expected = [by_pandas(first.repeat(weight_N), second.repeat(weight_N)) for weight_N in weight_RN]
    np.testing.assert_allclose(weighted_spearman(first, second, weight_RN), expected, atol=1e-12)


def test_rankings_do_not_see_monotone_scales_or_the_order_of_pairs():
    first, second = draw(30, 2)
    order = np.random.default_rng(1).permutation(30)
    plain = rank_agreement(first, second)
    assert rank_agreement(np.exp(3 * first), second**3 - 5) == plain
    assert rank_agreement(first[order], second[order]).value == pytest.approx(plain.value, abs=1e-12)
    assert rank_agreement(first, first).value == rank_agreement(first, first).low == 1
    assert rank_agreement(first, -first).value == -1


def test_the_interval_covers_the_correlation_of_all_pairs():
    first, second = draw(100_000, 3)
    true = by_pandas(first, second)
    found = [rank_agreement(*draw(60, seed), num_resamples=300) for seed in range(100, 200)]
    assert sum(one.low <= true <= one.high for one in found) >= 88


def test_pairs_that_share_their_sides_need_sides_drawn_again():
    def crossed(seed: int) -> list[np.ndarray]:
        """Two measures of 12 x 12 pairs that agree in the updates' sizes by nothing but chance."""
        rng = np.random.default_rng(seed)
        sides = [rng.normal(size=(12, 1)) + 0.3 * rng.normal(size=(12, 12)) for _ in range(2)]
        return [side.ravel() for side in sides]

    update, observe = (index.ravel() for index in np.indices((12, 12)))
    covered = {"pairs": 0, "sides": 0}
    for seed in range(60):
        values = crossed(seed)
        for name, clusters in (("pairs", []), ("sides", [update, observe])):
            found = rank_agreement(*values, clusters, num_resamples=200)
            covered[name] += found.low <= 0 <= found.high
    assert covered["pairs"] < 40 and covered["sides"] >= 52


def test_what_does_not_vary_has_no_ranking():
    found = rank_agreement([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert np.isnan([found.value, found.low, found.high]).all()


@pytest.mark.parametrize(
    "first, second, clusters, match",
    [
        ([1, 2, 3], [1, 2], [], "expected the same pairs twice"),
        ([1, 2], [1, 2], [], "at least 3"),
        ([1, 2, np.nan], [1, 2, 3], [], "missing or infinite"),
        ([1, 2, 3], [1, 2, 3], [["a", "b"]], "clusters has 2 labels"),
    ],
)
def test_bad_pairs_are_told(first, second, clusters, match):
    with pytest.raises(ValueError, match=match):
        rank_agreement(first, second, clusters)


def test_the_matrix_has_every_two_steps_and_shares_count_what_is_below():
    first, near = draw(80, 4, noise=0.1)
    far = draw(80, 5)[0]
    found = rank_stability({0: first, 10: near, 20: far})
    assert found.value_SS[0, 1] == found.value_SS[1, 0] == rank_agreement(first, near).value > 0.9
    assert found.high_SS[1, 2] == rank_agreement(near, far).high < 0.9
    assert found.share_below() == 0.5 and found.share_below(consecutive=False) == pytest.approx(2 / 3)
    assert found.share_below(surely=True) == 0.5 and found.share_below(1.0, surely=True) == 1
    assert list(found.consecutive()["after"]) == [10, 20]
    assert found.consecutive()["low"].tolist() == [found.low_SS[0, 1], found.low_SS[1, 2]]
    with pytest.raises(ValueError, match="at least 2"):
        rank_stability({0: first})
