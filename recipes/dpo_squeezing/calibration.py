"""How far the findings can be trusted: scored against the embedded world's own checker, and against what was done.

    python recipes/dpo_squeezing/calibration.py --development runs/dpo_squeezing --output_dir runs/calibration

Development: the runs that study.py left (seeds 0 to 4), and beside them runs of what is rare there; thresholds are
fixed on these. Test: other seeds, learning rates and lengths, trained here; looked at once, after the thresholds were
fixed. It writes calibration.md. What has finished is skipped: the same command goes on after an interruption.

What a run did is told by its answers (outcomes.py), never by the log-probabilities that the rules read. Squeezing has
no such mark; there the truth is what was done: plain DPO with off-policy negatives after SFT squeezes; DPO with
on-policy negatives and Cal-DPO, whose target stops the push, do not; other interventions, DPO after extended SFT, from
the base model or on rewritten pairs are neither. SFT, which pushes nothing down, is not asked.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import study
from calibration_arms import DEVELOPMENT_ARMS, HOW_CHOSEN, TEST_ARMS, squeezes
from confusion import Case, arm_table, confusion_table, robustness_table, unasked_table, verdict_table
from measures import Run
from outcomes import EDGE, NUM_PROMPTS, Outcome, answer_prompts, read_answers
from rewritings import KINDS, write_rewritten
from scans import scan_table
from study import BASE, Arm, Task
from worlds import WORLDS, world_of

from trl_dynamics import embedded
from trl_dynamics.paths import rules

DEVELOPMENT, TEST, REAL = "development", "test", "real model"


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, let every model answer, and write calibration.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--development", type=Path, default=Path("runs/dpo_squeezing"), help="output of study.py")
    parser.add_argument("--development_seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[5, 6, 7, 8, 9], help="of the test; none: no test")
    parser.add_argument("--arms", nargs="+", choices=list(TEST_ARMS), help="to train; default: all")
    parser.add_argument("--real", type=Path, help="output of study.py --world helpful_base: what was found there")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; 1 uses this process")
    parser.add_argument("--max_steps", type=int, help="at most so many steps per run, for a trial")
    parser.add_argument("--num_pairs", type=int)
    parser.add_argument("--num_probes", type=int)
    parser.add_argument("--num_prompts", type=int, default=NUM_PROMPTS, help="of each kind; fewer for a trial")
    args = parser.parse_args(argv)
    args.world, args.guard_budget, world = WORLDS[0], study.GUARD_BUDGET, world_of(WORLDS[0])
    args.num_pairs, args.num_probes = args.num_pairs or world.num_pairs, args.num_probes or world.num_probes
    arms = {name: arm for name, arm in TEST_ARMS.items() if not args.arms or name in with_starts(args.arms)}
    added = {name: arm for name, arm in DEVELOPMENT_ARMS.items() if not args.arms or name in args.arms}
    learnt = {seed: args.development / f"seed{seed}" for seed in args.development_seeds}
    tested = {seed: args.output_dir / f"seed{seed}" for seed in args.seeds}
    study.settle(args.output_dir / "settings.json", {name: getattr(args, name) for name in study.SETTINGS})
    for seed, folder in tested.items():
        world.write(folder, seed, args.num_pairs, args.num_probes)
    tasks = training_tasks(DEVELOPMENT, learnt, added, args) | training_tasks(TEST, tested, arms, args)
    tasks |= answer_tasks(DEVELOPMENT, learnt, study.ARMS | added, set(tasks), args)
    tasks |= answer_tasks(TEST, tested, arms, set(tasks), args)
    study.run_all(tasks, args.workers)
    stages = {
        DEVELOPMENT: cases(DEVELOPMENT, learnt, study.ARMS | added, args.output_dir),
        TEST: cases(TEST, tested, arms, args.output_dir),
    }
    if args.real:
        folders = {int(path.name[4:]): path for path in sorted(args.real.glob("seed*")) if path.name[4:].isdigit()}
        stages[REAL] = cases(REAL, folders, study.ARMS, None)
    print(write_page({stage: found for stage, found in stages.items() if found}, args.output_dir / "calibration.md"))


def with_starts(names: list[str]) -> set[str]:
    """The test's arms and those that they start from, all of which start from the base model."""
    return set(names) | {TEST_ARMS[name].start for name in names}


def training_tasks(
    stage: str, folders: Mapping[int, Path], arms: dict[str, Arm], args: argparse.Namespace
) -> dict[str, Task]:
    """A task per run; left out are those whose starting model is neither there nor trained by one of them."""
    tasks = {}
    for seed, folder in folders.items():
        for name, arm in arms.items():
            needs = frozenset({f"{stage}/seed{seed}/{arm.start}"}) & frozenset(tasks)
            if needs or (arm.start == BASE and folder.is_dir()) or study.has_finished(folder / arm.start):
                tasks[f"{stage}/seed{seed}/{name}"] = Task(needs, train, (name, folder, seed, args, arms))
    return tasks


