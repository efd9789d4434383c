"""Batches that a model cannot read, or would read as another, and numbers that are not finite, are refused."""

import pytest
import torch

from akg_models import batch_of, language_model, padded, small_classifier
from tiny import tiny_model
from trl_dynamics.akg.batched import influences
from trl_dynamics.akg.gram import gram
from trl_dynamics.akg.one_step import influence
from trl_dynamics.akg.proxies import head_only
from trl_dynamics.akg.real_step import verify
from trl_dynamics.akg.steps import step_of
from trl_dynamics.akg.task import causal_lm, classifier, label_logp

GOOD = batch_of(2, 8, 0)
CALLS = {
    "update": lambda model, batch: influence(model, batch, GOOD, lr=0.1),
    "observe": lambda model, batch: influence(model, GOOD, batch, lr=0.1),
    "several": lambda model, batch: list(influences(model, [GOOD, batch], GOOD, lr=0.1)),
    "verify": lambda model, batch: verify(model, GOOD, batch, lr=0.1),
    "logp": lambda model, batch: label_logp(causal_lm(model), batch),
    "gram": lambda model, batch: gram(model, GOOD, batch),
    "head only": lambda model, batch: head_only(model, GOOD, batch),
}


def without_mask(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def changed(name: str, value: int) -> dict:
    return GOOD | {name: GOOD[name].clone().index_fill_(1, torch.tensor([7]), value)}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (changed("input_ids", 260), "input_ids are from .* to 260, expected 0 to 259.*vocabulary"),
        (changed("input_ids", -1), "input_ids are from -1 to"),
        (changed("labels", 999), "labels are from .* to 999, expected 0 to 259"),
        (changed("labels", -1), "labels are from -1 to .*-100"),
        (without_mask(padded(GOOD, 3, 0)), "2 of 2 rows begin with padding .token 258.*attention_mask"),
    ],
    ids=["id", "negative id", "label", "negative label", "left padding"],
)
def test_they_are_refused_wherever_they_come_from(call, batch, message):
    with pytest.raises(ValueError, match=message):
        call(language_model(), batch)


def test_padding_with_a_mask_or_at_the_right_is_read():
    model = language_model()
    plain = influence(model, GOOD, GOOD, lr=0.1).total.target_N
    for batch in (padded(GOOD, 3, 0), padded(GOOD, 0, 3), without_mask(padded(GOOD, 0, 3))):
        torch.testing.assert_close(influence(model, GOOD, batch, lr=0.1).total.target_N, plain)


@pytest.mark.parametrize(("leading", "refused"), [(0, False), (1, False), (2, True)])
def test_one_token_that_also_ends_texts_may_begin_them(leading, refused):
    """Where padding is the end-of-text token, a single one at the start is none, two of them are."""
    model = language_model(pad_token_id=257)
    batch = GOOD | {"input_ids": GOOD["input_ids"].clone()}
    batch["input_ids"][1, :leading] = 257
    if refused:
        with pytest.raises(ValueError, match="1 of 2 rows begin with padding"):
            influence(model, GOOD, batch, lr=0.1)
    else:
        influence(model, GOOD, batch, lr=0.1)


def test_a_model_without_a_padding_token_reads_all():
    influence(language_model(pad_token_id=None), GOOD, without_mask(padded(GOOD, 3, 0)), lr=0.1)


def test_rows_longer_than_the_learnt_positions_are_refused():
    with pytest.raises(ValueError, match="rows of 65 tokens are too long.*GPT2LMHeadModel"):
        influence(language_model("gpt2"), GOOD, batch_of(1, 65, 0), lr=0.1)


@pytest.mark.parametrize("label", [-1, 5])
def test_classes_outside_of_the_models_are_refused(label):
    good, bad = ((torch.zeros(1, 6).double(), torch.tensor([value])) for value in (0, label))
    for update, observe in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match=f"labels of a batch are from {label} to {label}, expected 0 to 4"):
            influence(classifier(small_classifier()), update, observe, lr=0.1)


@pytest.mark.parametrize("name", ["update", "observe", "several", "verify", "gram"])
def test_attention_that_is_not_a_number_is_refused(name):
    """transformers' eager attention at columns of padding, in float64."""
    model = tiny_model("llama").double()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="not finite.*attn_implementation='sdpa'"):
        CALLS[name](model, padded(GOOD, 3, 0))
    model.set_attn_implementation("sdpa")
    CALLS[name](model, padded(GOOD, 3, 0))


def test_a_step_that_is_not_finite_is_refused():
    def broken(gradients: dict) -> dict:
        return {name: gradient * float("nan") for name, gradient in gradients.items()}

    with pytest.raises(ValueError, match="predicted change of 7 of 7 observed labels is not finite.*smaller lr"):
        influence(language_model(), GOOD, GOOD, direction=broken)


@pytest.mark.parametrize("max_grad_norm", [None, 0, 0.0, -1.0])
def test_a_norm_of_nothing_does_not_clip(max_grad_norm):
    """As transformers' Trainer reads it."""
    model = small_classifier()
    parameters = dict(model.named_parameters())
    step = step_of({name: torch.ones_like(p) for name, p in parameters.items()}, parameters, "sgd", 0.1, max_grad_norm)
    assert step.clip == 1.0
    assert all(torch.equal(change, torch.full_like(change, -0.1)) for change in step.total.values())
