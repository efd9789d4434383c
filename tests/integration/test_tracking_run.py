"""Tracked runs: what is written, where probe sets come from, extended SFT, precision, early stopping, the card."""

import json
import logging
import re

import pandas as pd
import pytest
import torch
from datasets import Dataset

import trl_dynamics
from tiny_runs import PAIRS, PROBES, make_trainer
from trl_dynamics.paths.metrics import METRICS
from trl_dynamics.tracking.cost import CostLedger

KEYS = ["run", "model", "step", "probe_id", "response_type"]


def records(output_dir) -> pd.DataFrame:
    return trl_dynamics.load_records(output_dir).set_index(KEYS).sort_index()


def test_what_a_run_leaves_behind(tmp_path):
    trainer = make_trainer("dpo", tmp_path / "run", probes=PROBES, max_steps=6, probe_every=0.5)
    trainer.train()
    frame = records(tmp_path / "run")
    assert frame.index.is_unique
    assert sorted(frame.index.unique("step")) == [0, 1, 2, 3, 6]
    assert len(frame) == 5 * 9
    root = tmp_path / "run" / "dynamics"
    meta = json.loads((root / "meta.json").read_text())
    assert meta["status"] == "finished" and meta["method"] == "dpo" and meta["schedule"]["steps"] == [0, 1, 2, 3, 6]
    assert meta["probe_set"]["num_probes"] == 3 and meta["cuts"]["chosen"] == {"prompt": 0, "response": 0, "of": 3}
    assert meta["probe_seconds"] > 0 and meta["train_seconds"] > 0
    assert trl_dynamics.ProbeSet.load(root / "probe_set").fingerprint == meta["probe_set"]["fingerprint"]
    losses = [entry for entry in json.loads((root / "trainer_log.json").read_text()) if "loss" in entry]
    assert [entry["step"] for entry in losses] == [3, 6]
    logged = [entry for entry in trainer.state.log_history if "probe/seconds" in entry]
    assert [entry["step"] for entry in logged] == [0, 1, 2, 3, 6]
    assert {f"squeeze/{name}" for name in METRICS} <= set(logged[-1])
    assert [entry[0] for entry in meta["timeline"]] == [0, 1, 2, 3, 6]
    assert [entry[1] for entry in meta["timeline"]] == [entry["probe/seconds"] for entry in logged]
    assert meta["setup_seconds"] > 0, "the check of the layout costs, too"
    whole = meta["setup_seconds"] + sum(entry["probe/seconds"] for entry in logged)
    assert meta["probe_seconds"] == pytest.approx(whole)
    assert meta["parts"] == [{"after_step": 0, "num_processes": 1}] and meta["lost_steps"] == []
    assert len(list((root / "records").iterdir())) == 1 and not (tmp_path / "run" / ".dynamics.lock").exists()


def test_a_run_from_python_ends_with_what_was_found_and_where_it_is(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trl_dynamics"), "level", logging.NOTSET)
    make_trainer("sft", tmp_path / "run", probes=PROBES, max_steps=1).train()
    said = [entry.getMessage() for entry in caplog.records if entry.name == "trl_dynamics.tracking.series"]
    assert said[-3].startswith("run: ")
    assert said[-2:] == [
        f"records: {tmp_path}/run/dynamics",
        f"page:    trl-dynamics report {tmp_path}/run -o report.html",
    ]


def test_a_second_run_moves_the_first_aside(tmp_path):
    for _ in range(2):
        make_trainer("sft", tmp_path, probes=PROBES, max_steps=1).train()
    assert (tmp_path / "dynamics-old-1" / "meta.json").is_file()
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "dynamics-old-1/records"), pd.read_parquet(tmp_path / "dynamics/records")
    )


def test_probe_sets_come_as_rows_files_and_names(tmp_path):
    trl_dynamics.ProbeSet.load(PROBES).save(tmp_path / "set")
    trainer = make_trainer("sft", tmp_path / "run", max_steps=1, probe_set=str(tmp_path / "set"))
    trainer.train()
    assert len(records(tmp_path / "run")) == 2 * 9
    with pytest.raises(ValueError, match="does not exist"):
        make_trainer("sft", tmp_path / "other", max_steps=1, probe_set=str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match="no response type 'chosen'"):
        make_trainer("sft", tmp_path / "other", max_steps=1, probes=[{"prompt": "a", "rejected": " b"}])


def test_over_long_probe_is_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"probe '0', response 'chosen' has \d+ tokens, more than the model's context"
    ):
        make_trainer("sft", tmp_path, probes=[{"prompt": "a", "chosen": " b" * 600, "rejected": " c"}])


@pytest.mark.parametrize(("sft_on", "rows"), [("chosen", 20), ("both", 40)])
def test_preference_pairs_in_sft(sft_on, rows, tmp_path):
    data = Dataset.from_list(PAIRS)
    options = {"sft_on": sft_on, "data": data, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    trainer = make_trainer("sft", tmp_path, probes=PROBES, **options)
    assert len(trainer.train_dataset) == rows
    assert trainer.completion_only_loss
    texts = [trainer.processing_class.decode(ids) for ids in trainer.train_dataset["input_ids"]]
    assert any("Maybe" in text for text in texts) == (sft_on == "both")
    trainer.train()
    assert "eval_loss" in trainer.evaluate(data.select(range(2)))


def test_bf16_weights_and_autocast(tmp_path):
    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=2, bf16=True)
    trainer.train()
    frame = records(tmp_path)
    assert (frame["logp_sum"] < 0).all() and (frame["argmax_logp_sum"] >= frame["logp_sum"]).all()
    assert json.loads((tmp_path / "dynamics/meta.json").read_text())["mixed_precision"] == "bf16"
    assert trainer.model.dtype == torch.float32


def test_early_stopping_still_takes_the_last_records(tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=8, probe_every=8, probe_log_spaced=False)
    trainer.add_callback(Stop())
    trainer.train()
    assert sorted(records(tmp_path).index.unique("step")) == [0, 3]


@pytest.mark.parametrize(("probe_seconds", "expected"), [(0.2, "about 1[01] %"), (0.02, None)])
def test_a_schedule_that_costs_more_than_a_twentieth_is_told_once(probe_seconds, expected, tmp_path, caplog):
    """By a clock on which a training step takes one second."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        time = 0.0

        def __call__(self):
            return self.time

        def on_step_begin(self, args, state, control, **kwargs):
            self.time += 1.0

    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=40, probe_every=2)
    clock, callback = Clock(), trainer.probe_callback
    score = callback.engine.score

    def slow_score(*args):
        clock.time += probe_seconds
        return score(*args)

    callback.engine.score, callback.series.cost = slow_score, CostLedger(clock)
    trainer.add_callback(clock)
    with caplog.at_level(logging.WARNING, "trl_dynamics"):
        trainer.train()
    told = [entry.getMessage() for entry in caplog.records if "probing will take" in entry.getMessage()]
    assert len(told) == (expected is not None)
    if expected:
        assert re.search(expected, told[0])
        assert all(option in told[0] for option in ("probe_every, now 2", "probe_subset", "probe_budget=0.05"))
    meta = json.loads((tmp_path / "dynamics/meta.json").read_text())
    assert meta["train_seconds"] == pytest.approx(40) and meta["probe_seconds"] == pytest.approx(22 * probe_seconds)


def test_model_card_has_the_table(tmp_path):
    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=2)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "## Training dynamics" in card and "| rejected |" in card and "trl-dynamics" in card
