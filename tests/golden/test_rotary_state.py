"""Rotary embeddings that scale with the longest row seen go on in training as if nothing had been scored."""

import pytest
import torch
import trl
from datasets import Dataset

import trl_dynamics
from tiny import tiny_model
from tiny_runs import make_trainer

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
# Rows of up to 200 tokens, of which the trained length is 64; probes stay below it.
ROWS = [{"prompt": "Say it: ", "completion": " word" * (5 + 4 * index)} for index in range(9)]
PROBES = [
    {"prompt": "a b", "chosen": " c d e", "rejected": " f"},
    {"prompt": "a b ccccccccccccc", "chosen": " c d e", "rejected": " f" * 20},
]


def dynamic_model(family: str = "llama", **overrides):
    return tiny_model(family, max_position_embeddings=64, rope_parameters=DYNAMIC, **overrides)


def trained(package, folder, **options) -> tuple[dict, dict]:
    """Weights after ten steps, and what the rotary module holds."""
    options |= {"max_steps": 10, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
    trainer = make_trainer(
        "sft", folder, package=package, make_model=dynamic_model, data=Dataset.from_list(ROWS), **options
    )
    trainer.train()
    rotary = trainer.model.model.rotary_emb
    held = {name: value.clone() for name, value in rotary.named_buffers()}
    return trainer.model.state_dict(), held | {"longest": torch.as_tensor(rotary.max_seq_len_cached)}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return trained(trl, tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_training_with_dynamic_rope_is_trls(layout, theirs, tmp_path):
    options = {"probe_every": 1, "probe_samples": 1, "probe_sample_tokens": 4, "akg_every": 3}
    ours = trained(trl_dynamics, tmp_path / "ours", probes=PROBES, probe_layout=layout, **options)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
