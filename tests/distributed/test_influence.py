"""Two processes record the influence that one records: of the averaged gradient, each observing a share."""

import numpy as np
import pytest

from comparison import assert_same_course
from launcher import launch
from small_stores import read_influence
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.store.store import DynamicsStore

pytestmark = pytest.mark.distributed

NAMES = ["influence", "influence_lora", "influence_accumulation"]
SAME = ("logp_sum", "predicted_sum", "update_sum", "momentum_sum", "true_sum", "force_norm", "grad_norm", "lr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder):
    return launch("single_gpu", NAMES, folder / "one", 1)


@pytest.fixture(scope="module")
def two(folder, one):
    return launch("ddp", NAMES, folder / "two", 2)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_record_what_one_records(name, one, two):
    assert (one.outcome(name)["num_processes"], two.outcome(name)["num_processes"]) == (1, 2)
    assert two.outcome(name)["wrapper"] == "DistributedDataParallel"
    assert_same_course(one.folder / name, two.folder / name)
    ours, theirs = read_influence(one.folder / name), read_influence(two.folder / name)
    keys = list(INFLUENCE.keys)
    assert ours[keys].equals(theirs[keys]) and not theirs.duplicated(keys).any()
    assert set(theirs["step"]) == {0, 2} and set(theirs["update"]) == {"batch", "chosen"}
    assert [*map(list, ours["token_ids"])] == [*map(list, theirs["token_ids"])]
    for (update, step), rows in theirs.groupby(["update", "step"]):
        for column in SAME:
            value, other = rows[column].to_numpy(), ours.loc[rows.index, column].to_numpy()
            assert (np.isnan(value) == np.isnan(other)).all(), (update, step, column)
            if not np.isnan(value).any():
                difference = np.linalg.norm(value - other)
                # A measured change is a difference of float32 sums.
                rounding = 1e-5 * len(value) ** 0.5 * (column == "true_sum")
                assert difference <= 2e-3 * np.linalg.norm(other) + rounding, (update, step, column, difference)
    taken = theirs[theirs["update"] == "batch"]
    wrong = np.linalg.norm(taken["predicted_sum"] - taken["true_sum"])
    assert 0 < wrong < 0.3 * np.linalg.norm(taken["true_sum"])


def test_what_is_observed_is_described_alike(one, two):
    ours, theirs = (DynamicsStore(run.folder / "influence").read_meta()["akg"] for run in (one, two))
    assert ours == theirs and ours["observe"]["num_probes"] == 5
