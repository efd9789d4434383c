"""Drop-in: TRL's configs are accepted, its log stays its own, and what is not probed costs nothing."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers import TrainerCallback

import trl_dynamics
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, PROBES, completions, letter_share, make_trainer
from trl_dynamics import stats_head

METHODS = ("sft", "dpo", "grpo")
# Losses that are overridden, and left to TRL while no option of ours is on.
PASSED_ON = {"sft": "SFTTrainer.compute_loss", "dpo": "DPOTrainer._compute_loss"}
PACKAGE = str(Path(trl_dynamics.__file__).parent)


@pytest.mark.parametrize("method", METHODS)
def test_plain_trl_configs_are_accepted(method, tmp_path):
    config = getattr(trl, f"{method.upper()}Config")
    options = {"num_generations": 2, "max_completion_length": 4} if method == "grpo" else {}
    args = config(output_dir=str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none", **options)
    rows = completions() if method == "sft" else Dataset.from_list(PAIRS)
    common = {"args": args, "train_dataset": rows, "processing_class": tiny_tokenizer(), "model": tiny_model()}
    common |= {"dpo": {"ref_model": tiny_model()}, "grpo": {"reward_funcs": letter_share}}.get(method, {})
    trainer_class = getattr(trl_dynamics, f"{method.upper()}Trainer")
    assert trainer_class(**common).probe_callback is None
    args.probe_every = 0.05  # the default leaves out what the clock says
    trainer_class(**common, probe_set=PROBES).train()
    assert sorted(trl_dynamics.load_records(tmp_path)["step"].unique()) == [0, 1, 2]


def test_a_log_line_falls_on_a_probed_step(tmp_path):
    """A probe's own log event must not swallow the training line of the same step."""
    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=4, logging_steps=2, probe_every=2)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]


@contextlib.contextmanager
def our_calls(trainer) -> Iterator[Counter]:
    """Counts every function of the package that runs meanwhile, by (step, name)."""
    calls: Counter = Counter()

    def count(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[trainer.state.global_step, frame.f_code.co_qualname] += 1

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def work_of(trainer) -> Counter:
    """Train; how many forwards of the model, backwards and optimiser steps it took."""
    counts: Counter = Counter()

    class CountSteps(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            counts["optimizer step"] += 1

    backward = trainer.accelerator.backward

    def counting_backward(*args, **kwargs):
        counts["backward"] += 1
        return backward(*args, **kwargs)

    trainer.accelerator.backward = counting_backward
    trainer.model.register_forward_pre_hook(lambda *_: counts.update(["forward"]))
    trainer.add_callback(CountSteps())
    trainer.train()
    return counts


@pytest.mark.parametrize("method", METHODS)
def test_without_a_probe_set_nothing_is_added(method, tmp_path):
    options = {"max_steps": 4, "gradient_accumulation_steps": 2}
    ours = make_trainer(method, tmp_path / "off", **options)
    theirs = make_trainer(method, tmp_path / "trl", package=trl, **options)
    assert list(map(type, ours.callback_handler.callbacks)) == list(map(type, theirs.callback_handler.callbacks))
    assert not stats_head.is_installed(ours.model)
    with our_calls(ours) as calls:
        counts = work_of(ours)
    assert counts == work_of(theirs) and counts["optimizer step"] == 4 and counts["backward"] == 8
    # Calls that are passed on: `train` once per run, the loss once per forward.
    expected = Counter({(0, "DynamicsMixin.train"): 1})
    if method in PASSED_ON:
        expected.update({(step, PASSED_ON[method]): 2 for step in range(4)})
    assert calls == expected


@pytest.mark.parametrize("method", METHODS)
def test_between_probes_a_step_costs_one_look_at_the_schedule(method, tmp_path):
    """Besides that, the model's forward and the loss pass their arguments on to those that they replaced."""
    num_steps, schedule = 8, {"probe_every": 0, "probe_log_spaced": False}
    schedule |= {"gauge_every": 0} if method == "dpo" else {}
    trainer = make_trainer(method, tmp_path, probes=PROBES, max_steps=num_steps, **schedule)
    with our_calls(trainer) as calls:
        trainer.train()
    assert sorted(trl_dynamics.load_records(tmp_path)["step"].unique()) == [0, num_steps]
    assert any("score" in name for step, name in calls if step == 0)
    for step in range(1, num_steps):
        found = {name: count for (at, name), count in calls.items() if at == step}
        assert found.pop("install.<locals>.forward") > 0
        assert method not in PASSED_ON or found.pop(PASSED_ON[method]) == 1
        assert found == {"ProbeCallback.on_step_end": 1, "ProbeCallback._is_due": 1}


@pytest.mark.parametrize("method", METHODS)
def test_probing_adds_its_own_forwards_only(method, tmp_path):
    options = {"max_steps": 4, "gradient_checkpointing": False, "probe_layout": "padded"}
    probed = make_trainer(method, tmp_path / "on", probes=PROBES, probe_every=2, **options)
    num_batches = probed.probe_callback.engine.batch_plan["num_batches"]
    options.pop("probe_layout")
    expected = work_of(make_trainer(method, tmp_path / "trl", package=trl, **options))
    expected["forward"] += num_batches * len((0, 1, 2, 4))
    assert work_of(probed) == expected
