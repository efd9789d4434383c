"""Greedy answers are what a model says token by token, whatever the batch, the padding and the model."""

import math

import pytest
import torch
from transformers import GenerationConfig

from engine_probes import adapt, encoded_probes, probes
from reference import true_float64
from tiny import tiny_model, tiny_tokenizer
from trl_dynamics import stats_head
from trl_dynamics.probing.encode import LengthLimits, encode_prompts
from trl_dynamics.probing.layouts import PaddedLayout, SharedPrefixLayout
from trl_dynamics.probing.schema import Probe, ProbeSet
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.scoring.sampling import GreedySampler, Reading

NEW_TOKENS = 12
SHARING = ("llama", "mistral", "gpt_neox", "gpt2", "bloom", "qwen3", "gemma2", "gemma3")
PATHS = [(family, "shared_prefix") for family in SHARING] + [(family, "padded") for family in (*SHARING, "mamba")]


def make_model(family: str):
    options = {"sliding_window": 8} if family in ("mistral", "gemma3") else {}
    return tiny_model(family, **options)


def make_sampler(path: str, *, tokens: int, ends=(257,), prompts=None, new_tokens=NEW_TOKENS, context=None):
    layout = SharedPrefixLayout(tokens) if path == "shared_prefix" else PaddedLayout(tokens_per_batch=tokens)
    engine = ProbeEngine(encoded_probes(), layout)
    prompts = encode_prompts(probes(), tiny_tokenizer()) if prompts is None else prompts
    return GreedySampler(prompts, Reading(tiny_tokenizer(), frozenset(ends), 258, context), new_tokens, engine, tokens)


def answer_slowly(model, prompt_ids, ends, room=NEW_TOKENS) -> tuple[list[int], list[float], float]:
    """One prompt, the whole row for every token, the whole log-softmax: ids, their log-probs, that of the end."""
    ids, logps = list(prompt_ids), []
    for _ in range(room):
        with torch.no_grad():
            logp_V = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), dim=-1)
        token = logp_V.argmax().item()
        if token in ends:
            return ids[len(prompt_ids) :], logps, logp_V[token].item()
        ids.append(token)
        logps.append(logp_V[token].item())
    return ids[len(prompt_ids) :], logps, math.nan


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("family", "path"), PATHS, ids=["-".join(path) for path in PATHS])
def test_float64_equals_the_slow_answers(family, path, lora):
    if lora and family == "mamba":
        pytest.skip("peft adapts no fused mamba projections")
    with true_float64(make_model(family)) as base:
        model = adapt(base, lora).double()
        prompts = encode_prompts(probes(), tiny_tokenizer())
        first, _, _ = answer_slowly(model, prompts[1].input_ids, ())
        ends = (257, first[4])  # so that some answers end, and at different lengths
        expected = [answer_slowly(model, prompt.input_ids, ends) for prompt in prompts]
        bound = 1e-5 if family == "mamba" else 1e-9  # whose scan runs in float32 whatever the model's dtype
        stats_head.install(model)
        for tokens in (1, 150, 10_000):
            given = make_sampler(path, tokens=tokens, ends=ends).sample(model)
            for index, (ids, logps, end) in enumerate(expected):
                assert given["token_ids"][index] == ids
                assert given["logp_sum"][index] == pytest.approx(sum(logps), abs=bound)
                assert given["eos_logp"][index] == pytest.approx(end, abs=bound, nan_ok=True)
                assert given["ended"][index] == (not math.isnan(end))
        assert any(given["ended"]) and len(set(given["num_tokens"])) > 1


@pytest.mark.parametrize("path", ["shared_prefix", "padded"])
def test_float32_says_what_generate_says(path):
    model = tiny_model("llama")
    prompts = encode_prompts(probes(), tiny_tokenizer())
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=257, pad_token_id=258)
    expected = [
        model.generate(torch.tensor([prompt.input_ids]), generation_config=config)[0, len(prompt.input_ids) :].tolist()
        for prompt in prompts
    ]
    stats_head.install(model)
    given = make_sampler(path, tokens=10_000).sample(model)
    assert given["token_ids"] == [[token for token in ids if token not in (257, 258)] for ids in expected]
    assert given["text"] == [tiny_tokenizer().decode(ids, skip_special_tokens=True) for ids in expected]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("path", ["shared_prefix", "padded"])
