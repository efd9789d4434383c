"""Ways to split rows or matrices over processes are refused in one sentence, with the objects that configure them."""

import contextlib

import pytest
from accelerate import DistributedType, ParallelismConfig

from launcher import ROOT, accelerate, free_port, watch
from tiny_runs import make_trainer
from trl_dynamics.trainers.parallelism import refuse_parallelism, refuse_silent_fallback


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


def test_processes_that_would_train_alone_are_refused(trainer, monkeypatch):
    refuse_silent_fallback(trainer)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, but each would work alone.*use_cpu=True"):
        refuse_silent_fallback(trainer)


@pytest.mark.parametrize(
    ("asked", "runs_as", "refused"),
    [
        ("FSDP", DistributedType.MULTI_CPU, True),
        ("FSDP", DistributedType.FSDP, False),
        ("DEEPSPEED", DistributedType.MULTI_CPU, True),
        ("DEEPSPEED", DistributedType.DEEPSPEED, False),
    ],
)
def test_sharding_that_is_not_there_is_refused(asked, runs_as, refused, trainer, monkeypatch):
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", runs_as)
    refuse_silent_fallback(trainer)
    monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    with pytest.raises(ValueError, match=f"{asked} was asked for") if refused else contextlib.nullcontext():
        refuse_silent_fallback(trainer)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "use_cpu", "message"),
    [("fsdp2", True, "FSDP was asked for, but on a CPU"), ("ddp", False, "each would work alone")],
)
def test_launches_on_a_cpu_that_are_not_what_they_say_end_in_one_sentence(config, use_cpu, message, tmp_path):
    options = {"use_cpu": use_cpu, "bf16": False, "max_steps": 1, "report_to": "none", "probe_set": "embedded"}
    options |= {"model_name_or_path": "embedded", "dataset_name": "embedded", "output_dir": tmp_path / "run"}
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    worker = [str(ROOT / "scripts/train_sft.py"), *flags]
    failure = watch(accelerate(config, 2, free_port(), worker), tmp_path / "output.txt")
    assert failure == "exit status 1"
    assert message in (tmp_path / "output.txt").read_text()
    assert not (tmp_path / "run/dynamics").exists()
