"""Influence on disk: what is written comes back, and only whole files of this run count."""

import errno

import numpy as np
import pandas as pd
import pytest

from small_stores import PLAN, Killed, count_operations, fail, interrupt, make_store, probe_set, snapshot
from trl_dynamics import load_influence
from trl_dynamics.influence.kind import (
    INFLUENCE_KEY_COLUMNS,
    INFLUENCE_SCHEMA,
    INFLUENCE_VALUE_COLUMNS,
    drop_from,
    read,
    recorded_steps,
    write,
)

NAN = float("nan")
ROWS = [(update, kind) for update in ("batch", "chosen") for kind in ("chosen", "größe")]


def rows(step: int) -> dict[str, list]:
    """Two answers of one probe under the step that was taken and under one that was not."""
    count, own = len(ROWS), [update == "batch" for update, _ in ROWS]
    values = {name: [step + 0.1 * i for i in range(count)] for name in INFLUENCE_VALUE_COLUMNS}
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


def test_what_is_written_comes_back(tmp_path):
    root = tmp_path / "dynamics"
    for step in (20, 0, 10):
        assert write(root, rows(step)).name == f"step-{step:09d}.parquet"
    frame = read(tmp_path)
    assert list(frame.columns) == INFLUENCE_SCHEMA.names and recorded_steps(tmp_path) == [0, 10, 20]
    wanted = pd.concat([pd.DataFrame(rows(step)) for step in (0, 10, 20)], ignore_index=True)
    for name in INFLUENCE_SCHEMA.names:
        if isinstance(wanted[name][0], list):
            assert lists(frame, name) == wanted[name].tolist()
        else:
            np.testing.assert_array_equal(frame[name], wanted[name])
    assert frame["predicted"][0].dtype == np.float32 and frame["num_tokens"].dtype == np.int32
    assert not frame.duplicated(list(INFLUENCE_KEY_COLUMNS)).any()
    pd.testing.assert_frame_equal(read(root), frame)


def test_steps_and_columns_can_be_chosen(tmp_path):
    for step in (0, 10):
        write(tmp_path / "dynamics", rows(step))
    frame = read(tmp_path, {10, 999}, ["predicted_sum", "step"])
    assert list(frame.columns) == [*INFLUENCE_KEY_COLUMNS, "predicted_sum"] and set(frame["step"]) == {10}
    with pytest.raises(ValueError, match="no column 'prediction', only model, step"):
        read(tmp_path, columns=["prediction"])


def test_a_run_without_influence_has_no_rows(tmp_path):
    make_store(tmp_path)
    assert len(read(tmp_path)) == 0 and list(read(tmp_path).columns) == INFLUENCE_SCHEMA.names
    assert recorded_steps(tmp_path) == []
    with pytest.raises(ValueError, match="nowhere is no folder; expected the output_dir"):
        read(tmp_path / "nowhere")


def test_runs_are_read_together(tmp_path):
    for name, step in (("a", 1), ("b", 2)):
        write(make_store(tmp_path / name, steps=()).root, rows(step))
    make_store(tmp_path / "c", steps=())
    frame = load_influence(tmp_path / "a", tmp_path / "b" / "dynamics", tmp_path / "c")
    assert list(frame.columns) == ["run", *INFLUENCE_SCHEMA.names]
    assert frame.groupby("run")["step"].unique().map(list).to_dict() == {"a": [1], "b": [2]}
    assert list(load_influence(tmp_path / "c").columns) == list(frame.columns)
    with pytest.raises(ValueError, match="load_influence needs at least one"):
        load_influence()


def test_only_rows_of_one_step_in_the_schema_are_written(tmp_path):
    both = {name: [*values, *rows(1)[name]] for name, values in rows(0).items()}
    with pytest.raises(ValueError, match=r"one step, got rows of \[0, 1\]"):
        write(tmp_path, both)
    with pytest.raises(ValueError, match="one step, got rows of none"):
        write(tmp_path, {name: [] for name in rows(0)})
    with pytest.raises(ValueError, match="exactly the columns"):
        write(tmp_path, {name: values for name, values in rows(0).items() if name != "lr"})
    assert not list(tmp_path.iterdir())


def test_a_step_taken_again_replaces_its_rows(tmp_path):
    write(tmp_path, rows(3))
    write(tmp_path, rows(3) | {"lr": [7.0] * len(ROWS)})
    assert len(read(tmp_path)) == len(ROWS) and set(read(tmp_path)["lr"]) == {7.0}


def test_a_process_that_dies_leaves_the_earlier_file_or_the_new_one(tmp_path, monkeypatch):
    write(tmp_path, rows(0))
    before = snapshot(tmp_path)
    operations = count_operations(monkeypatch, lambda: write(tmp_path, rows(1)))
    for at in range(len(operations)):
        for moment in ("before", "halfway", "after"):
            drop_from(tmp_path, 1)
            with monkeypatch.context() as patch, pytest.raises(Killed):
                interrupt(patch, Killed(), at=at, moment=moment)
                write(tmp_path, rows(1))
            assert recorded_steps(tmp_path) in ([0], [0, 1]) and len(read(tmp_path)) % len(ROWS) == 0
            assert before.items() <= snapshot(tmp_path).items()


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path, rows(0))
    before = snapshot(tmp_path)
    fail(monkeypatch, errno.ENOSPC, operation="write")
    with pytest.raises(OSError, match=r"No space left.*nothing already written was lost"):
        write(tmp_path, rows(1))
    assert snapshot(tmp_path) == before


def test_a_damaged_file_is_named(tmp_path):
    path = write(tmp_path, rows(4))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"step-000000004.parquet cannot be read .*remove it to go on"):
        read(tmp_path)


def test_the_store_drops_and_moves_influence_with_its_records(tmp_path, caplog):
    store = make_store(tmp_path, steps=(0, 10, 20))
    for step in (0, 9, 10, 15):
        write(store.root, rows(step))
    store.resume(probe_set(), PLAN, 10)
    assert store.recorded_steps() == [0, 10]
    assert recorded_steps(tmp_path) == [0, 9], "the step from 10 to 11 will be taken again"
    make_store(tmp_path, steps=())
    assert recorded_steps(tmp_path) == [] and recorded_steps(tmp_path / "dynamics-old-1") == [0, 9]


def test_many_rows_stay_small(tmp_path):
    """Texts and ids that repeat from update to update cost next to nothing; values are kept in full."""
    generator, count, length = np.random.default_rng(0), 300, 40
    ids = generator.integers(0, 2000, (count, length)).tolist()
    one = {
        "model": ["policy"] * count,
        "step": [0] * count,
        "probe_id": [f"probe-{index // 10}" for index in range(count)],
        "response_type": [f"type-{index % 10}" for index in range(count)],
        "num_tokens": [length] * count,
        **{name: generator.normal(size=count).tolist() for name in INFLUENCE_VALUE_COLUMNS},
        "token_ids": ids,
        "token_texts": [[f" token{token}" for token in answer] for answer in ids],
    }
    whole: dict[str, list] = {name: [] for name in INFLUENCE_SCHEMA.names}
    for update in ("batch", "chosen", "rejected", "argmax"):
        values = {name: generator.normal(size=(count, length)).tolist() for name in ("predicted", "true")}
        for name, part in (one | values | {"update": [update] * count}).items():
            whole[name] += part
    measured = sum(4 * len(values) for name in ("predicted", "true") for values in whole[name])
    assert write(tmp_path, whole).stat().st_size < 1.1 * measured
