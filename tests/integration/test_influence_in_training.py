"""Influence recorded in training: what torch's own steps do to the answers, whatever the trainer, and nothing else.

The reference takes the weights before and after a step, runs every answer alone and unpadded through the model, and
differentiates along the step by small differences in float64.
"""

import copy
import errno
import json
import logging
import os

import numpy as np
import pandas as pd
import pytest
import torch
import trl
from accelerate import Accelerator
from transformers import TrainerCallback

import trl_dynamics
from small_stores import influence_steps, read_influence
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PROBES, make_trainer
from trl_dynamics.akg.one_step import influence
from trl_dynamics.akg.steps import UPDATE
from trl_dynamics.cli.main import main
from trl_dynamics.compat import base_causal_lm
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.probing.encode import encode
from trl_dynamics.probing.labelled import collate
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.store import files
from trl_dynamics.store.store import DynamicsStore
from true_float64 import true_float64

KEYS = list(INFLUENCE.keys)


def exact_model(family: str, **options) -> torch.nn.Module:
    """Its norms, too, are of float64."""
    return true_float64(tiny_model(family, **options))


OPTIONS = {
    "max_steps": 4,
    "akg_every": 1,
    "dtype": torch.float64,
    "make_model": exact_model,
    "probe_every": 0,
    "probe_log_spaced": False,
}
ITEMS = encode(ProbeSet.load(PROBES), tiny_tokenizer()).items


class Witness(TrainerCallback):
    """Keeps copies of the model right before and right after every step, and of the optimiser before it."""

    def __init__(self, trainer):
        self.trainer, self.before, self.after, self.optimizers, self.norms = trainer, [], [], [], []
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model, optimizer = copy.deepcopy((self.trainer.model, self.trainer.optimizer.optimizer))
        self.before.append(own_forward(model))
        self.optimizers.append(optimizer)
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        self.norms.append(sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.after.append(own_forward(copy.deepcopy(self.trainer.model)))


def own_forward(model):
    """A copy whose forward is its class' own: what TRL put in its place runs the model that was copied."""
    vars(base_causal_lm(model)).pop("forward")
    return model.eval()


def logp_of(model, item) -> torch.Tensor:
    """ln pi of each of an answer's own tokens, the answer alone in its batch."""
    ids = torch.tensor([item.input_ids])
    start, stop = len(item.prompt_ids), len(item.prompt_ids) + len(item.response_ids)
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0].log_softmax(dim=-1)
    return torch.stack([logp[column - 1, ids[0, column]] for column in range(start, stop)])


def derivative(before, after, item, distance: float = 1e-4) -> torch.Tensor:
    """Along the step from one model to the other, of order `distance` squared."""
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(before)
        with torch.no_grad():
            for value, start, end in zip(moved.parameters(), before.parameters(), after.parameters(), strict=True):
                value.copy_(start + sign * distance * (end - start))
        ends.append(logp_of(moved, item))
    return (ends[0] - ends[1]) / (2 * distance)


