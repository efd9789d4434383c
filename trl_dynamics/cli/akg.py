"""trl-dynamics akg: what one training step on one answer does to every answer of a probe set, before training."""

import json
import logging
from dataclasses import dataclass

import torch
import trl
from accelerate import PartialState
from torch import nn

from trl_dynamics import loading
from trl_dynamics.cli import finite, inputs, outputs, sources
from trl_dynamics.cli.options import option, parse, parser_of, refuse_unknown, require
from trl_dynamics.influence import force_table
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.influence.single_steps import Reader, Steps, force_map
from trl_dynamics.paths.records import probe_set_files
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.encode import LengthLimits
from trl_dynamics.probing.rows import Pair, read_pairs
from trl_dynamics.probing.schema import Probe, ProbeSet
from trl_dynamics.scoring.setup import changed_fields, describe_origin
from trl_dynamics.store.store import DynamicsStore

logger = logging.getLogger(__name__)

INFLUENCE_FILE, SUMMARY_FILE = "influence.parquet", "summary.json"


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


def run(argv: list[str]) -> int:
    """Predict, write a row per update and observed answer, and print the mean change by type of each.

    Raises:
        ValueError: If an option, the model or the data is wrong; then nothing is written.
    """
    args, mixture, unknown = parse(parser_of((AkgArguments, trl.DatasetMixtureConfig), "akg"), argv)
    refuse_unknown(unknown, "akg")
    require(args, ("probe_set", "output_dir"), "akg")
    if PartialState().num_processes > 1:
        raise ValueError("akg runs in one process: each would predict everything; start it without accelerate launch")
    for name in ("probe_max_probes", "dataset_num_rows", "updates_at_once"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}, expected at least 1")
    folder = outputs.require_free(args.output_dir, INFLUENCE_FILE, args.overwrite)
    model, reader = load(args)
    probe_set = sources.find_probe_set(args.probe_set, args.probe_max_probes)
    rate, names = args.learning_rate, ("direction", "learning_rate", "max_grad_norm", "beta", "order", "verify")
    steps = Steps(**{name: getattr(args, name) for name in names}, at_once=args.updates_at_once, tokens=True)
    rows = force_map(model, reader, probe_set, rows_of(args, mixture, probe_set), args.update_types, steps)
    frame = force_table.without_tokens(rows)
    facts = {"model": args.model_name_or_path, "direction": args.direction, "learning_rate": rate, "order": args.order}
    with probe_io.complete_folder(folder) as part:
        frame.to_parquet(part / INFLUENCE_FILE, index=False)
        text = json.dumps(facts | force_table.summary(frame), indent=2)
        (part / SUMMARY_FILE).write_text(f"{text}\n", encoding="utf-8")
        meta = describe_origin(model, probe_set, "akg")
        meta |= {"status": "finished", "akg": {"dtype": meta["model"]["dtype"]}}
        store = DynamicsStore(part)
        store.create(meta, changed_fields(args), probe_set_files(probe_set))
        store.write(0, {INFLUENCE: INFLUENCE.table(force_table.as_influence(rows, rate))})
    print(*force_table.lines(frame, f"{args.direction} at {rate:g}", args.dtype), f"results: {folder}", sep="\n")
    return finite.exit_status("akg", *force_table.not_finite(frame), where=INFLUENCE_FILE)


def load(args: AkgArguments) -> tuple[nn.Module, Reader]:
    """The model on the accelerator, if there is one, and how it reads answers.

    Raises:
        ValueError: If it does not exist or cannot be loaded.
    """
    path, trusted = sources.find_model(args.model_name_or_path), {"trust_remote_code": args.trust_remote_code}
    tokenizer = loading.load_tokenizer(path, **trusted)
    model = loading.load_causal_lm(
        path, dtype=args.dtype, attn_implementation=args.attn_implementation, trainable=True, **trusted
    )
    if hasattr(model, "peft_config"):
        num_weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        logger.info(
            f"{path} is an adapter: the steps are taken on its {num_weights:,} weights, its base stays as it is"
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    context = loading.context_length(path, **trusted)
    limits = LengthLimits(args.max_prompt_length, args.max_length or context, context)
    return model.to(device), Reader(tokenizer, limits, frozenset(loading.end_ids(path)), args.tokens_per_batch)


def rows_of(args: AkgArguments, mixture: trl.DatasetMixtureConfig, probe_set: ProbeSet) -> list[Probe]:
    """What is trained on, row by row: the data, or else the probe set itself.

    Raises:
        ValueError: If the data does not exist or has no such split.
    """
    if not args.dataset_name and not mixture.datasets:
        return list(probe_set)[: args.dataset_num_rows]
    rows = inputs.take_split(inputs.load_splits(args, mixture), args.split)
    rows = rows if args.dataset_num_rows is None else rows.take(args.dataset_num_rows)
    pairs = [(index, pair) for index, pair in enumerate(read_pairs(rows)) if isinstance(pair, Pair)]
    return [Probe(str(index), pair.prompt, _answers(pair)) for index, pair in pairs]


def _answers(pair: Pair) -> dict[str, str]:
    return {"chosen": pair.chosen} | ({} if pair.rejected is None else {"rejected": pair.rejected})
