"""The study of the squeezing effect on a small model: every arm, seed by seed, then tables, verdicts and a page.

    python recipes/dpo_squeezing/study.py --output_dir runs/dpo_squeezing --seeds 0 1 2 3 4
    python recipes/dpo_squeezing/study.py --world helpful_base --output_dir runs/dpo_squeezing_real --seeds 0 1 2 3 4

A seed draws its own pairs, probes and held-out pairs. What has finished is skipped: the same command goes on after an
interruption, and adds seeds.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, disable_caching, load_from_disk
from summary import write_summary
from worlds import HERE, WORLDS, world_of

from trl_dynamics.cli.main import main as run_command
from trl_dynamics.probing.generate import Answer, LocalModel, Request, Sampling
from trl_dynamics.report.page import build_page
from trl_dynamics.store.store import DynamicsStore

BASE = "base"
# Draws of one prompt before it is left out of the pairs with on-policy negatives.
NUM_DRAWS = 4
# Drained mass per token and step; tuned on development seeds: see RESULTS.md.
GUARD_BUDGET = 1.0e-5


@dataclass(frozen=True)
class Arm:
    """One run: `trl-dynamics sft` or `dpo` with the settings of the world's YAML file and these.

    Args:
        method (`str`): `"sft"` or `"dpo"`.
        start (`str`): The arm whose model it starts from, or `"base"`.
        options (`dict`): What differs from the YAML file.
        data (`str`): `"pairs"`, or `"on_policy"` for rejected answers drawn from the model it starts from.
    """

    method: str
    start: str = BASE
    options: dict = field(default_factory=dict)
    data: str = "pairs"


def guard(mode: str) -> Arm:
    """The guard, or a control of it."""
    return Arm("dpo", "sft", {"squeeze_guard": GUARD_BUDGET, "squeeze_guard_mode": mode})


ARMS: dict[str, Arm] = {
    "sft": Arm("sft"),
    "sft_short": Arm("sft", options={"max_steps": 25}),
    # Two rows per pair: as many passes over chosen as `sft`, in twice the steps.
    "sft_both": Arm("sft", options={"sft_on": "both", "max_steps": 300}),
    "sft_chosen_twice": Arm("sft", options={"sft_on": "chosen_twice", "max_steps": 300}),
    "sft_chosen_and_other": Arm("sft", options={"sft_on": "chosen_and_other", "max_steps": 300}),
    "dpo": Arm("dpo", "sft"),
    "dpo_from_base": Arm("dpo"),
    # Chosen turns late when nothing has raised it before.
    "dpo_from_base_long": Arm("dpo", options={"max_steps": 300}),
    "dpo_after_short_sft": Arm("dpo", "sft_short"),
    "dpo_on_policy": Arm("dpo", "sft", data="on_policy"),
    "more_sft": Arm("sft", "sft", {"max_steps": 100, "learning_rate": 2e-4}),
    "dpo_after_both": Arm("dpo", "sft_both"),
    "dpo_after_chosen_twice": Arm("dpo", "sft_chosen_twice"),
    "dpo_after_chosen_and_other": Arm("dpo", "sft_chosen_and_other"),
    "guard": guard("guard"),
    "guard_uniform": guard("uniform"),
    "guard_shuffled": guard("shuffled"),
    "gate": Arm("dpo", "sft", {"gate_dpo": "token"}),
    "low_rate": Arm("dpo", "sft", {"learning_rate": 1e-4}),
    "dpop": Arm("dpo", "sft", {"dpop_lambda": 50}),
    "shift": Arm("dpo", "sft", {"dpo_shift": 0.75}),
    "cal": Arm("dpo", "sft", {"cal_dpo": 1}),
    "sft_term": Arm("dpo", "sft", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 1]}),
}
# Options that all runs of a folder share.
SETTINGS = ("world", "max_steps", "num_pairs", "num_probes", "guard_budget")
# What the real world leaves out: half an hour is enough.
ONLY_EMBEDDED = ("dpop", "shift", "cal", "sft_term", "low_rate", "guard_uniform", "guard_shuffled")
# What the page of a seed compares; the first run of a method is what the others of it are compared with.
ON_PAGE = ("dpo", "dpo_from_base", "dpo_after_short_sft", "dpo_on_policy", "dpo_after_both", "gate", "guard", "sft")


@dataclass(frozen=True)
class Task:
    """Something to do once `needs` is done: `call(*arguments)`."""

    needs: frozenset[str]
    call: Callable[..., None]
    arguments: tuple


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, judge it, write summary.md, summary.csv and the first seed's page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--world", choices=WORLDS, default=WORLDS[0], help="embedded, or the small real model and text"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/dpo_squeezing"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="these and those they start from; default: all")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 1 uses this process")
    parser.add_argument("--max_steps", type=int, help="at most so many steps per run, for a trial")
    parser.add_argument("--num_pairs", type=int)
    parser.add_argument("--num_probes", type=int)
    parser.add_argument("--guard_budget", type=float, default=GUARD_BUDGET)
    args = parser.parse_args(argv)
    world = world_of(args.world)
    args.num_pairs, args.num_probes = args.num_pairs or world.num_pairs, args.num_probes or world.num_probes
    if args.num_probes > args.num_pairs:
        parser.error(f"{args.num_probes} probes and {args.num_pairs} pairs: probes are the first training pairs")
    arms = with_starts(args.arms or [name for name in ARMS if world.judged or name not in ONLY_EMBEDDED])
    settle(args.output_dir / "settings.json", {name: getattr(args, name) for name in SETTINGS})
    tasks: dict[str, Task] = {}
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        world.write(folder, seed, args.num_pairs, args.num_probes)
        for name in arms:
            needs = frozenset({f"{folder.name}/{ARMS[name].start}"} - {f"{folder.name}/{BASE}"})
            tasks[f"{folder.name}/{name}"] = Task(needs, run_arm, (name, folder, seed, args))
        judged = [name for name in arms if ARMS[name].method == "dpo" and "dpo" in arms and world.judged]
        tasks[f"{folder.name}/judge"] = Task(
            frozenset(f"{folder.name}/{name}" for name in arms), judge, (folder, judged, world.max_answer)
        )
    run_all(tasks, args.workers)
    first = args.output_dir / f"seed{args.seeds[0]}"
    print(build_page([first / name for name in ON_PAGE if name in arms], args.output_dir / "report.html"))
    folders = {seed: args.output_dir / f"seed{seed}" for seed in args.seeds}
    print(write_summary(folders, arms, args.output_dir / "summary.md"))


def with_starts(names: list[str]) -> list[str]:
    """The arms and all that they start from, in the order of `ARMS`."""
    wanted = set(names)
    for name in reversed(ARMS):
        if name in wanted and ARMS[name].start != BASE:
            wanted.add(ARMS[name].start)
    return [name for name in ARMS if name in wanted]


def settle(path: Path, settings: dict) -> None:
    """Keep what all runs of a folder share.

    Raises:
        ValueError: If runs of other settings are there.
    """
    if path.is_file() and (known := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise ValueError(
            f"{path.parent} has runs with {known}, and now {settings} is asked for; choose another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings), encoding="utf-8")


def run_arm(name: str, folder: Path, seed: int, args: argparse.Namespace, arms: dict[str, Arm] = ARMS) -> None:
    """Train one of `arms` unless it has finished; what it prints goes to `<arm>.log`."""
    arm = arms[name]
    if has_finished(folder / name):
        return
    if arm.data == "on_policy":
        world = world_of(args.world)
        write_on_policy(folder, start_of(arm, folder, world.base), seed, world.max_answer, world.max_prompt)
    run_logged(folder / f"{name}.log", words_of(name, folder, seed, args, arms))


def start_of(arm: Arm, folder: Path, base: str) -> str:
    """The model that an arm of a seed starts from."""
    return base if arm.start == BASE else str(folder / arm.start)


def words_of(name: str, folder: Path, seed: int, args: argparse.Namespace, arms: dict[str, Arm] = ARMS) -> list[str]:
    """The command of one of `arms`, as one would type it after `trl-dynamics`."""
    arm, world = arms[name], world_of(args.world)
    options = {
        "config": HERE / world.configs[arm.method],
        "model_name_or_path": start_of(arm, folder, world.base),
        "dataset_name": folder / arm.data,
        "dataset_num_rows": args.num_pairs,
        "probe_set": folder / "probes",
        "probe_max_probes": args.num_probes,
        "output_dir": folder / name,
        "seed": seed,
        "disable_tqdm": True,
        **arm.options,
    }
    if "squeeze_guard" in options:
        options["squeeze_guard"] = args.guard_budget
    if args.max_steps:
        options["max_steps"] = args.max_steps
    return [arm.method, *flags(options)]


def flags(options: dict) -> list[str]:
    """Options as words of a command line."""
    found = []
    for key, value in options.items():
        found += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return found


def has_finished(output: Path) -> bool:
    """Whether a run's series is complete and its model saved, the last file of which is training_args.bin."""
    store = DynamicsStore(output)
    return store.exists and store.read_meta()["status"] == "finished" and (output / "training_args.bin").is_file()


