"""Arguments that are no plain values: a tracked run starts, and its config.yaml holds what they mean."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset

from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, PROBES, make_trainer
from trl_dynamics import DPOConfig, DPOTrainer
from trl_dynamics.scoring.setup import changed_fields


@pytest.mark.parametrize(
    ("method", "odd", "written"),
    [
        ("sft", {"learning_rate": np.float64(1e-5), "max_length": None}, {"learning_rate": 1e-5, "max_length": None}),
        ("dpo", {"beta": np.float64(0.2), "logging_steps": np.int64(2)}, {"beta": 0.2, "logging_steps": 2}),
        ("grpo", {"temperature": np.float64(0.5), "hub_token": "hf_secret"}, {"temperature": 0.5}),
    ],
)
def test_numbers_of_numpy(method, odd, written, tmp_path):
    make_trainer(method, tmp_path, probes=PROBES, max_steps=1, probe_every=0, **odd).train()
    text = (tmp_path / "dynamics" / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config | written == config and "hf_secret" not in text
    assert json.loads((tmp_path / "dynamics" / "meta.json").read_text())["status"] == "finished"


def test_a_dtype_and_a_path_among_the_arguments_of_the_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    init = {"dtype": torch.float16, "cache_dir": Path("cache")}
    args = DPOConfig(tmp_path / "run", model_init_kwargs=init, use_cpu=True, bf16=False, report_to="none")
    config = changed_fields(args)
    assert config["model_init_kwargs"] == init and "accelerator_config" not in config
    trainer = DPOTrainer(str(tmp_path / "model"), None, args, train_dataset=Dataset.from_list(PAIRS), probe_set=PROBES)
    trainer.args.max_steps = 1
    trainer.train()
    config = yaml.safe_load((tmp_path / "run" / "dynamics" / "config.yaml").read_text())
    assert config["model_init_kwargs"] == {"dtype": "float16", "cache_dir": "cache"}
    assert config["output_dir"] == str(tmp_path / "run")
