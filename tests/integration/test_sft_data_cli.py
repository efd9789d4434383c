"""`trl-dynamics sft` on data of several layouts: what it takes, and one line for what it cannot train on."""

import json

import pytest

from tiny import tiny_model, tiny_tokenizer
from trl_dynamics.cli.main import main

PROMPTS = [f"Prompt {i}?" for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sft(model, tmp_path, rows: list[dict], *more: str) -> int:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model_name_or_path": model, "dataset_name": data, "output_dir": tmp_path / "run", "max_steps": 1}
    given |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    return main(["sft", *(word for name, value in given.items() for word in (f"--{name}", str(value))), *more])


def test_a_prompt_and_chosen_answers_are_enough(model, tmp_path):
    assert sft(model, tmp_path, [{"prompt": prompt, "chosen": " Yes."} for prompt in PROMPTS]) == 0


def test_blank_answers_that_nobody_trains_on_are_no_error(model, tmp_path, capsys):
    rows = [{"prompt": p, "completion": " Yes.", "chosen": " ", "rejected": None} for p in PROMPTS]
    assert sft(model, tmp_path, rows) == 0
    assert sft(model, tmp_path, rows, "--sft_on", "chosen") == 1
    assert "has a blank 'chosen'" in capsys.readouterr().err
    assert sft(model, tmp_path, [row | {"completion": ""} for row in rows]) == 1
    assert "has a blank 'completion'" in capsys.readouterr().err


def test_a_prompt_beside_messages_is_one_line(model, tmp_path, capsys):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert sft(model, tmp_path, [{"prompt": prompt, "messages": chat} for prompt in PROMPTS]) == 1
    assert "training data has nothing to train on" in capsys.readouterr().err.strip().splitlines()[-1]
