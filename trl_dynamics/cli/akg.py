"""trl-dynamics akg: what one training step on one answer does to every answer of a probe set, before training."""

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import trl
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from trl_dynamics import loading, stats_head
from trl_dynamics.akg import losses
from trl_dynamics.akg.batched import predict_together
from trl_dynamics.akg.one_step import Force, Influence, predict, update_gradient
from trl_dynamics.akg.real_step import fixed_features, label_logp, last_bits, moved
from trl_dynamics.akg.steps import Step, step_of
from trl_dynamics.akg.task import Task, causal_lm
from trl_dynamics.cli import finite, sources
from trl_dynamics.cli.options import option, parse
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.encode import EncodedResponse, LengthLimits, encode, encode_response
from trl_dynamics.probing.labelled import collate, pad_id_of, split
from trl_dynamics.probing.rows import Pair, read_pairs
from trl_dynamics.probing.schema import REQUIRED_TYPES, Probe, ProbeSet, order_types

logger = logging.getLogger(__name__)

INFLUENCE_FILE, SUMMARY_FILE = "influence.parquet", "summary.json"
# Beside the types of answers, which are trained on one at a time: both sides of a pair under DPO's loss.
DPO = "dpo"


@dataclass
class AkgArguments:
    """Options of `trl-dynamics akg`."""

    model_name_or_path: str | None = option(
        None,
        "The model that the step starts from: folder, hub name, embedded. Of an adapter, its weights take the step.",
    )
    probe_set: str | None = option(None, "What is observed: every answer of every probe.")
    probe_max_probes: int | None = option(None, "Observe the first so many probes only.")
    dataset_name: str | None = option(
        None,
        "What is trained on, row by row: file, folder, hub dataset, embedded. None: the probes.",
        "--dataset",
    )
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_data_dir: str | None = option(None, "Folder inside a hub dataset.")
    split: str = option("train", "Split of the data.")
    dataset_num_rows: int | None = option(8, "Rows that are trained on, each from the same model.")
    dataset_streaming: bool = option(False, "Read a hub dataset without downloading all of it.")
    update_types: list[str] = option(
        [],
        "What of a row is trained on: types of answers, or dpo for both. Default: chosen rejected dpo.",
    )
    beta: float = option(0.1, "DPO's, whose reference is the model itself.")
    direction: str = option("sgd", "sgd or adamw: a first step of that optimiser.")
    learning_rate: float = option(1e-5, "The step's.")
    max_grad_norm: float | None = option(None, "Clip the gradient as in training.")
    order: int = option(1, "2 adds the second order along the step.")
    verify: bool = option(False, "Take each step, measure what it did, take it back.")
    updates_at_once: int = option(1, "Steps in one pass: 4 take 10 to 40 % less time, and 4 times the memory.")
    max_prompt_length: int | None = option(None, "As in training, in tokens.")
    max_length: int | None = option(None, "As in training; by default the model's context.")
    tokens_per_batch: int = option(2048, "Tokens of a forward over the probes.")
    dtype: str = option("float32", "Weights' dtype.")
    attn_implementation: str | None = option(None, "As in `from_pretrained`.")
    trust_remote_code: bool = option(False, "Run model code that comes from the hub.")
    output_dir: str | None = option(None, "Folder of the results.", "-o")
    overwrite: bool = option(False, "Replace earlier results in that folder.")


@dataclass(frozen=True)
class Update:
    """One step to predict: a row of the data, what of it is trained on, and the batch with its loss."""

    row: int
    kind: str
    prompt_key: str
    batch: dict[str, torch.Tensor]
    loss: losses.Loss


