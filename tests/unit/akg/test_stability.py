"""Sizes of K pair by pair, and how far rankings hold between checkpoints, against matrices and pandas."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from akg_models import batch_of, language_model
from trl_dynamics.akg.block_norms import block_norms
from trl_dynamics.akg.gram import gram
from trl_dynamics.akg.kernel import Kernel
from trl_dynamics.akg.stability import influence_measure, kernel_measure, label_pairs, stability, stability_of
from trl_dynamics.akg.task import causal_lm, classifier

UPDATE, OBSERVE = (batch_of(num, 6, num, num_labels=3, vocabulary=12) for num in (2, 3))


@pytest.fixture(scope="module")
def model():
    """As few labels and weights as may be: K is formed."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 12}
    return language_model(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def one_by_one(task) -> torch.Tensor:
    """(O, U) norms of the whole matrices of pairs, each by itself."""
    rows = [
        [{name: value[[row]] for name, value in batch.items()} for row in range(len(batch["labels"]))]
        for batch in (OBSERVE, UPDATE)
    ]
    return torch.stack([torch.stack([Kernel(task, u, o).exact().norm() for u in rows[1]]) for o in rows[0]])


def test_exact_norms_are_those_of_every_pairs_own_matrix(model):
    task = causal_lm(model)
    torch.testing.assert_close(block_norms(task, UPDATE, OBSERVE), one_by_one(task), rtol=1e-10, atol=0)
    torch.testing.assert_close(block_norms(task, OBSERVE, UPDATE), one_by_one(task).T, rtol=1e-10, atol=0)


def test_sketched_norms_are_unbiased_and_close(model):
    """Random models' kernels are far from low rank, so this is the hard case."""
    task, exact_OU = causal_lm(model), one_by_one(causal_lm(model))
    draws = torch.stack([block_norms(task, UPDATE, OBSERVE, num_products=18, seed=seed) for seed in range(6)])
    plain = torch.stack([plain_norms(task, 18, seed) for seed in range(6)])
    error, error_plain = ((found / exact_OU - 1).square().mean().sqrt() for found in (draws, plain))
    assert error < 0.08 and error < error_plain
    ratio_D = (draws / exact_OU).square().mean(dim=(1, 2))
    assert abs(ratio_D.mean() - 1) < 4 * ratio_D.std() / len(ratio_D) ** 0.5
    other = block_norms(task, OBSERVE, UPDATE, num_products=18, seed=3)
    torch.testing.assert_close(other, draws[3].T, rtol=1e-10, atol=0)  # the side with fewer rows is drawn for


def plain_norms(task, num_products: int, seed: int) -> torch.Tensor:
    """(O, U) by products with Gaussian vectors alone."""
    rng, columns = torch.Generator().manual_seed(seed), []
    for row in range(2):
        kernel = Kernel(task, {name: value[[row]] for name, value in UPDATE.items()}, OBSERVE)
        images = [kernel.apply(torch.randn(kernel.shape_u, generator=rng).double()) for _ in range(num_products)]
        square_N = torch.stack(images).square().sum(dim=2).mean(dim=0)
        columns.append(torch.zeros(3, dtype=torch.float64).index_add(0, task.items(OBSERVE), square_N))
    return torch.stack(columns, dim=1).sqrt()


def test_chosen_layers_make_a_part_of_the_kernel():
    task = classifier(Network())
    parts = [
        Kernel(task, *sides(), moves=lambda name, p=part: name.startswith(p)).exact() for part in ("body", "head")
    ]
    for part, exact in zip(("body", "head"), parts, strict=True):
        found = block_norms(task, *sides(), moves=lambda name, p=part: name.startswith(p))
        torch.testing.assert_close(found, exact.square().sum(dim=(1, 3)).sqrt())
    sketched = block_norms(task, *sides(), num_products=12, moves=lambda name: name.startswith("head"))
    torch.testing.assert_close(
        sketched, parts[1].square().sum(dim=(1, 3)).sqrt()
    )  # four labels: the range is all of it


def test_measures_are_per_pair_of_labels(model):
    task = causal_lm(model)
    assert label_pairs(task, UPDATE, OBSERVE).tolist() == [[9, 6], [6, 4], [3, 2]]
    expected_OU = gram(task, UPDATE, OBSERVE).total_OU / torch.tensor([[9, 6], [6, 4], [3, 2]])
    torch.testing.assert_close(influence_measure(task, UPDATE, OBSERVE), expected_OU)
    twice = {name: torch.cat([value, value]) for name, value in UPDATE.items()}
    found = kernel_measure()(task, twice, OBSERVE)
    torch.testing.assert_close(found[:, :2] ** 2 * label_pairs(task, UPDATE, OBSERVE), one_by_one(task) ** 2)


class Network(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 4)
        self.double()

    def forward(self, rows):
        return self.head(self.body(rows).tanh())


def sides() -> tuple:
    rng = torch.Generator().manual_seed(0)
    return tuple((torch.randn(n, 3, generator=rng, dtype=torch.float64), torch.arange(n) % 4) for n in (5, 6))


@pytest.mark.parametrize("measure", [influence_measure, kernel_measure()], ids=["influence", "kernel"])
def test_the_matrix_is_that_of_rankings_at_every_checkpoint(measure):
    tasks = {step: classifier(Network(seed)) for step, seed in ((0, 0), (10, 0), (20, 7))}
    with torch.no_grad():
        tasks[10].model.head.bias += 0.01
    found = stability(tasks.items(), *sides(), measure)
    values = pd.DataFrame({step: measure(task, *sides()).flatten().numpy() for step, task in tasks.items()})
    np.testing.assert_allclose(found.value_SS, values.corr("spearman").to_numpy(), atol=1e-12)
    assert found.steps == [0, 10, 20] and found.num_pairs == 30
    assert found.value_SS[0, 1] > 0.95 > found.value_SS[1, 2]
    again = stability_of({step: measure(task, *sides()) for step, task in tasks.items()})
    np.testing.assert_array_equal(again.high_SS, found.high_SS)


def test_the_order_of_pairs_counts_and_not_the_size_of_the_kernel():
    """Logits times 3, features as they were: K grows by 9 in the body's part, by 1 in the head's."""
    model = nn.Linear(3, 4, bias=False).double()
    scaled = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False)).double().requires_grad_(False)
    with torch.no_grad():
        scaled[0].weight.copy_(model.weight)
        scaled[1].weight.copy_(3 * torch.eye(4))
    scaled[0].weight.requires_grad_(True)
    names = (("plain", classifier(model)), ("scaled", classifier(scaled)))
    assert stability(names, *sides(), kernel_measure()).value_SS[0, 1] == pytest.approx(1, abs=1e-12)


