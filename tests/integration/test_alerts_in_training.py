"""Alerts of real training: noted in meta.json, told once whatever happens to the run, silent where switched off."""

import json
import logging

import pytest
from transformers import TrainerCallback

from tiny_runs import PAIRS, make_trainer

# Each probe calls the answer chosen that training rejects, so that chosen falls.
PROBES = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS[:12]]
OPTIONS = {
    "probes": PROBES,
    "max_steps": 16,
    "probe_every": 2,
    "save_strategy": "steps",
    "save_steps": 5,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
}


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def noted(output_dir) -> list[dict]:
    return json.loads((output_dir / "dynamics/meta.json").read_text())["alerts"]


def told(caplog) -> list[str]:
    """The alerts on the console."""
    return [r.message for r in caplog.records if "as at the probing step before" in r.message]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_trainer("dpo", folder, **OPTIONS).train()
    return noted(folder)


def test_a_finding_is_noted_and_told_when_it_stands(whole, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer("dpo", tmp_path, **OPTIONS).train()
    assert whole and noted(tmp_path) == whole
    assert len({alert["name"] for alert in whole}) == len(whole)
    assert [
        f"{alert['severity']}: At step {alert['step']}," in text
        for alert, text in zip(whole, told(caplog), strict=True)
    ]
    assert min(alert["step"] for alert in whole) > 1, "a finding stands at the second probe at the earliest"


@pytest.mark.parametrize("stop", [5, 10])
def test_a_resumed_run_tells_what_the_uninterrupted_one_tells_and_nothing_twice(whole, stop, tmp_path, caplog):
    first = make_trainer("dpo", tmp_path, **OPTIONS)
    first.add_callback(StopAt(stop))
    with caplog.at_level(logging.WARNING):
        first.train()
        again = make_trainer("dpo", tmp_path, **OPTIONS)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert noted(tmp_path) == whole and len(told(caplog)) == len(whole)


def test_what_was_told_after_the_checkpoint_is_not_told_again(whole, tmp_path, caplog):
    make_trainer("dpo", tmp_path, **OPTIONS).train()
    assert max(alert["step"] for alert in whole) > 10
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_trainer("dpo", tmp_path, **OPTIONS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert noted(tmp_path) == whole and told(caplog) == []


def test_alerts_can_be_switched_off(whole, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer("dpo", tmp_path, probe_alerts=False, **OPTIONS).train()
    assert told(caplog) == []