def run(argv: list[str]) -> int:
    """Predict, write a row per update and observed answer, and print the mean change by type of each.

    Raises:
        ValueError: If an option, the model or the data is wrong; then nothing is written.
    """
    parser = trl.TrlParser((AkgArguments, trl.DatasetMixtureConfig), prog="trl-dynamics akg")
    args, mixture, unknown = parse(parser, argv)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; see trl-dynamics akg --help")
    for name in ("probe_set", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; see trl-dynamics akg --help")
    if PartialState().num_processes > 1:
        raise ValueError("akg runs in one process: each would predict everything; start it without accelerate launch")
    for name in ("probe_max_probes", "dataset_num_rows", "updates_at_once"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}, expected at least 1")
    folder = sources.require_free(args.output_dir, INFLUENCE_FILE, args.overwrite)
    frame = measure(args, mixture)
    summary = summarise(frame, args)
    with probe_io.complete_folder(folder) as part:
        frame.to_parquet(part / INFLUENCE_FILE, index=False)
        (part / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(*report(frame, args), f"results: {folder}", sep="\n")
    return finite.exit_status("akg", *not_finite(frame), where=INFLUENCE_FILE)


def not_finite(frame: pd.DataFrame) -> tuple[int, int]:
    """How many rows (an update and an observed answer each) have a number that is not finite, and how many rows."""
    names = [name for name in frame if name.endswith("_sum") or name.startswith("delta_sum/") or name == "update_loss"]
    return int((~np.isfinite(frame[names])).any(axis=1).sum()), len(frame)


def measure(args: AkgArguments, mixture: trl.DatasetMixtureConfig) -> pd.DataFrame:
    """A row per update and observed answer.

    Columns: `update_row`, `update_type`, `same_prompt` (whether the update has the probe's prompt), `probe_id`,
    `response_type`, `num_tokens`, `truncated` (prompt or answer was cut), `logp_sum` before the step and `delta_sum`,
    its predicted change (nats, without the end-of-turn token); `delta_sum/PART` per part of the step where there are
    several; with `verify` `true_sum`, `fixed_features_sum`, the prediction of a model whose head alone moves, and
    `rounding_sum`, what weights moved by their last bits do; and of the update `update_loss` (nats) and `force_norm`,
    the norm of G over all its positions and labels.
    """
    path = sources.find_model(args.model_name_or_path)
    tokenizer = loading.load_tokenizer(path, trust_remote_code=args.trust_remote_code)
    model = loading.load_causal_lm(
        path,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        trainable=True,
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    task = causal_lm(model.to(device))
    if hasattr(model, "peft_config"):
        num_weights = sum(parameter.numel() for parameter in task.trainable().values())
        logger.info(
            f"{path} is an adapter: the steps are taken on its {num_weights:,} weights, its base stays as it is"
        )
    context = loading.context_length(path, trust_remote_code=args.trust_remote_code)
    limits = LengthLimits(args.max_prompt_length, args.max_length or context, context)
    probe_set = sources.find_probe_set(args.probe_set, args.probe_max_probes)
    ends = loading.end_ids(path)
    observed = list(encode(probe_set, tokenizer, limits, ends).items)
    prompts = {probe.probe_id: _key(probe.prompt) for probe in probe_set}
    parts = split(observed, args.tokens_per_batch, stats_head.length_boundaries(model))
    as_batch = functools.partial(collate, pad_id=pad_id_of(tokenizer, model), device=device)
    batches = [as_batch(items) for items in parts]
    rounding = [_rounding(task, batch) if args.verify else None for batch in batches]
    rows: list[dict] = []
    updates = list(
        read_updates(args, mixture, probe_set, tokenizer, limits, {tokenizer.eos_token_id, *ends}, as_batch)
    )
    for start in range(0, len(updates), args.updates_at_once):
        some = updates[start : start + args.updates_at_once]
        forces = [_force(task, update) for update in some]
        steps = [
            step_of(force.gradients, task.trainable(), args.direction, args.learning_rate, args.max_grad_norm)
            for force in forces
        ]
        found: list[list[dict]] = [[] for _ in some]
        items = iter(observed)
        for batch, rounding_B in zip(batches, rounding, strict=True):
            own = list(itertools.islice(items, len(batch["input_ids"])))
            for k, predicted in enumerate(_predicted(task, forces, steps, batch, args)):
                for item, sums in zip(own, _sums(task, predicted, batch, rounding_B, args.verify), strict=True):
                    same_prompt = prompts[item.probe_id] == some[k].prompt_key
                    found[k].append(_row(some[k], forces[k], item, sums) | {"same_prompt": same_prompt})
        rows += itertools.chain(*found)
        logger.info("steps predicted: %d of %d", start + len(some), len(updates))
    return pd.DataFrame(rows)


def _force(task: Task, update: Update) -> Force:
    trained = dataclasses.replace(task, loss=update.loss)
    return update_gradient(trained, with_reference(trained, update))


def _predicted(task: Task, forces: list[Force], steps: list[Step], batch: dict, args: AkgArguments) -> list[Influence]:
    if args.order == 1 and len(steps) > 1:
        return predict_together(task, forces, steps, batch)
    return [predict(task, force, step, batch, order=args.order) for force, step in zip(forces, steps, strict=True)]


def _sums(
    task: Task, predicted: Influence, batch: dict, rounding_B: torch.Tensor | None, verify: bool
) -> list[dict[str, float]]:
    """Of each row of the batch, over its labels."""
    sums = {"logp_sum": predicted.logp_N, "delta_sum": predicted.total.target_N}
    if len(predicted.parts) > 1:
        sums |= {f"delta_sum/{name}": part.target_N for name, part in predicted.parts.items()}
    if verify:
        sums["fixed_features_sum"] = fixed_features(task, batch, predicted)
        with moved(task, predicted.step.total):
            sums["true_sum"] = label_logp(task, batch) - predicted.logp_N
    num_rows = len(batch["input_ids"])
    columns = {name: _by_row(values_N, predicted.item_N, num_rows).tolist() for name, values_N in sums.items()}
    if rounding_B is not None:
        columns["rounding_sum"] = rounding_B.tolist()
    return [{name: values[row] for name, values in columns.items()} for row in range(num_rows)]


def _row(update: Update, force: Force, item: EncodedResponse, sums: dict[str, float]) -> dict:
    return {
        "update_row": update.row,
        "update_type": update.kind,
        "probe_id": item.probe_id,
        "response_type": item.response_type,
        "num_tokens": len(item.response_ids),
        "truncated": item.prompt_cut or item.response_cut,
        **sums,
        "update_loss": force.loss,
        "force_norm": float(torch.linalg.vector_norm(force.norm_U)),
    }


def _rounding(task: Task, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B,) how far the last bits of all weights move the log-probability of each answer, nats."""
    before_N = label_logp(task, batch)
    with moved(task, last_bits(task)):
        change_N = label_logp(task, batch) - before_N
    return _by_row(change_N, task.items(batch), len(batch["input_ids"]))


def _by_row(values_N: torch.Tensor, row_N: torch.Tensor, num_rows: int) -> torch.Tensor:
    zeros_B = torch.zeros(num_rows, dtype=torch.float64)
    return zeros_B.index_add(0, row_N.cpu(), values_N.cpu().double())


def read_updates(
    args: AkgArguments,
    mixture: trl.DatasetMixtureConfig,
    probe_set: ProbeSet,
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits,
    ends: set[int],
    as_batch: Callable[..., dict[str, torch.Tensor]],
) -> Iterator[Update]:
    """The steps to predict, from the data or else from the probe set itself.

    Raises:
        ValueError: If no row of the data can be used, or none has a type that was asked for.
    """
    if args.dataset_name or mixture.datasets:
        rows = sources.take_split(sources.load_splits(args, mixture), args.split)
        rows = rows if args.dataset_num_rows is None else rows.take(args.dataset_num_rows)
        probes = [_probe_of(index, pair) for index, pair in enumerate(read_pairs(rows)) if isinstance(pair, Pair)]
    else:
        probes = list(probe_set)[: args.dataset_num_rows]
    known = {name for probe in probes for name in probe.responses}
    if any(set(REQUIRED_TYPES) <= set(probe.responses) for probe in probes):
        known.add(DPO)
    kinds = args.update_types or [name for name in (*REQUIRED_TYPES, DPO) if name in known]
    if not probes:
        raise ValueError("there is no usable row to train on")
    if unknown := sorted(set(kinds) - known):
        raise ValueError(f"update_types has {unknown[0]!r}; the data has {', '.join(sorted(known))}")
    for index, probe in enumerate(probes):
        for kind in kinds:
            names = REQUIRED_TYPES if kind == DPO else (kind,)
            if set(names) <= set(probe.responses):
                items = [encode_response(probe, name, tokenizer, limits, ends) for name in names]
                batch = as_batch(items, ends=True)
                loss = losses.dpo(args.beta) if kind == DPO else losses.mean_cross_entropy
                yield Update(index, kind, _key(probe.prompt), batch, loss)


def with_reference(task: Task, update: Update) -> dict[str, torch.Tensor]:
    """The update's batch; DPO's reference is the model as it is."""
    if update.kind != DPO:
        return update.batch
    logp_N, row_N = label_logp(task, update.batch), task.items(update.batch)
    return update.batch | {"ref_logps": _by_row(logp_N, row_N, len(update.batch["input_ids"]))}


def summarise(frame: pd.DataFrame, args: AkgArguments) -> dict:
    """What was done, and means over updates and probes, for programs."""
    summary = {
        "model": args.model_name_or_path,
        "direction": args.direction,
        "learning_rate": args.learning_rate,
        "order": args.order,
        "num_updates": int(frame.groupby(["update_row", "update_type"]).ngroups),
        "delta_mean": {
            f"{update}/{observed}": finite.or_none(value)
            for (update, observed), value in _per_token(frame, "delta_sum").items()
        },
        "num_not_finite": not_finite(frame)[0],
    }
    if args.verify:
        for name, predicted in (("", "delta_sum"), ("_fixed_features", "fixed_features_sum")):
            errors = relative_errors(frame, predicted)
            shown = {kind: None if error is None else finite.or_none(error) for kind, error in errors.items()}
            summary[f"relative_error{name}"] = shown
    return summary


def relative_errors(frame: pd.DataFrame, predicted: str = "delta_sum") -> dict[str, float | None]:
    """||predicted - true|| / ||true|| over all observed answers, by type of update; None where nothing moved."""
    errors: dict[str, float | None] = {}
    for kind, rows in frame.groupby("update_type"):
        scale = rows["true_sum"].pow(2).sum(skipna=False)
        off = (rows[predicted] - rows["true_sum"]).pow(2).sum(skipna=False)
        errors[kind] = float((off / scale) ** 0.5) if scale else None
    return errors


def report(frame: pd.DataFrame, args: AkgArguments) -> list[str]:
    """Lines for the console: the force map, and how well it held."""
    own = frame[frame["same_prompt"]]
    lines = [f"predicted change of ln pi per token (nats) in one step, {args.direction} at {args.learning_rate:g}"]
    for title, rows in (
        ("answers to the update's own prompt", own),
        ("answers to other prompts", frame.drop(own.index)),
    ):
        if len(rows):
            table = pd.Series(_per_token(rows, "delta_sum")).unstack(0)
            order = order_types(table.index)
            lines += [
                "",
                f"{title} (rows), by what was trained on:",
                table.loc[order].map("{:+.2e}".format).to_string(),
            ]
    if args.verify:
        shown, fixed = (_shown(relative_errors(frame, name), args) for name in ("delta_sum", "fixed_features_sum"))
        lines += ["", f"against the real steps, relative error: {shown}; {_rounding_text(frame)}"]
        lines += [f"the same with fixed features, where the head alone moves: {fixed}"]
    return [*lines, ""]


def _rounding_text(frame: pd.DataFrame) -> str:
    """How much of the measured changes rounding may be."""
    rounding, moved = (frame[name].pow(2).sum(skipna=False) for name in ("rounding_sum", "true_sum"))
    share = (rounding / max(moved, 1e-300)) ** 0.5
    if not np.isfinite(share):
        return "what rounding makes of it is not finite"
    return f"rounding alone makes some {share:.1%}" if share < 1 else "rounding hides the steps: raise the rate"


def _shown(errors: dict[str, float | None], args: AkgArguments) -> str:
    unmoved = f"no change that {args.dtype} can tell"
    texts = {
        kind: unmoved if error is None else f"{error:.1%}" if np.isfinite(error) else "not finite"
        for kind, error in errors.items()
    }
    return ", ".join(f"{kind} {text}" for kind, text in texts.items())


def _per_token(frame: pd.DataFrame, column: str) -> dict[tuple[str, str], float]:
    means = (frame[column] / frame["num_tokens"]).groupby([frame["update_type"], frame["response_type"]]).mean()
    return {key: float(value) for key, value in means.items()}


def _probe_of(index: int, pair: Pair) -> Probe:
    responses = {"chosen": pair.chosen} | ({} if pair.rejected is None else {"rejected": pair.rejected})
    return Probe(str(index), pair.prompt, responses)


def _key(prompt: str | list[dict]) -> str:
    return json.dumps(prompt, sort_keys=True)