def test_one_model_may_come_again_with_other_weights():
    model, states = Network(), [Network(seed).state_dict() for seed in (0, 7)]

    def checkpoints():
        for index, state in enumerate(states):
            model.load_state_dict(state)
            yield index, classifier(model)

    apart = [(index, classifier(Network(seed))) for index, seed in enumerate((0, 7))]
    np.testing.assert_array_equal(stability(checkpoints(), *sides()).value_SS, stability(apart, *sides()).value_SS)


def test_bad_checkpoints_are_told():
    task = classifier(Network())
    with pytest.raises(ValueError, match="at least 2"):
        stability([], *sides())
    with pytest.raises(ValueError, match="at least 2"):
        stability([(0, task)], *sides())
    with pytest.raises(ValueError, match="0 comes twice"):
        stability([(0, task), (0, task)], *sides())
    with pytest.raises(ValueError, match="num_products is 5, expected at least 6"):
        block_norms(task, *sides(), num_products=5)


@pytest.mark.parametrize("measure", [influence_measure, kernel_measure(), kernel_measure(6)])
def test_a_row_without_labels_is_told(model, measure):
    without = UPDATE | {"labels": UPDATE["labels"].clone()}
    without["labels"][1] = -100
    with pytest.raises(ValueError, match="row 1 of update has no labelled position"):
        measure(causal_lm(model), without, OBSERVE)
    with pytest.raises(ValueError, match="row 1 of observe has no labelled position"):
        measure(causal_lm(model), OBSERVE, without)