def batch_rows(output_dir, step: int) -> pd.DataFrame:
    frame = read_influence(output_dir, {step})
    return frame[frame["update"] == "batch"].reset_index(drop=True)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sft", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1}),
        ("sft", {"optim": "sgd", "lora": True}),
        ("dpo", {"gate_dpo": "token", "gradient_checkpointing": False}),
        ("dpo", {"lora": True, "weight_decay": 0.1}),
        ("grpo", {"max_grad_norm": 0.0, "optim": "adamw_torch"}),
    ],
)
def test_what_is_recorded_is_what_the_steps_do(method, options, tmp_path):
    trainer = make_trainer(method, tmp_path, probes=PROBES, learning_rate=1e-4, **OPTIONS, **options)
    witness = Witness(trainer)
    trainer.train()
    assert influence_steps(tmp_path) == [0, 1, 2, 3]
    for step, (before, after) in enumerate(zip(witness.before, witness.after, strict=True)):
        rows = batch_rows(tmp_path, step)
        assert [*zip(rows["probe_id"], rows["response_type"], strict=True)] == [
            (item.probe_id, item.response_type) for item in ITEMS
        ]
        for item, row in zip(ITEMS, rows.itertuples(), strict=True):
            true, predicted = logp_of(after, item) - logp_of(before, item), derivative(before, after, item)
            assert [*row.token_ids] == [*item.response_ids] and row.num_tokens == len(item.response_ids)
            assert row.logp_sum == pytest.approx(float(logp_of(before, item).sum()), rel=1e-10)
            assert row.true_sum == pytest.approx(float(true.sum()), rel=1e-8, abs=1e-10)
            assert row.predicted_sum == pytest.approx(float(predicted.sum()), rel=1e-5, abs=1e-8)
            np.testing.assert_allclose(row.predicted, predicted, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(row.true, true, rtol=1e-5, atol=1e-8)
        parts = rows[["update_sum", "momentum_sum", "decay_sum"]]
        np.testing.assert_allclose(parts.sum(axis=1), rows["predicted_sum"], rtol=1e-10)
        momentum = step > 0 and options.get("optim") != "sgd"
        assert parts.notna().all().tolist() == [True, momentum, "weight_decay" in options]
        assert rows["lr"].unique() == pytest.approx([1e-4 * (1 - step / 4)]) and rows["error_sum"].isna().all()
        limit = options.get("max_grad_norm", 1.0) or np.inf
        assert witness.norms[step] == pytest.approx(min(limit, float(rows["grad_norm"][0])), rel=1e-4)


def test_the_error_falls_with_the_learning_rate(tmp_path):
    errors = []
    for rate in (1e-3, 1e-4, 1e-5):
        options = OPTIONS | {"max_steps": 1, "learning_rate": rate, "optim": "sgd"}
        make_trainer("dpo", tmp_path / str(rate), probes=PROBES, **options).train()
        rows = batch_rows(tmp_path / str(rate), 0)
        wrong = rows["predicted_sum"] - rows["true_sum"]
        errors.append(np.linalg.norm(wrong) / np.linalg.norm(rows["true_sum"]))
    assert errors[0] < 0.3 and all(small < 0.15 * large for large, small in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_another_update_is_the_first_part_of_the_optimisers_step_on_it(method, optim, tmp_path):
    trainer = make_trainer(
        method,
        tmp_path,
        probes=PROBES,
        akg_updates=["rejected", "batch"],
        optim=optim,
        weight_decay=0.1,
        learning_rate=1e-4,
        probe_tokens_per_batch=100,
        **OPTIONS,
    )
    witness = Witness(trainer)
    trainer.train()
    pad = tiny_tokenizer().pad_token_id
    answers = collate([item for item in ITEMS if item.response_type == "rejected"], pad, ends=True)
    for step in (0, 3):
        model, optimizer = witness.before[step], witness.optimizers[step]
        wanted = influence(model, answers, collate(ITEMS, pad), direction=optimizer, max_grad_norm=1.0)
        frame = read_influence(tmp_path, {step})
        assert [*dict.fromkeys(frame["update"])] == ["rejected", "batch"]
        rows = frame[frame["update"] == "rejected"]
        tokens = np.concatenate(rows["predicted"].tolist())
        np.testing.assert_allclose(tokens, wanted.parts[UPDATE].target_N, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(rows["update_sum"], rows["predicted_sum"], rtol=0)
        assert rows[["momentum_sum", "decay_sum", "true_sum"]].isna().all(axis=None)
        assert not rows["true"].map(len).any()
        force = float(torch.linalg.vector_norm(wanted.force_norm_U))
        np.testing.assert_allclose(rows["force_norm"], force, rtol=1e-8)


def test_batches_and_other_updates_change_nothing(tmp_path):
    common = OPTIONS | {"max_steps": 2, "learning_rate": 1e-4}
    make_trainer("sft", tmp_path / "a", probes=PROBES, probe_tokens_per_batch=4096, **common).train()
    small = {"probe_tokens_per_batch": 1, "akg_updates": ["chosen", "batch", "other_test"]}
    make_trainer("sft", tmp_path / "b", probes=PROBES, **small, **common).train()
    for step in (0, 1):
        one, other = (batch_rows(tmp_path / name, step).set_index(KEYS) for name in "ab")
        columns = ["logp_sum", "predicted_sum", "update_sum", "momentum_sum", "true_sum"]
        pd.testing.assert_frame_equal(one[columns], other[columns], rtol=1e-9)
    assert json.loads((tmp_path / "b/dynamics/meta.json").read_text())["akg"]["updates"] == small["akg_updates"]


@pytest.mark.parametrize("lora", [True, False])
def test_other_updates_go_through_reentrant_checkpointing(lora, tmp_path):
    common = OPTIONS | {
        "max_steps": 2,
        "akg_updates": ["chosen"],
        "lora": lora,
        "probes": PROBES,
        "learning_rate": 1e-4,
    }
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    make_trainer("sft", tmp_path / "plain", gradient_checkpointing=False, **common).train()
    make_trainer("sft", tmp_path / "reentrant", **reentrant, **common).train()
    one, other = (read_influence(tmp_path / name).set_index(KEYS) for name in ("plain", "reentrant"))
    columns = ["logp_sum", "predicted_sum", "update_sum", "force_norm", "grad_norm"]
    pd.testing.assert_frame_equal(one[columns], other[columns], rtol=1e-9)
    assert (one["predicted_sum"].abs() > 1e-8).all()


def test_texts_of_tokens_are_recorded(tmp_path):
    make_trainer("sft", tmp_path, probes=PROBES, **(OPTIONS | {"max_steps": 1})).train()
    texts = {
        (row.probe_id, row.response_type): "".join(row.token_texts) for row in read_influence(tmp_path).itertuples()
    }
    assert texts == {(p.probe_id, kind): text for p in ProbeSet.load(PROBES) for kind, text in p.responses.items()}


def save_probes(folder) -> str:
    path = folder / "observed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBES[1:]))
    return str(path)


def test_it_needs_no_tracked_probe_set_and_may_have_another(tmp_path):
    observed = save_probes(tmp_path)
    options = OPTIONS | {"akg_every": 3, "akg_observe": observed, "akg_max_probes": 1}
    for name, probes in (("lone", None), ("both", PROBES)):
        make_trainer("dpo", tmp_path / name, probes=probes, **options).train()
        assert influence_steps(tmp_path / name) == [0, 3]
    lone, both = read_influence(tmp_path / "lone"), read_influence(tmp_path / "both")
    pd.testing.assert_frame_equal(lone, both)
    assert lone["probe_id"].nunique() == 1 and lone["num_tokens"].iloc[0] == len(PROBES[1]["chosen"])
    store = DynamicsStore(tmp_path / "lone")
    meta = store.read_meta()
    assert not store.steps(RECORDS) and meta["status"] == "finished" and store.read_config()["akg_every"] == 3
    assert meta["akg"]["observe"]["num_probes"] == 1 and meta["akg"]["dtype"] == "float64"
    assert meta["akg"] == DynamicsStore(tmp_path / "both").read_meta()["akg"]
    assert 0 < meta["parts"][0]["akg_seconds"] and meta["train_seconds"] > 0 == meta["probe_seconds"]


@pytest.mark.parametrize("tracked", [True, False])
def test_a_resumed_run_records_what_the_whole_one_does(tracked, tmp_path):
    options = OPTIONS | {"max_steps": 8, "akg_every": 2, "save_strategy": "steps", "save_steps": 3}
    options |= {"akg_observe": save_probes(tmp_path), "probes": PROBES if tracked else None}
    for name in ("whole", "run"):
        make_trainer("sft", tmp_path / name, **options).train()
    assert influence_steps(tmp_path / "run") == [0, 2, 4, 6]
    checkpoint = str(tmp_path / "run/checkpoint-3")
    make_trainer("sft", tmp_path / "run", **options).train(resume_from_checkpoint=checkpoint)
    pd.testing.assert_frame_equal(read_influence(tmp_path / "run"), read_influence(tmp_path / "whole"))
    # What a run that goes on without it leaves out does not stay there from the part that it takes back.
    off = options | {"akg_every": None}
    if tracked:
        make_trainer("sft", tmp_path / "run", **off).train(resume_from_checkpoint=checkpoint)
        assert influence_steps(tmp_path / "run") == [0, 2]
        assert json.loads((tmp_path / "run/dynamics/meta.json").read_text())["akg"]["every"] == 2
    else:
        with pytest.raises(ValueError, match="cannot resume probing: the probe set changed"):
            other = options | {"akg_max_probes": 1}
            make_trainer("sft", tmp_path / "run", **other).train(resume_from_checkpoint=checkpoint)


def test_a_run_that_recorded_influence_alone_cannot_go_on_with_probes(tmp_path):
    options = OPTIONS | {"akg_observe": save_probes(tmp_path), "save_strategy": "steps", "save_steps": 2}
    make_trainer("sft", tmp_path / "run", probes=None, **options).train()
    tracked = make_trainer("sft", tmp_path / "run", probes=PROBES, **options)
    with pytest.raises(ValueError, match="recorded influence alone.*Resume without probe_set, or start anew"):
        tracked.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))


def test_a_new_run_of_a_trainer_that_had_gone_on_without_influence_does_not_claim_any(tmp_path):
    options = OPTIONS | {"probes": PROBES, "save_strategy": "steps", "save_steps": 2}
    make_trainer("sft", tmp_path, **options).train()
    trainer = make_trainer("sft", tmp_path, **(options | {"akg_every": None}))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert DynamicsStore(tmp_path).read_meta()["akg"]["every"] == 1
    trainer.train()
    assert "akg" not in DynamicsStore(tmp_path).read_meta()


def test_a_resume_that_observes_something_else_is_refused(tmp_path):
    options = OPTIONS | {"probes": PROBES, "save_strategy": "steps", "save_steps": 2}
    make_trainer("sft", tmp_path, **options).train()
    with pytest.raises(ValueError, match="what akg observes changed.*Keep akg_observe, akg_max_probes"):
        trainer = make_trainer("sft", tmp_path, akg_max_probes=1, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("tracked", [True, False])
def test_a_new_run_in_the_same_place_moves_the_old_ones_rows_aside(tracked, tmp_path):
    options = {"akg_observe": save_probes(tmp_path), "probes": PROBES if tracked else None}
    make_trainer("sft", tmp_path, **(OPTIONS | options)).train()
    make_trainer("sft", tmp_path, **(OPTIONS | options | {"max_steps": 2})).train()
    assert influence_steps(tmp_path) == [0, 1]
    assert influence_steps(tmp_path / "dynamics-old-1") == [0, 1, 2, 3]


def fill_disk(monkeypatch, name: str) -> None:
    """Let every write of files whose path has this name in it fail."""
    perform = files.perform

    def broken(operation, path, action, *arguments):
        if operation == "write" and name in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return perform(operation, path, action, *arguments)

    monkeypatch.setattr(files, "perform", broken)


def test_a_full_disk_costs_rows_only(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "trl_dynamics"):
        fill_disk(patch, "influence/m000-step000000001")
        make_trainer("sft", tmp_path, probes=PROBES, **OPTIONS).train()
    assert influence_steps(tmp_path) == [0, 2, 3]
    assert sum("Lost: the influence of step 1" in record.getMessage() for record in caplog.records) == 1
    with monkeypatch.context() as patch, pytest.raises(OSError, match="nothing already written was lost"):
        fill_disk(patch, "influence/m000-step000000001")
        make_trainer("sft", tmp_path, probes=PROBES, probe_on_error="stop", **OPTIONS).train()


def test_a_step_that_was_left_out_has_no_rows(tmp_path, monkeypatch):
    """As fp16 does when a gradient overflows."""
    trainer = make_trainer("sft", tmp_path, probes=PROBES, **OPTIONS)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda _: trainer.state.global_step == 1))
    trainer.train()
    assert influence_steps(tmp_path) == [0, 2, 3]


