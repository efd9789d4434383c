"""A resumed run goes on with its series: the records of the uninterrupted run, bit for bit, or a clear refusal."""

import json
import shutil

import pandas as pd
import pytest
from transformers import TrainerCallback

import trl_dynamics
from tiny_runs import PROBES, make_trainer
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking.callback import ProbeCallback

KEYS = ["model", "step", "probe_id", "response_type"]
OPTIONS = {"probes": PROBES, "max_steps": 12, "probe_every": 4, "save_strategy": "steps", "save_steps": 5}


class Crash(RuntimeError):
    pass


def crash():
    raise Crash


class During(TrainerCallback):
    """Does something after one step of training, then lets it end."""

    def __init__(self, action, step: int = 1):
        self.action, self.step = action, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
            self.action()


def records(output_dir) -> pd.DataFrame:
    return trl_dynamics.load_records(output_dir).drop(columns="run").set_index(KEYS).sort_index()


def meta(output_dir) -> dict:
    return json.loads((output_dir / "dynamics/meta.json").read_text())


def resume(output_dir, step: int, **options):
    trainer = make_trainer("sft", output_dir, **(OPTIONS | options))
    trainer.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{step}"))
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, probed at 0, 1, 2, 4, 5 (saved), 8, 10 (saved), 12."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer("sft", folder, **OPTIONS).train()
    assert DynamicsStore(folder).steps(RECORDS, 0) == [0, 1, 2, 4, 5, 8, 10, 12]
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A finished run like it, to be continued from its checkpoints 5 and 10."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_resume_equals_the_uninterrupted_run(run, whole):
    before = meta(run)
    resume(run, 5)
    pd.testing.assert_frame_equal(records(run), records(whole), check_exact=True)
    after = meta(run)
    assert after["resumed_at"] == [5] and after["run_id"] == before["run_id"] and after["created"] == before["created"]
    kept = [entry for entry in before["timeline"] if entry[0] <= 5]
    assert after["timeline"][: len(kept)] == kept, "costs are those as of the checkpoint"
    assert [entry[0] for entry in after["timeline"]] == [entry[0] for entry in before["timeline"]]
    assert after["setup_seconds"] > before["setup_seconds"] > 0, "that of both parts"
    whole = after["setup_seconds"] + sum(entry[1] for entry in after["timeline"])
    assert after["probe_seconds"] == pytest.approx(whole)
    assert after["train_seconds"] > kept[-1][2]


def test_resume_with_lora(tmp_path):
    for name in ("whole", "run"):
        make_trainer("sft", tmp_path / name, lora=True, **OPTIONS).train()
    resume(tmp_path / "run", 5, lora=True)
    pd.testing.assert_frame_equal(records(tmp_path / "run"), records(tmp_path / "whole"), check_exact=True)


def test_resume_again_and_from_an_older_checkpoint(run, whole):
    resume(run, 10)
    resume(run, 10)
    resume(run, 5)
    pd.testing.assert_frame_equal(records(run), records(whole), check_exact=True)
    after = meta(run)
    assert after["resumed_at"] == [10, 10, 5]
    assert [part["after_step"] for part in after["parts"]] == [0, 5]


def test_with_only_the_newest_checkpoint_kept(tmp_path, whole):
    trainer = make_trainer("sft", tmp_path, **OPTIONS, save_total_limit=1)
    trainer.add_callback(During(crash, step=11))
    with pytest.raises(Crash):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    resume(tmp_path, 10, save_total_limit=1)
    pd.testing.assert_frame_equal(records(tmp_path), records(whole), check_exact=True)


def test_a_crash_between_a_checkpoint_and_its_probe(tmp_path, whole, monkeypatch):
    def dies(self, args, state, control, **kwargs):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(ProbeCallback, "on_save", dies)
        with pytest.raises(Crash):
            make_trainer("sft", tmp_path, **OPTIONS).train()
    assert (tmp_path / "checkpoint-5").is_dir() and DynamicsStore(tmp_path).steps(RECORDS, 0) == [0, 1, 2, 4]
    resume(tmp_path, 5)
    pd.testing.assert_frame_equal(records(tmp_path), records(whole), check_exact=True)


