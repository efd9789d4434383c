"""Does the kernel keep its order of pairs over training? Image classifiers and language models, seed by seed.

    python recipes/kernel_stability/study.py --output_dir runs/kernel_stability --seeds 0 1 2

What has finished is skipped: the same command goes on after an interruption, and adds seeds. TRL_DYNAMICS_DATA names
the folder with mnist, stories260k and probing_helpful_base; see the main README. Written: summary.md and charts.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import images
import language
import numpy as np
import proxies
import running
import torch
from summary import write_summary

from trl_dynamics.akg.stability import influence_measure, kernel_measure
from trl_dynamics.akg.task import Task, label_logp

WORLDS, METHODS = ("embedded", "stories260k"), ("sft", "dpo")
SYSTEMS = (*images.NETWORKS, *(f"{world} {method}" for world in WORLDS for method in METHODS))


def main(argv: list[str] | None = None) -> None:
    """Train and measure what is missing, then write summary.md and the charts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/kernel_stability"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--epochs", type=int, nargs="+", default=list(images.EPOCHS), help="checkpoints of images")
    parser.add_argument("--steps", type=int, nargs="+", default=list(language.STEPS), help="checkpoints of text")
    parser.add_argument("--num_products", type=int, help="with K per update, of language models; default: the world's")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settle(
        args.output_dir / "settings.json", {name: getattr(args, name) for name in ("epochs", "steps", "num_products")}
    )
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        for system in args.systems:
            with timed(f"seed{seed}/{system}"):
                if system in images.NETWORKS:
                    measure_images(system, folder, seed, args)
                else:
                    measure_text(*system.split(), folder, seed, args)
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        for world in (world for world in WORLDS if any(system.startswith(world) for system in args.systems)):
            with timed(f"seed{seed}/{world} bounds"), logged(folder / f"{world}-bounds.log"):
                proxies.measure(world, folder, seed)
        for name in (name for name in running.RUNS if name in args.systems):
            with timed(f"seed{seed}/{name} step by step"), logged(folder / f"running-{name}.log"):
                running.measure(name, folder, seed)
    print(write_summary(args.output_dir, args.seeds, args.systems, args.output_dir / "summary.md"))


def measure_images(name: str, folder: Path, seed: int, args: argparse.Namespace) -> None:
    """Train a network and keep, at each epoch, what its pairs are ranked by."""
    path = folder / f"{name}.npz"
    if path.is_file():
        return
    train, held_out = images.drawn(seed)
    update, observe = (images.of_every_class(side, images.NUM_PER_CLASS) for side in (train, held_out))
    found, accuracies = {}, []
    for epoch, task, accuracy in images.checkpoints(name, seed, tuple(args.epochs)):
        found[epoch] = measured(task, update, observe)
        accuracies.append(accuracy)
        if epoch == max(args.epochs):
            proxies.keep(folder / f"forms-{name}.npz", proxies.forms_of(task, update, observe, found[epoch]))
    same = observe[1][:, None] == update[1]
    keep(path, found, same=same, quality=accuracies)


def measure_text(world_name: str, method: str, folder: Path, seed: int, args: argparse.Namespace) -> None:
    """Train a language model, DPO after SFT, and keep at each checkpoint what its pairs are ranked by."""
    path = folder / f"{world_name} {method}.npz"
    if path.is_file():
        return
    world, steps = language.world_of(world_name, seed), tuple(args.steps)
    num_products = args.num_products or world.num_products
    runs = {name: folder / f"{world_name}-{name}" for name in METHODS}
    starts = {"sft": world.base, "dpo": str(runs["sft"])}
    for name in METHODS[: METHODS.index(method) + 1]:
        if not (runs[name] / "training_args.bin").is_file():
            with logged(folder / f"{world_name}-{name}.log"):
                language.train(name, world, starts[name], runs[name], seed, steps)
    update, observe, same = language.ranked(world)
    found, quality = {}, []
    for step, task in language.checkpoints(starts[method], runs[method]):
        found[step] = measured(task, update, observe, num_products)
        quality.append(float(label_logp(task, update).mean()))
        if step == max(steps) or (step == 0 and method == "sft"):
            name = method if step else "base"
            proxies.keep(
                folder / f"forms-{world_name} {name}.npz", proxies.forms_of(task, update, observe, found[step])
            )
    again = kernel_measure(num_products, seed=1)(task, update, observe)
    keep(path, found, same=same, quality=quality, again=again)


def measured(task: Task, update, observe, num_products: int | None = None) -> dict[str, torch.Tensor]:
    """What pairs are ranked by: influence, and the size of K, exact without a number of products."""
    kernel = kernel_measure(num_products)(task, update, observe)
    return {"influence": influence_measure(task, update, observe), "kernel": kernel}


def keep(path: Path, found: dict[int, dict[str, torch.Tensor]], **more) -> None:
    """What was measured at all checkpoints of a system, in one file that is there as a whole or not at all."""
    arrays = {name: np.stack([np.asarray(one[name]) for one in found.values()]) for name in ("influence", "kernel")}
    proxies.keep(path, arrays | {"steps": list(found)} | more)


def settle(path: Path, settings: dict) -> None:
    """Keep what all seeds of a folder share.

    Raises:
        ValueError: If other settings are there.
    """
    if path.is_file() and (known := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise ValueError(
            f"{path.parent} was made with {known}, and now {settings} is asked for; choose another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    began = time.process_time()
    yield
    print(f"{name}: {time.process_time() - began:.0f} CPU s", flush=True)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """What is printed goes to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
