"""Runs on probe sets with columns that hold no answers, answers of the user's own, or no rejected answers."""

import json

import pandas as pd
import pytest

import trl_dynamics
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, PROBES, make_trainer
from trl_dynamics.cli.main import main

OWN = [row | {"source": "web", "score": 0.5, "mine": " Own answer."} for row in PROBES]
QUICK = {"max_steps": 1, "probe_every": 0}


def types_of(output_dir) -> list[str]:
    return sorted(trl_dynamics.load_records(output_dir)["response_type"].unique())


def test_metadata_of_probes_is_not_scored(tmp_path):
    for name, probes in (("without", PROBES), ("with", OWN)):
        trainer = make_trainer("dpo", tmp_path / name, probes=probes, **QUICK)
        trainer.train()
    frames = [trl_dynamics.load_records(tmp_path / name).drop(columns="run") for name in ("with", "without")]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    logged = set().union(*trainer.state.log_history)
    assert "probe/source/logp_mean" not in logged and "probe/other_test/logp_mean" in logged


def test_columns_declared_with_probe_types_are_scored(tmp_path, monkeypatch):
    make_trainer("sft", tmp_path / "run", probes=OWN, probe_types=["mine"], **QUICK).train()
    assert types_of(tmp_path / "run") == ["chosen", "mine", "other_test", "rejected"]
    copy = trl_dynamics.ProbeSet.load(tmp_path / "run" / "dynamics" / "probe_set")
    assert copy.counts["mine"] == 3 and copy.metadata["columns_left_out"] == ["score", "source"]
    with pytest.raises(ValueError, match="probe_types has 'nothing', which no probe"):
        make_trainer("sft", tmp_path / "other", probes=OWN, probe_types=["nothing"], **QUICK)
    with pytest.raises(ValueError, match="probe_types is 'mine', expected a list"):
        trl_dynamics.SFTConfig("x", probe_types="mine", use_cpu=True, bf16=False)


def test_probe_types_on_the_command_line(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("probes", OWN), ("train", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probes = ["--probe_set", str(tmp_path / "probes.jsonl"), "--probe_types", "mine"]
    model = ["--model_name_or_path", str(tmp_path / "model")]
    options = "--use_cpu True --bf16 False --report_to none --save_strategy no --max_steps 1 --probe_every 0".split()
    data = ["--dataset_name", str(tmp_path / "train.jsonl")]
    assert main(["dpo", *model, *data, *probes, *options, "--output_dir", str(tmp_path / "dpo")]) == 0
    assert main(["track", *model, *probes, "--output_dir", str(tmp_path / "track")]) == 0
    assert types_of(tmp_path / "dpo") == types_of(tmp_path / "track") == ["chosen", "mine", "other_test", "rejected"]


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_probes_without_rejected_answers(method, tmp_path):
    probes = [{name: text for name, text in row.items() if name != "rejected"} for row in PROBES]
    trainer = make_trainer(method, tmp_path / "run", probes=probes, akg_every=1, akg_max_probes=1, **QUICK)
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert "squeeze/displacement" in logged and "probe/chosen/logp_mean" in logged
    assert not {"squeeze/margin", "squeeze/drained_mass", "probe/rejected/logp_mean"} & logged
    assert main(["diagnose", str(tmp_path / "run")]) in (0, 3)
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")]) == 0
