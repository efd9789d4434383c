"""Influence on disk: a kind of row as any other, whose rows describe the step that follows."""

import numpy as np
import pandas as pd
import pytest

from small_stores import PLAN, make_store, probe_set, resume
from trl_dynamics import load_influence
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.store.store import DynamicsStore

NAN = float("nan")
ROWS = [(update, kind) for update in ("batch", "chosen") for kind in ("chosen", "größe")]


def rows(step: int) -> dict[str, list]:
    """Two answers of one probe under the step that was taken and under one that was not."""
    count, own = len(ROWS), [update == "batch" for update, _ in ROWS]
    values = {name: [step + 0.1 * i for i in range(count)] for name in INFLUENCE.values}
    return {
        "model": ["policy"] * count,
        "step": [step] * count,
        "update": [update for update, _ in ROWS],
        "probe_id": ["ä"] * count,
        "response_type": [kind for _, kind in ROWS],
        "num_tokens": [2] * count,
        **values,
        "true_sum": [value if taken else NAN for value, taken in zip(values["true_sum"], own, strict=True)],
        "token_ids": [[5, 70000]] * count,
        "token_texts": [[" a", "\ufffd"]] * count,
        "predicted": [[step + 0.25, -1.5]] * count,
        "true": [[0.5, 1.0] if taken else [] for taken in own],
    }


def lists(frame: pd.DataFrame, column: str) -> list[list]:
    return [list(cell) for cell in frame[column]]


def write(store: DynamicsStore, columns: dict[str, list]) -> None:
    store.write(columns["step"][0], {INFLUENCE: INFLUENCE.table(columns)})


@pytest.fixture
def store(tmp_path) -> DynamicsStore:
    """A store that was made for these rows alone, without a probe set."""
    made = DynamicsStore(tmp_path / "run")
    made.create({"run_id": "one"}, {}, {})
    return made


def test_what_is_written_comes_back(store):
    for step in (20, 0, 10):
        write(store, rows(step))
    frame = store.read(INFLUENCE)
    assert list(frame.columns) == INFLUENCE.schema.names and store.steps(INFLUENCE) == [0, 10, 20]
    wanted = pd.concat([pd.DataFrame(rows(step)) for step in (0, 10, 20)], ignore_index=True)
    for name in INFLUENCE.schema.names:
        if isinstance(wanted[name][0], list):
            assert lists(frame, name) == wanted[name].tolist()
        else:
            np.testing.assert_array_equal(frame[name], wanted[name])
    assert frame["predicted"][0].dtype == np.float32 and frame["num_tokens"].dtype == np.int32
    assert not frame.duplicated(list(INFLUENCE.keys)).any()


def test_steps_and_columns_can_be_chosen(store):
    for step in (0, 10):
        write(store, rows(step))
    frame = store.read(INFLUENCE, {10, 999}, ["predicted_sum", "step"])
    assert list(frame.columns) == [*INFLUENCE.keys, "predicted_sum"] and set(frame["step"]) == {10}
    with pytest.raises(ValueError, match="no column 'prediction', only model, step"):
        store.read(INFLUENCE, columns=["prediction"])


def test_runs_are_read_together(tmp_path):
    for name, step in (("a", 1), ("b", 2)):
        write(make_store(tmp_path / name, steps=()), rows(step))
    make_store(tmp_path / "c", steps=())
    frame = load_influence(tmp_path / "a", tmp_path / "b" / "dynamics", tmp_path / "c")
    assert list(frame.columns) == ["run", *INFLUENCE.schema.names]
    assert frame.groupby("run")["step"].unique().map(list).to_dict() == {"a": [1], "b": [2]}
    assert list(load_influence(tmp_path / "c").columns) == list(frame.columns)
    with pytest.raises(ValueError, match="load_influence needs at least one"):
        load_influence()


def test_a_step_taken_again_replaces_its_rows(store):
    write(store, rows(3))
    write(store, rows(3) | {"lr": [7.0] * len(ROWS)})
    frame = store.read(INFLUENCE)
    assert len(frame) == len(ROWS) and set(frame["lr"]) == {7.0}


def test_a_resumed_run_takes_the_next_step_again(tmp_path):
    store = make_store(tmp_path, steps=(0, 10, 20))
    for step in (0, 9, 10, 15):
        write(store, rows(step))
    resume(store, probe_set(), PLAN, 10)
    assert store.steps(RECORDS) == [0, 10] and store.steps(INFLUENCE) == [0, 9]
    make_store(tmp_path, steps=())
    assert store.steps(INFLUENCE) == []
    (tmp_path / "old").mkdir()
    (tmp_path / "dynamics-old-1").rename(tmp_path / "old" / "dynamics")
    assert DynamicsStore(tmp_path / "old").steps(INFLUENCE) == [0, 9]


def test_many_rows_stay_small(store):
    """Texts and ids that repeat from update to update cost next to nothing; values are kept in full."""
    generator, count, length = np.random.default_rng(0), 300, 40
    ids = generator.integers(0, 2000, (count, length)).tolist()
    one = {
        "model": ["policy"] * count,
        "step": [0] * count,
        "probe_id": [f"probe-{index // 10}" for index in range(count)],
        "response_type": [f"type-{index % 10}" for index in range(count)],
        "num_tokens": [length] * count,
        **{name: generator.normal(size=count).tolist() for name in INFLUENCE.values},
        "token_ids": ids,
        "token_texts": [[f" token{token}" for token in answer] for answer in ids],
    }
    whole: dict[str, list] = {name: [] for name in INFLUENCE.schema.names}
    for update in ("batch", "chosen", "rejected", "argmax"):
        values = {name: generator.normal(size=(count, length)).tolist() for name in ("predicted", "true")}
        for name, part in (one | values | {"update": [update] * count}).items():
            whole[name] += part
    measured = sum(4 * len(values) for name in ("predicted", "true") for values in whole[name])
    write(store, whole)
    assert store.files(INFLUENCE)[0].stat().st_size < 1.1 * measured
