"""Several updates in one pass: the numbers of one after the other."""

import logging

import pytest
import torch
from torch import nn

from akg_models import FAMILIES, adapted, batch_of, error, language_model, small_classifier
from tiny import tiny_model
from trl_dynamics.akg import batched
from trl_dynamics.akg.batched import influences, predict_together
from trl_dynamics.akg.one_step import influence, update_gradient
from trl_dynamics.akg.steps import step_of
from trl_dynamics.akg.task import causal_lm, classifier

UPDATES, OBSERVE = [batch_of(1 + seed % 2, 8, seed) for seed in range(5)], batch_of(3, 7, 9)


def agree(model, together: int = 4, bound: float = 1e-12, **options) -> None:
    found = list(influences(model, UPDATES, OBSERVE, together=together, **options))
    assert len(found) == len(UPDATES)
    for update, one in zip(UPDATES, found, strict=True):
        alone = influence(model, update, OBSERVE, **options)
        assert one.parts.keys() == alone.parts.keys() and one.loss == alone.loss
        for mine, other in [(one.total, alone.total), *((one.parts[name], alone.parts[name]) for name in one.parts)]:
            fields = {name: value for name, value in vars(other).items() if value is not None}
            assert fields.keys() == {name for name, value in vars(mine).items() if value is not None}
            assert all(error(getattr(mine, name), value) < bound for name, value in fields.items())
        assert error(one.logp_N, alone.logp_N) < bound
        assert (one.top_id_Nk is None) == (alone.top_id_Nk is None) or torch.equal(one.top_id_Nk, alone.top_id_Nk)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_numbers_of_one_after_the_other(family):
    agree(language_model(family, tie_word_embeddings=True), lr=0.1)


@pytest.mark.parametrize("output", ["target", "stats", "topk", "full"])
def test_all_outputs_and_all_parts_of_a_step(output):
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    model(input_ids=UPDATES[0]["input_ids"], labels=UPDATES[0]["labels"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    agree(model, direction=optimizer, max_grad_norm=0.1, output=output)


@pytest.mark.parametrize("together", [1, 2, 5, 9])
def test_how_many_share_a_pass_does_not_matter(together):
    agree(language_model(), together, lr=0.1)


def test_tiles_of_the_head_change_nothing(monkeypatch):
    monkeypatch.setattr("trl_dynamics.akg.task.TILE_ELEMENTS", 3 * 260)
    for output in ("target", "stats"):
        agree(language_model("gemma3"), lr=0.1, output=output)


def test_adapters_half_precision_and_checkpointing():
    agree(adapted(), lr=0.1)
    agree(tiny_model("llama", initializer_range=0.15).to(torch.bfloat16), lr=1e-8, bound=1e-5)
    model = language_model()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    agree(model.train(), lr=0.1)
    assert all(module.training for module in model.modules())


def test_steps_that_move_other_parameters_and_come_from_elsewhere_share_a_pass():
    model = small_classifier()
    rows, labels = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 3, 1])
    task = classifier(model)
    gradients = update_gradient(task, (rows, labels)).gradients
    halves = [{n: g for n, g in gradients.items() if n.startswith(layer)} for layer in ("0", "2")]
    steps = [step_of(half, task.trainable(), "sgd", 0.1, None) for half in (gradients, *halves)]
    whole, *parts = predict_together(task, [None] * 3, steps, (rows, labels))
    assert error(sum(part.total.target_N for part in parts), whole.total.target_N) < 1e-12
    assert error(whole.total.target_N, influence(task, (rows, labels), (rows, labels), lr=0.1).total.target_N) < 1e-12


@pytest.mark.parametrize(("direction", "passed"), [("sgd", 2), ("adamw", 6)])
def test_a_step_of_one_part_is_pushed_once(direction, passed, monkeypatch):
    """Two steps: SGD's have one part; AdamW's have two and their sum, since norms of parts do not add up."""
    counts, original = [], batched.push_forward_together

    def counted(task, changes, *more):
        counts.append(len(changes))
        return original(task, changes, *more)

    monkeypatch.setattr(batched, "push_forward_together", counted)
    model, updates = language_model(), UPDATES[:2]
    found = list(influences(model, updates, OBSERVE, direction=direction, lr=0.01, output="stats"))
    assert counts == [passed]
    for update, one in zip(updates, found, strict=True):
        alone = influence(model, update, OBSERVE, direction=direction, lr=0.01, output="stats").total
        assert all(error(getattr(one.total, name), v) < 1e-12 for name, v in vars(alone).items() if v is not None)


class Doubled(torch.autograd.Function):
    """An operation whose derivative looks at numbers, of which there are several at once in a shared pass."""

    @staticmethod
    def forward(value):
        return value * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2

    @staticmethod
    def jvp(ctx, change):
        return change * 2 if change.abs().sum().item() > 0 else change


class OfOnesOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = small_classifier()

    def forward(self, rows):
        return Doubled.apply(self.inner(rows))


def test_a_model_that_cannot_share_takes_a_pass_for_each(caplog):
    rows, labels = torch.randn(2, 6, dtype=torch.float64), torch.tensor([0, 3])
    task, updates = classifier(OfOnesOwn()), [(rows[:1], labels[:1]), (rows[1:], labels[1:])]
    with caplog.at_level(logging.INFO, logger=batched.__name__):
        found = list(influences(task, updates, (rows, labels), lr=0.1))
    assert "a pass for each step" in caplog.text
    for update, one in zip(updates, found, strict=True):
        assert torch.equal(one.total.target_N, influence(task, update, (rows, labels), lr=0.1).total.target_N)


def test_bad_arguments_are_told():
    with pytest.raises(ValueError, match="together is 0, expected at least 1"):
        next(influences(language_model(), UPDATES, OBSERVE, lr=0.1, together=0))
    with pytest.raises(ValueError, match="output is 'all'"):
        next(influences(causal_lm(language_model()), UPDATES, OBSERVE, lr=0.1, output="all"))
    assert list(influences(language_model(), [], OBSERVE, lr=0.1)) == []
