"""A force map from a model, without a command: what one step on one answer does to every observed answer."""

import copy

import pytest
import torch

from trl_dynamics import embedded, loading
from trl_dynamics.akg import causal_lm, influence
from trl_dynamics.influence import force_table
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.influence.single_steps import Reader, Steps, force_map

PROBES = embedded.probe_set(2)
FIRST, SECOND = PROBES


@pytest.fixture(scope="module")
def model():
    return loading.load_causal_lm(embedded.model_path(), trainable=True)


@pytest.fixture(scope="module")
def reader():
    path = embedded.model_path()
    return Reader(loading.load_tokenizer(path), end_ids=frozenset(loading.end_ids(path)), tokens_per_batch=64)


@pytest.fixture(scope="module")
def frame(model, reader):
    before = copy.deepcopy(model.state_dict())
    frame = force_map(
        model, reader, PROBES, list(PROBES), ["chosen", "dpo"], Steps(verify=True, at_once=3, tokens=True)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return frame


def test_a_row_is_the_influence_on_its_answer(model, reader, frame):
    update = reader.batch(model, [reader.encoded(SECOND, "chosen")], ends=True)
    observe = reader.batch(model, [reader.encoded(FIRST, "rejected")])
    found = influence(causal_lm(model), update, observe, lr=1e-5)
    row = frame.set_index(["update_row", "update_type", "probe_id", "response_type"]).loc[
        1, "chosen", FIRST.probe_id, "rejected"
    ]
    assert row["delta_sum"] == pytest.approx(float(found.per_item[0]), rel=1e-3)
    assert row["update_loss"] == pytest.approx(found.loss, rel=1e-5)
    assert row["predicted"] == pytest.approx(found.total.target_N.tolist(), rel=1e-2, abs=1e-8)
    assert row["true_sum"] == pytest.approx(row["delta_sum"], rel=0.1) and not row["same_prompt"]


def test_the_columns_are_those_of_recorded_influence(frame):
    columns = force_table.as_influence(frame, 1e-5)
    assert list(columns) == INFLUENCE.schema.names
    assert sorted(set(columns["update"])) == ["0 chosen", "0 dpo", "1 chosen", "1 dpo"]
    for name in ("predicted_sum", "update_sum"):
        assert columns[name] == pytest.approx(frame["delta_sum"].tolist(), rel=1e-12)
    assert all(value != value for name in ("momentum_sum", "decay_sum", "error_sum") for value in columns[name])
    one_row = frame[frame["update_row"] == 0]
    assert set(force_table.as_influence(one_row, 1e-5)["update"]) == {"chosen", "dpo"}
    assert "predicted_sum" not in force_table.without_tokens(frame) and "true_sum" in force_table.without_tokens(frame)


@pytest.mark.parametrize(("update", "kinds", "what"), [([], (), "no usable row"), (list(PROBES), ["x"], "'x'")])
def test_what_cannot_be_trained_on_is_refused(update, kinds, what, model, reader):
    with pytest.raises(ValueError, match=what):
        force_map(model, reader, PROBES, update, kinds)
