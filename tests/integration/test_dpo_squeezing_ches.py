"""The study of CHES: one step of DPO against closed forms, rank correlations against their definition, a small run."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tiny import tiny_model, tiny_tokenizer
from trl_dynamics import stats_head
from trl_dynamics.probing.encode import encode
from trl_dynamics.probing.schema import Probe, ProbeSet

PAIRS = [("Why?", " because it is", " no, it is"), ("A longer one?", " y", " a much longer answer"), ("a", "bb", "cd")]
BETA = 0.1


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "dpo_squeezing"))
    import ches

    yield ches
    sys.path.pop(0)


def encoded_pairs():
    probes = (Probe(str(i), p, {"chosen": c, "rejected": r}) for i, (p, c, r) in enumerate(PAIRS))
    items = encode(ProbeSet(tuple(probes)), tiny_tokenizer()).items
    return list(zip(items[0::2], items[1::2], strict=True))


@pytest.fixture
def model():
    """Float64 throughout (Llama's norm would round to float32), with an LM head of its own."""
    model = tiny_model("gpt_neox", tie_word_embeddings=False).double()
    stats_head.install(model)
    return model


@torch.no_grad()
def states_and_forces(model, answer, with_end):
    """States that predict an answer's tokens, and one-hot minus probabilities there, prefix by prefix."""
    targets = answer.input_ids[len(answer.prompt_ids) :] if with_end else answer.response_ids
    states, forces = [], []
    for k, target in enumerate(targets):
        ids = torch.tensor([answer.input_ids[: len(answer.prompt_ids) + k]])
        out = model(input_ids=ids, output_hidden_states=True)
        states.append(out.hidden_states[-1][0, -1])
        forces.append(torch.nn.functional.one_hot(torch.tensor(target), 260) - out.logits[0, -1].softmax(-1))
    return torch.stack(states), torch.stack(forces)


def head_slope(model, pair):
    """d(-ln pi(y+)) per unit of the rate when the head alone is trained: sum of <g, g'> <h, h'> over token pairs."""
    h, g = states_and_forces(model, pair[0], with_end=False)
    total = 0.0
    for answer, sign in zip(pair, (1, -1), strict=True):
        h_u, g_u = states_and_forces(model, answer, with_end=True)
        total += sign * float(((g @ g_u.T) * (h @ h_u.T)).sum())
    return -BETA / 2 * total


def test_a_step_of_the_head_alone_moves_chosen_as_the_closed_form_says(recipe, model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head"))
    pairs, rates = encoded_pairs(), [1e-4, 1e-5]
    frame = recipe.changes(model, pairs, rates, BETA)
    expected = np.array([head_slope(model, pair) for pair in pairs])
    np.testing.assert_allclose(frame["slope"], expected, rtol=1e-9)
    np.testing.assert_allclose(recipe.scores(model, pairs)["head_form"] * BETA / 2, expected, rtol=1e-9)
    errors = [np.abs(frame[f"own/{rate:g}"] - rate * expected).max() for rate in rates]
    assert errors[0] < 0.01 * rates[0] * np.abs(expected).min()
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)  # what is left is of second order


def test_a_step_of_all_weights_is_linear_in_a_small_rate_and_the_weights_come_back(recipe, model):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    rates = [1e-6, 1e-7]
    frame = recipe.changes(model, encoded_pairs(), rates, BETA)
    assert all(map(torch.equal, before, model.parameters()))
    errors = [np.abs(frame[f"own/{rate:g}"] - rate * frame["slope"]).max() for rate in rates]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)
    assert (frame["margin/1e-06"] > 0).all()
    lengths = np.array([len(chosen.response_ids) for chosen, _ in encoded_pairs()])
    np.testing.assert_allclose(frame["own/1e-06/per_token"] * lengths, frame["own/1e-06"])


