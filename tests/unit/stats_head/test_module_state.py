"""What a forward changes on its modules is put back: buffers, tensors and numbers, replaced, written to or made."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trl_dynamics.stats_head import kept_state


class Restless(nn.Module):
    """Every way in which a forward can leave something behind."""

    def __init__(self):
        super().__init__()
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3), persistent=False)
        self.register_buffer("empty", None)
        self.longest, self.kind, self.cache = 0, "short", torch.zeros(2)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, number: int) -> None:
        self.written += number
        self.replaced = torch.full((number,), 1.0)
        self.empty = torch.ones(1)
        self.longest, self.kind, self.made = number, "long", torch.ones(1)
        self.cache.add_(1)
        self.register_buffer("new", torch.ones(1))


def state(module: nn.Module) -> dict:
    plain = {name: value for name, value in vars(module).items() if isinstance(value, int | str | torch.Tensor)}
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in plain.items()} | {
        f"buffer {name}": None if value is None else value.clone() for name, value in module._buffers.items()
    }


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


@pytest.mark.parametrize("fails", [False, True])
def test_all_of_it_is_put_back(fails):
    outer = nn.Sequential(Restless(), Restless())
    before = [state(module) for module in outer]
    held = outer[0].replaced
    try:
        with torch.no_grad(), kept_state(outer):
            outer[1](4)
            outer[0](5)
            assert not any(same(state(module), old) for module, old in zip(outer, before, strict=True))
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert all(same(state(module), old) for module, old in zip(outer, before, strict=True))
    assert outer[0].replaced is held and "new" not in dict(outer.named_buffers())


def test_parameters_hooks_and_modes_are_not_touched():
    module = Restless().train()
    with kept_state(module):
        module.eval()
        module.weight.data.add_(1)
        handle = module.register_forward_hook(lambda *_: None)
    assert not module.training and module.weight[0] == 2 and handle.id in module._forward_hooks


def test_a_large_buffer_that_is_written_to_is_refused(monkeypatch):
    monkeypatch.setattr("trl_dynamics.stats_head.module_state.LARGEST_COPY", 8)
    module = nn.Sequential(Restless(), Restless())
    before = state(module[1])
    with pytest.raises(ValueError, match="writes to 0.written, 1.written, a buffer of more than"), torch.no_grad():
        with kept_state(module):
            module[0](1)
            module[1](1)
    now = state(module[1])
    assert now.pop("buffer written")[0] == 1 and before.pop("buffer written")[0] == 0
    assert same(now, before), "all else is put back all the same"
    with kept_state(module):
        pass


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_embeddings_start_fresh_and_are_left_as_they_were(rope_type):
    torch.manual_seed(0)
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if rope_type == "longrope" else {}
    config = AutoConfig.for_model(
        "llama", vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64 if rope_type == "longrope" else 16, rope_parameters=rope, initializer_range=0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    short, long = torch.arange(16)[None] % 50, torch.arange(40)[None] % 50
    rotary = model.model.rotary_emb
    with torch.no_grad():
        fresh = model(short).logits
        model(long)
        before = state(rotary)
        with kept_state(model):
            given = model(short).logits
        assert same(state(rotary), before)
    assert torch.equal(given, fresh)
