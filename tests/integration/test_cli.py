"""The command line: what it runs, what it writes, and one clear line for every wrong input."""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import trl_dynamics
from cli_runs import failure, flags
from tiny_runs import PAIRS
from trl_dynamics.cli import launching
from trl_dynamics.cli.grpo import find_reward
from trl_dynamics.cli.main import COMMANDS, main
from trl_dynamics.cli.targets import find_targets
from trl_dynamics.cli.training import TrainingCommand


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean log-probability per token: steps x response types."""
    return frame.pivot_table(index="step", columns="response_type", values="logp_mean")


def test_sft_then_dpo_then_report(world, tmp_path, capsys):
    assert main(["sft", *flags(world, tmp_path / "sft")]) == 0
    options = {"model_name_or_path": tmp_path / "sft", "dataset_name": world / "train.parquet"}
    assert main(["dpo", *flags(world, tmp_path / "dpo", **options)]) == 0
    frame = trl_dynamics.load_records(tmp_path / "sft", tmp_path / "dpo")
    assert sorted(frame["run"].unique()) == ["dpo", "sft"]
    scored = frame.set_index(["run", "step", "probe_id", "response_type"])["logp_sum"].sort_index()
    pd.testing.assert_series_equal(scored["dpo", 0], scored["sft", 2], atol=1e-4, rtol=0)
    capsys.readouterr()
    assert main(["report", str(tmp_path / "sft"), str(tmp_path / "dpo"), "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert "<html" in (tmp_path / "page.html").read_text()[:500]
    for kind, suffix in (("csv", ".csv"), ("png", ".png")):
        assert main(["report", str(tmp_path / "dpo"), "--format", kind]) == 0
        assert list((tmp_path / "dpo" / "dynamics" / kind).glob(f"*{suffix}"))


def test_config_yaml_replays_the_run(world, tmp_path):
    assert main(["dpo", *flags(world, tmp_path / "run", beta=0.3, learning_rate=1e-4, seed=3)]) == 0
    config = tmp_path / "run" / "dynamics" / "config.yaml"
    assert yaml.safe_load(config.read_text())["beta"] == 0.3
    assert main(["dpo", "--config", str(config), "--output_dir", str(tmp_path / "again")]) == 0
    frames = [trl_dynamics.load_records(tmp_path / name).drop(columns="run") for name in ("run", "again")]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    again = yaml.safe_load((tmp_path / "again" / "dynamics" / "config.yaml").read_text())
    assert again | {"output_dir": ""} == yaml.safe_load(config.read_text()) | {"output_dir": ""}


REWARDS = """
def vowels(completions, **columns):
    return [sum(text.count(letter) for letter in "aeiou") for text in completions]

def brevity(completions, chosen, **columns):
    return [-abs(len(text) - len(answer)) for text, answer in zip(completions, chosen)]
"""
SHORT = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4}


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """The working directory holds a module of reward functions."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tiny_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path / "own")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("tiny_rewards", None)


