"""With LongRoPE a row's numbers are its own: no batch has rows on both sides of the trained length."""

import contextlib

import pytest
import torch

from reference import score_slowly
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import make_trainer
from trl_dynamics import ProbeSet, load_records, stats_head
from trl_dynamics.judging.likelihood import Likelihood
from trl_dynamics.probing.encode import encode, encode_prompts
from trl_dynamics.probing.generate import LocalModel, Request, Sampling
from trl_dynamics.probing.labelled import split
from trl_dynamics.probing.layouts import PaddedLayout, SharedPrefixLayout, side_of
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.scoring.sampling import GreedySampler, Reading

TRAINED = 40
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": TRAINED,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
# Prompts below and above the trained length, answers of one prompt on both sides of it.
ROWS = [
    {"prompt": "x" * prompt, "chosen": "abc" * chosen, "rejected": "de" * rejected}
    for prompt, chosen, rejected in ((10, 3, 14), (25, 8, 2), (45, 4, 4), (30, 2, 5), (33, 2, 3))
]
ENCODED = encode(ProbeSet.load(ROWS), tiny_tokenizer())


def long_model(family: str = "llama", **overrides):
    return tiny_model(family, rope_parameters=ROPE, max_position_embeddings=160, **overrides)


@pytest.fixture(scope="module")
def model():
    return long_model()


@pytest.fixture(scope="module")
def true(model):
    found = [row["logp_mean"] for row in score_slowly(model, ENCODED)]
    stats_head.install(model)
    return found


@pytest.mark.parametrize(
    "layout",
    [
        PaddedLayout(tokens_per_batch=16384, boundaries=(TRAINED,)),
        PaddedLayout(3, padding_side="left", boundaries=(TRAINED,)),
        SharedPrefixLayout(16384, boundaries=(TRAINED,)),
        SharedPrefixLayout(60, boundaries=(TRAINED,)),
    ],
)
def test_a_row_is_scored_as_if_it_were_alone(layout, model, true):
    assert stats_head.length_boundaries(model) == (TRAINED,)
    assert ProbeEngine(ENCODED, layout).score(model).columns["logp_mean"] == pytest.approx(true, abs=1e-5)


class OneOfTwo:
    """A process of two that share the work; sums are of its own share."""

    num_processes, mixed_precision, device = 2, "no", torch.device("cpu")

    def __init__(self, process_index: int):
        self.process_index = process_index

    def autocast(self):
        return contextlib.nullcontext()

    def reduce(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
        return values


def test_processes_run_the_same_number_of_forwards(model, true):
    counts, logps = [], []
    for rank in (0, 1):
        layout = SharedPrefixLayout(60, boundaries=(TRAINED,))
        engine, calls = ProbeEngine(ENCODED, layout, accelerator=OneOfTwo(rank)), []
        assert {group.prompts is None for group in engine.groups} == {True, False}
        handle = model.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args))
        logps.append(engine.score(model).columns["logp_mean"])
        handle.remove()
        counts.append(len(calls))
    assert counts[0] == counts[1]
    assert [a + b for a, b in zip(*logps, strict=True)] == pytest.approx(true, abs=1e-5)


def test_company_across_the_trained_length_would_show(model, true):
    given = ProbeEngine(ENCODED, PaddedLayout(tokens_per_batch=16384)).score(model).columns["logp_mean"]
    assert max(abs(a - b) for a, b in zip(given, true, strict=True)) > 0.05


def test_other_models_have_no_boundary():
    assert stats_head.length_boundaries(tiny_model("llama")) == ()


def test_batches_for_influence_keep_to_one_side():
    parts = list(split(ENCODED.items, 16384, (TRAINED,)))
    assert [item for part in parts for item in part] == list(ENCODED.items)
    assert all(len({side_of(len(item.input_ids), (TRAINED,)) for item in part}) == 1 for part in parts)
    assert len(list(split(ENCODED.items, 16384))) == 1


def test_a_run_and_its_continuation_keep_to_it(tmp_path):
    options = {"probes": ROWS, "make_model": long_model, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer("sft", tmp_path, probe_tokens_per_batch=16384, **options).train()
    records = load_records(tmp_path)
    model = long_model()
    true = [row["logp_mean"] for row in score_slowly(model, ENCODED)]
    assert records[records["step"] == 0]["logp_mean"].tolist() == pytest.approx(true, abs=1e-5)
    last = records[records["step"] == 2]["logp_mean"].tolist()
    again = make_trainer("sft", tmp_path, probe_tokens_per_batch=16384, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    records = load_records(tmp_path)
    assert records[records["step"] == 2]["logp_mean"].tolist() == last


def test_likelihood_of_an_answer_does_not_depend_on_the_others(model, true):
    judge = Likelihood(LocalModel(model, tiny_tokenizer(), "tiny", batch_size=64))
    scores = judge.score([(row["prompt"], row[kind]) for row in ROWS for kind in ("chosen", "rejected")])
    assert [score.value for score in scores] == pytest.approx(true, abs=1e-5)


@pytest.mark.parametrize("layout", [PaddedLayout, SharedPrefixLayout])
def test_greedy_answers_are_those_of_a_prompt_alone(layout, model, true):
    tokenizer, new_tokens = tiny_tokenizer(), 12
    prompts = encode_prompts(ProbeSet.load(ROWS), tokenizer)
    engine = ProbeEngine(ENCODED, layout(tokens_per_batch=16384, boundaries=(TRAINED,)))
    sampler = GreedySampler(prompts, Reading(tokenizer, frozenset({257}), 258, 160), new_tokens, engine, 16384)
    given = sampler.sample(model)["token_ids"]
    for prompt, ids in zip(prompts, given, strict=True):
        row = list(prompt.input_ids)
        with torch.no_grad():
            for _ in range(new_tokens):
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
                if row[-1] == 257:
                    break
        expected = row[len(prompt.input_ids) :]
        assert ids == (expected[:-1] if expected[-1] == 257 else expected)


def test_generated_answers_do_not_depend_on_the_other_prompts(model):
    """Prompts below and above the trained length, and two of one length whose answers cross it."""
    prompts = ["x" * length for length in (10, 25, 33, 45, 50)] + ["y" * 33]
    wanted = [Request.of(prompt, Sampling(12, 1.0, seed=i)) for i, prompt in enumerate(prompts)]

    def answers(requests: list[Request], batch_size: int) -> dict[Request, str]:
        local = LocalModel(model, tiny_tokenizer(), "tiny", batch_size)
        return {request: answer.text for request, answer in local.generate(requests)}

    alone = {request: text for one in wanted for request, text in answers([one], 1).items()}
    assert answers(wanted, 64) == alone and len(set(alone.values())) > 2
