"""Standard errors of means over probes and types, with and without holes."""

import numpy as np
import pytest

from trl_dynamics.findings.effects import clustered_effect

RNG = np.random.default_rng


def without_correction(values: np.ndarray) -> float:
    """The standard error of the mean of the probes' means, for probes that have every type."""
    means = values.mean(axis=1)
    return float(means.std(ddof=1) / len(means) ** 0.5)


@pytest.mark.parametrize(("num_probes", "num_types"), [(2, 1), (6, 1), (6, 5), (12, 13), (40, 3)])
def test_of_complete_data_it_is_that_of_the_probes_means(num_probes, num_types):
    values = RNG(num_probes).standard_normal((num_probes, num_types)) + RNG(1).standard_normal((num_probes, 1))
    found = clustered_effect(values)
    assert found.num_probes == num_probes
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.se == pytest.approx(without_correction(values), rel=1e-12)


def holed(num_probes: int, num_types: int, missing: float, rng: np.random.Generator) -> np.ndarray:
    """Which probe has which type: everyone has one, and every type has somebody."""
    while True:
        present = rng.random((num_probes, num_types)) >= missing
        if present.any(axis=0).all() and present.any(axis=1).all():
            return present


@pytest.mark.parametrize("correlation", [0.0, 0.4, 0.9])
@pytest.mark.parametrize(
    ("num_probes", "num_types", "missing"), [(6, 5, 0.3), (6, 10, 0.5), (8, 3, 0.5), (12, 10, 0.5), (12, 10, 0.7)]
)
def test_its_mean_square_is_the_means_variance(num_probes, num_types, missing, correlation):
    """For each pattern of holes, that variance is known: of types of variance 1 and one correlation."""
    rng, found, true = RNG(7), 0.0, 0.0
    covariance = np.where(np.eye(num_types, dtype=bool), 1.0, correlation)
    for _ in range(60):
        present = holed(num_probes, num_types, missing, rng)
        counts, common = present.sum(axis=0), present.T.astype(float) @ present
        together = rng.standard_normal((50, num_probes, 1)) * correlation**0.5
        values = together + rng.standard_normal((50, num_probes, num_types)) * (1 - correlation) ** 0.5
        levels = rng.standard_normal(num_types)
        squares = [clustered_effect(np.where(present, one, np.nan) + levels).se ** 2 for one in values]
        if np.isnan(squares[0]):
            continue
        found += np.mean(squares)
        true += (common / np.outer(counts, counts) * covariance).sum() / num_types**2
    assert (found / true) ** 0.5 == pytest.approx(1.0, abs=0.05)


def test_where_no_type_has_two_probes_there_is_none():
    found = clustered_effect(np.where(np.eye(4, dtype=bool), 1.0, np.nan))
    assert (found.mean, found.num_probes) == (1.0, 4) and np.isnan(found.se)
    assert not found.up() and not found.down()


def test_a_type_with_one_probe_is_taken_to_vary_as_the_others():
    values = RNG(0).standard_normal((6, 3))
    whole, values[1:, 2] = clustered_effect(values).se, np.nan
    assert clustered_effect(values).se > whole


def test_values_that_do_not_vary_have_no_error():
    values = np.ones((5, 3))
    values[0, 0] = np.nan
    assert clustered_effect(values).se == 0.0