def test_autocast_is_left_and_half_precision_weights_are_warned_of(tmp_path, caplog):
    common = OPTIONS | {"max_steps": 1, "probes": PROBES, "dtype": torch.float32, "learning_rate": 1e-4}
    make_trainer("sft", tmp_path / "wide", **common).train()
    make_trainer("sft", tmp_path / "autocast", bf16=True, **common).train()
    assert "mostly rounding" not in caplog.text
    wide, narrow = (batch_rows(tmp_path / name, 0) for name in ("wide", "autocast"))
    assert narrow["logp_sum"].equals(wide["logp_sum"]), "the same weights, in float32"
    wrong = np.linalg.norm(narrow["predicted_sum"] - narrow["true_sum"]) / np.linalg.norm(narrow["true_sum"])
    assert wrong < 0.05
    make_trainer("sft", tmp_path / "half", **(common | {"dtype": torch.bfloat16})).train()
    assert "akg_every on bfloat16 weights: predictions hold" in caplog.text
    assert json.loads((tmp_path / "half/dynamics/meta.json").read_text())["akg"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"akg_every": 0}, "akg_every is 0, expected a whole number of at least 1, or none"),
        ({"akg_max_probes": 0}, "akg_max_probes is 0, expected a whole number of at least 1"),
        ({"akg_updates": []}, r"akg_updates is \[\], expected a list of 'batch' and types"),
        ({"akg_updates": "batch"}, "akg_updates is 'batch', expected a list"),
    ],
)
def test_options_that_cannot_be_are_told(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        trl_dynamics.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"akg_updates": ["dpo"]}, "akg_updates has 'dpo', expected some of batch, chosen, rejected, other_test"),
        ({"akg_observe": "/nowhere/at/all.jsonl"}, "/nowhere/at/all.jsonl"),
    ],
)
@pytest.mark.parametrize("method", ["SFT", "DPO", "GRPO"])
def test_probes_that_cannot_be_observed_are_told_before_a_model_is_loaded(method, options, said, tmp_path):
    config, trainer = (getattr(trl_dynamics, f"{method}{kind}") for kind in ("Config", "Trainer"))
    args = config(str(tmp_path), use_cpu=True, bf16=False, akg_every=1, **options)
    with pytest.raises((ValueError, OSError), match=said):
        trainer(model="/no/model/here", args=args, probe_set=PROBES)


