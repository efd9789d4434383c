"""GRPO with probes: what is recorded does not depend on how completions are sampled, rewarded or buffered."""

import functools

import pandas as pd
import pytest

import trl_dynamics
from tiny_runs import PROBES, letter_share, make_trainer

KEYS = ["step", "probe_id", "response_type"]


def records(output_dir) -> pd.DataFrame:
    return trl_dynamics.load_records(output_dir).set_index(KEYS).sort_index().drop(columns=["run", "model"])


def test_probes_are_scored_at_temperature_one(tmp_path):
    """With a learning rate of 0 the weights stay, and so do the numbers, which are those of an SFT run as well."""
    for temperature in (0.7, 1.0):
        options = {"temperature": temperature, "learning_rate": 0.0, "max_steps": 2, "probe_every": 1}
        make_trainer("grpo", tmp_path / str(temperature), probes=PROBES, **options).train()
    make_trainer("sft", tmp_path / "sft", probes=PROBES, max_steps=1).train()
    cold, warm = records(tmp_path / "0.7"), records(tmp_path / "1.0")
    pd.testing.assert_frame_equal(cold, warm, check_exact=True)
    pd.testing.assert_frame_equal(cold.loc[[0]], records(tmp_path / "sft").loc[[0]], check_exact=True)
    pd.testing.assert_frame_equal(cold.loc[[2]].droplevel("step"), cold.loc[[0]].droplevel("step"), check_exact=True)


def test_probes_do_not_reach_rewards_completions_or_the_generation_buffer(tmp_path):
    trainer = make_trainer(
        "grpo", tmp_path, probes=PROBES, max_steps=4, probe_every=1, num_iterations=2, steps_per_generation=2
    )
    score = trainer.probe_callback.engine.score
    seen, states = [], []

    def state() -> tuple:
        metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
        return trainer._step, id(trainer._buffered_inputs), metrics

    def reward(completions, prompts, **columns):
        seen.extend(prompts)
        return letter_share(completions)

    def watched_score(*args):
        before = state()
        result = score(*args)
        assert state() == before
        states.append(before)
        return result

    trainer.reward_funcs, trainer.probe_callback.engine.score = [reward], watched_score
    trainer.train()
    assert [step for step, *_ in states] == [0, 1, 2, 3, 4] and any(metrics for *_, metrics in states)
    # One generation of two groups of two serves the four steps.
    assert len(seen) == 4 and len(set(seen)) == 2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_grpo_resumes_its_records(lora, tmp_path):
    options = {"lora": lora, "probes": PROBES, "max_steps": 6, "probe_every": 2, "save_strategy": "steps"}
    options |= {"save_steps": 3}
    make_trainer("grpo", tmp_path, **options).train()
    before = records(tmp_path)
    make_trainer("grpo", tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    after = records(tmp_path)
    assert after.index.equals(before.index) and after.index.is_unique
    pd.testing.assert_frame_equal(after.loc[:3], before.loc[:3], check_exact=True)


def test_the_default_config_is_named_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make_trainer("grpo", tmp_path)
    source.model.config.name_or_path = "org/tiny"
    # On a CPU, TRL's own defaults are refused.
    on_cpu = functools.partial(trl_dynamics.GRPOConfig, use_cpu=True, report_to="none")
    monkeypatch.setattr("trl_dynamics.trainers.grpo.GRPOConfig", on_cpu)
    data = {"train_dataset": source.train_dataset, "processing_class": source.processing_class}
    trainer = trl_dynamics.GRPOTrainer(source.model, letter_share, **data)
    assert isinstance(trainer.args, trl_dynamics.GRPOConfig) and trainer.args.output_dir == "tiny-GRPO"
