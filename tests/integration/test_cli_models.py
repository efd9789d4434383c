"""What commands do with models that they are given: adapters, missing weights, numbers that are not finite."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import trl_dynamics
from cli_runs import failure, flags, scored
from tiny import tiny_model, tiny_tokenizer
from trl_dynamics.cli import dpo, merging
from trl_dynamics.cli.main import main

SHORT = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4}
PEFT = {"use_peft": True, "learning_rate": 0.05, "probe_every": 1}


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory):
    """The folder of an SFT run with LoRA, and the log-probabilities that it ended with."""
    folder = tmp_path_factory.mktemp("adapter") / "sft"
    assert main(["sft", *flags(world, folder, **PEFT)]) == 0
    assert (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists()
    return folder, scored(folder)[2]


@pytest.mark.parametrize(("method", "options"), [("dpo", {}), ("dpo", PEFT), ("sft", {}), ("grpo", PEFT)])
def test_training_starts_from_what_an_adapter_makes_of_its_base(method, options, world, adapter, tmp_path, caplog):
    start, expected = adapter
    options = options | {"model_name_or_path": start, "learning_rate": 0.05, "probe_every": 1}
    argv = [method, *flags(world, tmp_path / "run", **options | (SHORT if method == "grpo" else {}))]
    if method == "grpo":
        argv += ["--reward_funcs", "get_soft_overlong_punishment"]
    with caplog.at_level("INFO", logger="trl_dynamics"):
        assert main(argv) == 0
    assert sum("merged into its base" in line for line in caplog.messages) == 1
    (merged,) = (tmp_path / "run").glob("_merged_*")
    found = scored(tmp_path / "run")
    pd.testing.assert_series_equal(found[0], expected, atol=1e-4, rtol=0)
    if "use_peft" in options:
        assert json.loads((tmp_path / "run/adapter_config.json").read_text())["base_model_name_or_path"] == str(merged)
    # What was saved is what was trained, whichever base it has.
    again = ["track", "--model_name_or_path", str(tmp_path / "run"), "--probe_set", str(world / "probes.jsonl")]
    assert main([*again, "--output_dir", str(tmp_path / "after")]) == 0
    pd.testing.assert_series_equal(scored(tmp_path / "after")[0], found[2], atol=1e-5, rtol=0)


def test_dpo_s_reference_is_the_merged_model_not_the_base(world, adapter, tmp_path):
    """At the first step nothing has moved, so that both rewards are zero only against the model it starts from."""
    options = {"model_name_or_path": adapter[0], "logging_steps": 1, "max_steps": 1, "learning_rate": 1e-9}
    trainers = []
    for more in ({}, {"use_peft": True}):
        command = dpo.command()
        configs, _ = command.parse(flags(world, tmp_path / str(len(trainers)), **options | more))
        trainers.append(command.train(*configs))
    for trainer in trainers:
        first = next(row for row in trainer.state.log_history if "rewards/chosen" in row)
        assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/rejected"]) < 1e-5


def test_a_merged_model_is_made_once_per_adapter_and_dtype(adapter, tmp_path):
    args = trl_dynamics.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    first = Path(merging.whole_model(str(adapter[0]), args, dtype="float32", revision="main"))
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert merging.whole_model(str(adapter[0]), args, dtype="float32", revision="main") == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    half = merging.whole_model(str(adapter[0]), args, dtype="bfloat16", revision="main")
    assert half != str(first) and json.loads(Path(half, "config.json").read_text())["dtype"] == "bfloat16"
    changed = tmp_path / "changed"
    shutil.copytree(adapter[0], changed)
    weights = load_file(changed / "adapter_model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, changed / "adapter_model.safetensors")
    assert merging.whole_model(str(changed), args, dtype="float32", revision="main") not in (str(first), half)
    config = json.loads((adapter[0] / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    shutil.copy(adapter[0] / "adapter_model.safetensors", changed)
    assert merging.whole_model(str(changed), args, dtype="float32", revision="main") not in (str(first), half)


def test_a_merged_model_that_cannot_be_written_names_its_folder(adapter, tmp_path, monkeypatch):
    args = trl_dynamics.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    save = LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda model, folder: save_file({}, folder / "no" / "x"))
    with pytest.raises(ValueError, match=f"{tmp_path}/_merged_"):
        merging.whole_model(str(adapter[0]), args, dtype="float32", revision="main")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    assert Path(merging.whole_model(str(adapter[0]), args, dtype="float32", revision="main")).is_dir()


def test_weights_that_are_missing_end_training_before_it_begins(world, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "lm_head" not in name}
    save_file(kept, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    for method in ("sft", "dpo"):
        line = failure(capsys, [method, *flags(world, tmp_path / "run", model_name_or_path=tmp_path / "model")])
        assert "no weights for 'lm_head.weight'" in line
    assert not list(tmp_path.glob("run/*"))


@pytest.fixture(scope="module")
def nan_model(world, tmp_path_factory):
    """A model that gives NaN after one word, and numbers before it."""
    folder = tmp_path_factory.mktemp("nan") / "model"
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny_tokenizer()("y")["input_ids"][0]] = float("nan")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_numbers_that_are_not_finite_have_an_exit_status(world, nan_model, tmp_path, capsys):
    probes = ["--probe_set", str(world / "probes.jsonl")]
    commands = {
        "track": ["track", "--model_name_or_path", str(nan_model), *probes, "--output_dir"],
        "screen": ["probes", "screen", "--model", str(nan_model), *probes, "-o"],
        "akg": ["akg", "--model_name_or_path", str(nan_model), *probes, "--update_types", "chosen", "-o"],
    }
    told = {}
    for name, argv in commands.items():
        assert main([*argv, str(tmp_path / name)]) == 4
        lines = capsys.readouterr().err.strip().splitlines()
        (told[name],) = re.findall(r"error: (\d+) of (\d+) answers are not finite", lines[-1])
    frame = trl_dynamics.load_records(tmp_path / "track")
    # Of three types, the rejected answers have the letter.
    assert told["track"] == ("3", "9") == told["screen"]
    assert set(frame.loc[frame["logp_sum"].isna(), "response_type"]) == {"rejected"}
    scores = pd.read_parquet(tmp_path / "screen/scores.parquet")
    assert scores["logp_sum/rejected"].isna().all() and scores["logp_sum/chosen"].notna().all()
    influence = pd.read_parquet(tmp_path / "akg/influence.parquet")
    assert influence["delta_sum"].isna().sum() == int(told["akg"][0]) and len(influence) == int(told["akg"][1])

    def no_constant(name: str):
        raise AssertionError(f"{name} is no JSON")

    screened, influenced = (
        json.loads((tmp_path / name / "summary.json").read_text(), parse_constant=no_constant)
        for name in ("screen", "akg")
    )
    assert screened["logp_mean"]["rejected"] is None and screened["logp_mean"]["chosen"] < 0
    assert screened["num_not_finite"] == 3 and influenced["num_not_finite"] == int(told["akg"][0])


def test_akg_names_errors_that_are_not_finite(world, nan_model, tmp_path, capsys):
    argv = [
        "akg",
        "--model_name_or_path",
        str(nan_model),
        "--probe_set",
        str(world / "probes.jsonl"),
        "--verify",
        "True",
    ]
    assert main([*argv, "-o", str(tmp_path / "map")]) == 4
    out = capsys.readouterr().out
    assert "relative error: chosen not finite" in out and "rounding" in out and "%" not in out


def test_a_model_that_is_nan_has_no_answer(world, nan_model, tmp_path, capsys):
    argv = ["judge", str(nan_model), str(nan_model), "--prompts", str(world / "probes.jsonl"), "--judge", "likelihood"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why? y"}\n')
    argv[4] = str(tmp_path / "prompts.jsonl")
    assert "not finite" in failure(capsys, [*argv, "--judge_model", str(world / "model"), "-o", str(tmp_path / "j")])
