"""The tiled head equals an obvious float64 loop, whatever the tile, and never holds all logits at once."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_dynamics.ops import tiled_head
from trl_dynamics.ops.tiled_head import Head, token_stats

NAMES = {
    "target_logp",
    "argmax_logp",
    "argmax_id",
    "other_id",
    "other_logp",
    "entropy",
    "sum_sq",
    "topk_mass",
    "extra_logp",
}
VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "factor": {"factor": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "factor": 1.7, "softcap": 5.0},
}


def slow_stats(hidden_ND, head: Head, target_N, extra_NE=None, top_k: int = 10) -> dict[str, torch.Tensor]:
    """One position at a time and one label at a time, in float64."""
    rows = []
    for index, hidden_D in enumerate(hidden_ND.double()):
        logits = []
        for label, weight_D in enumerate(head.weight_VD.double()):
            logit = (weight_D * hidden_D).sum()
            if head.bias_V is not None:
                logit = logit + head.bias_V[label].double()
            logit = logit * head.factor
            logits.append(logit if head.softcap is None else head.softcap * torch.tanh(logit / head.softcap))
        logits_V = torch.stack(logits)
        logp = (logits_V - torch.logsumexp(logits_V, 0)).tolist()
        prob = [math.exp(value) for value in logp]
        target = int(target_N[index])
        argmax = max(range(len(logp)), key=lambda label: logp[label])
        other = max((label for label in range(len(logp)) if label != target), key=lambda label: logp[label])
        rows.append(
            {
                "target_logp": logp[target],
                "argmax_logp": logp[argmax],
                "argmax_id": argmax,
                "other_id": other,
                "other_logp": logp[other],
                "entropy": -sum(p * value for p, value in zip(prob, logp, strict=True) if p > 0),
                "sum_sq": sum(p * p for p in prob),
                "topk_mass": sum(sorted(prob, reverse=True)[:top_k]),
            }
            | ({} if extra_NE is None else {"extra_logp": [logp[label] for label in extra_NE[index].tolist()]})
        )
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def problem(num=7, dim=5, vocab=23, dtype=torch.float64, *, bias=False, **options):
    """Hidden states, a head, targets (every other one the argmax) and three extra labels per position."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(num, dim, generator=generator, dtype=torch.float64).to(dtype)
    weight_VD = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype)
    bias_V = torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    head = Head(weight_VD, bias_V, **options)
    argmax_N = head.logits(hidden_ND).argmax(-1)
    target_N = torch.where(torch.arange(num) % 2 == 0, argmax_N, (argmax_N + 1) % vocab)
    extra_NE = torch.randint(vocab, (num, 3), generator=generator)
    return hidden_ND, head, target_N, extra_NE


