"""Prompts are shared where the model allows it, and only where its own numbers agree."""

import json
import logging

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

import trl_dynamics
from reference import score_slowly
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PROBES, make_trainer
from trl_dynamics import ProbeSet, compat, stats_head
from trl_dynamics.probing.encode import encode
from trl_dynamics.probing.layouts import PaddedLayout, SharedPrefixLayout
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.scoring.layout_check import settle_layout, two_probes
from trl_dynamics.scoring.setup import choose_layout

PROMPTS = ("What is one plus two?", "Once upon a time, there was a", "def main(argv):", "Dear Sir or Madam, ")


def engine(layout) -> ProbeEngine:
    rows = [{"prompt": text, "chosen": " Yes.", "rejected": " No, it is not."} for text in PROMPTS]
    return ProbeEngine(encode(ProbeSet.load(rows), tiny_tokenizer()), layout)


class ForgetfulCache(compat.PromptCache):
    """A cache that a model would not understand: every row continues the first prompt of its group."""

    def continue_from(self, prompt_B):
        super().continue_from(torch.zeros_like(prompt_B))


@pytest.fixture
def forgetful(monkeypatch):
    monkeypatch.setattr("trl_dynamics.scoring.engine.PromptCache", ForgetfulCache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_model_keeps_the_layout(dtype):
    model = tiny_model("llama").to(dtype)
    stats_head.install(model)
    checked = engine(SharedPrefixLayout(200))
    settle_layout(checked, model, PaddedLayout(), required=True)
    assert checked.layout == SharedPrefixLayout(200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_disagrees_is_scored_in_padded_rows(dtype, forgetful, caplog):
    model = tiny_model("llama").to(dtype)
    stats_head.install(model)
    checked = engine(SharedPrefixLayout(10_000))
    with caplog.at_level(logging.WARNING):
        settle_layout(checked, model, PaddedLayout(4), required=False)
    assert "differ by" in caplog.text and "scored as 'padded'" in caplog.text
    assert checked.batch_plan["layout"] == "padded"
    if dtype == torch.float32:
        given = checked.score(model).columns["logp_sum"]
        assert given == pytest.approx([row["logp_sum"] for row in score_slowly(model, checked.encoded)], abs=1e-3)
    with pytest.raises(ValueError, match="differ by .* nats per token on this model .*use probe_layout='auto'"):
        settle_layout(engine(SharedPrefixLayout(10_000)), model, PaddedLayout(), required=True)


def test_a_layout_that_does_not_run_is_given_up(monkeypatch, caplog):
    def update(self, *args, **kwargs):
        raise TypeError("this model has no such cache")

    monkeypatch.setattr(compat.models._PromptLayer, "update", update)
    model = tiny_model("llama")
    stats_head.install(model)
    checked = engine(SharedPrefixLayout(200))
    settle_layout(checked, model, PaddedLayout(4), required=False)
    assert checked.layout == PaddedLayout(4) and "does not run on this model (TypeError: this model" in caplog.text
    with pytest.raises(ValueError, match="does not run on this model .* use probe_layout='auto'"):
        settle_layout(engine(SharedPrefixLayout(200)), model, PaddedLayout(4), required=True)


def test_the_sample_is_two_whole_probes():
    encoded = encode(ProbeSet.load(PROBES), tiny_tokenizer())
    sample = two_probes(encoded)
    ids = {item.probe_id for item in sample.items}
    assert len(ids) == 2 and len(sample.items) == sum(item.probe_id in ids for item in encoded.items)


def test_layouts_by_name():
    model = tiny_model("llama")
    assert choose_layout(model, "auto", 50, 258) == choose_layout(model, "shared_prefix", 50, 258)
    assert choose_layout(model, "auto", 50, 258) == SharedPrefixLayout(50, 258)
    assert choose_layout(model, "padded", 50, 258) == PaddedLayout(pad_id=258, tokens_per_batch=50)
    with pytest.raises(ValueError, match="probe_layout is 'packed', expected 'auto', 'shared_prefix' or 'padded'"):
        choose_layout(model, "packed", 50, 258)


def test_a_learned_prompt_cannot_be_shared():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_model("llama"), config)
    assert choose_layout(model, "auto", 50, 258).name == "padded"
    with pytest.raises(ValueError, match="'shared_prefix' does not fit llama: it needs plain or sliding-window"):
        choose_layout(model, "shared_prefix", 50, 258)


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_the_layout_of_a_run_is_recorded(layout, tmp_path):
    make_trainer("dpo", tmp_path, probes=PROBES, max_steps=1, probe_layout=layout).train()
    plan = json.loads((tmp_path / "dynamics/meta.json").read_text())["batch_plan"]
    assert plan["layout"] == {"auto": "shared_prefix", "padded": "padded"}[layout]
    assert plan["tokens_per_batch"] == 512


def test_a_run_falls_back_by_itself(tmp_path, forgetful):
    make_trainer("sft", tmp_path, probes=PROBES, max_steps=1).train()
    make_trainer("sft", tmp_path / "padded", probes=PROBES, max_steps=1, probe_layout="padded").train()
    assert json.loads((tmp_path / "dynamics/meta.json").read_text())["batch_plan"]["layout"] == "padded"
    one, other = (trl_dynamics.load_records(path).drop(columns="run") for path in (tmp_path, tmp_path / "padded"))
    assert one.equals(other)
