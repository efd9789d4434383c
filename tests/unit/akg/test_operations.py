"""Derivatives of forward mode, of first and second order, against differences in float64; wrong ones are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from akg_models import error, logp_of
from trl_dynamics.akg.one_step import influence
from trl_dynamics.akg.operations import Nestable, Unhooked
from trl_dynamics.akg.task import classifier

torch.manual_seed(0)
ROWS, IMAGES, WEIGHT = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 6, 8), (2, 4, 6, 6), (8,)))
SQUARE = torch.randn(5, 5, dtype=torch.float64) + 3 * torch.eye(5, dtype=torch.float64)
KERNEL, LABELS = torch.randn(3, 4, 3, 3, dtype=torch.float64), torch.randint(0, 8, (24,))
MEAN, VARIANCE = torch.linspace(-1, 1, 4, dtype=torch.float64), torch.linspace(0.5, 2, 4, dtype=torch.float64)
CHANNELS = WEIGHT[:4]

ON_ROWS = {
    **{
        name: getattr(F, name)
        for name in (
            "elu selu celu mish softplus hardswish hardtanh relu relu6 leaky_relu silu gelu glu tanhshrink softsign "
            "logsigmoid sigmoid tanh normalize"
        ).split()
    },
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "cross_entropy": lambda x: F.cross_entropy(x.view(24, 8), LABELS, reduction="none"),
    "layer_norm": lambda x: F.layer_norm(x, (8,), WEIGHT, WEIGHT),
    "rms_norm": lambda x: F.rms_norm(x, (8,), WEIGHT, 1e-5),
    "batch_norm of rows": lambda x: F.batch_norm(x.view(-1, 8), None, None, WEIGHT, None, True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.sin(), x * x, is_causal=True),
    "linear": lambda x: F.linear(x, x[0, :, :].T @ x[1], WEIGHT * x.mean()),
    "prelu": lambda x: F.prelu(x, WEIGHT[:6] * x.mean()),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x * x + WEIGHT, dim=-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "cumsum": lambda x: (x * x).cumsum(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "embedding": lambda x: F.embedding(LABELS[:5] % 4, x[:, 0]) ** 2,
    "var": lambda x: x.var(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
}
ON_IMAGES = {
    "batch_norm": lambda x: F.batch_norm(x, None, None, CHANNELS, CHANNELS, True),
    "batch_norm of given statistics": lambda x: F.batch_norm(x, MEAN, VARIANCE, CHANNELS, CHANNELS, False),
    "instance_norm": lambda x: F.instance_norm(x, None, None, CHANNELS, CHANNELS),
    "instance_norm without weights": F.instance_norm,
    "instance_norm of given statistics": lambda x: F.instance_norm(x, MEAN, VARIANCE, use_input_stats=False),
    "group_norm": lambda x: F.group_norm(x, 2, CHANNELS, CHANNELS),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "conv2d": lambda x: F.conv2d(x, KERNEL * x.mean(), padding=1),
    "max_pool2d": lambda x: F.max_pool2d(x**2, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x**2, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x**2, 3),
    "interpolate": lambda x: F.interpolate(x**2, scale_factor=2, mode="bilinear"),
}
CASES = [(name, call, ROWS) for name, call in ON_ROWS.items()]
CASES += [(name, call, IMAGES) for name, call in ON_IMAGES.items()]


@pytest.mark.parametrize(("call", "value"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_both_orders_are_those_of_differences(call, value):
    change = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(3))
    one = torch.ones((), dtype=torch.float64)

    def at(distance: torch.Tensor) -> torch.Tensor:
        return call(value + distance * change)

    def slope_at(distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.func.jvp(at, (distance,), (one,))

    step = 1e-4 * one
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with Nestable():
            (here, first), (_, second) = torch.func.jvp(slope_at, (0 * one,), (one,))
        torch.testing.assert_close(here, at(0 * one), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(first, (at(step) - at(-step)) / 2e-4, rtol=1e-5, atol=1e-5)
        expected = (slope_at(step)[1] - slope_at(-step)[1]) / 2e-4
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "instance", "glu"])
def test_the_second_order_of_influence_goes_through(norm):
    """What it leaves of a real step falls with the cube of the step."""
    torch.manual_seed(0)
    inner = {
        "batch": nn.BatchNorm1d(8, track_running_stats=False),
        "instance": nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
        "glu": nn.Sequential(nn.Linear(8, 16), nn.GLU()),
    }[norm]
    model = nn.Sequential(nn.Linear(6, 8), inner, nn.Mish(), nn.Linear(8, 5)).double()
    task, rng = classifier(model), torch.Generator().manual_seed(1)
    update, observe = ((torch.randn(6, 6, generator=rng, dtype=torch.float64), torch.arange(6) % 5) for _ in range(2))
    left = []
    for lr in (1e-1, 1e-2):
        found = influence(task, update, observe, lr=lr, output="full", order=2)
        before = logp_of(task, observe)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for name, change in found.step.total.items():
                model.get_parameter(name).add_(change)
        after = logp_of(task, observe)
        model.load_state_dict(weights)
        left.append(error(found.total.logp_NV, after - before) * lr)
    assert left[1] < 3e-3 * left[0]


WRONG = {
    "det": torch.det,
    "logdet": lambda x: (x @ x.T).logdet(),
    "slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "solve": lambda x: torch.linalg.solve(x, x * x),
    "householder_product": lambda x: torch.linalg.householder_product(x, x[0]),
    "layer_norm": lambda x: torch.layer_norm(x, (5,)),
    "batch_norm": lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_second_derivative_is_refused(call):
    with pytest.raises(ValueError, match="second derivative.*order=1"), Nestable():
        call(SQUARE)


class Inverse(nn.Module):
    """Logits of an inverse from a Cholesky factor, whose derivative torch has wrong at first order already."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(SQUARE.clone())

    def forward(self, rows):
        return rows @ torch.cholesky_inverse(torch.linalg.cholesky(self.weight @ self.weight.T))


def test_a_wrong_first_derivative_is_refused():
    rows, labels = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 1, 2])
    for order in (1, 2):
        with pytest.raises(ValueError, match="cholesky_inverse.*linalg.inv"):
            influence(classifier(Inverse()), (rows, labels), (rows, labels), lr=0.1, order=order)
    with Unhooked():
        torch.det(SQUARE)
