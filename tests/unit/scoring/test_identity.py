"""One model is told from another by its kind and shapes, at no cost, and never by its weights or its name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny import tiny_model
from trl_dynamics.scoring.identity import model_identity


def with_lora(rank: int):
    return get_peft_model(tiny_model(), LoraConfig(r=rank, target_modules="all-linear"))


def test_weights_and_names_do_not_matter():
    one, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.config.name_or_path = "moved"
    assert model_identity(one) == model_identity(other)
    assert model_identity(with_lora(4)) == model_identity(with_lora(4))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda: tiny_model("qwen3"), {"architecture", "num_parameters", "structure"}),
        (lambda: tiny_model(vocab_size=320), {"vocab_size", "num_parameters", "structure"}),
        (lambda: tiny_model().bfloat16(), {"dtype", "structure"}),
        (lambda: with_lora(4), {"num_parameters", "structure"}),
        (lambda: tiny_model(num_key_value_heads=4), {"num_parameters", "structure"}),
    ],
    ids=["architecture", "vocabulary", "dtype", "adapter", "heads"],
)
def test_everything_else_does(change, differs):
    one, other = model_identity(tiny_model()), model_identity(change())
    assert differs <= {name for name in one if one[name] != other[name]}


def test_sharded_parameters_count_as_whole():
    """Under ZeRO-3 a parameter is empty and its shape is kept beside it."""
    whole, sharded = tiny_model(), tiny_model()
    for parameter in sharded.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert model_identity(sharded) == model_identity(whole)
