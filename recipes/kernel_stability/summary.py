"""What the study found, as Markdown: stability over seeds, accumulated influence, and how cheap forms rank."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import proxies
import running
import torch
from charts import write_charts

from trl_dynamics.akg.proxies import agreement
from trl_dynamics.influence.series import SAMPLED
from trl_dynamics.statistics import STABLE, Stability, rank_agreement, rank_stability

MEASURES = {"kernel": "size of K", "influence": "influence"}
ALL, APART, CLASSES = "all", "different prompts or classes", "means of class pairs"


class System:
    """What was measured of one model and seed at its checkpoints.

    Args:
        path (`Path`): The file that study.py kept.
    """

    def __init__(self, path: Path):
        with np.load(path) as file:
            self.arrays = dict(file)
        self.steps = self.arrays["steps"].tolist()
        self.stability = cache(self._stability)

    def _stability(self, measure: str, pairs: str = ALL) -> Stability:
        values_SOU = self.arrays[measure]
        if pairs == CLASSES:
            each = values_SOU.shape[1] // 10
            values_SOU = values_SOU.reshape(len(values_SOU), 10, each, 10, each).mean(axis=(2, 4))
        kept_OU = np.ones(values_SOU.shape[1:], dtype=bool)
        if pairs == APART:
            kept_OU = ~self.arrays["same"].astype(bool)
        sides = [index_OU[kept_OU] for index_OU in np.indices(kept_OU.shape)]
        values = {step: one[kept_OU] for step, one in zip(self.steps, values_SOU, strict=True)}
        return rank_stability(values, sides)

    def noise(self) -> float:
        """Correlation of two draws of the sizes of K at the last checkpoint; 1 where they are exact."""
        again = self.arrays.get("again")
        return 1.0 if again is None else rank_agreement(self.arrays["kernel"][-1].ravel(), again.ravel()).value


def write_summary(folder: Path, seeds: Sequence[int], systems: Sequence[str], path: Path) -> Path:
    """All tables, and charts beside them; returns the file."""
    found = {name: [System(path) for path in _of_seeds(folder, seeds, f"{name}.npz")] for name in systems}
    found = {name: runs for name, runs in found.items() if runs}
    counts = ", ".join(f"{name} {len(runs)}" for name, runs in found.items())
    lines = [
        "# Stability of the kernel",
        "",
        f"Seeds: {counts}. Numbers are means over seeds, with the smallest and largest of a seed.",
        "",
        "## Rankings between checkpoints",
        "",
        *stability_table(found),
        "",
        "## Which stretches are below .9",
        "",
        *stretch_table(found),
        "",
        "## Quality along the run",
        "",
        *quality_table(found),
        *accumulated_table(folder, seeds),
        *forms_table(folder, seeds),
        *bounds_table(folder, seeds),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    matrices = {
        measure: {name: _mean_matrix(one.stability(measure) for one in runs) for name, runs in found.items()}
        for measure in MEASURES
    }
    write_charts(matrices, folder / "charts")
    return path


def stability_table(found: dict[str, list[System]]) -> list[str]:
    """Per system, measure and kind of pairs: neighbours, the share below `STABLE`, and the ends of the run."""
    heads = ["ranked by", "pairs", "lowest of neighbours", f"below {STABLE:g}", "surely", "start to end", "draws of K"]
    lines = _header("model", heads)
    for name, runs in found.items():
        classes = [CLASSES] if name in ("mlp", "cnn") else []
        for measure in MEASURES:
            for pairs in (ALL, APART, *classes):
                stable = [run.stability(measure, pairs) for run in runs]
                cells = [
                    MEASURES[measure],
                    pairs,
                    spread([one.consecutive()["value"].min() for one in stable]),
                    _share([one.share_below() for one in stable], stable[0]),
                    _share([one.share_below(surely=True) for one in stable], stable[0]),
                    spread([one.value_SS[0, -1] for one in stable]),
                    spread([run.noise() for run in runs]) if measure == "kernel" else "-",
                ]
                lines.append(_row(name, cells))
    return lines


def stretch_table(found: dict[str, list[System]]) -> list[str]:
    """Every stretch between neighbouring checkpoints of all pairs, by measure."""
    lines = _header("model", ["ranked by", "stretches: correlation"])
    for name, runs in found.items():
        for measure, words in MEASURES.items():
            tables = [run.stability(measure).consecutive() for run in runs]
            mean = pd.concat([table["value"] for table in tables], axis=1).mean(axis=1)
            ends = zip(tables[0]["before"], tables[0]["after"], mean, strict=True)
            cells = ", ".join(
                f"{before}-{after}: {'**' if value < STABLE else ''}{value:.2f}{'**' if value < STABLE else ''}"
                for before, after, value in ends
            )
            lines.append(_row(name, [words, cells]))
    return lines


def quality_table(found: dict[str, list[System]]) -> list[str]:
    """Held-out accuracy of networks; mean ln pi of the updates' labels, nats per token, of language models."""
    lines = _header("model", ["start", "end"])
    for name, runs in found.items():
        quality = [run.arrays["quality"] for run in runs]
        lines.append(_row(name, [spread([one[at] for one in quality]) for at in (0, -1)]))
    return lines


