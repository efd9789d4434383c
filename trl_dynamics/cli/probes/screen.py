"""trl-dynamics probes screen: before any training, log-probabilities at step 0 and likelihood-displacement risk."""

import functools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import add
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import trl

from trl_dynamics import loading, stats_head
from trl_dynamics.cli import finite, sources
from trl_dynamics.cli.probes.build import parse
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.encode import EncodedProbes, LengthLimits, encode_response
from trl_dynamics.probing.labelled import pad_id_of
from trl_dynamics.probing.layouts import PaddedLayout
from trl_dynamics.probing.rows import Pair, read_pairs
from trl_dynamics.probing.schema import REQUIRED_TYPES, Probe, ProbeSet, order_types
from trl_dynamics.progress import with_bar
from trl_dynamics.tokens import displacement
from trl_dynamics.tracking.threads import tell_threads

logger = logging.getLogger(__name__)

SCORES_FILE, KEPT_FILE, UNSCORED_FILE, SUMMARY_FILE = (
    "scores.parquet",
    "filtered.jsonl",
    "unscored.jsonl",
    "summary.json",
)
# Pairs encoded at a time; more would only cost memory.
CHUNK = 256


@dataclass
class ScreenArguments:
    """Options of `trl-dynamics probes screen`."""

    model: str | None = field(default=None, metadata={"help": "The model that training would start from."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Preference pairs: file, folder, hub dataset.", "aliases": ["--dataset"]}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_data_dir: str | None = field(default=None, metadata={"help": "Folder inside a hub dataset."})
    split: str = field(default="train", metadata={"help": "Split of the pairs."})
    dataset_num_rows: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Not supported: the filtered rows are written."})
    probe_set: str | None = field(
        default=None, metadata={"help": "Instead of pairs a probe set: all its types are scored, its pairs ranked."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the results.", "aliases": ["-o"]})
    overwrite: bool = field(default=False, metadata={"help": "Replace earlier results in that folder."})
    keep_fraction: float = field(
        default=0.9, metadata={"help": "Part of the pairs, those of the lowest risk, in the filtered data."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "As in training, in tokens."})
    max_length: int | None = field(default=None, metadata={"help": "As in training; by default the model's context."})
    batch_size: int = field(default=8, metadata={"help": "Responses of a forward pass."})
    dtype: str = field(default="float32", metadata={"help": "Weights' dtype."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})


@dataclass(frozen=True)
class Screened:
    """A row per scored probe, and why others have none."""

    frame: pd.DataFrame
    unscored: list[dict]


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
    folder = sources.require_free(args.output_dir, SCORES_FILE, args.overwrite)
    rows, probes, unusable = _read(args, mixture)
    screened = screen(probes, args, unusable)
    kept = _kept(screened.frame, args.keep_fraction)
    with probe_io.complete_folder(folder) as part:
        screened.frame.to_parquet(part / SCORES_FILE, index=False)
        _write_kept(rows, kept, part / KEPT_FILE)
        _write_lines(screened.unscored, part / UNSCORED_FILE)
        (part / SUMMARY_FILE).write_text(json.dumps(summary(screened, kept, args), indent=2) + "\n")
    print(*_report(screened, kept, rows), sep="\n")
    print(f"results: {folder}")
    return finite.exit_status("probes screen", *not_finite(screened.frame), where=SCORES_FILE)


def not_finite(frame: pd.DataFrame) -> tuple[int, int]:
    """How many of all scored answers have a log-probability that is not finite, and how many there are."""
    names = [name.removeprefix("num_tokens/") for name in frame if name.startswith("num_tokens/")]
    scored = [frame.loc[frame[f"num_tokens/{name}"].notna(), f"logp_sum/{name}"] for name in names]
    return sum(int((~np.isfinite(column)).sum()) for column in scored), sum(map(len, scored))


def screen(probes: list[Probe], args: ScreenArguments, unscored: list[dict]) -> Screened:
    """Score every probe that fits the model; the others are listed with reasons.

    The frame has `row`, `probe_id`, per type `logp_sum/TYPE`, `logp_mean/TYPE` (nats), `num_tokens/TYPE` and
    `truncated/TYPE` (prompt or answer was cut), and for probes with both answers `ches`, `ches_normalized` and
    `risk`, the rank of the latter in (0, 1]. These leave the state out that predicts the end-of-turn token;
    `ches_with_eos` and `ches_normalized_with_eos` count it, as the code of CHES's authors does on rows that end with
    one.
    """
    path = sources.find_model(args.model)
    tokenizer = loading.load_tokenizer(path, trust_remote_code=args.trust_remote_code)
    model = loading.load_causal_lm(path, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tell_threads(device, 1)
    model = model.to(device)
    stats_head.install(model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = LengthLimits(args.max_prompt_length, args.max_length or context, context)
    ends = {tokenizer.eos_token_id, *loading.end_ids(path)}
    pad_id = pad_id_of(tokenizer, model)
    layout, scored = PaddedLayout(args.batch_size, pad_id, boundaries=stats_head.length_boundaries(model)), []
    for start in range(0, len(probes), CHUNK):
        chunk, items = [], []
        for row, probe in enumerate(probes[start : start + CHUNK], start=start):
            try:
                new = [encode_response(probe, name, tokenizer, limits, ends) for name in order_types(probe.responses)]
            except ValueError as error:
                unscored.append({"probe_id": probe.probe_id, "reason": str(error)})
                continue
            chunk.append((row, probe))
            items += new
        if items and not scored:
            stats_head.settle(model, items[0].input_ids)
            layout = layout.at_most(stats_head.own_forward_tokens(model))
        scored += _score(chunk, items, model, layout)
        logger.info("screened: %d of %d", min(len(probes), start + CHUNK), len(probes))
    if not scored:
        raise ValueError(f"none of {len(unscored)} pairs could be scored, first: {unscored[0]['reason']}")
    frame = pd.DataFrame(scored)
    if "ches_normalized" in frame:
        known = frame["ches_normalized"].notna()
        values = torch.tensor(frame.loc[known, "ches_normalized"].to_numpy())
        frame.loc[known, "risk"] = displacement.risk(values).numpy()
    return Screened(frame, unscored)


def _score(chunk: list[tuple[int, Probe]], items: list, model, layout: PaddedLayout) -> Iterator[dict]:
    if not items:
        return
    batches = layout.batches(EncodedProbes(tuple(items)))
    watched = with_bar(batches, len(batches), "screening")
    sums = functools.reduce(add, (displacement.score_responses(model, batch, len(items)) for batch in watched))
    index = {(item.probe_id, item.response_type): i for i, item in enumerate(items)}
    for row, probe in chunk:
        line = {"row": row, "probe_id": probe.probe_id}
        for name in order_types(probe.responses):
            i = index[probe.probe_id, name]
            num_tokens = int(sums.num_tokens_I[i])
            line |= {
                f"logp_sum/{name}": float(sums.logp_sum_I[i]),
                f"logp_mean/{name}": float(sums.logp_sum_I[i]) / num_tokens,
                f"num_tokens/{name}": num_tokens,
                f"truncated/{name}": items[i].prompt_cut or items[i].response_cut,
            }
        if set(REQUIRED_TYPES) <= set(probe.responses):
            both = [index[probe.probe_id, name] for name in REQUIRED_TYPES]
            for suffix, with_end in (("", False), ("_with_eos", True)):
                hidden_ID, num_I = sums.states(with_end=with_end)
                chosen_PD, rejected_PD = hidden_ID[both][:, None]
                normalized_P = displacement.ches_normalized(chosen_PD, rejected_PD, *num_I[both][:, None])
                line[f"ches{suffix}"] = float(displacement.ches(chosen_PD, rejected_PD))
                line[f"ches_normalized{suffix}"] = float(normalized_P)
        yield line


def summary(screened: Screened, kept: list[str], args: ScreenArguments) -> dict:
    """What was done and found, for programs."""
    frame = screened.frame
    means = {
        name.split("/", 1)[1]: finite.or_none(frame[name].mean()) for name in frame if name.startswith("logp_mean/")
    }
    return {
        "model": args.model,
        "source": args.probe_set or args.dataset_name,
        "num_scored": len(frame),
        "num_unscored": len(screened.unscored),
        "num_not_finite": not_finite(frame)[0],
        "num_kept": len(kept),
        "num_truncated": int(frame.filter(like="truncated/").eq(True).to_numpy().sum()),
        "keep_fraction": args.keep_fraction,
        "max_prompt_length": args.max_prompt_length,
        "max_length": args.max_length,
        "logp_mean": means,
    }


def _read(args: ScreenArguments, mixture: trl.DatasetMixtureConfig) -> tuple[object, list[Probe], list[dict]]:
    """The source's rows (a dataset, or a probe set), a probe for each usable one, and reasons for the others."""
    if args.probe_set:
        if args.dataset_name or mixture.datasets:
            raise ValueError("give either a dataset or --probe_set, not both")
        probe_set = sources.find_probe_set(args.probe_set, args.dataset_num_rows)
        return probe_set, list(probe_set), []
    rows = sources.take_split(sources.load_splits(args, mixture), args.split)
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


def _kept(frame: pd.DataFrame, fraction: float) -> list[str]:
    """Ids of the pairs with the lowest risk, in the order of the data."""
    if "risk" not in frame:
        raise ValueError("no probe has both a chosen and a rejected answer, so that there are no pairs to rank")
    ranked = frame[frame["risk"].notna()].sort_values(["ches_normalized", "row"])
    return list(ranked.head(max(1, round(fraction * len(ranked)))).sort_values("row")["probe_id"])


def _write_kept(rows, kept: list[str], path: Path) -> None:
    if isinstance(rows, ProbeSet):
        wanted = set(kept)
        _write_lines([probe.to_row() for probe in rows if probe.probe_id in wanted], path)
    else:
        rows.select([int(probe_id) for probe_id in kept]).to_json(path, lines=True, force_ascii=False)


def _write_lines(lines: list[dict], path: Path) -> None:
    if lines:
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _report(screened: Screened, kept: list[str], rows) -> list[str]:
    frame = screened.frame
    lines = [f"{'step 0, nats':<28} {'per token':>10} {'per response':>13} {'probes':>7}"]
    for name in order_types(column.split("/", 1)[1] for column in frame if column.startswith("logp_mean/")):
        mean, total = frame[f"logp_mean/{name}"], frame[f"logp_sum/{name}"]
        lines.append(f"{name:<28} {mean.mean():>10.3f} {total.mean():>13.2f} {mean.notna().sum():>7}")
    values = frame["ches_normalized"].dropna()
    parts = ", ".join(f"{q:.0%} {values.quantile(q):.3g}" for q in (0, 0.1, 0.5, 0.9, 1))
    lines += ["", f"length-normalised CHES of {len(values)} pairs, quantiles: {parts}", "riskiest pairs:"]
    for _, row in frame.sort_values("ches_normalized", ascending=False).head(5).iterrows():
        what = "probe" if isinstance(rows, ProbeSet) else "row"
        lines.append(f"  {what} {row['probe_id']}: CHES {row['ches']:.4g}, normalised {row['ches_normalized']:.4g}")
    lines.append(f"kept in {KEPT_FILE}: {len(kept)} of {len(values)} pairs, those of the lowest risk")
    if screened.unscored:
        lines.append(
            f"not scored, see {UNSCORED_FILE}: {len(screened.unscored)}; first: {screened.unscored[0]['reason']}"
        )
    return lines
