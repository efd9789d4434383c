"""The outside world on the command line: files, packages and versions that are not as they should be; the help."""

import ast
import json
import shlex
from pathlib import Path

import pytest

from cli_runs import failure, flags, scored
from tiny import tiny_model
from tiny_runs import PAIRS
from trl_dynamics.cli import outputs
from trl_dynamics.cli.main import COMMANDS, main
from trl_dynamics.cli.probes import ACTIONS

EVERY = [[name] for name in COMMANDS] + [["probes", action] for action in ACTIONS]


def test_files_and_packages_that_are_not_there_are_one_line(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outputs, "get_available_reporting_integrations", lambda: [])
    (tmp_path / "bad.yaml").write_text("beta: [1,\n")
    (tmp_path / "list.yaml").write_text("- beta\n")
    (tmp_path / "mixture.yaml").write_text("datasets: pairs\n")
    (tmp_path / "gone.yaml").write_text("datasets:\n  - path: ./gone\n")
    (tmp_path / "cut.jsonl").write_text(json.dumps(PAIRS[0]) + '\n{"prompt": "a", ')
    (tmp_path / "cut.parquet").write_bytes((world / "train.parquet").read_bytes()[:-50])
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(PAIRS[0]).encode() + b'\n{"prompt": "caf\xe9"}')
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "runs").mkdir()
    tiny_model("llama").save_pretrained(tmp_path / "untold")
    cases = {
        "--config 'gone_too.yaml' does not exist": ["--config", "gone_too.yaml"],
        "--config 'also.yaml' does not exist": ["--config=also.yaml"],
        "--config 'bad.yaml', line 2": ["--config", "bad.yaml"],
        "--config 'list.yaml' holds ['beta']": ["--config", "list.yaml"],
        "--config names no file": ["--config"],
        "`datasets:` in 'mixture.yaml' is 'pairs'": ["--config", "mixture.yaml"],
        "--accelerate_config 'gone.json' does not exist": ["--accelerate_config", "gone.json"],
        "dataset './gone' does not exist": ["--config", "gone.yaml", "--dataset_name", ""],
        "cut.jsonl, line 2 is not JSON": ["--dataset_name", "cut.jsonl"],
        "cut.jsonl, line 2 is not JSON: ": ["--dataset_name", "cut.jsonl", "--dataset_streaming", "True"],
        "'cut.parquet' cannot be read as parquet": ["--dataset_name", "cut.parquet"],
        "latin.jsonl, line 2 is not UTF-8": ["--dataset_name", "latin.jsonl"],
        "of kind '.txt'": ["--dataset_name", "rows.txt"],
        "the folder 'runs' has no 'pairs'": ["--dataset_name", "runs/pairs"],
        "dataset 'nobody/nothing' is neither a file or folder here nor": ["--dataset_name", "nobody/nothing"],
        "'untold' holds no tokenizer": ["--model_name_or_path", "untold"],
        "model 'gone/rows.txt' does not exist": ["--model_name_or_path", "gone/rows.txt"],
        "model 'cut.jsonl' is a file": ["--model_name_or_path", "cut.jsonl"],
        "the folder 'runs' has no 'sft'": ["--model_name_or_path", "runs/sft"],
        "pip install wandb": ["--report_to", "wandb"],
        "resume_from_checkpoint 'gone' does not exist": ["--resume_from_checkpoint", "gone"],
        "resume_from_checkpoint 'runs' is no checkpoint": ["--resume_from_checkpoint", "runs"],
        "resume_from_checkpoint is True, but": ["--resume_from_checkpoint", "True"],
    }
    for message, more in cases.items():
        assert message in failure(capsys, ["dpo", *flags(world, tmp_path / "run"), *more]), message
    assert not list(tmp_path.glob("run/*"))
    assert "Unknown loss type" in failure(capsys, ["dpo", *flags(world, tmp_path / "run", loss_type="magic")])
    assert "chat_template_path './gone' does" in failure(
        capsys, ["sft", *flags(world, tmp_path / "run", chat_template_path="./gone")]
    )


@pytest.mark.parametrize("argv", [["squeeze-demo"], ["report", "{run}"], ["report", "{run}", "--format", "csv"]])
def test_results_that_cannot_be_written_are_one_line(argv, world, tmp_path, capsys):
    if "{run}" in argv:
        track = ["track", "--model_name_or_path", str(world / "model"), "--probe_set", str(world / "probes.jsonl")]
        assert main([*track, "--output_dir", str(tmp_path / "run")]) == 0
    (tmp_path / "file").write_text("x")
    argv = [arg.format(run=tmp_path / "run") for arg in argv]
    line = failure(capsys, [*argv, "-o", str(tmp_path / "file/below")])
    assert str(tmp_path / "file") in line and (tmp_path / "file").read_text() == "x"


def test_a_fault_of_this_package_keeps_its_traceback(monkeypatch, capsys):
    def fault(argv):
        raise KeyError("x")

    monkeypatch.setattr("trl_dynamics.cli.env.run", fault)
    with pytest.raises(KeyError):
        main(["env"])


def test_an_unsupported_version_is_one_line_where_a_command_is_imported(monkeypatch, capsys):
    def refuse(name):
        raise ImportError("trl-dynamics needs trl 1.16")

    monkeypatch.setattr("trl_dynamics.cli.dispatch.importlib.import_module", refuse)
    assert "needs trl" in failure(capsys, ["env"])


@pytest.mark.parametrize("argv", EVERY, ids=" ".join)
def test_every_command_has_its_help(argv, capsys):
    try:
        status = main([*argv, "--help"])
    except SystemExit as left:
        status = left.code
    out = capsys.readouterr().out
    assert status == 0 and f"trl-dynamics {argv[0]}" in out


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_the_line_in_a_script_s_docstring_runs(name, tmp_path, monkeypatch):
    script = Path(__file__).parents[2] / f"scripts/train_{name}.py"
    monkeypatch.chdir(script.parents[1])
    lines = ast.get_docstring(ast.parse(script.read_text())).split("Eight GPUs")[0]
    program, path, *argv = shlex.split(lines.partition("One process:")[2])
    assert (program, Path(path)) == ("python", script.relative_to(script.parents[1]))
    short = {"max_steps": 1, "dataset_num_rows": 8, "probe_max_probes": 2, "use_cpu": True, "output_dir": tmp_path}
    assert main([name, *argv, *(part for key, value in short.items() for part in (f"--{key}", str(value)))]) == 0
    assert scored(tmp_path).index.get_level_values("step").max() == 1