def accumulated_table(folder: Path, seeds: Sequence[int]) -> list[str]:
    """The sums along runs of which every step was predicted, per type of answers."""
    lines: list[str] = []
    for name in running.RUNS:
        outputs = [path.parent for path in _of_seeds(folder, seeds, f"running-{name}/training_args.bin")]
        if not outputs:
            continue
        whole, sampled = (
            [running.sums(output, every) for output in outputs] for every in (running.ALL, running.SAMPLE)
        )
        assert all((one["coverage"] == SAMPLED).all() for one in sampled)
        lines += ["", f"## {name}: predicted and observed, {running.NUM_STEPS} steps, nats per token", ""]
        lines += _header(
            "type", ["predicted, summed", "observed", "predicted - observed", "every 5th step alone, sampled"]
        )
        for kind in whole[0].index:
            columns = [[one.loc[kind, column] for one in whole] for column in ("predicted", "observed")]
            error = [predicted - observed for predicted, observed in zip(*columns, strict=True)]
            part = [one.loc[kind, "predicted"] for one in sampled]
            lines.append(_row(kind, [spread(values, "+.3f") for values in (*columns, error, part)]))
        near = pd.concat([running.neighbours(output)["value"] for output in outputs])
        lines += ["", f"Rankings of fixed updates' influence at neighbouring steps: {spread(near)}."]
    return lines


def forms_table(folder: Path, seeds: Sequence[int]) -> list[str]:
    """Spearman's correlation of every cheap form with the exact influence and, in absolute value, the size of K."""
    lines = ["", "## Cheap forms against exact ones", "", *_header("model", ["form", "influence", "size of K"])]
    for path in sorted((folder / f"seed{seeds[0]}").glob("forms-*.npz")):
        files = [_arrays(one) for one in _of_seeds(folder, seeds, path.name)]
        for form in (key for key in files[0] if key not in MEASURES):
            cells = [_agreement(files, form, measure) for measure in ("influence", "kernel")]
            lines.append(_row(path.stem.removeprefix("forms-"), [form, *cells]))
    return lines


def _agreement(files: list[dict[str, np.ndarray]], form: str, measure: str) -> str:
    size: Callable = np.abs if measure == "kernel" else np.asarray
    found = [
        agreement({form: torch.from_numpy(size(one[form]))}, torch.from_numpy(one[measure]))[form] for one in files
    ]
    value, low, high = (np.mean([getattr(one, end) for one in found]) for end in ("value", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def bounds_table(folder: Path, seeds: Sequence[int]) -> list[str]:
    """LBK against the size of K, SignDelta against influence, over pairs of types."""
    heads = ["run", "LBK and size of K", "SignDelta and influence"]
    paths = sorted((folder / f"seed{seeds[0]}").glob("bounds-*.npz"))
    lines = ["", "## Bounds from records against exact ones, over pairs of types", "", *_header("model", heads)]
    for path in paths:
        files = [_arrays(one) for one in _of_seeds(folder, seeds, path.name)]
        for optimizer in proxies.OPTIMIZERS:
            cells = []
            for bound, exact in (("lbk", "kernel"), ("sign_delta", "-influence")):
                found = [
                    agreement({"": torch.from_numpy(one[f"{optimizer}/{bound}"])}, torch.from_numpy(one[exact]))[""]
                    for one in files
                ]
                ends = (np.mean([getattr(one, end) for one in found]) for end in ("value", "low", "high"))
                cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*ends))
            lines.append(_row(path.stem.removeprefix("bounds-"), [optimizer, *cells]))
    return lines if paths else []


def _of_seeds(folder: Path, seeds: Sequence[int], name: str) -> list[Path]:
    """A file of every seed that has got so far."""
    paths = [folder / f"seed{seed}" / name for seed in seeds]
    return [path for path in paths if path.is_file()]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def _mean_matrix(found: Iterable[Stability]) -> pd.DataFrame:
    """Mean over seeds of the correlation of every two checkpoints."""
    found = list(found)
    return pd.DataFrame(np.mean([one.value_SS for one in found], axis=0), found[0].steps, found[0].steps)


def _share(shares: list[float], stable: Stability) -> str:
    """How many stretches, of all seeds together."""
    num = len(stable.steps) - 1
    return f"{round(sum(shares) * num)} of {num * len(shares)}"


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Mean, and the smallest and largest."""
    values = list(values)
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _header(first: str, heads: Sequence[str]) -> list[str]:
    return [_row(first, heads), _row("---", ["---"] * len(heads))]


def _row(first: str, cells) -> str:
    return f"| {' | '.join([first, *cells])} |"
