"""trl-dynamics probes screen: before any training, log-probabilities at step 0 and likelihood-displacement risk."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import trl

from trl_dynamics import loading
from trl_dynamics.cli import finite, inputs, outputs, sources
from trl_dynamics.cli.options import option
from trl_dynamics.cli.probes.build import parse
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.encode import LengthLimits
from trl_dynamics.probing.rows import Pair, read_pairs
from trl_dynamics.probing.schema import Probe, ProbeSet
from trl_dynamics.tokens import screening
from trl_dynamics.tokens.screening import KEPT_FILE, SCORES_FILE, UNSCORED_FILE
from trl_dynamics.tracking.threads import tell_threads

SUMMARY_FILE = "summary.json"


@dataclass
class ScreenArguments:
    """Options of `trl-dynamics probes screen`."""

    model: str | None = option(None, "The model that training would start from.")
    dataset_name: str | None = option(None, "Preference pairs: file, folder, hub dataset.", "--dataset")
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_data_dir: str | None = option(None, "Folder inside a hub dataset.")
    split: str = option("train", "Split of the pairs.")
    dataset_num_rows: int | None = option(None, "Use the first so many rows only.")
    dataset_streaming: bool = option(False, "Not supported: the filtered rows are written.")
    probe_set: str | None = option(None, "Instead of pairs a probe set: all its types are scored, its pairs ranked.")
    output_dir: str | None = option(None, "Folder of the results.", "-o")
    overwrite: bool = option(False, "Replace earlier results in that folder.")
    keep_fraction: float = option(0.9, "Part of the pairs, those of the lowest risk, in the filtered data.")
    max_prompt_length: int | None = option(None, "As in training, in tokens.")
    max_length: int | None = option(None, "As in training; by default the model's context.")
    batch_size: int = option(8, "Responses of a forward pass.")
    dtype: str = option("float32", "Weights' dtype.")
    trust_remote_code: bool = option(False, "Run model code that comes from the hub.")


def run(argv: list[str]) -> int:
    """Score, rank, filter and write; prints the distribution and the riskiest pairs.

    The status is 4 if an answer's log-probability is not finite.

    Raises:
        ValueError: If an option, the model or the data is wrong, or no pair could be scored; then nothing is written.
    """
    args, mixture = parse(ScreenArguments, argv, "screen")
    if not 0 < args.keep_fraction <= 1:
        raise ValueError(f"keep_fraction is {args.keep_fraction}, expected more than 0 and at most 1")
    if args.dataset_streaming:
        raise ValueError("screening writes the filtered rows, so that it cannot stream; leave --dataset_streaming out")
    folder = outputs.require_free(args.output_dir, SCORES_FILE, args.overwrite)
    rows, probes, unusable = _read(args, mixture)
    screened = screening.screen(*_load(args), probes, batch_size=args.batch_size, unscored=unusable)
    kept = screening.lowest_risk(screened.frame, args.keep_fraction)
    with probe_io.complete_folder(folder) as part:
        screened.frame.to_parquet(part / SCORES_FILE, index=False)
        _write_kept(rows, kept, part / KEPT_FILE)
        _write_lines(screened.unscored, part / UNSCORED_FILE)
        (part / SUMMARY_FILE).write_text(json.dumps(summary(screened, kept, args), indent=2) + "\n")
    print(*screening.lines(screened, kept, "probe" if args.probe_set else "row"), sep="\n")
    print(f"results: {folder}")
    return finite.exit_status("probes screen", *screening.not_finite(screened.frame), where=SCORES_FILE)


def summary(screened: screening.Screened, kept: list[str], args: ScreenArguments) -> dict:
    """What was done and found, for programs."""
    names = ("keep_fraction", "max_prompt_length", "max_length")
    facts = {"model": args.model, "source": args.probe_set or args.dataset_name}
    return facts | screening.summary(screened, kept) | {name: getattr(args, name) for name in names}


def _load(args: ScreenArguments) -> tuple:
    """The model on the accelerator, if there is one, its tokenizer, where it cuts answers, and what ends them."""
    path, trusted = sources.find_model(args.model), {"trust_remote_code": args.trust_remote_code}
    tokenizer = loading.load_tokenizer(path, **trusted)
    model = loading.load_causal_lm(path, dtype=args.dtype, **trusted)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tell_threads(device, 1)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = LengthLimits(args.max_prompt_length, args.max_length or context, context)
    return model.to(device), tokenizer, limits, loading.end_ids(path)


def _read(args: ScreenArguments, mixture: trl.DatasetMixtureConfig) -> tuple[object, list[Probe], list[dict]]:
    """The source's rows (a dataset, or a probe set), a probe for each usable one, and reasons for the others."""
    if args.probe_set:
        if args.dataset_name or mixture.datasets:
            raise ValueError("give either a dataset or --probe_set, not both")
        probe_set = sources.find_probe_set(args.probe_set, args.dataset_num_rows)
        return probe_set, list(probe_set), []
    rows = inputs.take_split(inputs.load_splits(args, mixture), args.split)
    rows = rows if args.dataset_num_rows is None else rows.take(args.dataset_num_rows)
    probes, unusable = [], []
    for index, item in enumerate(read_pairs(rows)):
        if isinstance(item, Pair) and item.rejected is None:
            raise ValueError(f"{item.where} has no rejected answer; screening is for preference pairs")
        if isinstance(item, Pair):
            probes.append(Probe(str(index), item.prompt, {"chosen": item.chosen, "rejected": item.rejected}))
        else:
            unusable.append({"probe_id": str(index), "reason": item})
    return rows, probes, unusable


def _write_kept(rows, kept: list[str], path: Path) -> None:
    if isinstance(rows, ProbeSet):
        wanted = set(kept)
        _write_lines([probe.to_row() for probe in rows if probe.probe_id in wanted], path)
    else:
        rows.select([int(probe_id) for probe_id in kept]).to_json(path, lines=True, force_ascii=False)


def _write_lines(lines: list[dict], path: Path) -> None:
    if lines:
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
