"""Inner products of gradients for models whose parameters are not where layers have theirs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModelForCausalLM

from akg_models import batch_of
from trl_dynamics.akg.gram import gram
from trl_dynamics.akg.task import Task, causal_lm, classifier


class Scaled(nn.Module):
    """A parameter of its own, and a child that is trained; `shared` makes its scale the child's bias."""

    def __init__(self, shared: bool = False):
        super().__init__()
        self.child = nn.Linear(6, 6)
        self.scale = self.child.bias if shared else nn.Parameter(torch.randn(6))

    def forward(self, rows):
        return self.child(rows) * self.scale


class Shifted(nn.Module):
    """A parameter of the model itself, with trained layers beneath it."""

    def __init__(self):
        super().__init__()
        self.shift, self.first, self.last = nn.Parameter(torch.randn(6)), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, rows):
        return self.last(torch.tanh(self.first(rows) + self.shift))


class Listed(nn.Module):
    """Parameters in containers that are never called."""

    def __init__(self):
        super().__init__()
        self.layer, self.listed = nn.Linear(6, 6), nn.ParameterList([torch.randn(6), torch.randn(6)])
        self.named = nn.ParameterDict({"shift": torch.randn(6)})

    def forward(self, rows):
        return self.layer(rows) * self.listed[0] + self.listed[1] + self.named["shift"]


class ByHand(nn.Module):
    """Reads its child's weight without calling it, as Mamba does; one parameter has two names."""

    def __init__(self):
        super().__init__()
        self.child, self.scale = nn.Linear(6, 6), nn.Parameter(torch.randn(6))
        self.same = self.scale

    def forward(self, rows):
        return nn.functional.linear(rows * self.scale, self.child.weight) * self.same


STRUCTURES = {
    "own and child": Scaled,
    "own is the child's": lambda: Scaled(shared=True),
    "root": Shifted,
    "containers": Listed,
    "by hand": ByHand,
    "within another": lambda: nn.Sequential(Scaled(), Scaled()),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
}
MAMBAS = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    first = STRUCTURES[name]()
    model = first if name == "root" else nn.Sequential(nn.Linear(6, 6), first, nn.Tanh(), nn.Linear(6, 5))
    return model.double().eval()


def stored(task: Task, batches: list) -> torch.Tensor:
    """(rows, P) gradients of ln pi of a row's labels, by autograd, row by row."""
    parameters, rows = list(task.trainable().values()), []
    for batch in batches:
        logp_NV = torch.cat(list(task.logits(task.model, batch))).log_softmax(dim=-1)
        score = logp_NV.gather(1, task.labels(batch)[:, None]).sum()
        found = torch.autograd.grad(score, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows).double()


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("num_rows", [3, 6])
@pytest.mark.parametrize("name", STRUCTURES)
def test_products_are_those_of_stored_gradients(name, num_rows, check):
    """Six rows are as many as the layers have outputs, three are not."""
    task, rng = classifier(made(name)), torch.Generator().manual_seed(1)
    update, observe = (
        (torch.randn(num_rows, 6, generator=rng, dtype=torch.float64), torch.arange(num_rows) % 5) for _ in range(2)
    )
    state = copy.deepcopy(task.model.state_dict())
    found = gram(task, update, observe, by="module", check=check)
    one, other = (
        stored(task, [(rows[i : i + 1], labels[i : i + 1]) for i in range(num_rows)])
        for rows, labels in (observe, update)
    )
    torch.testing.assert_close(found.total_OU, -one @ other.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(found.module_OU.values()), found.total_OU, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(state[key], value) for key, value in task.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in task.model.parameters())


@pytest.mark.parametrize("family", MAMBAS)
def test_mamba_reads_weights_of_layers_that_it_does_not_call(family):
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 1, "pad_token_id": 0} | MAMBAS[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32).eval()
    task, update, observe = causal_lm(model), batch_of(2, 8, 1), batch_of(3, 8, 2)
    one, other = (
        stored(task, [{name: value[row : row + 1] for name, value in batch.items()} for row in range(size)])
        for batch, size in ((observe, 3), (update, 2))
    )
    expected_OU = -one @ other.T
    off_OU = (gram(task, update, observe).total_OU - expected_OU).abs()
    assert float(off_OU.max()) < 1e-5 * float(expected_OU.abs().max())


class HalfByHand(nn.Module):
    """Calls its child, and reads its weight besides."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(6, 6)

    def forward(self, rows):
        return self.child(rows) + 0.01 * nn.functional.linear(rows, self.child.weight)


def test_a_small_part_of_one_parameter_that_is_missing_is_found():
    """The sum over all parameters is nearly right."""
    torch.manual_seed(0)
    big = nn.Linear(6, 400)
    model = nn.Sequential(HalfByHand(), nn.Tanh(), big, nn.Linear(400, 5)).double()
    with torch.no_grad():
        big.weight.mul_(1e-2)
    rows = (torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"of 0.child.weight.*uses a parameter outside"):
        gram(classifier(model), rows, rows)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.BatchNorm1d(6, track_running_stats=False), "BatchNorm1d.*for one row alone.*akg.influence"),
        (lambda: nn.utils.weight_norm(nn.Linear(6, 6)), "WeightNorm of torch.nn.utils.*parametrizations"),
    ],
    ids=["batch norm", "weight norm by a hook"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_layers_that_cannot_be_run_for_one_row_are_refused(layer, message):
    model = nn.Sequential(nn.Linear(6, 6), layer(), nn.Linear(6, 5)).double()
    rows = (torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=message):
        gram(classifier(model), rows, rows, check=False)
