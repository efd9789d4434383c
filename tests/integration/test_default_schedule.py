"""The default schedule in training: thinned to a third by a clock, forecast, and kept by a resumed run.

On the clock of these tests a training step takes one second, and a scoring what the test says.
"""

import json
import logging

import pytest
import yaml
from transformers import TrainerCallback

from tiny_runs import PROBES, make_trainer
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking.cost import CostLedger
from trl_dynamics.tracking.schedule import probe_steps

DEFAULT = {"probes": PROBES, "probe_every": None, "max_steps": 40, "probe_layout": "padded"}
SAVED = {"save_strategy": "steps", "save_steps": 20}


class Clock(TrainerCallback):
    time = 0.0

    def __call__(self) -> float:
        return self.time

    def on_step_begin(self, args, state, control, **kwargs):
        self.time += 1.0


def make(output_dir, scoring: float, **options):
    """A trainer whose callback goes by a clock on which a scoring takes `scoring` seconds."""
    trainer = make_trainer("sft", output_dir, **(DEFAULT | options))
    clock, callback = Clock(), trainer.probe_callback
    score = callback.engine.score

    def slow_score(*args):
        clock.time += scoring
        return score(*args)

    callback.engine.score, callback.series.cost = slow_score, CostLedger(clock)
    trainer.add_callback(clock)
    return trainer


def meta(output_dir) -> dict:
    return json.loads((output_dir / "dynamics/meta.json").read_text())


@pytest.mark.parametrize("scoring", [1.5, 6.0, 60.0])
def test_a_run_without_options_keeps_to_a_third(scoring, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trl_dynamics"):
        make(tmp_path, scoring).train()
    steps, found = DynamicsStore(tmp_path).steps(RECORDS, 0), meta(tmp_path)
    whole = probe_steps(40, 0.05)
    assert found["schedule"] == {"steps": whole, "every": 0.05, "budget": 1 / 3, "thinned": True, "on_save": True}
    assert [choice["step"] for choice in found["decisions"]] == whole
    assert [choice["step"] for choice in found["decisions"] if choice["taken"]] == steps
    assert steps[0] == 0 and steps[-1] == 40 and len(steps) < len(whole)
    assert len(steps) == 2 or found["probe_seconds"] <= found["train_seconds"] / 3
    said = [record.getMessage() for record in caplog.records if "probing will take" in record.getMessage()]
    first, share = said
    assert f"{len(whole)} scorings of {scoring:.2g} s each" in first
    assert ("at the start and the end alone" in share) == (2 * scoring > 40 / 3)


def test_a_resumed_run_goes_on_with_its_spacing_and_limit(tmp_path):
    make(tmp_path, 1.5, **SAVED).train()
    before = meta(tmp_path)
    make(tmp_path, 1.5, **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    after = meta(tmp_path)
    assert after["schedule"] == before["schedule"] and after["resumed_at"] == [20]
    # The clock is the same, and so is every choice.
    assert after["decisions"] == before["decisions"]


def test_a_run_that_began_with_a_spacing_goes_on_with_it_where_none_is_given(tmp_path):
    make(tmp_path, 6.0, probe_every=8, **SAVED).train()
    make(tmp_path, 6.0, **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert DynamicsStore(tmp_path).steps(RECORDS, 0) == sorted({*probe_steps(40, 8), 20})
    assert meta(tmp_path)["schedule"]["budget"] is None and "decisions" not in meta(tmp_path)
    # Given anew, a value wins.
    trainer = make(tmp_path, 6.0, probe_every=16, probe_budget=0.9, **SAVED)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert (meta(tmp_path)["schedule"]["every"], meta(tmp_path)["schedule"]["budget"]) == (16, 0.9)


@pytest.mark.parametrize("given", [None, 10])
def test_a_run_of_an_older_version_goes_on_without_a_limit(given, tmp_path):
    """Its meta.json had no spacing: 0.05 was the default, and config.yaml has another."""
    every = given or 0.05
    make(tmp_path, 6.0, probe_every=every, **SAVED).train()
    path, config = tmp_path / "dynamics/meta.json", tmp_path / "dynamics/config.yaml"
    schedule = {name: meta(tmp_path)["schedule"][name] for name in ("steps", "on_save", "budget")}
    path.write_text(json.dumps(meta(tmp_path) | {"schedule": schedule}))
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "probe_every" or given}))
    make(tmp_path, 6.0, **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert meta(tmp_path)["schedule"]["every"] == every
    assert DynamicsStore(tmp_path).steps(RECORDS, 0) == sorted({*probe_steps(40, every), 20})


def test_checkpoints_and_evaluations_count_in_the_forecast(tmp_path, caplog):
    options = {"probe_every": 10, "probe_log_spaced": False, "save_strategy": "steps", "save_steps": 8}
    options |= {"eval_strategy": "steps", "eval_steps": 13, "probe_on_evaluate": True}
    with caplog.at_level(logging.INFO, "trl_dynamics"):
        make(tmp_path, 0.5, **options).train()
    steps = DynamicsStore(tmp_path).steps(RECORDS, 0)
    assert steps == [0, 8, 10, 13, 16, 20, 24, 26, 30, 32, 39, 40]
    said = [record.getMessage() for record in caplog.records if "scorings of" in record.getMessage()]
    assert len(said) == 1 and f"about {len(steps)} scorings of 0.5 s each = 6 s in all" in said[0]
