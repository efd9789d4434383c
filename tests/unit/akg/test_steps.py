"""What a step does to weights of half precision, where small parts of it would vanish; the rest is with influence."""

import pytest
import torch
from torch import nn

from akg_models import error
from trl_dynamics.akg.steps import step_of

GRADIENT = 1e-3 * torch.randn(100, generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD([p], lr=1e-5, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam([p], lr=1e-5, weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW([p], lr=1e-5, weight_decay=0.01),
}


def parts_of(kind: str, dtype: torch.dtype, wide: torch.dtype) -> dict[str, torch.Tensor]:
    """The parts of a second step of weights that `dtype` has rounded, all of it held in `wide`."""
    weight = 0.02 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(weight.to(dtype).to(wide))
    optimizer = OPTIMIZERS[kind](parameter)
    buffers = ("momentum_buffer",) if kind == "sgd" else ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    state = optimizer.state[parameter]
    state.update({name: (GRADIENT.square() if "sq" in name else GRADIENT).to(dtype).to(wide) for name in buffers})
    if kind != "sgd":
        state["step"] = torch.tensor(1.0)
    found = step_of({"p": GRADIENT.to(dtype).to(wide)}, {"p": parameter}, optimizer, None, None)
    return {name: change["p"] for name, change in found.parts.items()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_of_a_step_of_half_precision_are_those_of_float32(kind, dtype):
    found, expected = parts_of(kind, dtype, dtype), parts_of(kind, dtype, torch.float32)
    assert found.keys() == expected.keys() == {"update", "momentum", "decay"}
    for name, change in found.items():
        assert change.dtype == torch.float32 and change.count_nonzero() == 100
        assert error(change, expected[name]) < 1e-6
