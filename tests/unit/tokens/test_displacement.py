"""CHES against the definition, one unpadded row at a time in float64; padding and company change nothing."""

import pytest
import torch

from tiny import END, tiny_model, tiny_tokenizer
from trl_dynamics import stats_head
from trl_dynamics.probing.encode import encode
from trl_dynamics.probing.layouts import PaddedLayout
from trl_dynamics.probing.schema import Probe, ProbeSet
from trl_dynamics.tokens.displacement import ches, ches_normalized, risk, score_responses

PAIRS = [
    ("Why?", " because it is", " no"),
    ("A longer prompt, then?", " y", " a much longer answer to it"),
    ("a", "b", "c d"),
]
PROBES = ProbeSet(tuple(Probe(str(i), p, {"chosen": c, "rejected": r}) for i, (p, c, r) in enumerate(PAIRS)))


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def model(request):
    model = tiny_model(request.param).double()
    stats_head.install(model)
    return model


def scored(model, layout, probe_set=PROBES):
    encoded = encode(probe_set, tiny_tokenizer())
    parts = [score_responses(model, batch, len(encoded.items)) for batch in layout.batches(encoded)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@torch.no_grad()
def definition(model, prompt, response):
    """Sum of the final states that predict the response's tokens, written as the paper's h(x, y_<k), k = 1..|y|."""
    tokenizer = tiny_tokenizer()
    ids, answer = tokenizer(text=prompt)["input_ids"], tokenizer(text=response)["input_ids"]
    states, logp = [], 0.0
    for k in range(len(answer)):
        prefix = torch.tensor([ids + answer[:k]])
        out = model(input_ids=prefix, output_hidden_states=True)
        states.append(out.hidden_states[-1][0, -1])
        logp += out.logits[0, -1].log_softmax(-1)[answer[k]]
    return torch.stack(states).sum(0), float(logp), len(answer)


def test_sums_are_the_definitions(model):
    sums = scored(model, PaddedLayout(4, 258))
    rows = [definition(model, p, text) for p, c, r in PAIRS for text in (c, r)]
    for i, (state, logp, length) in enumerate(rows):
        torch.testing.assert_close(sums.hidden_ID[i], state, rtol=0, atol=1e-9)
        assert float(sums.logp_sum_I[i]) == pytest.approx(logp, abs=1e-9) and sums.num_tokens_I[i] == length


def test_scores_are_the_papers(model):
    sums = scored(model, PaddedLayout(4, 258))
    chosen, rejected = sums.hidden_ID[0::2], sums.hidden_ID[1::2]
    found = ches(chosen, rejected)
    normalized = ches_normalized(chosen, rejected, sums.num_tokens_I[0::2], sums.num_tokens_I[1::2])
    for i, (p, c, r) in enumerate(PAIRS):
        (plus, _, n_plus), (minus, _, n_minus) = definition(model, p, c), definition(model, p, r)
        assert float(found[i]) == pytest.approx(float(plus @ minus - plus @ plus), abs=1e-8)
        expected = float(plus @ minus / (n_plus * n_minus) - plus @ plus / n_plus**2)
        assert float(normalized[i]) == pytest.approx(expected, abs=1e-9)


def test_with_the_end_scores_are_those_of_answers_that_have_it_as_their_last_token(model):
    """As the authors' code counts rows that end with EOS: the state after the answer's last token as well."""
    sums = scored(model, PaddedLayout(4, 258))
    hidden, lengths = sums.states(with_end=True)
    for i, (p, c, r) in enumerate(PAIRS):
        (plus, _, n_plus), (minus, _, n_minus) = (definition(model, p, text + END) for text in (c, r))
        assert (lengths[2 * i], lengths[2 * i + 1]) == (n_plus, n_minus)
        sides = (hidden[2 * i, None], hidden[2 * i + 1, None], lengths[2 * i, None], lengths[2 * i + 1, None])
        expected = float(plus @ minus / (n_plus * n_minus) - plus @ plus / n_plus**2)
        assert float(ches_normalized(*sides)) == pytest.approx(expected, abs=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(sums.states(), (sums.hidden_ID, sums.num_tokens_I), strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_padding_changes_nothing(model, side, batch_size):
    alone = scored(model, PaddedLayout(1, 258))
    # Token 5 is a letter: where padding were counted, it would count as one.
    for pad_id in (258, 5):
        found = scored(model, PaddedLayout(batch_size, pad_id, side))
        torch.testing.assert_close(found.hidden_ID, alone.hidden_ID, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.logp_sum_I, alone.logp_sum_I, rtol=0, atol=1e-10)
        assert torch.equal(found.num_tokens_I, alone.num_tokens_I)


def test_dropping_the_last_padded_position_would_be_another_number(model):
    """The trap: sums over all but the last column of a padded batch, with no mask, depend on the padding."""
    tokenizer = tiny_tokenizer()
    prompt, short = (tokenizer(text=text)["input_ids"] for text in ("Why?", " no"))
    with torch.no_grad():
        naive = []
        for padding in (0, 7):
            ids = torch.tensor([prompt + short + [258] * padding])
            mask = torch.tensor([[1] * len(prompt + short) + [0] * padding])
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][0]
            naive.append(states[len(prompt) - 1 : -1].sum(0))
    right = definition(model, "Why?", " no")[0]
    torch.testing.assert_close(naive[0], right, rtol=0, atol=1e-9)
    assert (naive[1] - right).norm() > 0.1 * right.norm()
    assert torch.allclose(scored(model, PaddedLayout(6, 258)).hidden_ID[1], right, rtol=0, atol=1e-9)


def test_identical_answers_have_score_zero_and_risk_is_a_rank():
    states = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert ches(states, states).abs().max() == 0
    assert risk(torch.tensor([3.0, -1.0, 3.0, 0.5])).tolist() == [1.0, 0.25, 1.0, 0.5]


def test_low_precision_models_are_summed_in_high_precision():
    model = tiny_model().to(torch.bfloat16)
    stats_head.install(model)
    sums = scored(model, PaddedLayout(4, 258))
    exact = tiny_model().double()
    stats_head.install(exact)
    assert sums.hidden_ID.dtype == torch.float64
    error = (sums.hidden_ID - scored(exact, PaddedLayout(4, 258)).hidden_ID).norm(dim=1)
    assert (error < 0.05 * sums.hidden_ID.norm(dim=1)).all()