def test_something_must_be_observed(tmp_path, caplog):
    with pytest.raises(ValueError, match="akg_every=2 has nothing to observe: give akg_observe, or a probe_set"):
        make_trainer("sft", tmp_path, akg_every=2)
    trainer = make_trainer("sft", tmp_path, akg_observe=save_probes(tmp_path))
    assert "akg_observe without effect" in caplog.text and trainer.influence_callback is None


def test_other_optimisers_are_refused_before_the_first_step(tmp_path):
    trainer = make_trainer("sft", tmp_path, probes=PROBES, optim="adafactor", **OPTIONS)
    with pytest.raises(ValueError, match="training steps with Adafactor: set optim='adamw_torch' or optim='sgd'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_trls_own_config_knows_nothing_of_it(tmp_path):
    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=1, package=_plain_configs())
    assert type(trainer.args) is trl.SFTConfig
    trainer.train()
    assert trainer.influence_callback is None and not (tmp_path / "dynamics/influence").exists()


def _plain_configs():
    class Package:
        SFTConfig, SFTTrainer = trl.SFTConfig, trl_dynamics.SFTTrainer

    return Package


def test_the_command_line_takes_it(tmp_path):
    flags = ["--model_name_or_path", "embedded", "--dataset_name", "embedded", "--dataset_num_rows", "8"]
    flags += ["--akg_observe", "embedded", "--akg_max_probes", "2", "--akg_updates", "batch", "chosen"]
    flags += ["--akg_every", "2", "--max_steps", "3", "--use_cpu", "True", "--bf16", "False", "--report_to", "none"]
    assert main(["dpo", *flags, "--output_dir", str(tmp_path / "run")]) == 0
    frame = read_influence(tmp_path / "run")
    assert set(frame["step"]) == {0, 2} and set(frame["update"]) == {"batch", "chosen"}
    assert frame["probe_id"].nunique() == 2
    assert DynamicsStore(tmp_path / "run").read_config()["dataset_name"] == "embedded"
