"""What all inner products of gradients cost: CPU seconds and memory of `gram` and of gradients that are stored.

    python scripts/bench/gram.py [--quick]

A built Llama of width 256 with 8 thousand labels (7.4 million parameters), as many observers as updates. Stored: one
backward per row into a matrix that is made beforehand, then one product, the best of the ways that hold all
gradients. Plain: the forward and backward of all rows in one batch, which nobody can do without. Every figure is of a
process of its own, on one thread.
"""

import argparse
import json
from collections.abc import Callable

import measure
import torch
from akg import Setting, built, rows_of

from trl_dynamics.akg.gram import gram
from trl_dynamics.akg.task import Task, causal_lm

GOALS = {"seconds": "stored / gram >= 1.5 at 64 rows of 64 tokens", "memory": "stored / gram >= 4 there"}
Batch = dict[str, torch.Tensor]


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows; under 50 s on two cores")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, ratios = built(8192), {}
    heads = ("stored, s", "MB", "plain, s", "MB", "gram, s", "MB")
    print(f"{'':<22}", *(f"{head:>10}" for head in heads))
    for num_rows, num_tokens in ((16, 64),) if args.quick else ((64, 64), (32, 64), (12, 256)):
        name = f"{num_rows} rows, {num_tokens} tokens"
        runs = {arm: measured(model, num_rows, num_tokens, call) for arm, call in ARMS.items()}
        print(f"{name:<22}", *(f"{run.seconds:>10.2f} {run.megabytes:>10.0f}" for run in runs.values()))
        apart = (runs["gram"].result - runs["stored"].result).abs().max() / runs["stored"].result.abs().max()
        if apart > 1e-4:
            raise RuntimeError(f"{name}: gram and stored gradients differ by {apart:.1e}")
        ratios |= {
            f"{name}/seconds": runs["stored"].seconds / runs["gram"].seconds,
            f"{name}/memory": runs["stored"].megabytes / runs["gram"].megabytes,
            f"{name}/over_plain": runs["gram"].seconds / runs["plain"].seconds,
        }
    large = "64 rows, 64 tokens"
    met = not args.quick and ratios[f"{large}/seconds"] >= 1.5 and ratios[f"{large}/memory"] >= 4
    shown = {name: round(value, 3) for name, value in ratios.items()}
    print(json.dumps({"name": "gram", "ratios": shown, "goals": GOALS, "met": met}))
    return 0


def measured(model: torch.nn.Module, num_rows: int, num_tokens: int, call: Callable) -> measure.Run:
    """One arm on `num_rows` observers and as many updates; a small call warms up."""
    setting, task = Setting("", model, num_rows), causal_lm(model)
    update, observe = (rows_of(setting, num_rows, seed, num_tokens) for seed in (0, 1))
    small = [{name: values[:1] for name, values in batch.items()} for batch in (update, observe)]
    return measure.time_and_memory(lambda: call(task, update, observe), lambda: call(task, *small))


def stored(task: Task, update: Batch, observe: Batch) -> torch.Tensor:
    """S (O, U) from a matrix of gradients per side."""
    return -gradients(task, observe) @ gradients(task, update).T


def gradients(task: Task, batch: Batch) -> torch.Tensor:
    """(rows, P) the gradient of each row's sum of -ln pi."""
    parameters = list(task.trainable().values())
    found = torch.empty(len(batch["labels"]), sum(parameter.numel() for parameter in parameters))
    for row in range(len(found)):
        parts = torch.autograd.grad(loss(task, {name: values[[row]] for name, values in batch.items()}), parameters)
        torch.cat([part.flatten() for part in parts], out=found[row])
    return found


def plain(task: Task, update: Batch, observe: Batch) -> None:
    """Forward and backward of all rows at once."""
    batch = {name: torch.cat([update[name], observe[name]]) for name in update}
    torch.autograd.grad(loss(task, batch), list(task.trainable().values()))


def loss(task: Task, batch: Batch) -> torch.Tensor:
    logits_NV = torch.cat(list(task.logits(task.model, batch)))
    return torch.nn.functional.cross_entropy(logits_NV, task.labels(batch), reduction="sum")


ARMS: dict[str, Callable] = {
    "stored": stored,
    "plain": plain,
    "gram": lambda task, update, observe: gram(task, update, observe, check=False, disable_tqdm=True).total_OU.float(),
}


if __name__ == "__main__":
    raise SystemExit(main())
