"""Runs scenarios one after another, on every process that `accelerate launch` starts.

usage: worker.py CONFIG FOLDER NUM_PROCESSES SCENARIO...

A CPU needs three things that a GPU does not, and they are done here and nowhere else: FSDP must believe in the device,
DeepSpeed must be told to use gloo, and its collectives through shared memory, which are compiled at the first use,
must be off. Most ways to get this wrong run one process, or plain data parallelism, without an error; so every
scenario asserts what it ran as.
"""

import contextlib
import errno
import faulthandler
import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

EXPECTED = {
    "single_gpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_CPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def prepare_device(config: str) -> dict:
    """What this CPU needs to run `config`; returns training arguments."""
    torch.set_num_threads(1)
    if config == "fsdp2":
        if not hasattr(PartialState, "_prepare_backend"):
            raise RuntimeError("accelerate no longer has PartialState._prepare_backend: find its successor for FSDP2")
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        return {"use_cpu": False}
    if config.startswith("zero"):
        import deepspeed

        if "deepspeed_shm_comm" not in deepspeed.ops.__compatible_ops__:
            raise RuntimeError("deepspeed no longer lists deepspeed_shm_comm: see how its collectives are chosen now")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        return {"use_cpu": False, "ddp_backend": "gloo"}
    return {"use_cpu": True}


def share_held(trainer, config: str) -> float:
    """The share of what `config` splits over processes that this one holds: parameters, or in ZeRO-2 their state."""
    if config == "fsdp2":
        parameters = list(trainer.model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters), "a parameter lies here as a whole"
        held = sum(parameter.to_local().numel() for parameter in parameters)
        return held / sum(parameter.numel() for parameter in parameters)
    if config.startswith("zero"):
        engine = trainer.model_wrapped
        assert type(engine).__name__ == "DeepSpeedEngine"
        assert engine.zero_optimization_stage() == int(config[-1])
    if config == "zero3":
        parameters = list(trainer.model.parameters())
        assert all(parameter.numel() == 0 for parameter in parameters), "a parameter lies here as a whole"
        return sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters)
    if config == "zero2":
        held = sum(flat.numel() for flat in engine.optimizer.single_partition_of_fp32_groups)
        return held / sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return 1.0


def run(name: str, config: str, folder: Path, num_processes: int, device_options: dict) -> dict:
    """One scenario on this process; returns what it ran as."""
    from scenarios import SCENARIOS, TRACKINGS, make

    if name in TRACKINGS:
        return track(TRACKINGS[name], config, folder, name, num_processes)
    scenario = SCENARIOS[name]
    output_dir = folder / name
    os.environ["ACCELERATE_MIXED_PRECISION"] = scenario.mixed_precision
    if scenario.parallelism:
        return {"refused": refusal(scenario, folder, name, num_processes, device_options)}
    checkpoint = None
    if scenario.resume_from:
        if int(os.environ.get("RANK", 0)) == 0:
            shutil.copytree(folder / scenario.resume_from, output_dir)
        checkpoint = str(output_dir / "checkpoint-2")
    trainer = make(scenario, folder, name, num_processes, **device_options)
    accelerator = trainer.accelerator
    assert accelerator.distributed_type == EXPECTED[config if num_processes > 1 else "single_gpu"], vars(accelerator)
    assert accelerator.num_processes == num_processes
    accelerator.wait_for_everyone()
    if config == "zero3":
        # DeepSpeed does not split small parameters, which all of a tiny model's are.
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    disk_is_full = scenario.full_disk_at is not None
    with contextlib.ExitStack() as stack:
        if disk_is_full:
            stack.enter_context(full_disk(trainer, scenario.full_disk_at, folder / name))
        if scenario.clocks_differ:
            affords = lambda *args, step, **more: step in (0, 4) or not accelerator.is_main_process  # noqa: E731
            stack.enter_context(mock.patch("trl_dynamics.tracking.callback.is_affordable", affords))
        trainer.train(resume_from_checkpoint=checkpoint)
    share = share_held(trainer, config)
    if num_processes > 1 and config != "ddp":
        assert 1 / num_processes <= share < 0.6, f"a process holds {share:.2f} of the whole"
    accelerator.wait_for_everyone()
    assert accelerator.mixed_precision == scenario.mixed_precision
    # Not `trainer.end()`, which takes the process group down: the next scenario uses it.
    return {
        "distributed_type": str(accelerator.distributed_type.value),
        "num_processes": accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "share_held": share,
        "steps": gather_object([trainer.state.global_step]),
        "log": trainer.state.log_history,
    }


