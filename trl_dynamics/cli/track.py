"""trl-dynamics track: score models, or the checkpoints of a run, on a probe set, without training."""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from trl_dynamics import stats_head
from trl_dynamics.cli import sources
from trl_dynamics.tracking.records import to_table
from trl_dynamics.tracking.run import build_engine, changed_fields, describe_run
from trl_dynamics.tracking.store import DynamicsStore, load_records
from trl_dynamics.trainers.config import ScoringArguments


@dataclass
class TrackArguments(ScoringArguments):
    """Options of `trl-dynamics track`."""

    model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Models to score: folders or hub names; the first is the baseline."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where the records go."})
    checkpoints: str | None = field(
        default=None,
        metadata={"help": "Score the checkpoints in each model folder that match, e.g. 'checkpoint-*', by step."},
    )
    dtype: str = field(default="float32", metadata={"help": "Weights' dtype: float32, bfloat16, float16 or auto."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in `from_pretrained`."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})


@dataclass(frozen=True)
class Target:
    """One set of weights to score: where it lies, and the model and step its records go under."""

    path: str
    model: str
    step: int


def run(argv: list[str]) -> int:
    """Score every target and print a table of the mean log-probability per token.

    Raises:
        ValueError: If an option is missing or a path does not exist.
    """
    parser = HfArgumentParser(TrackArguments, prog="trl-dynamics track")
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; see trl-dynamics track --help")
    for name in ("model_name_or_path", "probe_set", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; see trl-dynamics track --help")
    store = track(args)
    if Accelerator().is_main_process:
        frame = load_records(store.output_dir)
        table = frame.pivot_table(index=["model", "step"], columns="response_type", values="logp_mean", sort=False)
        print("mean log-probability per token (nats):", table.round(3).to_string(), f"records: {store.root}", sep="\n")
    return 0


def track(args: TrackArguments) -> DynamicsStore:
    """Score the models of `args` and write their records; returns the store.

    y* is frozen at the first target; a target that tokenises the probes differently starts a baseline of its own.
    """
    targets = find_targets(args.model_name_or_path, args.checkpoints)
    accelerator = Accelerator()
    set_seed(0)
    probe_set = sources.find_probe_set(args.probe_set, args.probe_max_probes)
    sources.require_writable(args.output_dir)
    store = DynamicsStore(args.output_dir)
    baselines: dict[str, list[list[int]]] = {}
    meta: dict = {}
    for target in targets:
        began = time.perf_counter()
        model, tokenizer = _load(target.path, args, accelerator.device)
        engine = build_engine(model, tokenizer, probe_set, args, accelerator)
        stats_head.install(model)
        if not meta:
            meta = describe_run(model, probe_set, engine, "track") | {
                "status": "running",
                "num_processes": accelerator.num_processes,
                "targets": [vars(target) for target in targets],
            }
            if accelerator.is_main_process:
                store.create(probe_set, meta, changed_fields(args))
        plan = engine.batch_plan["fingerprint"]
        scores = engine.score(model, baselines.get(plan))
        index = list(dict.fromkeys(t.model for t in targets)).index(target.model)
        num_rows = len(scores.columns["probe_id"])
        table = to_table({"model": [target.model] * num_rows, "step": [target.step] * num_rows} | scores.columns)
        if accelerator.is_main_process:
            if plan not in baselines:
                store.write_baseline(scores.star_ids, model_index=index)
            store.write_records(table, step=target.step, model_index=index)
        baselines.setdefault(plan, scores.star_ids)
        meta["probe_seconds"] += time.perf_counter() - began
    if accelerator.is_main_process:
        store.write_meta(meta | {"status": "finished"})
    accelerator.wait_for_everyone()
    return store


def find_targets(models: list[str], checkpoints: str | None) -> list[Target]:
    """What to score, in order: each model once at step 0, or its checkpoints by ascending step.

    Raises:
        ValueError: If a local path does not exist, no checkpoint matches, or a model is given twice.
    """
    if len(set(models)) < len(models):
        raise ValueError(f"a model is given twice: {models}")
    names = _short_names(models)
    targets = []
    for name, model in zip(names, models, strict=True):
        folder = sources.find_model(model)
        if checkpoints is None:
            targets.append(Target(folder, name, 0))
            continue
        found = [path for path in Path(model).glob(checkpoints) if path.is_dir() and _step_of(path) is not None]
        if not found:
            raise ValueError(f"no folder {checkpoints!r} with a step number in {model!r}")
        targets += [Target(str(path), name, _step_of(path)) for path in sorted(found, key=_step_of)]
    return targets


def _short_names(models: list[str]) -> list[str]:
    parts = [Path(model).parts for model in models]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _step_of(path: Path) -> int | None:
    match = re.search(r"(\d+)$", path.name)
    return int(match[1]) if match else None


def _load(path: str, args: TrackArguments, device: torch.device):
    options = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=args.dtype, attn_implementation=args.attn_implementation, **options
    )
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path, **options)