def test_an_answer_never_leaves_the_context(path, family):
    prompts = encode_prompts(probes(), tiny_tokenizer())
    longest = max(len(prompt.input_ids) for prompt in prompts)
    model = tiny_model(family, max_position_embeddings=longest + 3)
    expected = [
        answer_slowly(model, prompt.input_ids, (257,), min(NEW_TOKENS, longest + 3 - len(prompt.input_ids)))[0]
        for prompt in prompts
    ]
    stats_head.install(model)
    given = make_sampler(path, tokens=10_000, context=longest + 3).sample(model)
    assert given["token_ids"] == expected and min(given["num_tokens"]) == 3
    with pytest.raises(ValueError, match="fills the model's context .* set probe_max_prompt_length"):
        make_sampler(path, tokens=10_000, context=longest)


def test_forwards_stop_when_every_answer_has_ended():
    model = tiny_model("llama")
    stats_head.install(model)
    forwards, forward = [], model.forward
    model.forward = lambda *args, **kwargs: forwards.append(1) or forward(*args, **kwargs)
    everything = range(260)
    given = make_sampler("shared_prefix", tokens=10_000, ends=everything, new_tokens=100).sample(model)
    assert given["num_tokens"] == [0] * 5 and given["ended"] == [True] * 5 and given["text"] == [""] * 5
    assert all(math.isnan(value) for value in given["logp_mean"]) and given["longest_repeat"] == [0.0] * 5
    assert len(forwards) == 8


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama", attention_dropout=0.5).train()
    stats_head.install(model)
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    sampler, random_state = make_sampler("shared_prefix", tokens=150), torch.get_rng_state()
    assert sampler.sample(model) == sampler.sample(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prompts_are_read_as_a_user_would_ask_them():
    chat = [{"role": "user", "content": "Hi"}]
    plain, talk = (ProbeSet((Probe("a", p, {"chosen": " x", "rejected": " y"}),)) for p in ("Say hi", chat))
    tokenizer = tiny_tokenizer()
    (prompt,) = encode_prompts(talk, tokenizer)
    assert tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant\n") and not prompt.cut
    (prompt,) = encode_prompts(plain, tokenizer, LengthLimits(max_prompt_length=2))
    assert tokenizer.decode(prompt.input_ids) == "hi" and prompt.cut
    closing = tiny_tokenizer()
    tokenize = closing.__class__.__call__

    class Closing(closing.__class__):
        def __call__(self, *args, **kwargs):
            encoded = tokenize(self, *args, **kwargs)
            encoded["input_ids"] = [*encoded["input_ids"], self.eos_token_id]
            return encoded

    closing.__class__ = Closing
    (prompt,) = encode_prompts(plain, closing)
    assert tokenizer.decode(prompt.input_ids) == "Say hi"


@pytest.mark.parametrize(("tokens", "expected"), [(1, 5), (150, 2), (10_000, 1)])
def test_batches_keep_to_the_budget(tokens, expected):
    sampler = make_sampler("padded", tokens=tokens)
    for cached in (True, False):
        groups = sampler.groups(cached)
        assert sorted(index for group in groups for index in group) == list(range(5))
        for group in groups:
            width = max(len(sampler.prompts[index].input_ids) for index in group)
            assert len(group) == 1 or len(group) * width <= tokens
            assert len(group) == 1 or cached or len(group) * (width + NEW_TOKENS) <= tokens
    assert len(groups) == expected


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="probe_sample_tokens is 0"):
        make_sampler("padded", tokens=100, new_tokens=0)
    with pytest.raises(ValueError, match="no prompts to answer"):
        make_sampler("padded", tokens=100, prompts=())
    with pytest.raises(ValueError, match="has no stats head"):
        make_sampler("padded", tokens=100).sample(tiny_model("llama"))