def train(name: str, folder: Path, seed: int, args: argparse.Namespace, arms: dict[str, Arm]) -> None:
    """Train one of `arms` unless it has finished, on data that is written before where it needs any."""
    if arms[name].data in KINDS and not study.has_finished(folder / name):
        write_rewritten(arms[name].data, folder, study.start_of(arms[name], folder, world_of(args.world).base), seed)
    # Nothing here reads held-out accuracy, and training is bit for bit the same without it.
    options = {"eval_strategy": "no"} if arms[name].method == "dpo" else {}
    arm = replace(arms[name], options=options | arms[name].options)
    study.run_arm(name, folder, seed, args, arms | {name: arm})


def answer_tasks(
    stage: str, folders: Mapping[int, Path], arms: Mapping[str, Arm], training: set[str], args: argparse.Namespace
) -> dict[str, Task]:
    """A task per model that has to answer, at once where it has finished, else once it is trained."""
    tasks = {}
    for seed, folder in folders.items():
        for name in [BASE, *arms]:
            needs = frozenset({f"{stage}/seed{seed}/{name}"}) & training
            if needs or name == BASE or study.has_finished(folder / name):
                model = Path(embedded.model_path()) if name == BASE else folder / name
                path = answers_of(args.output_dir, stage, seed, name)
                tasks[f"answers/{stage}/seed{seed}/{name}"] = Task(
                    needs, answer_prompts, (model, path, seed, args.num_prompts)
                )
    return tasks


def answers_of(output_dir: Path, stage: str, seed: int, name: str) -> Path:
    """Where the answers of a model are kept."""
    return output_dir / "answers" / stage / f"seed{seed}" / f"{name}.json"


def finished(folders: Mapping[int, Path], arms: Mapping[str, Arm]) -> dict[int, list[str]]:
    """The arms that have finished, by seed."""
    return {seed: [name for name in arms if study.has_finished(folder / name)] for seed, folder in folders.items()}


def cases(stage: str, folders: Mapping[int, Path], arms: Mapping[str, Arm], output_dir: Path | None) -> list[Case]:
    """Every finished run as a case; without an `output_dir` nobody has judged its answers."""
    tables = cache(read_answers)
    found = []
    for seed, names in finished(folders, arms).items():
        for name in names:
            run, outcome = Run(folders[seed] / name), None
            if output_dir is not None:
                ends = (answers_of(output_dir, stage, seed, one) for one in (arms[name].start, name))
                outcome = Outcome(*map(tables, ends))
            said = rules.find(run.summary, run.store.read_meta())
            severities = {finding.name: finding.severity for finding in said}
            found.append(
                Case(seed, name, arms[name].method, run.summary, severities, outcome, squeezes(arms[name], arms))
            )
    return found


def write_page(stages: Mapping[str, list[Case]], path: Path) -> Path:
    """Everything that is known as Markdown; returns the file."""
    judged = {stage: found for stage, found in stages.items() if stage != REAL}
    counts = ", ".join(
        f"{stage} {len(found)} runs of seeds {', '.join(map(str, sorted({case.seed for case in found})))}"
        for stage, found in stages.items()
    )
    lines = [
        "# How far the findings can be trusted",
        "",
        f"Runs: {counts}. Truth: the world's checker on answers to held-out prompts, start against end of each run, "
        f"classes from a change of {EDGE} on (outcomes.py); for squeezing, what was done (calibration.py). Rates with "
        "Wilson's 95 % interval, which takes runs as independent. They are not: runs of one arm mostly say the same, "
        "so that what is known is nearer to the number of arms than to that of runs. Development and test have the "
        "world's facts and the base model in common; wording, order, draws, learning rates and lengths differ.",
        "",
        HOW_CHOSEN,
        "",
        "## Confusion tables",
        "",
        *confusion_table(stages),
        "",
        "## Where chosen fell: harmful or benign?",
        "",
        "Runs whose chosen ended below its start, by the checker and by what the finding calls it; *cannot be told* "
        "is a warning.",
        "",
        *verdict_table(judged),
        "",
        "## What greedy answers add (probe_samples)",
        "",
        "Degeneration is seen in own answers alone, and a collapse of entropy withdraws an alert only where own "
        "answers show that they do not degenerate.",
        "",
        *unasked_table(judged),
        "",
        "## The same where the truth is clear, or is taken from other answers",
        "",
        "Recall and false alarms. Clear: no change that decides is within two standard errors of its edge.",
        "",
        *robustness_table(judged),
    ]
    if DEVELOPMENT in stages:
        lines += [
            "",
            "## Thresholds on development, one at a time; in use: bold",
            "",
            *scan_table(stages[DEVELOPMENT]),
        ]
    for stage, found in stages.items():
        lines += ["", f"## {stage.capitalize()}, arm by arm", "", *arm_table(found)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    # Inherited by the workers: more threads than that only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
