"""What one step's exact influence costs: CPU seconds and memory, in forwards of everything that is observed.

    python scripts/bench/akg.py [--quick]

A forward gives the full log-softmax of all observed positions, without gradients. Arms are interleaved in one process
on one thread; medians of the ratios of each round. Memory is the most bytes of tensors that are alive at once above
those before, which does not depend on what the allocator finds to use again, as resident memory does. Two built
Llamas of width 256 with 8 thousand and 50 thousand labels, and the small real model, where TRL_DYNAMICS_DATA names the
folder with the public data files (see README.md). The last column is the time of four updates in one pass over that of
one after the other.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measure
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as hf_logging

from trl_dynamics.akg.batched import predict_together
from trl_dynamics.akg.one_step import predict, update_gradient
from trl_dynamics.akg.steps import step_of
from trl_dynamics.akg.task import IGNORED, Task, causal_lm

NUM_TOKENS, UPDATES = 128, 4
GOALS = {"full": "<= 5 forwards", "stats": "<= 4 forwards", "stats_memory_growth": "<= 1.5 from V = 8k to 50k"}


@dataclass(frozen=True)
class Setting:
    """A model and how many rows are observed."""

    name: str
    model: torch.nn.Module
    num_rows: int


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round; under 50 s on two cores")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    rounds, ratios = 1 if args.quick else 7, {}
    heads = ("forward, s", "default SDPA", "backward", "full", "stats", "MB of full", "of stats", "4 together")
    print(f"{'':<20}", *(f"{head:>12}" for head in heads))
    for setting in settings():
        found = in_rounds(setting, rounds)
        megabytes = {output: memory(setting, output) for output in ("full", "stats")}
        seconds = found["forward"]
        row = {name: median_ratio(found[name], seconds) for name in found}
        cells = [f"{sorted(seconds)[len(seconds) // 2]:.3f}"]
        cells += [f"{row[name]:.2f}" for name in ("default", "backward", "full", "stats")]
        together = median_ratio(found["together"], found["one by one"])
        cells += [*(f"{value:.0f}" for value in megabytes.values()), f"{together:.2f}"]
        print(f"{setting.name:<20}", *(f"{cell:>12}" for cell in cells))
        short = setting.name.split(",")[0]
        ratios |= {
            f"{short}/full": row["full"],
            f"{short}/stats": row["stats"],
            f"{short}/stats_mb": megabytes["stats"],
            f"{short}/together": together,
        }
    growth = ratios["V = 50304/stats_mb"] / ratios["V = 8192/stats_mb"]
    ratios["stats_memory_growth"] = growth
    met = growth <= 1.5 and all(
        ratios[f"{name}/full"] <= 5 and ratios[f"{name}/stats"] <= 4 for name in ("V = 8192", "V = 50304")
    )
    shown = {name: round(value, 3) for name, value in ratios.items()}
    print(json.dumps({"name": "akg", "ratios": shown, "goals": GOALS, "met": met}))
    return 0


def settings() -> list[Setting]:
    """The models, with random weights but for the last."""
    found = [Setting(f"V = {size}, {rows} rows", built(size), rows) for size, rows in ((8192, 4), (50304, 2))]
    folder = os.environ.get("TRL_DYNAMICS_DATA")
    if folder:
        real = AutoModelForCausalLM.from_pretrained(Path(folder) / "stories260k")
        found.append(Setting("stories260k, 8 rows", real, 8))
    return found


def built(vocab_size: int) -> torch.nn.Module:
    """A Llama of width 256 and 4 layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def rows_of(setting: Setting, num_rows: int, seed: int, num_tokens: int = NUM_TOKENS) -> dict[str, torch.Tensor]:
    """Random tokens, all of them labels."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, setting.model.config.vocab_size, (num_rows, num_tokens), generator=generator)
    labels_BT = ids_BT.clone()
    labels_BT[:, 0] = IGNORED
    return {"input_ids": ids_BT, "labels": labels_BT}


def arms_of(setting: Setting) -> dict[str, Callable[[], object]]:
    """What is timed."""
    task, observe, update = causal_lm(setting.model), rows_of(setting, setting.num_rows, 0), rows_of(setting, 1, 1)
    force = update_gradient(task, update)
    step = step_of(force.gradients, task.trainable(), "sgd", 1e-4, None)
    return {
        "forward": lambda: forward(task, observe, SDPBackend.MATH),
        "default": lambda: forward(task, observe, SDPBackend.FLASH_ATTENTION),
        "backward": lambda: update_gradient(task, update),
        "full": lambda: predict(task, force, step, observe, output="full"),
        "stats": lambda: predict(task, force, step, observe, output="stats"),
        "together": lambda: predict_together(task, [force] * UPDATES, [step] * UPDATES, observe),
        "one by one": lambda: [predict(task, force, step, observe) for _ in range(UPDATES)],
    }


def forward(task: Task, observe: dict[str, torch.Tensor], kernel: SDPBackend) -> torch.Tensor:
    """The full log-softmax of all observed positions."""
    with torch.no_grad(), sdpa_kernel(kernel):
        return torch.cat(list(task.logits(task.model, observe))).log_softmax(dim=-1)


def in_rounds(setting: Setting, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every arm, round by round; the first round warms up."""
    arms = arms_of(setting)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            start = time.process_time()
            arm()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def memory(setting: Setting, output: str) -> float:
    """Peak MB of the tensors of one prediction."""
    arm = arms_of(setting)[output]
    arm()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        arm()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) / 2**20


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return measure.bootstrap_median([a / b for a, b in zip(ours, theirs, strict=True)]).median


if __name__ == "__main__":
    raise SystemExit(main())
