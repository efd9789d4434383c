"""K as an operator, its size with honest error bars, and the kernel of features."""

import pytest
import torch
from torch import nn

from akg_models import batch_of, language_model
from trl_dynamics.akg.kernel import Kernel, chi_squared
from trl_dynamics.akg.one_step import update_gradient
from trl_dynamics.akg.task import Task, causal_lm, causal_lm_labels, classifier, row_of_label
from trl_dynamics.statistics import student_t

UPDATE, OBSERVE = (batch_of(2, width, seed, num_labels=3, vocabulary=24) for width, seed in ((6, 0), (5, 1)))


def toy(num_steps: int = 0) -> nn.Module:
    """A tiny model, trained for some steps on sequences in which each token is the one before plus one."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 24, "initializer_range": 0.3}
    model = language_model(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(2)
    for _ in range(num_steps):
        ids_BT = (torch.randint(1, 23, (16, 1), generator=rng) + torch.arange(8)) % 23 + 1
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_products_are_those_with_the_matrix_itself():
    kernel = Kernel(causal_lm(toy()), UPDATE, OBSERVE)
    exact = kernel.exact()
    rng = torch.Generator().manual_seed(0)
    right = torch.randn(kernel.shape_u, generator=rng, dtype=torch.float64)
    left = torch.randn(kernel.shape_o, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(kernel.apply(right), torch.einsum("nvuk,uk->nv", exact, right), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        kernel.apply_transposed(left), torch.einsum("nvuk,nv->uk", exact, left), rtol=1e-10, atol=1e-12
    )


def test_the_kernel_between_a_batch_and_itself_is_symmetric_and_has_the_trace_of_all_squared_gradients():
    kernel = Kernel(causal_lm(toy()), UPDATE, UPDATE)
    exact = kernel.exact().flatten(2).flatten(0, 1)
    torch.testing.assert_close(exact, exact.T)
    stand_in = on_the_matrix(kernel)
    draws = [stand_in.trace(48, seed) for seed in range(100)]
    assert sum(draw.low <= float(exact.trace()) <= draw.high for draw in draws) >= 90
    assert kernel.trace(48, 5).value == pytest.approx(draws[5].value, rel=1e-6)


def on_the_matrix(kernel: Kernel) -> Kernel:
    """The same estimators with products by the matrix itself: a hundred draws cost next to nothing."""
    exact, stand_in = kernel.exact(), Kernel.__new__(Kernel)
    vars(stand_in).update(vars(kernel))
    stand_in.apply = lambda v: torch.einsum("nvuk,uk->nv", exact, v)
    stand_in.apply_transposed = lambda w: torch.einsum("nvuk,nv->uk", exact, w)
    return stand_in


@pytest.mark.parametrize("num_steps", [0, 150], ids=["at initialisation", "trained"])
def test_intervals_of_the_norm_cover_it_in_at_least_ninety_of_a_hundred_draws(num_steps):
    kernel = Kernel(causal_lm(toy(num_steps)), UPDATE, OBSERVE)
    whole, true = on_the_matrix(kernel), float(kernel.exact().norm())
    draws = [whole.frobenius(48, seed) for seed in range(100)]
    assert sum(draw.low <= true <= draw.high for draw in draws) >= 90
    plain = [whole.frobenius_plain(48, seed) for seed in range(100)]
    assert sum(draw.low <= true <= draw.high for draw in plain) >= 90

    def spread(found):
        return (sum((draw.value / true - 1) ** 2 for draw in found) / len(found)) ** 0.5

    assert spread(draws) < spread(plain) / 2
    if num_steps:
        assert spread(draws) < 0.01
    one = kernel.frobenius(48, 3)
    assert one.value == pytest.approx(draws[3].value, rel=1e-6) and kernel.num_products == one.num_products == 48


def test_chosen_layers_make_a_part_of_the_kernel():
    task = causal_lm(toy())
    whole = Kernel(task, UPDATE, OBSERVE).exact()
    parts = [
        Kernel(task, UPDATE, OBSERVE, moves=lambda name, first=first: ("layers.0." in name) == first).exact()
        for first in (True, False)
    ]
    torch.testing.assert_close(sum(parts), whole)
    with pytest.raises(ValueError, match="no parameter of"):
        Kernel(task, UPDATE, OBSERVE, moves=lambda name: False)


def test_the_kernel_of_features_predicts_how_features_move():
    model = toy()

    def features(model, batch):
        hidden_BTD = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        yield hidden_BTD[(batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)]

    task = Task(model, features, causal_lm_labels, row_of_label, lambda features, *_: features.square().sum())
    kernel = Kernel(task, UPDATE, OBSERVE)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        pull = 2 * torch.cat(list(features(model, UPDATE)))
        before = torch.cat(list(features(model, OBSERVE)))
    predicted = -1e-6 * kernel.apply(pull)
    gradients = update_gradient(task, UPDATE).gradients
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for name, gradient in gradients.items():
            model.get_parameter(name).add_(gradient, alpha=-1e-6)
        moved = torch.cat(list(features(model, OBSERVE))) - before
    assert torch.linalg.vector_norm(predicted - moved) < 1e-4 * torch.linalg.vector_norm(moved)


def test_quantiles_are_those_of_the_tables():
    for level, freedom, value in [(0.975, 1, 5.0239), (0.025, 1, 0.00098207), (0.975, 10, 20.483), (0.025, 10, 3.247)]:
        assert chi_squared(level, freedom) == pytest.approx(value, rel=2e-3)
    for freedom, value in [(1, 12.7062), (2, 4.3027)]:
        assert student_t(freedom) == pytest.approx(value, rel=1e-4)
    for freedom, value in [(3, 3.1824), (9, 2.2622), (15, 2.1314)]:
        assert student_t(freedom) == pytest.approx(value, rel=1e-2)


def test_classifiers_have_kernels_too():
    torch.manual_seed(0)
    task = classifier(nn.Linear(3, 4, bias=False).double())
    rows = torch.randn(2, 3, dtype=torch.float64)
    exact = Kernel(task, (rows, torch.tensor([0, 1])), (rows, torch.tensor([2, 3]))).exact()
    expected = torch.einsum("nd,ud->nu", rows, rows)[:, None, :, None] * torch.eye(4, dtype=torch.float64)[:, None]
    torch.testing.assert_close(exact, expected.expand_as(exact))


@pytest.mark.parametrize("name", ["frobenius", "trace"])
def test_too_few_products_are_told(name):
    kernel = Kernel(causal_lm(toy()), UPDATE, UPDATE)
    with pytest.raises(ValueError, match="num_products is 5, expected at least 6"):
        getattr(kernel, name)(5)
    if name == "trace":
        with pytest.raises(ValueError, match="equally many positions, got 5 and 6"):
            Kernel(causal_lm(toy()), batch_of(3, 6, 0, num_labels=3, vocabulary=24), OBSERVE).trace()
