"""trl-dynamics quickstart: the squeezing effect, and what extended SFT does to it, on the embedded model.

Four runs: SFT on chosen answers -> DPO, and SFT on both answers -> DPO, all with the same probes; then one page that
compares them.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from trl_dynamics.cli import dpo, sft
from trl_dynamics.cli.options import option, read
from trl_dynamics.cli.training import TrainingCommand
from trl_dynamics.findings.verdicts import Judged, calm_of, compare, findings_of, judge, summary_text
from trl_dynamics.report import extra
from trl_dynamics.store.store import open_store

# recipes/quickstart holds the same settings as YAML.
SHARED = {
    "dataset_name": "embedded",
    "probe_set": "embedded",
    "per_device_train_batch_size": 8,
    "logging_steps": 5,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "probe_every": 0.1,
}
SFT = SHARED | {"sft_on": "chosen", "learning_rate": 1e-3, "num_train_epochs": 5}
DPO = SHARED | {"learning_rate": 2e-4, "beta": 0.1, "num_train_epochs": 4}
# Name of the run, command, settings, and the run it starts from.
STAGES = (
    ("sft", sft, SFT, None),
    ("dpo", dpo, DPO, "sft"),
    ("sft_both", sft, SFT | {"sft_on": "both"}, None),
    ("dpo_after_sft_both", dpo, DPO, "sft_both"),
)


@dataclass
class QuickstartArguments:
    """Options of `trl-dynamics quickstart`."""

    output_dir: str = option("runs/quickstart", "where the four runs and the page go")
    num_pairs: int = option(200, "preference pairs to train on")
    num_probes: int = option(40, "probes to track")
    seed: int = option(0, "")


def run(argv: list[str]) -> int:
    """Train the four runs, write the comparison page and print what was found."""
    args = read(QuickstartArguments, argv, "quickstart", __doc__)
    began, output_dir = time.perf_counter(), Path(args.output_dir)
    # A model this small gains nothing from a second thread and loses much wherever a core is shared.
    torch.set_num_threads(1)
    if missing := missing_extra():
        print(f"There will be no page: {missing}", flush=True)
    with _quiet():
        for number, (name, command, settings, start) in enumerate(STAGES, start=1):
            model = "embedded" if start is None else str(output_dir / start)
            print(f"\n[{number}/{len(STAGES)}] {describe(name)}", flush=True)
            train(command.command(), settings, model, output_dir / name, args)
    runs = [output_dir / name for name, *_ in STAGES]
    print("\nWhat the probes found:")
    verdicts = {path.name: judge(open_store(path)) for path in runs}
    print("\n".join(found_text(name, judged) for name, judged in verdicts.items()))
    print("\nDPO after SFT on both answers, against DPO after SFT on chosen ones:")
    compared = compare({name: verdicts[name] for name in ("dpo", "dpo_after_sft_both")})
    texts = [finding.text for comparison in compared for finding in comparison.findings]
    print("\n".join(texts) or "no difference beyond two standard errors over probes")
    print(f"\n{cost_text([open_store(path).read_meta() for path in runs])}")
    print(f"The quickstart took {time.perf_counter() - began:.0f} s. Records: {output_dir}/*/dynamics/")
    _write_page(runs, output_dir / "report.html")
    return 0


def found_text(name: str, judged: list[Judged]) -> str:
    """What was found in a run of one model, in words."""
    return summary_text(findings_of(judged), name, calm_of(judged))


def missing_extra() -> str | None:
    """What a page would need and is not installed, with the command that installs it; None where all is there."""
    try:
        extra.vl_convert()
        extra.jinja2()
    except extra.ReportExtraMissing as missing:
        return str(missing)
    return None


def describe(name: str) -> str:
    """What a stage does, in words."""
    return {
        "sft": "SFT on the chosen answers",
        "dpo": "DPO after that",
        "sft_both": "extended SFT: on chosen and rejected answers",
        "dpo_after_sft_both": "DPO after extended SFT",
    }[name]


def cost_text(metas: list[dict]) -> str:
    """What probing cost in these runs, by their meta.json."""
    probing, training = (sum(meta[name] for meta in metas) for name in ("probe_seconds", "train_seconds"))
    return (
        f"Probing took {probing:.0f} s for {training:.0f} s of training ({probing / training:.0%}), because the "
        "model is tiny, the runs are short and probe_every is given; without it, at most a third of training is taken."
    )


def train(command: TrainingCommand, settings: dict, model: str, output_dir: Path, args: QuickstartArguments) -> None:
    """One run through the same code as `trl-dynamics sft` and `dpo`."""
    values = settings | {
        "model_name_or_path": model,
        "output_dir": str(output_dir),
        "dataset_num_rows": args.num_pairs,
        "probe_max_probes": args.num_probes,
        "seed": args.seed,
        "disable_tqdm": True,
    }
    flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    configs, _ = command.parse(flags)
    command.train(*configs, drop_callbacks=(PrinterCallback,))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only the probes' lines: no progress bars of data preparation and loading, and at the end what all runs say."""
    bars = (datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled())
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    trainers = logging.getLogger("trl_dynamics.trainers")
    level = trainers.level
    trainers.setLevel(logging.WARNING)
    # Findings, places and cost are printed together at the end.
    said_at_the_end = ("records: ", "page: ", "probing ", *(f"{name}: " for name, *_ in STAGES))
    loggers = [logging.getLogger(f"trl_dynamics.tracking.{module}") for module in ("callback", "series")]

    def is_for_now(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(said_at_the_end)

    for logger in loggers:
        logger.addFilter(is_for_now)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_for_now)
        trainers.setLevel(level)
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers_logging.enable_progress_bar()


def _write_page(runs: list[Path], path: Path) -> None:
    from trl_dynamics.report.page import build_page

    try:
        print(f"Open the comparison report: {build_page(runs, path).resolve()}")
    except extra.ReportExtraMissing as missing:
        print(f"No page was written: {missing}")
