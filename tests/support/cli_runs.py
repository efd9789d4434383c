"""Commands as tests give them: their flags, and the one line that a wrong one prints."""

import pandas as pd

import trl_dynamics
from trl_dynamics.cli.main import main


def flags(world, output_dir, **options) -> list[str]:
    values = {
        "model_name_or_path": world / "model",
        "dataset_name": world / "train.jsonl",
        "probe_set": world / "probes.jsonl",
        "output_dir": output_dir,
        "max_steps": 2,
        "probe_every": 0.05,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | options
    return [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]


def failure(capsys, argv: list[str]) -> str:
    """The one line that a wrong command prints."""
    assert main(argv) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith(f"trl-dynamics {argv[0]}: error:")]
    assert len(errors) == 1 and lines[-1] == errors[0]
    return errors[0]


def scored(output_dir) -> pd.Series:
    """Log-probabilities by step, probe and type."""
    frame = trl_dynamics.load_records(output_dir)
    return frame.set_index(["step", "probe_id", "response_type"])["logp_sum"].sort_index()