@pytest.mark.parametrize("top_k", [1, 2, 10, 23, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_loop(variant, top_k):
    hidden_ND, head, target_N, extra_NE = problem(**VARIANTS[variant])
    given = token_stats(hidden_ND, head, target_N, extra_NE, top_k)
    expected = slow_stats(hidden_ND, head, target_N, extra_NE, top_k)
    assert set(given) == NAMES
    for name, value in expected.items():
        torch.testing.assert_close(given[name].double(), value, rtol=0, atol=1e-12, msg=name)


def test_both_kinds_of_target_occur():
    hidden_ND, head, target_N, _ = problem()
    stats = token_stats(hidden_ND, head, target_N)
    is_argmax_N = stats["argmax_id"] == target_N
    assert is_argmax_N.any() and not is_argmax_N.all()
    assert torch.all(stats["other_id"] != target_N)
    assert torch.equal(stats["other_id"][~is_argmax_N], stats["argmax_id"][~is_argmax_N])
    assert torch.all(stats["other_logp"][is_argmax_N] <= stats["target_logp"][is_argmax_N])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows_per_tile", [1, 2, 3, 6, 7, 100])
def test_the_tile_does_not_matter(rows_per_tile, dtype, monkeypatch):
    arguments = problem(dtype=dtype, bias=True, softcap=5.0)
    whole = token_stats(*arguments)
    monkeypatch.setattr(tiled_head, "TILE_ELEMENTS", rows_per_tile * 23 + 5)
    tiled = token_stats(*arguments)
    for name, value in whole.items():
        torch.testing.assert_close(tiled[name], value, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_a_tile_smaller_than_the_vocabulary_still_holds_one_row(monkeypatch):
    arguments = problem()
    monkeypatch.setattr(tiled_head, "TILE_ELEMENTS", 1)
    for name, value in slow_stats(*arguments).items():
        torch.testing.assert_close(token_stats(*arguments)[name].double(), value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_statistics_are_float32(dtype):
    hidden_ND, head, target_N, extra_NE = problem(dtype=dtype, bias=True, factor=0.5, softcap=9.0)
    stats = token_stats(hidden_ND, head, target_N, extra_NE)
    ids = {"argmax_id", "other_id"}
    assert all(value.dtype == (torch.int64 if name in ids else torch.float32) for name, value in stats.items())
    # Only the product is in the low precision: everything after it is as exact as float32.
    logits_NV = torch.nn.functional.linear(hidden_ND, head.weight_VD, head.bias_V).double() * 0.5
    logp_NV = torch.log_softmax(9.0 * torch.tanh(logits_NV / 9.0), dim=-1)
    torch.testing.assert_close(
        stats["target_logp"].double(), logp_NV.gather(1, target_N[:, None])[:, 0], rtol=0, atol=2e-6
    )
    torch.testing.assert_close(stats["entropy"].double(), -(logp_NV.exp() * logp_NV).sum(-1), rtol=0, atol=2e-6)


def test_extra_labels_are_optional_and_may_be_none():
    hidden_ND, head, target_N, extra_NE = problem()
    assert set(token_stats(hidden_ND, head, target_N)) == NAMES - {"extra_logp"}
    assert token_stats(hidden_ND, head, target_N, extra_NE[:, :0])["extra_logp"].shape == (7, 0)
    own = token_stats(hidden_ND, head, target_N, target_N[:, None])
    assert torch.equal(own["extra_logp"][:, 0], own["target_logp"])


def test_top_k_beyond_the_vocabulary_is_everything():
    hidden_ND, head, target_N, _ = problem()
    mass_N = token_stats(hidden_ND, head, target_N, top_k=50)["topk_mass"]
    torch.testing.assert_close(mass_N, torch.ones_like(mass_N), rtol=0, atol=1e-12)


def test_impossible_labels_leave_the_rest_exact():
    hidden_ND, head, _, _ = problem(dtype=torch.float32)
    bias_V = torch.zeros(23)
    bias_V[[3, 20]] = -torch.inf
    possible = [label for label in range(23) if label not in (3, 20)]
    target_N = torch.full((7,), 5)
    stats = token_stats(hidden_ND, Head(head.weight_VD, bias_V), target_N, torch.full((7, 1), 3))
    short = token_stats(hidden_ND, Head(head.weight_VD[possible]), torch.full((7,), possible.index(5)))
    for name in ("target_logp", "argmax_logp", "other_logp", "entropy", "sum_sq", "topk_mass"):
        assert torch.isfinite(stats[name]).all()
        torch.testing.assert_close(stats[name], short[name], rtol=0, atol=1e-5)
    assert torch.all(stats["extra_logp"] == -torch.inf)


def test_one_certain_label_has_no_entropy():
    bias_V = torch.full((23,), -torch.inf)
    bias_V[4] = 0.0
    stats = token_stats(torch.zeros(2, 5), Head(torch.zeros(23, 5), bias_V), torch.tensor([4, 5]))
    assert stats["entropy"].tolist() == [0.0, 0.0]
    assert stats["target_logp"].tolist() == [0.0, -torch.inf]
    assert stats["argmax_id"].tolist() == [4, 4] and stats["sum_sq"].tolist() == [1.0, 1.0]


def test_an_empty_request_gives_empty_statistics_of_the_same_kind():
    hidden_ND, head, target_N, extra_NE = problem(dtype=torch.bfloat16)
    some = token_stats(hidden_ND, head, target_N, extra_NE)
    none = token_stats(hidden_ND[:0], head, target_N[:0], extra_NE[:0])
    assert {name: value.dtype for name, value in none.items()} == {name: value.dtype for name, value in some.items()}
    assert all(len(value) == 0 for value in none.values()) and none["extra_logp"].shape == (0, 3)


class LargestOutput(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tensor_over_all_positions_and_labels(variant, monkeypatch):
    num, vocab, rows_per_tile = 64, 301, 4
    hidden_ND, head, target_N, extra_NE = problem(num, 5, vocab, torch.bfloat16, **VARIANTS[variant])
    with LargestOutput() as untiled:
        token_stats(hidden_ND, head, target_N, extra_NE)
    assert untiled.num_elements == num * vocab
    monkeypatch.setattr(tiled_head, "TILE_ELEMENTS", rows_per_tile * vocab)
    with LargestOutput() as tiled:
        token_stats(hidden_ND, head, target_N, extra_NE)
    # The transposed view of the weight, which costs no memory, is as large as the weight.
    assert tiled.num_elements == max(rows_per_tile * vocab, vocab * 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_not_rounded_under_autocast(dtype):
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(7, 16), torch.randn(300, 16)
    target_N = torch.arange(7)
    with torch.autocast("cpu", dtype=dtype):
        logits_NV = Head(weight_VD).logits(hidden_ND).double()
        stats = token_stats(hidden_ND, Head(weight_VD), target_N)
    logp_NV = logits_NV.log_softmax(-1)
    exact = {"entropy": -(logp_NV.exp() * logp_NV).sum(-1), "sum_sq": logp_NV.exp().square().sum(-1)}
    for name, expected in exact.items():
        torch.testing.assert_close(stats[name].double(), expected, atol=1e-6, rtol=1e-5)
