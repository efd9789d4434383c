"""A wrong option or probe set is refused before a model is loaded and before a folder is made."""

import dataclasses

import pytest
import trl

from tiny import tiny_tokenizer
from tiny_runs import PROBES, make_trainer
from trl_dynamics import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl_dynamics.cli.track import TrackArguments
from trl_dynamics.trainers.config import ProbeArguments

TRAINERS = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig, GRPOTrainer: GRPOConfig}
WRONG = {
    "probe_every": (-3, 2.5, float("nan")),
    "probe_budget": (0, 5),
    "probe_subset": (0, -1, 2.5),
    "probe_max_probes": (0, 1.5),
    "probe_tokens_per_batch": (0,),
    "probe_max_prompt_length": (0,),
    "probe_max_length": (1,),
    "probe_top_k": (0, None),
    "probe_samples": (-1, 0.5),
    "probe_sample_tokens": (0, None),
    "probe_layout": ("cube", None),
    "probe_dtype": ("float64",),
    "probe_on_error": ("ignore",),
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize("config", [SFTConfig, DPOConfig, GRPOConfig, TrackArguments])
def test_a_config_refuses_a_value_that_no_run_can_have(config, tmp_path):
    fixed = {} if config is TrackArguments else {"use_cpu": True, "bf16": False}
    for name, value in CASES:
        if hasattr(config, name):
            with pytest.raises(ValueError, match=f"^{name} is {value!r}, expected .*[a-z0-9]"):
                config(output_dir=str(tmp_path), **fixed, **{name: value})
    config(output_dir=str(tmp_path), **fixed, probe_subset=3, probe_samples=0, probe_dtype="float32", probe_top_k=1)


def test_every_number_and_choice_among_the_options_is_checked():
    fields = dataclasses.fields(ProbeArguments)
    numbers = {field.name for field in fields if field.type in (int, float, int | None, float | None)}
    assert numbers | {field.name for field in fields if "choices" in field.metadata} == set(WRONG)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("plain", [False, True])
def test_a_trainer_refuses_before_it_loads_a_model(trainer, plain, tmp_path):
    config = getattr(trl, TRAINERS[trainer].__name__) if plain else TRAINERS[trainer]
    (tmp_path / "file").write_text("mine")

    def start(output_dir, probe_set):
        args = config(output_dir=str(output_dir), use_cpu=True, bf16=False)
        trainer(model="/no/such/model", args=args, probe_set=probe_set)

    for output_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"output_dir is '{output_dir}', but '{tmp_path / 'file'}' is a file"):
            start(output_dir, None)
    with pytest.raises(ValueError, match="probe set './missing.jsonl' does not exist"):
        start(tmp_path / "run", "./missing.jsonl")
    with pytest.raises(ValueError, match="has no response type 'chosen'"):
        start(tmp_path / "run", [{"prompt": "a", "rejected": " b"}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_training_refuses_answers_that_its_template_changes(method, tmp_path, monkeypatch):
    """Before the first step, when the trainer is made, in one line."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].split('</think>')[-1]"
    )
    monkeypatch.setattr("tiny_runs.tiny_tokenizer", lambda: tokenizer)
    chat = [{"role": "user", "content": "Why?"}]
    rows = [{"prompt": chat, "chosen": "<think>hm</think>So.", "rejected": f"No. {i}"} for i in range(5)]
    with pytest.raises(ValueError, match="^5 of 10 responses cannot be scored; the first: probe '0'.*probe '2'"):
        make_trainer(method, tmp_path / "run", probes=rows)
    assert not (tmp_path / "run" / "dynamics").exists()


def test_a_probe_set_of_the_config_is_read_before_the_model(tmp_path):
    with pytest.raises(ValueError, match="probe set './missing.jsonl' does not exist"):
        make_trainer("sft", tmp_path / "run", probe_set="./missing.jsonl")
    assert not (tmp_path / "run").exists()
    assert make_trainer("sft", tmp_path / "run", probe_set="./missing.jsonl", probes=PROBES).probe_callback is not None