@contextlib.contextmanager
def full_disk(trainer, step: int, output_dir: Path):
    """While training stands at `step`, the main process has no room for records; the others see nothing of it.

    What a process raises is noted beside `output_dir` and waited for: the launcher would end those that are late.
    """
    from trl_dynamics.store import files

    perform, accelerator = files.perform, trainer.accelerator

    def broken(operation, path, action, *arguments):
        if operation == "write" and accelerator.is_main_process and trainer.state.global_step == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return perform(operation, path, action, *arguments)

    try:
        with mock.patch.object(files, "perform", broken):
            yield
    except OSError as error:
        output_dir.with_name(f"{output_dir.name}_error_{accelerator.process_index}").write_text(str(error))
        accelerator.wait_for_everyone()
        raise


def track(tracking, config: str, folder: Path, name: str, num_processes: int) -> dict:
    """The calls of `trl-dynamics track` on this process, and how many models each process loaded for each."""
    from trl_dynamics.cli.main import main as command_line
    from trl_dynamics.paths import checkpoints as library

    flags = ["--model_name_or_path", str((folder / tracking.run).resolve()), "--output_dir", str(folder / name)]
    flags += ["--probe_set", str(folder / "probes.jsonl"), *tracking.options]
    # Nothing else tells accelerate to look for processes on a CPU; for training, its arguments do.
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    loaded = []
    for pattern in tracking.calls:
        with mock.patch.object(library, "_load", wraps=library._load) as load:
            assert command_line(["track", *flags, "--checkpoints", pattern]) == 0
        loaded.append(gather_object([load.call_count]))
    del os.environ["ACCELERATE_USE_CPU"]
    state = PartialState()
    assert state.distributed_type == EXPECTED[config if num_processes > 1 else "single_gpu"], vars(state)
    assert state.num_processes == num_processes
    return {
        "distributed_type": str(state.distributed_type.value),
        "num_processes": state.num_processes,
        "loaded": loaded,
    }


def refusal(scenario, folder: Path, name: str, num_processes: int, device_options: dict) -> str:
    """What the trainer says against sizes of parallelism that accelerate takes from the environment."""
    from scenarios import make

    sizes = {f"PARALLELISM_CONFIG_{size}": value for size, value in scenario.parallelism.items()}
    os.environ.update(sizes | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"})
    try:
        make(scenario, folder, name, num_processes, **device_options)
    except ValueError as error:
        return str(error)
    finally:
        for variable in [*sizes, "ACCELERATE_USE_PARALLELISM_CONFIG"]:
            del os.environ[variable]
    raise AssertionError("the trainer took it")


def main(config: str, folder: Path, num_processes: int, names: list[str]) -> None:
    is_main = int(os.environ.get("RANK", 0)) == 0
    device_options = prepare_device(config if num_processes > 1 else "single_gpu")
    for name in names:
        if name == "hang":
            # Processes may start seconds apart; the clock of this one starts when they have met.
            (folder / f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))
            PartialState(cpu=True)
        # Where each process stands goes to the output just before the launcher calls it a hang.
        faulthandler.dump_traceback_later(float(os.environ["SCENARIO_LIMIT"]) * 0.9)
        if is_main:
            (folder / "progress").write_text(name)
        if name == "hang":
            # The test of the time limit: process 1 never reaches the collective that process 0 waits in.
            PartialState().wait_for_everyone() if is_main else time.sleep(3600)
        began = time.perf_counter()
        facts = run(name, config, folder, num_processes, device_options)
        if is_main:
            written = facts | {"seconds": time.perf_counter() - began}
            (folder / f"{name}.part").write_text(json.dumps(written))
            os.replace(folder / f"{name}.part", folder / f"{name}.json")
        faulthandler.cancel_dump_traceback_later()
        gc.collect()


def run_to_the_end(main: Callable[..., None]) -> None:
    """Run `main` on the command line's configuration, folder, number of processes and further words, and leave."""
    faulthandler.enable()
    try:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    # Gloo's threads may still hold Python objects; an interpreter that takes itself down beside them aborts now and
    # then. And after an error the other processes wait in a collective: the launcher ends them when this one has left.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run_to_the_end(main)
