"""Options of the tracker inside a run: budget, subset, float32, probe scalars among the evaluation metrics."""

import copy
import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback

import trl_dynamics
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, PROBES, make_trainer
from trl_dynamics import ProbeSet, stats_head
from trl_dynamics.probing.encode import encode
from trl_dynamics.probing.layouts import PaddedLayout, SharedPrefixLayout
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.scoring.probes import find_probes
from trl_dynamics.tracking.callback import OWN_KEYS
from trl_dynamics.trainers.config import ProbeArguments


def meta(output_dir) -> dict:
    return json.loads((output_dir / "dynamics/meta.json").read_text())


def steps(output_dir) -> list[int]:
    return sorted(int(step) for step in trl_dynamics.load_records(output_dir)["step"].unique())


def test_a_budget_decides_and_notes_it(tmp_path, monkeypatch):
    options = {"probes": PROBES, "max_steps": 12, "probe_every": 2, "probe_log_spaced": False}
    make_trainer("sft", tmp_path, probe_budget=1e-6, **options).train()
    assert steps(tmp_path) == [0, 12]
    decisions = meta(tmp_path)["decisions"]
    assert [choice["step"] for choice in decisions] == [0, 2, 4, 6, 8, 10, 12]
    assert [choice["step"] for choice in decisions if choice["taken"]] == [0, 12]
    # A run that resumes has the decisions up to its checkpoint and makes the later ones anew.
    monkeypatch.setattr("trl_dynamics.tracking.callback.is_affordable", lambda *args, step, **more: step in (0, 4, 12))
    options |= {"save_strategy": "steps", "save_steps": 6, "probe_on_save": False, "probe_budget": 0.5}
    make_trainer("sft", tmp_path / "two", **options).train()
    assert steps(tmp_path / "two") == [0, 4, 12]
    monkeypatch.setattr("trl_dynamics.tracking.callback.is_affordable", lambda *args, step, **more: step == 8)
    make_trainer("sft", tmp_path / "two", **options).train(resume_from_checkpoint=str(tmp_path / "two/checkpoint-6"))
    taken = {choice["step"]: choice["taken"] for choice in meta(tmp_path / "two")["decisions"]}
    assert taken == {0: True, 2: False, 4: True, 6: False, 8: True, 10: False, 12: True}
    assert meta(tmp_path / "two")["decisions"][-1] == {"step": 12, "taken": True, "affordable": False}


def test_decisions_say_what_an_evaluation_took_all_the_same(tmp_path):
    options = {"probes": PROBES, "max_steps": 8, "probe_every": 2, "probe_log_spaced": False, "probe_budget": 1e-6}
    evaluation = {"eval_strategy": "steps", "eval_steps": 4, "probe_on_evaluate": True}
    make_trainer("sft", tmp_path, **options, **evaluation).train()
    assert steps(tmp_path) == [0, 4, 8]
    decisions = {choice.pop("step"): choice for choice in meta(tmp_path)["decisions"]}
    refused, anyway = {"taken": False}, {"taken": True, "affordable": False}
    assert decisions == {0: {"taken": True}, 2: refused, 4: anyway, 6: refused, 8: {"taken": True}}


def test_a_subset_is_the_same_whatever_else_is_in_the_set(tmp_path):
    rows = [row | {"id": str(index)} for index, row in enumerate(PAIRS)]
    whole = ProbeSet.load(rows)
    kept = {probe.probe_id for probe in whole.sample(0.25)}
    assert len(kept) == 5 and len(whole.sample(3)) == 3 and whole.sample(1000) == whole
    fewer = ProbeSet.load(rows[:10])
    assert {p.probe_id for p in fewer.sample(10)} == {str(index) for index in range(10)}
    assert {p.probe_id for p in fewer.sample(2)} <= {p.probe_id for p in whole.sample(10)} | {
        p.probe_id for p in fewer
    }
    make_trainer("sft", tmp_path, probes=rows, max_steps=1, probe_subset=0.25).train()
    assert set(trl_dynamics.load_records(tmp_path)["probe_id"]) == kept
    for wrong in (0, -1, 2.5):
        said = f"probe_subset is {wrong}, expected a share above 0 and below 1, or a whole number of probes from 1 on"
        with pytest.raises(ValueError, match=said):
            whole.sample(wrong)


@pytest.mark.parametrize("process_index", [0, 1])
def test_a_subset_larger_than_the_set_is_told_by_the_main_process_alone(process_index, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trl_dynamics.SFTConfig, "process_index", process_index)
    for subset in (4, 500):
        assert not caplog.records
        args = trl_dynamics.SFTConfig(str(tmp_path), probe_subset=subset, use_cpu=True, bf16=False)
        assert len(find_probes(PAIRS[:4], args)) == 4
    said = "probe_subset is 500, but the probe set 'probes' has 4 probes: all are scored"
    assert [record.message for record in caplog.records] == ([] if process_index else [said])


def test_too_few_probes_to_judge_are_told_before_training(tmp_path, caplog):
    args = trl_dynamics.SFTConfig(str(tmp_path), probe_max_probes=3, use_cpu=True, bf16=False)
    assert len(find_probes(PAIRS, args)) == 3
    (told,) = caplog.records
    assert told.levelname == "WARNING" and "3 probes are scored" in told.message and "at least 4" in told.message


def test_the_help_names_all_that_an_evaluation_gets():
    told = next(
        field.metadata["help"] for field in dataclasses.fields(ProbeArguments) if field.name == "probe_on_evaluate"
    )
    assert all(f"eval_{key}..." in told for key in OWN_KEYS)


