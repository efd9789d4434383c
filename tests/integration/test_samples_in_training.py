"""Greedy answers in a real run: recorded at every probing step, continued, and the same when tracked later."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from tiny import tiny_tokenizer
from tiny_runs import PROBES, make_trainer
from trl_dynamics import load_records
from trl_dynamics.cli.main import main
from trl_dynamics.paths.records import read_probe_set
from trl_dynamics.paths.samples import SAMPLE_METRICS, Samples, load_samples
from trl_dynamics.store.store import DynamicsStore

ASKED = {"probe_samples": 2, "probe_sample_tokens": 10, "probe_every": 2, "max_steps": 6, "learning_rate": 1e-2}
SAVED = ASKED | {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer = make_trainer("sft", folder, probes=PROBES, **SAVED)
    trainer.train()
    trainer.processing_class.save_pretrained(folder)
    return folder, trainer


def assert_same(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    ours, theirs = (frame.drop(columns=["run", "model"]).reset_index(drop=True) for frame in (ours, theirs))
    assert [list(ids) for ids in ours["token_ids"]] == [list(ids) for ids in theirs["token_ids"]]
    pd.testing.assert_frame_equal(ours.drop(columns="token_ids"), theirs.drop(columns="token_ids"), check_exact=True)


def test_answers_come_with_the_records(run):
    folder, trainer = run
    frame = load_samples(folder)
    steps = sorted(load_records(folder)["step"].unique())
    assert steps == [0, 1, 2, 4, 6] and sorted(frame["step"].unique()) == steps
    assert (frame.groupby("step").size() == 2).all() and frame["num_tokens"].le(10).all()
    asked = json.loads((folder / "dynamics/meta.json").read_text())["samples"]
    assert (asked["num_probes"], asked["max_new_tokens"], asked["prompts_cut"]) == (2, 10, 0)
    changed = frame.groupby("probe_id")["text"].nunique()
    assert (changed > 2).all(), "training moved nothing, so the answers mean nothing"
    for row in frame.to_dict("records"):
        assert row["text"] == tiny_tokenizer().decode(row["token_ids"], skip_special_tokens=True)
        assert row["logp_mean"] == pytest.approx(row["logp_sum"] / row["num_tokens"])
    lines = {line["step"]: line for line in trainer.state.log_history if "probe/seconds" in line}
    for name in SAMPLE_METRICS:
        curve = Samples(frame).metric(name)
        assert {step: lines[step][f"samples/{name}"] for step in curve.index} == pytest.approx(curve.to_dict())
    log = json.loads((folder / "dynamics/trainer_log.json").read_text())
    assert log and not [line for line in log if any(key.startswith("samples/") for key in line)]


def test_the_last_answer_is_that_of_the_trained_model(run):
    folder, trainer = run
    last = load_samples(folder).query("step == 6")
    for row in last.to_dict("records"):
        prompt = next(probe for probe in read_probe_set(DynamicsStore(folder)) if probe.probe_id == row["probe_id"])
        ids = tiny_tokenizer()(prompt.prompt)["input_ids"]
        with torch.no_grad():
            logp = torch.log_softmax(trainer.model.eval()(torch.tensor([[*ids, *row["token_ids"]]])).logits[0], -1)
        own = logp[len(ids) - 1 : len(ids) - 1 + row["num_tokens"]]
        assert own.argmax(-1).tolist() == list(row["token_ids"])
        assert row["logp_sum"] == pytest.approx(own.max(-1).values.sum().item(), abs=1e-4)


def test_a_resumed_run_has_the_same_answers_once(run, tmp_path):
    whole = run[0]
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    trainer = make_trainer("sft", folder, probes=PROBES, **SAVED)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_same(load_samples(folder), load_samples(whole))
    assert len(list((folder / "dynamics/samples").iterdir())) == 1
    without = make_trainer("sft", folder, probes=PROBES, **SAVED | {"probe_samples": None})
    without.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert sorted(load_samples(folder)["step"].unique()) == [0, 1, 2, 4]
    assert json.loads((folder / "dynamics/meta.json").read_text())["samples"]["num_probes"] == 2
    for change, said in (
        ({"probe_samples": 1}, "the number of prompts to answer was 2, is 1;.* Keep probe_samples as in the run"),
        ({"probe_sample_tokens": 9}, "probe_sample_tokens was 10, is 9;"),
    ):
        with pytest.raises(ValueError, match=said):
            make_trainer("sft", folder, probes=PROBES, **SAVED | change).train(
                resume_from_checkpoint=str(folder / "checkpoint-4")
            )


def test_checkpoints_tracked_later_answer_as_training_did(run, tmp_path):
    folder, _ = run
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBES))
    flags = ["--model_name_or_path", str(folder), "--probe_set", str(tmp_path / "probes.jsonl")]
    for name, more in (("replayed", []), ("own", ["--probe_samples", "1", "--probe_sample_tokens", "4"])):
        wanted = ["--checkpoints", "checkpoint-*", "--output_dir", str(tmp_path / name)]
        assert main(["track", *flags, *wanted, *more]) == 0
    assert_same(load_samples(tmp_path / "replayed"), load_samples(folder).query("step in [2, 4, 6]"))
    # Answers that were lost are given again, although their records are there.
    store = DynamicsStore(tmp_path / "replayed")
    next((store.root / "samples").glob("*step000000004*")).unlink()
    assert store.drop_damaged() == [(0, 4)]
    assert main(["track", *flags, "--checkpoints", "checkpoint-*", "--output_dir", str(tmp_path / "replayed")]) == 0
    assert_same(load_samples(tmp_path / "replayed"), load_samples(folder).query("step in [2, 4, 6]"))
    few = load_samples(tmp_path / "own")
    assert len(few) == 3 and few["num_tokens"].max() <= 4


def test_evaluation_has_the_scalars_and_without_the_option_nothing_is_asked(tmp_path):
    options = ASKED | {"eval_strategy": "steps", "eval_steps": 3, "probe_on_evaluate": True}
    trainer = make_trainer("sft", tmp_path / "asked", probes=PROBES, **options)
    trainer.train()
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert len(evaluated) == 2 and all(0 < line["eval_samples/distinct_1"] <= 1 for line in evaluated)
    assert np.isfinite(trainer.evaluate()["eval_samples/greedy_logp"])
    plain = make_trainer("sft", tmp_path / "plain", probes=PROBES, **options | {"probe_samples": None})
    plain.train()
    assert not any(key.startswith(("samples/", "eval_samples/")) for line in plain.state.log_history for key in line)
    assert json.loads((tmp_path / "plain/dynamics/meta.json").read_text())["samples"] is None
    assert not (tmp_path / "plain/dynamics/samples").exists() and load_samples(tmp_path / "plain").empty


@pytest.mark.parametrize("wrong", [{"probe_samples": -1}, {"probe_samples": 1.5}, {"probe_sample_tokens": 0}])
def test_wrong_options_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_trainer("sft", tmp_path, probes=PROBES, **ASKED | wrong)
