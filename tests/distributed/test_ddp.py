"""Two processes track what one process tracks: DDP over gloo, through `accelerate launch` with the recipe's config."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import trl_dynamics
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, PROBES

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes/accelerate_configs/ddp.yaml"
WORKER = Path(__file__).parent / "train_worker.py"
KEYS = ["step", "probe_id", "response_type"]
TIME_LIMIT = 240

pytestmark = pytest.mark.distributed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(command: list[str]) -> str:
    """Run to the end; a hang ends at the time limit. Returns what was printed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    # Earlier tests of this process may have left what their training arguments export.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    env = inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIME_LIMIT, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def start(method: str, output_dir: Path, num_processes: int, batch_size: int, *flags: str) -> dict:
    """Run the worker; returns what its main process printed."""
    worker = [str(WORKER), method, str(output_dir), str(num_processes), str(batch_size), *flags]
    if num_processes == 1:
        command = [sys.executable, *worker]
    else:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
        launcher += ["--num_processes", str(num_processes), "--main_process_port", str(free_port())]
        command = [*launcher, *worker]
    return json.loads(run(command).strip().splitlines()[-1])


@pytest.mark.parametrize(("method", "flags"), [("sft", ()), ("dpo", ()), ("sft", ("lora",)), ("sft", ("one_probe",))])
def test_two_processes_record_what_one_records(method, flags, tmp_path):
    one = start(method, tmp_path / "one", 1, 2, *flags)
    two = start(method, tmp_path / "two", 2, 1, *flags)
    assert two["wrapper"] == "DistributedDataParallel" and one["wrapper"] != "DistributedDataParallel"
    single, double = (
        trl_dynamics.load_records(tmp_path / name).set_index(KEYS).sort_index() for name in ("one", "two")
    )
    assert single.index.equals(double.index) and single.index.is_unique
    assert sorted(single.index.unique("step")) == [0, 1, 2, 4]
    values = [name for name in single.columns if name.endswith(("_sum", "_mean")) or name == "eos_logp"]
    # Before the first update both score the same weights in the same batches.
    assert single.loc[[0], values].equals(double.loc[[0], values])
    # Later the gradients are summed in another order.
    for name in values:
        bound = 1e-5 * single["num_tokens"] + 1e-4 if name.endswith("_sum") else 1e-4
        assert ((single[name] - double[name]).abs() <= bound).all(), name
    scalars = [[entry for entry in run["log"] if "probe/seconds" in entry] for run in (one, two)]
    for ours, theirs in zip(*scalars, strict=True):
        assert {k: v for k, v in ours.items() if k != "probe/seconds"} == pytest.approx(
            {k: v for k, v in theirs.items() if k != "probe/seconds"}, abs=1e-2
        )
    meta = json.loads((tmp_path / "two/dynamics/meta.json").read_text())
    assert meta["num_processes"] == 2


def test_the_command_line_starts_two_processes(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("pairs", PAIRS), ("probes", PROBES)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "accelerate_config": CONFIG,
        "num_processes": 2,
        "main_process_port": free_port(),
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "pairs.jsonl",
        "probe_set": tmp_path / "probes.jsonl",
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    printed = run([sys.executable, "-m", "trl_dynamics.cli.main", "sft", *flags])
    assert printed.count("records:") == 1
    assert json.loads((tmp_path / "run/dynamics/meta.json").read_text())["num_processes"] == 2