@pytest.mark.parametrize("options", [{"probe_subset": 0.5}, {"probe_max_probes": 12, "probe_subset": 0.5}])
def test_the_copy_of_a_narrowed_set_is_what_a_resume_takes(options, tmp_path):
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | options
    make_trainer("sft", tmp_path, probes=PAIRS, **common).train()
    records = trl_dynamics.load_records(tmp_path)
    for again in (PAIRS, str(tmp_path / "dynamics/probe_set")):
        trainer = make_trainer("sft", tmp_path, probes=again, **common)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trl_dynamics.load_records(tmp_path)["probe_id"].equals(records["probe_id"])
    said = "the probe set changed, probe_subset was 0.5, is 5; .*Keep probe_max_probes and probe_subset as in the run"
    with pytest.raises(ValueError, match=said):
        trainer = make_trainer("sft", tmp_path, probes=PAIRS, **(common | {"probe_subset": 5}))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"the probe set changed; .*pass the set in"):
        trainer = make_trainer("sft", tmp_path, probes=PAIRS[1:], **common)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("layout", [PaddedLayout(4), SharedPrefixLayout(200)], ids=lambda layout: layout.name)
@pytest.mark.parametrize("tied", [False, True])
def test_float32_scoring_of_half_precision_weights_is_that_of_the_same_weights_in_float32(layout, tied):
    model = tiny_model("llama", tie_word_embeddings=tied).bfloat16()
    wide = tiny_model("llama", tie_word_embeddings=tied).bfloat16().float()
    encoded = encode(ProbeSet.load(PROBES), tiny_tokenizer())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storages = {name: value.data_ptr() for name, value in model.named_parameters()}
    for each in (model, wide):
        stats_head.install(each)
    given = ProbeEngine(encoded, layout, float32=True).score(model)
    assert given == ProbeEngine(encoded, layout).score(wide)
    assert given != ProbeEngine(encoded, layout).score(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == storages


def test_float32_scoring_of_half_precision_adapters():
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama").bfloat16(), config, autocast_adapter_dtype=False).bfloat16().eval()
    wide = copy.deepcopy(model).float()
    encoded = encode(ProbeSet.load(PROBES), tiny_tokenizer())
    for each in (model, wide):
        stats_head.install(each)
    given = ProbeEngine(encoded, SharedPrefixLayout(200), float32=True).score(model)
    assert given == ProbeEngine(encoded, SharedPrefixLayout(200)).score(wide)


def test_float32_scoring_keeps_the_hooks_on_gradients():
    """DDP reduces gradients in hooks on each parameter's gradient accumulator, which must stay the same object."""
    model = tiny_model("llama").bfloat16()
    fired = []
    for parameter in model.parameters():
        accumulator = parameter.view_as(parameter).grad_fn.next_functions[0][0]
        accumulator.register_hook(lambda *_, kept=accumulator: fired.append(kept))
    stats_head.install(model)
    ProbeEngine(encode(ProbeSet.load(PROBES), tiny_tokenizer()), PaddedLayout(4), float32=True).score(model)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    assert len(fired) == len(list(model.parameters()))


def test_float32_scoring_gives_the_weights_back_after_an_error():
    model = tiny_model("llama").bfloat16()
    stats_head.install(model)
    engine = ProbeEngine(encode(ProbeSet.load(PROBES), tiny_tokenizer()), PaddedLayout(4), float32=True)

    def failing(module, args):
        raise RuntimeError("stop")

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="stop"):
        engine.score(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_float32_scoring_under_autocast_ignores_it(tmp_path):
    options = {"probes": PROBES, "max_steps": 1, "probe_every": 0}
    for name, more in {
        "exact": {},
        "coarse": {"bf16": True},
        "wide": {"bf16": True, "probe_dtype": "float32"},
    }.items():
        make_trainer("sft", tmp_path / name, **options, **more).train()
    exact, coarse, wide = (
        trl_dynamics.load_records(tmp_path / name).query("step == 0").drop(columns="run").reset_index(drop=True)
        for name in ("exact", "coarse", "wide")
    )
    assert wide.equals(exact) and not coarse.equals(exact)
    assert meta(tmp_path / "wide")["probe_dtype"] == "float32" and meta(tmp_path / "wide")["mixed_precision"] == "bf16"


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_probe_scalars_select_the_best_model(method, tmp_path):
    options = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_probe/chosen/logp_mean",
        "greater_is_better": method == "sft",
        "probe_on_evaluate": True,
        "probe_every": 0,
        "probe_on_save": False,
        "probe_log_spaced": False,
    }
    trainer = make_trainer(method, tmp_path, probes=PROBES, **options)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=5))
    trainer.train()
    frame = trl_dynamics.load_records(tmp_path)
    path = frame[frame["response_type"] == "chosen"].groupby("step")["logp_mean"].mean().loc[2:]
    best = path.max() if method == "sft" else path.min()
    assert trainer.state.best_metric == pytest.approx(best, abs=1e-12)
    logged = [entry for entry in trainer.state.log_history if "eval_probe/chosen/logp_mean" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6] and all("eval_loss" in entry for entry in logged)
    assert steps(tmp_path) == [0, 2, 4, 6]


def test_evaluation_outside_training_scores_without_recording(tmp_path):
    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=2, eval_strategy="no", probe_on_evaluate=True)
    trainer.eval_dataset = None
    data = trainer.train_dataset.select(range(4))
    before = trainer.evaluate(data)
    assert before["eval_squeeze/argmax_minus_chosen"] > 0 and not (tmp_path / "dynamics").exists()
    trainer.train()
    after = trainer.evaluate(data)
    frame = trl_dynamics.load_records(tmp_path)
    last = frame[(frame["response_type"] == "chosen") & (frame["step"] == 2)]["logp_mean"].mean()
    assert after["eval_probe/chosen/logp_mean"] == pytest.approx(last, abs=1e-12)
    assert steps(tmp_path) == [0, 1, 2]