def test_the_common_step_is_the_mean_of_all_steps(recipe, model):
    """To first order, a pair's change is the mean over pairs of what a step on each of them does to it."""
    pairs, rate = encoded_pairs(), 1e-7
    gradients = []
    for answers in pairs:
        logps = []
        for answer in answers:
            logits = model(input_ids=torch.tensor([answer.input_ids])).logits[0, len(answer.prompt_ids) - 1 : -1]
            targets = torch.tensor(answer.input_ids[len(answer.prompt_ids) :])
            logps.append(logits.log_softmax(-1)[range(len(targets)), targets][: len(answer.response_ids)])
            logps.append(logits.log_softmax(-1)[range(len(targets)), targets])
        chosen, whole_chosen, _, whole_rejected = (logp.sum() for logp in logps)
        margin = whole_chosen - whole_rejected
        gradients.append(
            [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in (chosen, margin)]
        )
    expected = [
        -rate
        * BETA
        / 2
        * np.mean([sum(float((a * b).sum()) for a, b in zip(mine, m, strict=True)) for _, m in gradients])
        for mine, _ in gradients
    ]
    frame = recipe.changes(model, pairs, [rate], BETA)
    np.testing.assert_allclose(frame["all/1e-07"], expected, rtol=1e-3)


def test_scores_are_those_of_their_pair(recipe, model):
    frame, pairs = recipe.scores(model, encoded_pairs()), encoded_pairs()
    for pair, row in zip(pairs, frame.itertuples(), strict=True):
        plus, minus = (states_and_forces(model, answer, with_end=False)[0] for answer in pair)
        last = [states_and_forces(model, answer, with_end=True)[0][-1] for answer in pair]
        assert row.ches == pytest.approx(float(plus.sum(0) @ minus.sum(0) - plus.sum(0) @ plus.sum(0)), rel=1e-9)
        expected = float(plus.mean(0) @ minus.mean(0) - plus.mean(0) @ plus.mean(0))
        assert row.ches_normalized == pytest.approx(expected, rel=1e-9)
        assert row.last_hidden == pytest.approx(float(last[0] @ last[1]), rel=1e-9)
        assert (row.num_chosen, row.num_rejected) == tuple(len(answer.response_ids) for answer in pair)
    # Tokens are bytes: of " y" and " a much longer answer", with 15 between them, only the space is in both.
    assert frame["jaccard"].tolist() == pytest.approx([4 / 12, 1 / 15, 0.0])


def slow_ranks(values):
    return np.array([np.sum(values < v) + (np.sum(values == v) + 1) / 2 for v in values])


def test_rank_correlation_is_spearmans_and_controls_are_regressed_out(recipe):
    rng = np.random.default_rng(0)
    control = rng.integers(5, size=60).astype(float)
    other = rng.integers(9, size=60).astype(float)
    a, b = control + rng.integers(4, size=60), control**2 + other + rng.integers(4, size=60)
    found = recipe.rank_correlation(np.stack([a, -a]), np.stack([b, b]))
    expected = np.corrcoef(slow_ranks(a), slow_ranks(b))[0, 1]
    assert found == pytest.approx([expected, -expected], abs=1e-12)
    assert expected == pytest.approx(pd.DataFrame({"a": a, "b": b}).corr("spearman").loc["a", "b"], abs=1e-12)

    ra, rb, rc, ro = map(slow_ranks, (a, b, control, other))
    design = np.stack([np.ones(60), rc, ro], axis=1)
    rest = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in (ra, rb)]
    given = recipe.rank_correlation(a[None], b[None], (control[None], other[None]))
    assert given == pytest.approx([np.corrcoef(*rest)[0, 1]], abs=1e-10)
    assert abs(given[0]) < abs(expected) - 0.1


def test_an_interval_covers_the_correlation_of_the_population(recipe):
    """Normal pairs with correlation r have Spearman's 6/pi asin(r/2)."""
    rng, hits, truth = np.random.default_rng(1), 0, 6 / np.pi * np.arcsin(0.6 / 2)
    for _ in range(40):
        x = rng.normal(size=80)
        frame = pd.DataFrame({"x": x, "y": 0.6 * x + 0.8 * rng.normal(size=80)})
        value, low, high = recipe.interval(frame, ("x", "y"), rng)
        assert low < value < high
        hits += low < truth < high
    assert 34 <= hits


def test_a_small_run_writes_the_values_and_the_table(recipe, tmp_path):
    recipe.main(["--num_pairs", "6", "--rates", "0.01", "--output_dir", str(tmp_path)])
    frame, text = pd.read_csv(tmp_path / "ches.csv"), (tmp_path / "ches.md").read_text()
    assert len(frame) == 6 and set(recipe.SCORES) <= set(frame)
    np.testing.assert_allclose(frame["own/0.01"], 0.01 * frame["slope"], rtol=0.2)
    assert all(f"| {score} |" in text for score in recipe.SCORES) and "ches, given both lengths" in text