def test_grpo_with_own_rewards_and_the_replay_of_its_config(world, tmp_path, rewards):
    argv = ["grpo", *flags(world, tmp_path / "run", logging_steps=1, steps_per_generation=2, **SHORT)]
    assert main([*argv, "--reward_funcs", "tiny_rewards.vowels", "tiny_rewards:brevity"]) == 0
    root = tmp_path / "run" / "dynamics"
    meta = json.loads((root / "meta.json").read_text())
    assert (meta["method"], meta["status"], meta["schedule"]["steps"]) == ("grpo", "finished", [0, 1, 2])
    logged = json.loads((root / "trainer_log.json").read_text())
    assert {"rewards/vowels/mean", "rewards/brevity/mean"} <= set(logged[0])
    assert main(["grpo", "--config", str(root / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    frames = [trl_dynamics.load_records(tmp_path / name).drop(columns="run") for name in ("run", "again")]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_grpo_takes_prompts_from_implicit_preference_pairs(world, tmp_path, rewards):
    rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in PAIRS]
    (tmp_path / "implicit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"dataset_name": tmp_path / "implicit.jsonl", "reward_funcs": "tiny_rewards.brevity", **SHORT}
    assert main(["grpo", *flags(world, tmp_path / "run", **options)]) == 0
    assert len(trl_dynamics.load_records(tmp_path / "run")) == 3 * 9


def test_wrong_rewards_and_prompts_are_one_line(world, tmp_path, rewards, capsys):
    (tmp_path / "blank.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    (tmp_path / "answers.jsonl").write_text('{"answer": "a"}\n')
    vowels = {"reward_funcs": "tiny_rewards.vowels"}
    cases = {
        "no reward given: pass --reward_funcs": {},
        "reward function 'vowels' is not known; expected one of accuracy_reward,": {"reward_funcs": "vowels"},
        "there is no module 'tiny_reward'": {"reward_funcs": "tiny_reward.vowels"},
        "tiny_rewards.py defines no function 'bowels'": {"reward_funcs": "tiny_rewards.bowels"},
        "reward model './none' does not exist": {"reward_model_name_or_path": "./none"},
        "training data row 1 has a blank 'prompt'": vowels | {"dataset_name": tmp_path / "blank.jsonl"},
        "grpo needs prompt or chosen+rejected": vowels | {"dataset_name": tmp_path / "answers.jsonl"},
    }
    for message, options in cases.items():
        assert message in failure(capsys, ["grpo", *flags(world, tmp_path / "run", **SHORT, **options)]), message


def test_an_error_in_a_reward_function_keeps_its_traceback(world, tmp_path, rewards):
    Path("reading_rewards.py").write_text("def read(completions, **others):\n    return open('scores.txt').read()\n")
    options = {"reward_funcs": "reading_rewards.read", **SHORT}
    with pytest.raises(FileNotFoundError, match="scores.txt"):
        main(["grpo", *flags(world, tmp_path / "run", **options)])


def test_a_reward_module_that_cannot_be_imported_keeps_its_own_error(rewards):
    Path("broken_rewards.py").write_text("import a_module_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        find_reward("broken_rewards.f")


def test_code_that_comes_with_a_model_runs_when_trusted(world, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    code = "from transformers import LlamaForCausalLM\n\nclass OwnLM(LlamaForCausalLM):\n    pass\n"
    (folder / "own_model.py").write_text(code)
    config |= {"architectures": ["OwnLM"], "auto_map": {"AutoModelForCausalLM": "own_model.OwnLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    for trusted, expected in ((True, "OwnLM"), (False, "LlamaForCausalLM")):
        options = {"model_name_or_path": folder, "trust_remote_code": trusted, "max_steps": 1}
        assert main(["sft", *flags(world, tmp_path / str(trusted), **options)]) == 0
        assert json.loads((tmp_path / str(trusted) / "config.json").read_text())["architectures"] == [expected]


def test_command_line_wins_over_yaml(world, tmp_path):
    (tmp_path / "recipe.yaml").write_text("beta: 0.5\nlearning_rate: 1.0e-5\n")
    from trl_dynamics.cli.dpo import command

    argv = ["--config", str(tmp_path / "recipe.yaml"), *flags(world, tmp_path / "run", learning_rate=2e-5)]
    (_, args, _, _), launch_args = command().parse(argv)
    assert (args.beta, args.learning_rate, launch_args) == (0.5, 2e-5, [])


def test_launch_options_are_told_apart(world, tmp_path):
    from trl_dynamics.cli.sft import command

    argv = [*flags(world, tmp_path), "--accelerate_config", "x.yaml", "--num_processes", "2"]
    _, launch_args = command().parse(argv)
    assert launch_args == ["--accelerate_config", "x.yaml", "--num_processes", "2"]
    assert isinstance(command(), TrainingCommand)


def test_the_launched_command_keeps_its_own_options(world, tmp_path, monkeypatch):
    """A value of `accelerate launch` may be that of another option too: here both have a 2."""
    started = []
    monkeypatch.setattr(launching, "LAUNCHED", False)
    monkeypatch.setattr(launching.subprocess, "run", lambda command, check: started.append(command) or Done())
    (tmp_path / "ddp.yaml").write_text("num_processes: 8\n")
    (tmp_path / "recipe.yaml").write_text("mixed_precision: no\n")
    own = [*flags(world, tmp_path / "run", max_steps=2), "--config", str(tmp_path / "recipe.yaml")]
    assert main(["dpo", *own, "--accelerate_config", str(tmp_path / "ddp.yaml"), "--num_processes", "2"]) == 7
    (command,) = started
    assert command[command.index("dpo") + 1 :] == own
    assert command[command.index("--num_processes") + 1] == "2" and str(tmp_path / "ddp.yaml") in command


class Done:
    """A process that has ended."""

    returncode = 7


def test_track_models_and_checkpoints(world, tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 1}
    assert main(["sft", *flags(world, tmp_path / "run", **options)]) == 0
    probes = ["--probe_set", str(world / "probes.jsonl")]
    models = [str(world / "model"), str(tmp_path / "run")]
    assert main(["track", "--model_name_or_path", *models, *probes, "--output_dir", str(tmp_path / "models")]) == 0
    frame = trl_dynamics.load_records(tmp_path / "models")
    assert frame.groupby("model").size().to_dict() == {"model": 9, "run": 9}
    assert "mean log-probability per token" in capsys.readouterr().out
    argv = ["track", "--model_name_or_path", models[1], "--checkpoints", "checkpoint-*", *probes]
    assert main([*argv, "--output_dir", str(tmp_path / "checkpoints")]) == 0
    tracked = trl_dynamics.load_records(tmp_path / "checkpoints")
    assert sorted(tracked["step"].unique()) == [1, 2]
    trained = trl_dynamics.load_records(tmp_path / "run")
    keys = ["step", "probe_id", "response_type"]
    both = trained.merge(tracked, on=keys, suffixes=("", "_tracked"))
    assert len(both) == 18
    assert both["logp_sum"].to_numpy() == pytest.approx(both["logp_sum_tracked"].to_numpy(), abs=1e-4)
    capsys.readouterr()
    assert main(["report", str(tmp_path / "models"), "-o", str(tmp_path / "page.html")]) == 0


def test_checkpoints_are_ordered_by_step(tmp_path):
    for step in (10, 9, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [target.step for target in find_targets([str(tmp_path)], "checkpoint-*")] == [9, 10, 100]
    with pytest.raises(ValueError, match="no folder"):
        find_targets([str(tmp_path)], "epoch-*")
    with pytest.raises(ValueError, match="given twice"):
        find_targets(["a", "a"], None)


def test_wrong_input_is_one_line(world, tmp_path, capsys):
    out = tmp_path / "run"
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "a", "chosen": " ", "rejected": " c"}]
    (tmp_path / "blank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "columns.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (tmp_path / "no_chosen.jsonl").write_text('{"prompt": "a", "rejected": "b"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "chosen": " b" * 600, "rejected": " c"}) + "\n")
    (tmp_path / "bad.yaml").write_text("prbe_every: 3\n")
    (tmp_path / "file").write_text("")
    cases = {
        "training data has the columns ['answer', 'prompt']": flags(
            world, out, dataset_name=tmp_path / "columns.jsonl"
        ),
        "training data row 1 has a blank 'chosen'": flags(world, out, dataset_name=tmp_path / "blank.jsonl"),
        "has no response type 'chosen'": flags(world, out, probe_set=tmp_path / "no_chosen.jsonl"),
        "response 'chosen' has 1202 tokens": flags(world, tmp_path / "other", probe_set=tmp_path / "long.jsonl"),
        "probe set './missing.jsonl' does not exist": flags(world, out, probe_set="./missing.jsonl"),
        "unknown option or YAML key 'prbe_every'; did you mean --probe_every?": [
            "--config",
            str(tmp_path / "bad.yaml"),
            *flags(world, out),
        ],
        "unknown option or YAML key 'probe_evry'; did you mean --probe_every?": [*flags(world, out), "--probe_evry=3"],
        "unknown option or YAML key 'nope' (": [*flags(world, out), "--nope", "3"],
        "model '/no/such/model' does not exist": flags(world, out, model_name_or_path="/no/such/model"),
        "no model given": flags(world, out, model_name_or_path=None),
        "dataset './missing.jsonl' does not exist": flags(world, out, dataset_name="./missing.jsonl"),
        "give exactly one of --dataset_name": flags(world, out, dataset_name=None),
        "the data has no split 'validation'": flags(world, out, dataset_train_split="validation"),
        "cannot write": flags(world, tmp_path / "file" / "below"),
        "probe_every is -1.0": flags(world, out, probe_every=-1),
        "probe_budget is 5.0": flags(world, out, probe_budget=5),
    }
    for message, argv in cases.items():
        assert message in failure(capsys, ["dpo", *argv]), message
    assert not out.exists() and not list((tmp_path / "other").iterdir())


def test_drop_invalid_rows(world, tmp_path):
    rows = [*PAIRS, {"prompt": "a", "chosen": "", "rejected": " c"}]
    (tmp_path / "blank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"dataset_name": tmp_path / "blank.jsonl", "drop_invalid_rows": True}
    assert main(["dpo", *flags(world, tmp_path / "run", **options)]) == 0


def test_report_and_track_refuse_wrong_folders(world, tmp_path, capsys):
    assert "holds no dynamics/ folder" in failure(capsys, ["report", str(tmp_path)])
    assert "--probe_set is missing" in failure(capsys, ["track", "--model_name_or_path", "x", "--output_dir", "y"])
    argv = ["track", "--model_name_or_path", "./nowhere", "--probe_set", str(world / "probes.jsonl")]
    assert "does not exist" in failure(capsys, [*argv, "--output_dir", str(tmp_path / "x")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-o", "x.csv"], "add --format csv"),
        (["-o", "."], "is a folder"),
        (["-o", "x.csv", "--format", "csv"], "expected a folder"),
        (["-o", "x.html", "--format", "png"], "expected a folder"),
    ],
)
def test_report_refuses_a_name_that_promises_something_else(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, ["report", "run", *argv])
    assert not list(tmp_path.iterdir())


def test_wrong_usage_is_one_line_too(world, tmp_path, capsys):
    for argv in (["dpo", *flags(world, tmp_path / "run", probe_layout="cube")], ["report", "--format", "pdf", "run"]):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "invalid choice" in line and line.endswith(f"(see trl-dynamics {argv[0]} --help)")


def test_bf16_without_a_gpu_names_the_two_options(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    line = failure(capsys, ["dpo", *flags(world, tmp_path / "run", use_cpu=None, bf16=None)])
    assert line.endswith("add --use_cpu True --bf16 False")


def test_options_that_contradict_each_other_are_one_line(world, tmp_path, capsys):
    options = {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "steps"}
    assert "load_best_model_at_end" in failure(capsys, ["dpo", *flags(world, tmp_path / "run", **options)])


def test_usage_and_env(capsys):
    assert main([]) == 2 and main(["--help"]) == 0 and main(["fly"]) == 2
    out = capsys.readouterr()
    assert all(name in out.out for name in COMMANDS) and "unknown command 'fly'" in out.err
    assert main(["env"]) == 0
    assert "- trl: 1.16" in capsys.readouterr().out
