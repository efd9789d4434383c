"""Ways to split rows or matrices over processes are refused in one sentence, with the objects that configure them."""

import pytest
from accelerate import ParallelismConfig

from tiny_runs import make_trainer
from trl_dynamics.trainers.parallelism import refuse_parallelism


@pytest.fixture
def trainer(tmp_path):
    return make_trainer("sft", tmp_path)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"cp_size": 2}, r"context parallelism \(cp_size=2\)"),
        ({"sp_size": 4}, r"sequence parallelism \(sp_size=4\)"),
        ({"tp_size": 2}, r"tensor parallelism \(tp_size=2\)"),
        ({"tp_size": 2, "cp_size": 2}, r"\(cp_size=2\) and tensor parallelism \(tp_size=2\)"),
    ],
)
def test_split_rows_and_matrices_are_refused(trainer, monkeypatch, sizes, named):
    monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", ParallelismConfig(**sizes))
    with pytest.raises(ValueError, match=named):
        refuse_parallelism(trainer)


@pytest.mark.parametrize("sizes", [{}, {"dp_shard_size": 8}, {"dp_replicate_size": 2, "dp_shard_size": 4}])
def test_data_parallelism_of_every_kind_is_not(trainer, monkeypatch, sizes):
    monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", ParallelismConfig(**sizes))
    refuse_parallelism(trainer)


def test_a_model_that_was_loaded_in_parts_is_refused(trainer, monkeypatch):
    monkeypatch.setattr(trainer.model, "_tp_size", 2)
    assert trainer.model.tp_size == 2
    with pytest.raises(ValueError, match=r"tensor parallelism \(tp_size=2\)"):
        refuse_parallelism(trainer)
