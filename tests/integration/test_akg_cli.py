"""trl-dynamics akg: a force map of the embedded model, checked against real steps, and what it refuses."""

import json

import pandas as pd
import peft
import pytest
import torch

from trl_dynamics import embedded, load_influence, loading
from trl_dynamics.cli.main import main

SMALL = ["--model_name_or_path", "embedded", "--probe_set", "embedded", "--probe_max_probes", "2"]


def call(folder, *more: str) -> int:
    return main(["akg", *SMALL, "--dataset_num_rows", "1", "--learning_rate", "1e-4", "-o", str(folder), *more])


def test_a_map_is_written_that_real_steps_bear_out(tmp_path, capsys):
    assert call(tmp_path / "map", "--verify") == 0
    frame = pd.read_parquet(tmp_path / "map/influence.parquet")
    assert len(frame) == 3 * 2 * 11 and set(frame["update_type"]) == {"chosen", "rejected", "dpo"}
    summary = json.loads((tmp_path / "map/summary.json").read_text())
    assert summary["num_updates"] == 3 and all(error < 0.05 for error in summary["relative_error"].values())
    assert all(error > 0.05 for error in summary["relative_error_fixed_features"].values())
    own = frame[frame["same_prompt"]].set_index(["update_type", "response_type"])["delta_sum"]
    assert own["chosen", "chosen"] > 0 and own["rejected", "rejected"] > 0
    assert own["dpo", "chosen"] > 0 > own["dpo", "rejected"]
    others = frame[~frame["same_prompt"]].set_index(["update_type", "response_type"])["delta_sum"]
    assert others["chosen", "chosen"] < own["chosen", "chosen"]
    rows = load_influence(tmp_path / "map")
    assert rows["update"].tolist() == frame["update_type"].tolist() and set(rows["step"]) == {0}
    for name, old in {"predicted_sum": "delta_sum", "true_sum": "true_sum", "logp_sum": "logp_sum"}.items():
        assert rows[name].tolist() == pytest.approx(frame[old].tolist(), rel=1e-12), name
    assert [len(tokens) for tokens in rows["true"]] == rows["num_tokens"].tolist()
    out = capsys.readouterr().out
    assert main(["diagnose", str(tmp_path / "map"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_judged"] == []
    assert main(["report", str(tmp_path / "map"), "--format", "csv"]) == 0
    assert set(pd.read_csv(tmp_path / "map/dynamics/csv/influence.csv")["update"]) == {"chosen", "rejected", "dpo"}
    assert "answers to other prompts" in out and "relative error: chosen" in out and "rounding alone makes some" in out
    assert "the head alone moves: chosen" in out
    assert call(tmp_path / "map") == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_of_an_adapter_its_own_weights_take_the_step(kind, tmp_path, capsys, caplog):
    config = {
        "lora": peft.LoraConfig(r=4, task_type="CAUSAL_LM"),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }[kind]
    torch.manual_seed(0)
    model = peft.get_peft_model(loading.load_causal_lm(embedded.model_path()), config)
    num_weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "adapter")
    more = ["--model_name_or_path", str(tmp_path / "adapter"), "--update_types", "chosen", "--verify"]
    more += ["--learning_rate", "0.01"]
    if kind == "prompt":
        assert call(tmp_path / "map", *more) == 1
        assert "learned prompt (PROMPT_TUNING)" in capsys.readouterr().err and not (tmp_path / "map").exists()
        return
    with caplog.at_level("INFO", logger="trl_dynamics"):
        assert call(tmp_path / "map", *more) == 0
    assert any(f"{num_weights:,} weights" in line for line in caplog.messages)
    summary = json.loads((tmp_path / "map/summary.json").read_text())
    assert summary["relative_error"]["chosen"] < 0.05 and summary["num_not_finite"] == 0


def test_neither_the_size_of_a_forward_nor_other_data_changes_an_influence(tmp_path):
    assert call(tmp_path / "wide", "--update_types", "chosen", "--direction", "adamw") == 0
    narrow = [
        "--tokens_per_batch",
        "1",
        "--dataset_name",
        "embedded",
        "--update_types",
        "chosen",
        "--direction",
        "adamw",
    ]
    assert call(tmp_path / "narrow", *narrow) == 0
    wide, narrow = (pd.read_parquet(tmp_path / name / "influence.parquet") for name in ("wide", "narrow"))
    assert wide["response_type"].tolist() == narrow["response_type"].tolist()
    torch.testing.assert_close(
        torch.tensor(wide["delta_sum"].to_numpy()), torch.tensor(narrow["delta_sum"].to_numpy()), rtol=1e-3, atol=1e-5
    )
    # AdamW's decay is a part of its own.
    parts = narrow["delta_sum/update"] + narrow["delta_sum/decay"]
    assert (parts - narrow["delta_sum"]).abs().max() < 1e-6


def test_steps_that_share_a_pass_have_the_same_numbers(tmp_path):
    frames = []
    for number in ("1", "2"):  # two of chosen, rejected and dpo, then one
        assert call(tmp_path / number, "--updates_at_once", number, "--direction", "adamw", "--verify") == 0
        frames.append(pd.read_parquet(tmp_path / number / "influence.parquet"))
    pd.testing.assert_frame_equal(*frames, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--update_types", "greedy"], "update_types has 'greedy'; the data has chosen,"),
        (["--model_name_or_path", "embeded"], "model 'embeded' cannot be loaded"),
        (["--dtype", "flot32"], "cannot be loaded"),
        (["--learning_rate", "nan"], "lr is nan"),
        (["--probe_max_probes", "0"], "probe_max_probes is 0, expected at least 1"),
        (["--updates_at_once", "0"], "updates_at_once is 0, expected at least 1"),
        (["--direction", "lion"], "direction is 'lion'"),
        (["--order", "3"], "order is 3"),
        (["--nonsense", "1"], "unknown option '--nonsense'"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(more, message, tmp_path, capsys):
    assert call(tmp_path / "map", *more) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "map").exists()
