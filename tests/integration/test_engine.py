"""The engine gives what a slow reference gives, whatever the batch, the padding and the model, and leaves no trace."""

import itertools

import pytest
import torch

from engine_probes import adapt, encoded_probes, probes
from reference import score_slowly, true_float64
from tiny import tiny_model, tiny_tokenizer
from trl_dynamics import ProbeSet, stats_head
from trl_dynamics.probing.encode import LengthLimits, encode
from trl_dynamics.probing.layouts import PaddedLayout, SharedPrefixLayout
from trl_dynamics.scoring.engine import ProbeEngine

FAMILIES = ("llama", "gpt_neox", "gpt2", "bloom", "qwen2", "qwen3", "gemma2", "gemma3")
LAYOUTS = [
    *(PaddedLayout(size, padding_side=side) for size in (1, 3, 64) for side in ("right", "left")),
    PaddedLayout(tokens_per_batch=100),
    *(SharedPrefixLayout(tokens) for tokens in (1, 200, 10_000)),
]


def assert_equal(scores, rows: list[dict], per_token: float, per_sum: float | None = None) -> None:
    for index, row in enumerate(rows):
        for name, values in scores.columns.items():
            if name not in row:
                continue
            expected, given = row[name], values[index]
            bound = per_token
            if name.endswith("_sum"):
                bound = per_token * row["num_tokens"] if per_sum is None else 1e-5 * row["num_tokens"] + per_sum
            assert given == pytest.approx(expected, abs=bound, nan_ok=True), f"{name} of response {index}"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_equals_reference_over_padding_and_batches(family, lora):
    encoded = encoded_probes()
    with true_float64(tiny_model(family)) as base:
        model = adapt(base, lora).double()
        baseline = score_slowly(model, encoded)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        star_ids = [row["star_ids"] for row in baseline]
        later = score_slowly(model, encoded, star_ids)
        stats_head.install(model)
        for layout in LAYOUTS:
            assert_equal(ProbeEngine(encoded, layout).score(model, star_ids), later, per_token=1e-10)
        anew = [row["star_ids"] for row in score_slowly(model, encoded)]
        for layout in (PaddedLayout(4), SharedPrefixLayout(200)):
            assert ProbeEngine(encoded, layout).score(model).star_ids == anew


@pytest.mark.parametrize(
    ("family", "attention"),
    [*itertools.product(("mistral", "qwen2", "gemma3"), ("eager", "sdpa")), ("gemma2", "eager")],
)
def test_sliding_windows_shorter_than_the_rows(family, attention):
    encoded = encoded_probes()
    options = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    with true_float64(tiny_model(family, sliding_window=7, **options)) as model:
        model.set_attn_implementation(attention)
        rows = score_slowly(model, encoded)
        stats_head.install(model)
        for layout in (PaddedLayout(4), SharedPrefixLayout(1), SharedPrefixLayout(10_000)):
            assert_equal(ProbeEngine(encoded, layout).score(model), rows, per_token=1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_float64_without_the_patch_has_a_floor(family):
    """Merely calling `.double()` leaves an error far above 1e-10, because norms and softmax pass through float32."""
    model, encoded = tiny_model(family), encoded_probes()
    with true_float64(model):
        exact = score_slowly(model, encoded)
    stats_head.install(model)
    given = ProbeEngine(encoded, PaddedLayout(64)).score(model).columns["logp_mean"]
    worst = max(abs(row["logp_mean"] - value) for row, value in zip(exact, given, strict=True))
    assert 1e-9 < worst < 1e-4


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_reference(family, lora):
    encoded = encoded_probes()
    model = adapt(tiny_model(family), lora)
    rows = score_slowly(model, encoded)
    stats_head.install(model)
    for layout in (PaddedLayout(4), PaddedLayout(4, padding_side="left"), SharedPrefixLayout(200)):
        assert_equal(ProbeEngine(encoded, layout).score(model), rows, per_token=1e-4, per_sum=1e-4)


def test_every_token_in_float32():
    encoded = encoded_probes()
    model = tiny_model("llama")
    rows = score_slowly(model, encoded)
    stats_head.install(model)
    (batch,) = PaddedLayout(64).batches(encoded)
    request = stats_head.StatsRequest(batch.rows_N, batch.cols_N, batch.target_N, batch.input_ids.shape[1])
    with torch.no_grad():
        stats = model(batch.input_ids, attention_mask=batch.attention_mask, stats_request=request)
    own_N = ~batch.is_eos_mask_N
    for index, row in enumerate(rows):
        given = stats["target_logp"][own_N & (batch.item_N == index)]
        torch.testing.assert_close(given.double(), torch.tensor(row["logp"]).double(), atol=1e-4, rtol=0)


def test_real_model_and_probes(data_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = data_dir / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    published = ProbeSet.from_jsonl(data_dir / "probing_helpful_base" / "formal_prob_train.jsonl").select(4)
    encoded = encode(published, tokenizer, LengthLimits(96, 256, 512))
    rows = score_slowly(model, encoded)
    stats_head.install(model)
    for layout in (PaddedLayout(16), SharedPrefixLayout()):
        assert_equal(ProbeEngine(encoded, layout).score(model), rows, per_token=1e-4, per_sum=1e-4)


@pytest.mark.parametrize("layout", [PaddedLayout(4), SharedPrefixLayout(200)], ids=lambda layout: layout.name)
def test_scoring_leaves_no_trace(layout):
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    stats_head.install(model)
    engine = ProbeEngine(encoded_probes(), layout)
    state = torch.get_rng_state()
    first = engine.score(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert repr(engine.score(model)) == repr(first)


def test_modes_are_restored_when_scoring_fails():
    model = tiny_model("llama").train()
    stats_head.install(model)
    engine = ProbeEngine(encoded_probes(), PaddedLayout(4))
    model.set_input_embeddings(torch.nn.Embedding(4, 32))  # too small for the ids
    with pytest.raises(IndexError):
        engine.score(model)
    assert model.training


def test_a_model_without_the_head_is_refused():
    with pytest.raises(ValueError, match="no stats head"):
        ProbeEngine(encoded_probes(), PaddedLayout(4)).score(tiny_model("llama"))


def test_stars_of_another_tokenisation_are_refused():
    model = tiny_model("llama")
    stats_head.install(model)
    with pytest.raises(ValueError, match="tokenizer or the length limits changed"):
        ProbeEngine(encoded_probes(), PaddedLayout(4)).score(model, [[1, 2]])


@pytest.mark.parametrize("layout", [PaddedLayout(1), SharedPrefixLayout(1)], ids=lambda layout: layout.name)
def test_row_order_does_not_matter(layout):
    model = tiny_model("llama")
    stats_head.install(model)
    forward, backward = probes(), ProbeSet(tuple(reversed(probes().probes)))
    by_key = []
    for probe_set in (forward, backward):
        columns = ProbeEngine(encode(probe_set, tiny_tokenizer()), layout).score(model).columns
        keys = zip(columns["probe_id"], columns["response_type"], strict=True)
        by_key.append(dict(zip(keys, columns["logp_sum"], strict=True)))
    assert by_key[0] == by_key[1]
