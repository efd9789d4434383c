"""LBK and SignDelta from records: loops, and the inequality that they come from."""

import numpy as np
import pandas as pd
import pytest

from trl_dynamics.paths.lbk import lower_bounds


def records(num_steps: int = 3, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(0, 10 * num_steps, 10):
        for kind in ("chosen", "rejected", "other_test"):
            for probe in "abcd":
                prob = rng.uniform(0.1, 0.5)
                row = {"step": step, "response_type": kind, "probe_id": probe, "logp_mean": rng.normal()}
                rows.append(row | {"prob_mean": prob, "sum_sq_mean": rng.uniform(prob**2, 1)})
    return pd.DataFrame(rows)


def test_they_are_what_the_formulas_say_probe_by_probe():
    frame, vocab_size = records(), 30
    found = lower_bounds(frame, "chosen", vocab_size).set_index(["step", "response_type"])
    table = frame.set_index(["step", "response_type", "probe_id"])
    assert len(found) == 2 * 3
    for (step, kind), row in found.iterrows():
        deltas, sizes, forces = [], [], []
        for probe in "abcd":
            now, before = table.loc[(step, kind, probe)], table.loc[(step - 10, kind, probe)]
            deltas.append(now["logp_mean"] - before["logp_mean"])
            sizes.append((vocab_size - 2 + vocab_size * before["sum_sq_mean"]) ** 0.5)
            chosen = table.loc[(step - 10, "chosen", probe)]
            forces.append((1 - 2 * chosen["prob_mean"] + chosen["sum_sq_mean"]) ** 0.5)
        divisor = np.mean(sizes) * np.mean(forces)
        assert row["lbk"] == pytest.approx(np.mean(np.square(deltas)) ** 0.5 / divisor)
        assert row["sign_delta"] == pytest.approx(np.mean(deltas) / divisor)
        assert (row["amplification"], row["force"]) == pytest.approx((np.mean(sizes), np.mean(forces)))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def test_a_step_of_softmax_regression_stays_below_the_size_of_its_kernel():
    rng, rate, num_labels = np.random.default_rng(0), 1e-4, 7
    weight_VD = rng.normal(size=(num_labels, 4))
    for _ in range(20):
        trained, seen = rng.normal(size=(2, 4))
        label, other = rng.integers(num_labels, size=2)
        moved_VD = weight_VD - rate * np.outer(softmax(weight_VD @ trained) - np.eye(num_labels)[label], trained)
        rows = []
        for step, weight in enumerate((weight_VD, moved_VD)):
            for kind, features, target in (("chosen", trained, label), ("other_test", seen, other)):
                prob_V = softmax(weight @ features)
                row = {"step": step, "response_type": kind, "probe_id": "a", "logp_mean": np.log(prob_V[target])}
                rows.append(row | {"prob_mean": prob_V[target], "sum_sq_mean": (prob_V**2).sum()})
        found = lower_bounds(pd.DataFrame(rows), "chosen", num_labels).set_index("response_type")
        for kind, features in (("chosen", trained), ("other_test", seen)):
            size = rate * abs(features @ trained)  # of K = <x_o, x_u> I, as an operator
            assert found.loc[kind, "lbk"] <= size * 1.01
            assert abs(found.loc[kind, "sign_delta"]) == pytest.approx(found.loc[kind, "lbk"])
        assert found.loc["chosen", "sign_delta"] > 0


def test_several_trained_types_push_by_their_mean():
    one, two, both = (
        lower_bounds(records(), types, 30)["force"].iloc[0] for types in ("chosen", "rejected", ["chosen", "rejected"])
    )
    assert both == pytest.approx((one + two) / 2)


@pytest.mark.parametrize(
    "change, trained_on, match",
    [
        (lambda frame: frame.drop(columns="prob_mean"), "chosen", "no column 'prob_mean'"),
        (lambda frame: frame, "random_words", "no record is of the type 'random_words'"),
        (lambda frame: pd.concat([frame, frame]), "chosen", "recorded twice"),
        (lambda frame: frame[frame["step"] == 0], "chosen", "records of 1 step"),
    ],
)
def test_bad_records_are_told(change, trained_on, match):
    with pytest.raises(ValueError, match=match):
        lower_bounds(change(records()), trained_on, 30)
