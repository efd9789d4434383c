"""Which backend predicts a trainer's steps, and what each refuses before training begins."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

from tiny import tiny_model
from trl_dynamics import stats_head
from trl_dynamics.trainers.influence.choice import choose_backend
from trl_dynamics.trainers.influence.dense import Dense
from trl_dynamics.trainers.influence.sharded import FullyShardedData, ZeroStates, ZeroWeights


def trainer(kind: str = "NO", *, stage: int = 3, fsdp2: bool = True, precision: str = "no", updates=("batch",)):
    """What of a trainer is asked."""
    accelerator = SimpleNamespace(
        distributed_type=DistributedType[kind],
        is_fsdp2=fsdp2,
        mixed_precision=precision,
        device=torch.device("cpu"),
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
    )
    args = SimpleNamespace(akg_updates=list(updates))
    return SimpleNamespace(accelerator=accelerator, args=args, model=tiny_model("llama"))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("NO", {}, Dense),
        ("MULTI_GPU", {"precision": "bf16", "updates": ("batch", "chosen")}, Dense),
        ("FSDP", {}, FullyShardedData),
        ("DEEPSPEED", {"stage": 1, "updates": ("chosen",)}, ZeroStates),
        ("DEEPSPEED", {"stage": 2}, ZeroStates),
        ("DEEPSPEED", {"stage": 3}, ZeroWeights),
    ],
)
def test_the_backend_follows_how_weights_are_kept(kind, options, expected):
    backend = choose_backend(trainer(kind, **options))
    assert type(backend) is expected
    assert backend.steps_in_backward == (kind == "DEEPSPEED")


def test_split_weights_are_observed_through_the_stats_head():
    given = trainer("FSDP")
    choose_backend(given)
    assert stats_head.is_installed(given.model)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("FSDP", {"fsdp2": False}, "how FSDP1 keeps weights and steps.*fsdp_version: 2"),
        ("DEEPSPEED", {"stage": 0}, "DeepSpeed with zero_stage 0.*DDP"),
        ("MEGATRON_LM", {}, "how MEGATRON_LM keeps.*DDP"),
        ("FSDP", {"precision": "bf16"}, "under FSDP needs float32, but mixed precision is bf16: .*bf16=False"),
        ("DEEPSPEED", {"precision": "fp16"}, "under DEEPSPEED needs float32.*fp16=False"),
        ("DEEPSPEED", {"stage": 2, "precision": "bf16"}, "under DEEPSPEED needs float32"),
        ("FSDP", {"updates": ("batch", "chosen")}, "akg_updates has 'chosen'.*only 'batch'.*DDP.*ZeRO-2"),
        ("DEEPSPEED", {"updates": ("rejected",)}, "akg_updates has 'rejected'"),
    ],
)
def test_what_cannot_be_predicted_is_refused_with_what_can(kind, options, said):
    with pytest.raises(ValueError, match=said):
        choose_backend(trainer(kind, **options))


def test_quantised_weights_are_refused_before_training_begins():
    given = trainer()
    given.model.is_quantized = True
    with pytest.raises(ValueError, match="the weights are quantised.*dequantize"):
        choose_backend(given)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_half_precision_weights_are_refused_where_weights_are_split(kind):
    given = trainer(kind)
    given.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 weights.*DDP"):
        choose_backend(given)
