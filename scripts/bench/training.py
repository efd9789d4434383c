"""Overhead on training: the same run with and without our tracker, in interleaved pairs of forked processes."""

import io
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import measure
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as hf_logging

import trl_dynamics
from trl_dynamics import ProbeSet

ROWS, STEPS, SCHEDULE_STEPS = 64, 60, 160
QUICK_STEPS, QUICK_BUDGET_STEPS, SCHEDULED_PROBES = 10, 30, 8
# Few probes and many steps, so that what is always taken (the check of the layout, the first scoring and the last)
# fits into 5 % of a run that is still short.
BUDGET_STEPS, BUDGET_PROBES = 400, 2


def overhead(folder: Path, pairs: int, *, quick: bool) -> dict[str, measure.Interval]:
    """Ratios of CPU seconds of `train()`: without probes to TRL's trainer, with a budget of 5 % to without probes."""
    hf_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    probe_set = ProbeSet.from_jsonl(folder / "probing_helpful_base/formal_prob_train.jsonl").select(ROWS)
    steps, budget_steps = (QUICK_STEPS, QUICK_BUDGET_STEPS) if quick else (STEPS, BUDGET_STEPS)
    arms = {
        "trl": lambda: _train(trl, folder, probe_set, steps),
        "off": lambda: _train(trl_dynamics, folder, probe_set, steps),
    }
    budget = {
        "off": lambda: _train(trl_dynamics, folder, probe_set, budget_steps),
        "budget": lambda: _train(
            trl_dynamics,
            folder,
            probe_set,
            budget_steps,
            probe_set=probe_set.select(BUDGET_PROBES),
            probe_budget=0.05,
        ),
    }
    found = {
        "overhead_off": _ratio(arms["off"], arms["trl"], pairs),
        "overhead_budget_5_percent": _ratio(budget["budget"], budget["off"], max(1, pairs // 5)),
    }
    if not quick:
        scheduled = {"probe_set": probe_set.select(SCHEDULED_PROBES)}
        default = lambda: _train(trl_dynamics, folder, probe_set, SCHEDULE_STEPS, **scheduled)  # noqa: E731
        given = lambda: _train(trl_dynamics, folder, probe_set, SCHEDULE_STEPS, probe_every=0.05, **scheduled)  # noqa: E731
        without = lambda: _train(trl_dynamics, folder, probe_set, SCHEDULE_STEPS)  # noqa: E731
        found["overhead_default_schedule"] = _ratio(default, without, max(1, pairs // 3))
        found["overhead_every_0.05"] = _ratio(given, without, max(1, pairs // 3))
    print("\noverhead on SFT of the 260k-parameter model: CPU seconds of training, median ratio of interleaved pairs")
    for name, interval in found.items():
        print(f"{name:<44} {interval}")
    return found


def _ratio(ours, theirs, pairs: int) -> measure.Interval:
    ratios = []
    for pair in range(pairs):
        # Each goes first in every second pair.
        order = (ours, theirs) if pair % 2 else (theirs, ours)
        seconds = {arm: measure.in_fork(arm).result for arm in order}
        ratios.append(seconds[ours] / seconds[theirs])
    return measure.bootstrap_median(ratios)


def _train(package, folder: Path, rows: ProbeSet, steps: int, **options) -> float:
    """CPU seconds of `train()` alone, without loading anything."""
    torch.set_num_threads(1)
    set_seed(0)
    path = folder / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    data = Dataset.from_list([{"prompt": p.prompt[-300:], "completion": p.responses["chosen"][:400]} for p in rows])
    probe_set = options.pop("probe_set", None)
    limits = {"probe_max_prompt_length": 96, "probe_max_length": 256} if probe_set else {}
    with tempfile.TemporaryDirectory() as output_dir, redirect_stdout(io.StringIO()):
        args = package.SFTConfig(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            max_length=256,
            save_strategy="no",
            logging_steps=10,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            **limits,
            **options,
        )
        extra = {"probe_set": probe_set} if probe_set else {}
        trainer = package.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, **extra)
        start = time.process_time()
        trainer.train()
        return time.process_time() - start
