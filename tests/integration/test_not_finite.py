"""A model that becomes NaN in training: keys stay, training goes on as TRL's, the alert comes at once."""

import json
import logging
import math

import pytest
import torch
from transformers import TrainerCallback

from tiny_runs import PROBES, make_trainer
from trl_dynamics import load_records
from trl_dynamics.cli.main import main
from trl_dynamics.paths.samples import load_samples

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "probe_on_evaluate": True,
    "metric_for_best_model": "eval_probe/chosen/logp_mean",
    "greater_is_better": True,
}
BREAKS_AT = 2


class Break(TrainerCallback):
    """Makes the weights NaN."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 >= BREAKS_AT:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, seen = tmp_path_factory.mktemp("run") / "run", []
    trainer = make_trainer(
        "dpo", folder, probes=PROBES, max_steps=4, probe_every=1, probe_samples=2, probe_sample_tokens=6, **BEST
    )
    trainer.callback_handler.callbacks.insert(0, Break())
    logger, handler = logging.getLogger("trl_dynamics.tracking.alerts"), logging.Handler()
    handler.emit = seen.append
    logger.addHandler(handler)
    trainer.train()
    logger.removeHandler(handler)
    return folder, trainer, [record.getMessage() for record in seen]


def test_training_ends_and_the_key_that_chooses_the_best_model_stays(run):
    _, trainer, _ = run
    key = BEST["metric_for_best_model"]
    values = {line["step"]: line[key] for line in trainer.state.log_history if key in line}
    assert set(values) == {1, 2, 3, 4}
    assert [math.isnan(values[step]) for step in (1, 2, 3, 4)] == [False, True, True, True]
    assert trainer.state.best_global_step == 1 and trainer.state.best_metric == values[1]
    lines = {line["step"]: line for line in trainer.state.log_history if "probe/seconds" in line}
    assert [lines[step]["probe/not_finite"] for step in range(5)] == [0, 0, 1, 1, 1]
    assert set(lines[0]) == set(lines[4]) and math.isnan(lines[4]["squeeze/margin"])


def test_the_alert_comes_at_the_first_such_scoring(run):
    _, trainer, said = run
    alerts = trainer.probe_callback.series.meta["alerts"]
    assert {"name": "not_finite", "severity": "alert", "step": BREAKS_AT} in alerts
    told = [text for text in said if "NaN or infinite" in text]
    assert len(told) == 1 and told[0].startswith(f"alert: At step {BREAKS_AT}: ")


def test_what_is_recorded_of_it_is_nan_everywhere(run):
    folder, *_ = run
    late = load_records(folder).query("step >= 2")
    measured = late.drop(columns=["run", "model", "step", "probe_id", "response_type", "num_tokens", "truncated"])
    assert measured.isna().all(axis=None)
    answers = load_samples(folder).query("step >= 2")
    assert answers["logp_sum"].isna().all()


def test_diagnose_and_the_page_say_so(run, tmp_path, capsys):
    folder, *_ = run
    assert main(["diagnose", str(folder), "--format", "json"]) == 30
    (one,) = json.loads(capsys.readouterr().out)["runs"]
    assert one["findings"][0]["name"] == "not_finite" and one["findings"][0]["evidence"]["first_step"] == BREAKS_AT
