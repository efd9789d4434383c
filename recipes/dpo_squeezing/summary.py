"""What the runs of the study say, as Markdown: verdicts, and tables over seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from claims import EARLY, all_claims
from measures import CHANGES, EQUALITIES, MIN_SEEDS, Run, Study, over_seeds, shown


def judged(study: Study, arm: str) -> list[dict]:
    """The summaries of the comparisons of an arm, `dpo` with `sft`, others with `dpo`."""
    paths = [folder / "judged" / arm / "summary.json" for folder in study.folders.values()]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def tables(study: Study) -> list[str]:
    """Markdown: what moved in every arm, differences to plain DPO, answers."""
    lines = ["## Change over the run, mean over seeds ± standard error over seeds", "", *_header("arm", CHANGES)]
    for arm in study.arms:
        lines.append(_row(arm, [shown(study.end(arm, name)) for name in CHANGES]))
    lines += sft_table(study)
    others = [arm for arm in study.arms if arm != "dpo" and study.method(arm) == "dpo"]
    for equality in EQUALITIES if study.has("dpo") else ():
        lines += ["", f"## Difference to plain DPO at {equality}", "", *_header("arm", CHANGES[:7])]
        for arm in others:
            cells = [shown(study.difference(arm, "dpo", name, equality)) for name in CHANGES[:7]]
            lines.append(_row(arm, cells))
    return lines + answer_table(study)


def sft_table(study: Study) -> list[str]:
    """Every response type of the arm `sft` along the run."""
    if not study.has("sft"):
        return []
    shares = (EARLY, 0.1, 0.25, 0.5, 0.75, 1.0)
    heads = [f"{share:.0%}" for share in shares]
    lines = ["", "## SFT: change of each response type at shares of the run", "", *_header("type", heads)]

    def value(run: Run, name: str, share: float) -> float:
        steps = run.types.index.to_numpy(float)
        return float(np.interp(share * steps[-1], steps, run.types[name].to_numpy()))

    for name in study.runs["sft"][0].types:
        cells = [study.mean("sft", lambda run, share=share, name=name: value(run, name, share)) for share in shares]
        lines.append(_row(name, map(shown, cells)))
    return lines


def answer_table(study: Study) -> list[str]:
    """Greedy answers: degeneration on probes, and the world's checker on held-out prompts."""
    metrics = ("same_share", "distinct_2", "repeat_share", "length")
    checks = ("fact_right", "grammatical", "preferred")
    heads = [*metrics, *checks, "win rate", "against"]
    lines = []
    for arm in study.arms:
        samples = [run.summary.samples for run in study.runs[arm]]
        verdicts = judged(study, arm)
        if not verdicts or any(one is None for one in samples):
            continue
        cells = [over_seeds([one.value(name)[1] for one in samples]) for name in metrics]
        cells += [over_seeds([one["numbers"]["A"][name] for one in verdicts]) for name in checks]
        cells.append(over_seeds([one["win_rate"] for one in verdicts]))
        lines.append(_row(arm, [*(shown(cell, "") for cell in cells), "sft" if arm == "dpo" else "dpo"]))
    return ["", "## Greedy answers at the end", "", *_header("arm", heads), *lines] if lines else []


def write_summary(folders: Mapping[int, Path], arms: Sequence[str], path: Path) -> Path:
    """All tables and verdicts as Markdown; returns the file."""
    study = Study(folders, arms)
    seeds = ", ".join(map(str, folders))
    enough = len(folders) >= MIN_SEEDS
    head = f"Seeds {seeds}." if enough else f"Seeds {seeds}; at least {MIN_SEEDS} are needed before a verdict."
    seconds = sum(_seconds(run) for runs in study.runs.values() for run in runs)
    lines = [
        "# The squeezing study",
        "",
        f"{head} Training and probing: {seconds:.0f} s.",
        "",
    ]
    lines += [
        "## Verdicts",
        "",
        *_header("claim", ["verdict"]),
        *(_row(claim, [said]) for claim, said in all_claims(study)),
        "",
    ]
    path.write_text("\n".join([*lines, *tables(study)]) + "\n", encoding="utf-8")
    return path


def _seconds(run: Run) -> float:
    meta = run.store.read_meta()
    return meta["probe_seconds"] + meta["train_seconds"]


def _header(first: str, heads: Sequence[str]) -> list[str]:
    return [_row(first, heads), _row("---", ["---"] * len(heads))]


def _row(first: str, cells) -> str:
    return f"| {' | '.join([first, *cells])} |"