def run_logged(log: Path, words: list[str]) -> None:
    """A command of `trl-dynamics` in this process.

    Raises:
        RuntimeError: If it fails.
    """
    with open(log, "a", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = run_command(words)
    if status:
        raise RuntimeError(f"trl-dynamics {words[0]} ended with status {status}, see {log}")


def write_on_policy(folder: Path, start: str, seed: int, max_answer: int, max_prompt: int | None) -> None:
    """The pairs with answers drawn from the starting model at temperature 1 in place of the rejected ones.

    A draw that is cut, blank or the chosen answer itself is drawn again; a prompt without another answer is left out.
    """
    if (folder / "on_policy").is_dir():
        return
    pairs = load_from_disk(str(folder / "pairs"))
    model = LocalModel.load(start, batch_size=32)
    rows = {index: row for index, row in enumerate(pairs["train"])}
    drawn: dict[int, dict] = {}
    for attempt in range(NUM_DRAWS):
        open_rows = [index for index in rows if index not in drawn]
        requests = {}
        for i in open_rows:
            draw = (seed * NUM_DRAWS + attempt) * 10_000 + i
            sampling = Sampling(max_answer, 1.0, seed=draw, max_prompt_length=max_prompt)
            requests[Request.of(rows[i]["prompt"], sampling)] = i
        for request, answer in model.generate(list(requests)):
            row = rows[requests[request]]
            if isinstance(answer, Answer) and answer.finish == "stop" and answer.text.strip():
                rejected = like(row["chosen"], answer.text.strip())
                if rejected != row["chosen"]:
                    drawn[requests[request]] = row | {"rejected": rejected}
    kept = DatasetDict({"train": Dataset.from_list([drawn[i] for i in sorted(drawn)]), "test": pairs["test"]})
    kept.save_to_disk(folder / "on_policy.part")
    (folder / "on_policy.part").rename(folder / "on_policy")


def like(chosen: str | list[dict], text: str) -> str | list[dict]:
    """`text` as an answer in the form of `chosen`: plain with a leading space, or a chat message."""
    return f" {text}" if isinstance(chosen, str) else [{"role": "assistant", "content": text}]


def judge(folder: Path, names: list[str], max_answer: int) -> None:
    """Greedy answers to held-out prompts by the world's own checker: `dpo` against `sft`, all others against `dpo`."""
    for name in sorted(names, key=lambda name: name != "dpo"):
        if (folder / "judged" / name / "summary.json").is_file():
            continue
        other = folder / "sft" if name == "dpo" else folder / "judged" / "dpo" / "answers_A.jsonl"
        options = {"prompts": folder / "held_out.jsonl", "judge": "embedded", "output_dir": folder / "judged" / name}
        options |= {"max_new_tokens": max_answer, "batch_size": 64}
        run_logged(folder / "judge.log", ["judge", str(folder / name), str(other), *flags(options)])


def run_all(tasks: dict[str, Task], num_workers: int) -> None:
    """Do all tasks, each as soon as what it needs is done, the first ones first."""
    if num_workers == 1:
        for name, task in tasks.items():
            _say(name, _timed(task.call, task.arguments))
        return
    waiting, running, done = dict(tasks), {}, set()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker) as pool:
        while waiting or running:
            ready = [name for name, task in waiting.items() if task.needs <= done][: num_workers - len(running)]
            if not ready and not running:
                raise RuntimeError(f"{sorted(waiting)} wait for what nobody does")
            for name in ready:
                task = waiting.pop(name)
                running[pool.submit(_timed, task.call, task.arguments)] = name
            finished: set[Future] = wait(running, return_when=FIRST_COMPLETED).done
            for future in finished:
                name = running.pop(future)
                _say(name, future.result())
                done.add(name)


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)
    disable_caching()


def _timed(call: Callable[..., None], arguments: tuple) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def _say(name: str, seconds: float) -> None:
    print(f"{name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    # Inherited by the workers: more threads than that only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
