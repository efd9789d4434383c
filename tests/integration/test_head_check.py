"""What is scored is the model: heads of any kind, planted changes of the logits, and models that cannot be scored."""

import json
import logging
import types

import pandas as pd
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, T5ForConditionalGeneration

from reference import score_slowly
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PROBES, make_trainer
from trl_dynamics import ProbeSet, load_records, stats_head
from trl_dynamics.akg.task import causal_lm
from trl_dynamics.cli.main import main
from trl_dynamics.judging.likelihood import Likelihood
from trl_dynamics.probing.encode import encode
from trl_dynamics.probing.generate import LocalModel
from trl_dynamics.probing.layouts import PaddedLayout, SharedPrefixLayout
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.scoring.head_check import confirm_head, settle_head
from trl_dynamics.scoring.layout_check import settle_layout
from trl_dynamics.stats_head.check import Disagreement, Precision
from trl_dynamics.stats_head.ways import MATRIX, MODULE, OWN, way_of

ENCODED = encode(ProbeSet.load(PROBES), tiny_tokenizer())
ROW = ENCODED.items[0].input_ids
ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, use_dora=True),
    "ia3": IA3Config(target_modules=["lm_head"], feedforward_modules=["lm_head"], init_ia3_weights=False),
    "modules_to_save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def patched(change, model=None):
    """A model whose own logits go through `change` on their way out, under no name that its config has."""
    model = tiny_model("llama") if model is None else model
    forward = model.forward

    def changed(self, *args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = types.MethodType(changed, model)
    return model


def masked(logits: torch.Tensor) -> torch.Tensor:
    return logits.index_fill(-1, torch.tensor([0, 5]), -torch.inf)


PLANTED = {
    "soft cap": lambda logits: 30 * torch.tanh(logits / 30),
    "scale": lambda logits: 2 * logits,
    "scale of one percent": lambda logits: 1.01 * logits,
    "bias": lambda logits: logits + torch.arange(logits.shape[-1]) / 100,
    "mask": masked,
}


def scored(model, required=False) -> tuple[ProbeEngine, list[float]]:
    stats_head.install(model)
    engine, fallback = ProbeEngine(ENCODED, SharedPrefixLayout(200)), PaddedLayout(tokens_per_batch=200)
    settle_head(engine, model, fallback, required=required)
    settle_layout(engine, model, fallback, required=required)
    return engine, engine.score(model).columns["logp_mean"]


def expected(model) -> list[float]:
    return [row["logp_mean"] for row in score_slowly(model, ENCODED)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_a_plain_head_keeps_the_matrix(family, caplog):
    model = tiny_model(family)
    true = expected(model)
    engine, given = scored(model)
    assert way_of(model) == MATRIX and engine.layout == SharedPrefixLayout(200) and not caplog.records
    assert given == pytest.approx(true, abs=1e-5)
    assert confirm_head(engine, model) is None


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_on_the_head_is_scored_with_it(kind):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("llama"), ADAPTERS[kind]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lm_head" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    true = expected(model)
    engine, given = scored(model)
    assert given == pytest.approx(true, abs=1e-5) and engine.layout.name == "shared_prefix"
    assert way_of(model.get_base_model()) == MODULE
    with model.disable_adapter():
        base = expected(model)
        assert max(abs(a - b) for a, b in zip(base, true, strict=True)) > 0.1
        assert engine.score(model).columns["logp_mean"] == pytest.approx(base, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_change_of_the_logits_is_caught_and_scored(name, dtype, caplog):
    model = patched(PLANTED[name], tiny_model("llama", initializer_range=0.6).to(dtype))
    true = expected(model)
    with caplog.at_level(logging.WARNING):
        engine, given = scored(model)
    assert way_of(model) == OWN and engine.layout.name == "padded"
    assert sum("scored by its own forward" in record.message for record in caplog.records) == 1
    assert given == pytest.approx(true, abs=1e-5 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_change(dtype):
    model = tiny_model("llama", initializer_range=0.6).to(dtype)
    scored(model)
    assert way_of(model) == MATRIX


def test_a_layout_that_was_asked_for_is_not_given_up():
    with pytest.raises(
        ValueError, match="probe_layout='shared_prefix' does not fit a model that is scored by its own"
    ):
        scored(patched(PLANTED["scale"]), required=True)


def test_batches_of_the_own_forward_keep_to_a_number_of_bytes(monkeypatch):
    monkeypatch.setattr("trl_dynamics.stats_head.ways.OWN_LOGITS_BYTES", 4 * 260 * 100)
    model = patched(PLANTED["scale"])
    true = expected(model)
    engine, given = scored(model)
    assert stats_head.own_forward_tokens(model) == 100
    assert max(group.num_tokens for group in engine.groups) <= 100 and given == pytest.approx(true, abs=1e-5)


def bert_decoder(**overrides):
    torch.manual_seed(0)
    options = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"intermediate_size": 32, "initializer_range": 0.3, "pad_token_id": 258} | overrides
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **options)).eval()


def test_a_head_with_a_network_before_it_is_scored():
    model = bert_decoder(is_decoder=True)
    true = expected(model)
    _, given = scored(model)
    assert way_of(model) == OWN and given == pytest.approx(true, abs=1e-5)


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(Disagreement, match="BertLMHeadModel is not causal: .* set is_decoder=True"):
        scored(bert_decoder())


def test_a_model_that_draws_at_random_is_refused():
    with pytest.raises(Disagreement, match="other log-probabilities each time"):
        scored(patched(lambda logits: logits + 0.005 * torch.rand_like(logits)))


def test_a_model_that_is_not_finite_is_no_disagreement():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    scored(model)
    assert way_of(model) == MATRIX


@pytest.mark.parametrize("token", [*sorted(set(ROW)), tiny_tokenizer().eos_token_id, tiny_tokenizer().pad_token_id])
def test_one_weight_that_is_not_finite_is_no_disagreement(token):
    """It also spreads to tokens before it, and to rows that it pads."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[token, 0] = torch.nan
    engine, _ = scored(model, required=True)
    assert way_of(model) == MATRIX and engine.layout.name == "shared_prefix"


def test_a_causal_model_that_rounds_with_the_length_of_its_rows_is_not_refused():
    """As kernels do in half precision, whose errors grow from layer to layer."""

    def rounded(logits: torch.Tensor) -> torch.Tensor:
        return logits + 0.2 * torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(logits.shape[1]))

    model = patched(rounded).to(torch.bfloat16)
    stats_head.install(model)
    stats_head.settle(model, ROW)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_one_process_finds_decides_for_all(number):
    """As where another kind of GPU rounds otherwise: on this process all agrees."""
    model, asked = tiny_model("llama"), []
    stats_head.install(model)

    def by_all(holds: bool) -> bool:
        asked.append(holds)
        return holds and len(asked) != number

    if number < 3:
        with pytest.raises(Disagreement, match="is not causal"):
            stats_head.settle(model, ROW, by_all=by_all)
    else:
        stats_head.settle(model, ROW, by_all=by_all)
        assert way_of(model) == OWN
    assert all(asked)


def test_an_encoder_decoder_is_refused():
    config = AutoConfig.for_model("t5", vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    for install in (stats_head.install, causal_lm):
        with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder, expected a causal"):
            install(model)


def test_the_check_draws_nothing_and_leaves_nothing():
    model = patched(PLANTED["scale"]).train()
    stats_head.install(model)
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    settle_head(ProbeEngine(ENCODED, PaddedLayout(4)), model, PaddedLayout(4), required=False)
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes


def test_hidden_states_of_the_own_forward_are_those_that_the_head_reads():
    model = patched(PLANTED["scale"])
    plain = tiny_model("llama")
    given = {}
    for one in (model, plain):
        stats_head.install(one)
        stats_head.settle(one, ROW)
        positions = torch.arange(4)
        request = stats_head.StatsRequest(
            torch.zeros_like(positions), positions, torch.tensor(ROW[1:5]), len(ROW), return_hidden=True
        )
        given[one] = one(torch.tensor([ROW]), stats_request=request)
    assert way_of(model) == OWN and way_of(plain) == MATRIX
    torch.testing.assert_close(given[model]["hidden_ND"], given[plain]["hidden_ND"])


def test_a_trainer_scores_what_its_model_says(tmp_path):
    def capped(*args, **kwargs):
        return patched(lambda logits: 3 * torch.tanh(logits / 3), tiny_model(*args, **kwargs))

    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=1, make_model=capped)
    trainer.train()
    records = load_records(tmp_path)
    given = records[records["step"] == 0]["logp_mean"].tolist()
    assert given == pytest.approx(expected(capped("llama")), abs=1e-5)


def test_a_model_that_changes_in_training_is_noticed(tmp_path, caplog):
    trainer = make_trainer("sft", tmp_path, probes=PROBES, max_steps=2)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        trainer.model.lm_head.register_forward_hook(lambda module, args, output: 1.5 * output)
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert "the model has changed in training" in caplog.text


def test_influence_refuses_a_cap_that_its_logits_hardly_reach():
    with pytest.raises(ValueError, match="does more than its output embeddings to its last hidden states"):
        causal_lm(patched(lambda logits: 30 * torch.tanh(logits / 30), tiny_model("llama", initializer_range=0.2)))


def test_precision_of_half_weights():
    assert Precision.of_weights(nn.Linear(2, 2).half()).half and not Precision.of_weights(nn.Linear(2, 2)).half


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory):
    """A BERT decoder, whose head has a network before its last matrix, with a tokenizer."""
    folder = tmp_path_factory.mktemp("decoder")
    bert_decoder(is_decoder=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBES))
    return folder


def test_track_scores_the_models_own_logits(decoder_folder, tmp_path, capsys):
    source, probes = str(decoder_folder), str(decoder_folder / "probes.jsonl")
    main(["track", "--model_name_or_path", source, "--probe_set", probes, "--output_dir", str(tmp_path)])
    model = AutoModelForCausalLM.from_pretrained(decoder_folder).eval()
    assert load_records(tmp_path)["logp_mean"].tolist() == pytest.approx(expected(model), abs=1e-5)


def test_screening_scores_the_models_own_logits(decoder_folder, tmp_path, capsys):
    source, probes = str(decoder_folder), str(decoder_folder / "probes.jsonl")
    main(["probes", "screen", "--model", source, "--probe_set", probes, "--output_dir", str(tmp_path / "out")])
    frame = pd.read_parquet(tmp_path / "out/scores.parquet")
    model = AutoModelForCausalLM.from_pretrained(decoder_folder).eval()
    given = frame[["logp_mean/chosen", "logp_mean/rejected", "logp_mean/other_test"]].to_numpy().flatten()
    assert given == pytest.approx(expected(model), abs=1e-5)
    assert frame["ches"].notna().all()


def test_a_likelihood_judge_scores_the_models_own_logits(decoder_folder):
    model = AutoModelForCausalLM.from_pretrained(decoder_folder).eval()
    true = expected(model)
    judge = Likelihood(LocalModel(model, tiny_tokenizer(), "tiny"))
    scores = judge.score([(row["prompt"], text) for row in PROBES for kind, text in row.items() if kind != "prompt"])
    assert [score.value for score in scores] == pytest.approx(true, abs=1e-5)


def test_influence_of_such_a_model_is_refused(decoder_folder, tmp_path, capsys):
    source, probes = str(decoder_folder), str(decoder_folder / "probes.jsonl")
    status = main(["akg", "--model_name_or_path", source, "--probe_set", probes, "--output_dir", str(tmp_path / "o")])
    assert status != 0 and "does more than its output embeddings" in capsys.readouterr().err