def test_a_crash_between_a_probe_and_its_checkpoint(tmp_path, monkeypatch):
    """The probe of step 8 is dropped and taken again, by the run that goes on from step 4."""
    options = OPTIONS | {"save_steps": 4}
    make_trainer("sft", tmp_path / "whole", **options).train()
    trainer = make_trainer("sft", tmp_path / "run", **options)
    save = trainer._save_checkpoint

    def dies_at_8(*args, **kwargs):
        if trainer.state.global_step == 8:
            raise Crash
        save(*args, **kwargs)

    monkeypatch.setattr(trainer, "_save_checkpoint", dies_at_8)
    with pytest.raises(Crash):
        trainer.train()
    assert DynamicsStore(tmp_path / "run").steps(RECORDS, 0) == [0, 1, 2, 4, 8]
    resume(tmp_path / "run", 4, save_steps=4)
    pd.testing.assert_frame_equal(records(tmp_path / "run"), records(tmp_path / "whole"), check_exact=True)


def test_a_run_without_probes_on_save_keeps_its_counters(tmp_path):
    options = OPTIONS | {"probe_on_save": False}
    make_trainer("sft", tmp_path, **options).train()
    before = meta(tmp_path)
    assert [entry[0] for entry in before["timeline"]] == [0, 1, 2, 4, 5, 8, 10, 12]
    resume(tmp_path, 5, probe_on_save=False)
    kept = [entry for entry in before["timeline"] if entry[0] <= 5]
    assert meta(tmp_path)["timeline"][: len(kept)] == kept and kept[-1][1] == 0.0
    assert DynamicsStore(tmp_path).steps(RECORDS, 0) == [0, 1, 2, 4, 8, 12]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"probes": PROBES[:2]}, "the probe set changed"),
        ({"probe_tokens_per_batch": 60}, "the probe batches changed"),
        ({"bf16": True}, "mixed precision was 'no', is 'bf16'"),
        ({"probe_top_k": 3}, "probe_top_k was 10, is 3"),
    ],
    ids=["probe set", "batches", "precision", "top k"],
)
def test_resume_refuses_another_series_and_loses_nothing(options, said, run):
    before = records(run)
    with pytest.raises(ValueError, match=f"cannot resume probing.*{said}"):
        resume(run, 5, **options)
    pd.testing.assert_frame_equal(records(run), before, check_exact=True)
    resume(run, 10)


def test_resume_refuses_another_model(run):
    trainer = make_trainer("sft", run, **OPTIONS)
    trainer.probe_callback.series.meta["model"]["num_parameters"] += 1
    with pytest.raises(ValueError, match="number of parameters was .*Keep the model and adapter options"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-5"))


def test_resume_refuses_a_checkpoint_of_another_run(run):
    """A second run in the same place that got less far leaves the first one's later checkpoints behind."""
    make_trainer("sft", run, **(OPTIONS | {"max_steps": 5})).train()
    with pytest.raises(ValueError, match="checkpoint is of another run than the records .*move its dynamics-old-"):
        resume(run, 10)
    assert DynamicsStore(run).steps(RECORDS, 0) == [0, 1, 2, 4, 5]


def test_resume_of_a_run_without_records_is_refused(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer("sft", tmp_path, **options).train()
    with pytest.raises(ValueError, match="holds no records of an earlier run"):
        make_trainer("sft", tmp_path, probes=PROBES, **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_a_second_run_in_the_same_place_is_refused_while_the_first_trains(tmp_path):
    second = make_trainer("sft", tmp_path, probes=PROBES, max_steps=2)

    def start_second():
        with pytest.raises(ValueError, match="is being written by process .*use another output_dir"):
            second.train()

    first = make_trainer("sft", tmp_path, probes=PROBES, max_steps=2)
    first.add_callback(During(start_second))
    first.train()
    assert not list(tmp_path.glob("dynamics-old-*")), "the refused run moved and wrote nothing"
    assert DynamicsStore(tmp_path).steps(RECORDS, 0) == [0, 1]
    second.train()
    assert len(list(tmp_path.glob("dynamics-old-*"))) == 1


def test_a_run_that_raises_lets_the_next_one_in(tmp_path):
    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=2)
    trainer.add_callback(During(crash))
    with pytest.raises(Crash):
        trainer.train()
    make_trainer("sft", tmp_path, probes=PROBES, max_steps=2).train()
    assert DynamicsStore(tmp_path).steps(RECORDS, 0) == [0, 1, 2]
