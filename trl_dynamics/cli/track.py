"""trl-dynamics track: score models, or the checkpoints of a run, on a probe set, without training."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from trl_dynamics import stats_head
from trl_dynamics.cli import sources
from trl_dynamics.tracking.layout_check import settle_layout
from trl_dynamics.tracking.records import to_table
from trl_dynamics.tracking.run import LIMITS, build_engine, changed_fields, describe_run
from trl_dynamics.tracking.store import DynamicsStore, load_records
from trl_dynamics.trainers.config import ScoringArguments

logger = logging.getLogger(__name__)

# What a run wrote into its meta.json: option of this command -> path there.
_REPLAYED = {
    "dtype": ("model", "dtype"),
    "attn_implementation": ("model", "attn_implementation"),
    "mixed_precision": ("mixed_precision",),
    "probe_dtype": ("probe_dtype",),
    "probe_layout": ("batch_plan", "layout"),
    "probe_tokens_per_batch": ("batch_plan", "tokens_per_batch"),
    "probe_top_k": ("top_k",),
    **{name: ("limits", name) for name in LIMITS},
}


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
    replay: bool = field(
        default=True,
        metadata={
            "help": "Where the first model is a run with records: score as that run did (dtype, autocast, attention, "
            "layout, batches, limits, y*), unless an option says otherwise."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "Weights' dtype: float32, bfloat16, float16 or auto. None: the run's, else float32."},
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "Autocast: no, bf16 or fp16. None: the run's, else what accelerate says."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As in `from_pretrained`."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})


@dataclass(frozen=True)
class Target:
    """One set of weights to score: where it lies, and the model and step its records go under."""

    path: str
    model: str
    model_index: int
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
    """Score the models of `args` that have no records yet, and write those; returns the store.

    y* is that of the replayed run, or frozen at the first target; a target that tokenises the probes differently
    starts a baseline of its own. An interrupted call goes on where it stopped when it is given again.
    """
    targets = find_targets(args.model_name_or_path, args.checkpoints)
    source = replayed_run(args)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(0)
    probe_set = sources.find_probe_set(args.probe_set, args.probe_max_probes)
    probe_set = probe_set.sample(args.probe_subset) if args.probe_subset is not None else probe_set
    sources.require_writable(args.output_dir)
    store = DynamicsStore(args.output_dir)
    session = _Session(store, source, accelerator, targets)
    try:
        for target in targets:
            if not session.is_done(target, probe_set):
                session.score(target, args, probe_set)
        session.finish()
    finally:
        store.close()
    accelerator.wait_for_everyone()
    return store


class _Session:
    """One call of `track`: what it scores goes into one store, which an earlier call may have begun."""

    def __init__(self, store: DynamicsStore, source: DynamicsStore | None, accelerator, targets: list[Target]):
        self.store, self.source, self.accelerator, self.targets = store, source, accelerator, targets
        self.meta: dict = {}
        self.done: set[tuple[int, int]] = set()
        self.baselines: dict[str, list[list[int]]] = {}
        if source is not None and source.has_baseline():
            self.baselines[source.read_meta()["batch_plan"]["fingerprint"]] = source.read_baseline()

    def is_done(self, target: Target, probe_set) -> bool:
        """Whether the store has this target's records; the first question opens the store."""
        if not self.meta:
            self.meta, self.done, earlier = self._on_main(lambda: self._continued(probe_set))
            self.baselines |= earlier
        return (target.model_index, target.step) in self.done

    def score(self, target: Target, args: TrackArguments, probe_set) -> None:
        """Load the weights, score them, write their records."""
        began = time.perf_counter()
        model, tokenizer = _load(target.path, args, self.accelerator.device)
        engine, fallback = build_engine(model, tokenizer, probe_set, args, self.accelerator)
        stats_head.install(model)
        settle_layout(engine, model, fallback, required=args.probe_layout == "shared_prefix")
        plan = engine.batch_plan["fingerprint"]
        scores = engine.score(model, self.baselines.get(plan))
        num_rows = len(scores.columns["probe_id"])
        table = to_table({"model": [target.model] * num_rows, "step": [target.step] * num_rows} | scores.columns)
        if "batch_plan" not in self.meta:
            self.meta |= describe_run(model, probe_set, engine, "track", args) | self.meta
            self._on_main(lambda: self.store.create(probe_set, self.meta, changed_fields(args)))
        if not self.store.has_baseline(model_index=target.model_index):
            self._on_main(lambda: self.store.write_baseline(scores.star_ids, model_index=target.model_index))
        self._on_main(lambda: self.store.write_records(table, step=target.step, model_index=target.model_index))
        self.baselines.setdefault(plan, scores.star_ids)
        self.meta["probe_seconds"] += time.perf_counter() - began
        logger.info(f"scored {target.model} at step {target.step}")

    def finish(self) -> None:
        """Say in meta.json that all is done."""
        self.meta["status"] = "finished"
        self._on_main(lambda: self.store.write_meta(self.meta))

    def _continued(self, probe_set) -> tuple[dict, set[tuple[int, int]], dict[str, list[list[int]]]]:
        """What the store of an interrupted or smaller call says: meta, the done, the y* of the plan."""
        self.store.open()
        facts = {
            "status": "running",
            "num_processes": self.accelerator.num_processes,
            "targets": [vars(target) for target in self.targets],
        }
        earlier = self.store.read_meta() if self.store.exists else {}
        same = earlier.get("kind") == "track" and earlier["probe_set"]["fingerprint"] == probe_set.fingerprint
        if not same or [t for t in earlier["targets"] if t not in facts["targets"]]:
            return facts, set(), {}
        done = {(i, step) for i in {t.model_index for t in self.targets} for step in self.store.recorded_steps(i)}
        if not done:
            return facts, set(), {}
        logger.info(f"{self.store.root} has records of {len(done)} of {len(self.targets)} targets already")
        first = min(index for index, _ in done)
        return (
            earlier | facts,
            done,
            {earlier["batch_plan"]["fingerprint"]: self.store.read_baseline(model_index=first)},
        )

    def _on_main(self, work: Callable[[], object]) -> object:
        """Run `work` on the main process; its result, or its error, reaches every process."""
        outcome: list = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome[0] = work()
            except (OSError, ValueError) as error:
                outcome[1] = error
        if self.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def replayed_run(args: TrackArguments) -> DynamicsStore | None:
    """The run whose checkpoints are scored; its settings fill in every option of `args` that was left open."""
    source = DynamicsStore(args.model_name_or_path[0])
    defaults = {"dtype": "float32"}
    if args.replay and source.exists:
        meta = source.read_meta()
        unset = TrackArguments()
        for name, path in _REPLAYED.items():
            value = meta
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None and getattr(args, name) == getattr(unset, name):
                setattr(args, name, value)
        logger.info(
            f"scoring as the run in {source.output_dir} did: weights {args.dtype}, autocast "
            f"{args.mixed_precision or 'no'}, attention {args.attn_implementation}, layout {args.probe_layout} "
            f"with {args.probe_tokens_per_batch} tokens per batch (--replay False to choose yourself)"
        )
    else:
        source = None
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return source


def find_targets(models: list[str], checkpoints: str | None) -> list[Target]:
    """What to score, in order: each model once at step 0, or its checkpoints by ascending step.

    Raises:
        ValueError: If a local path does not exist, no checkpoint matches, or a model is given twice.
    """
    if len(set(models)) < len(models):
        raise ValueError(f"a model is given twice: {models}")
    names = _short_names(models)
    targets = []
    for index, (name, model) in enumerate(zip(names, models, strict=True)):
        folder = sources.find_model(model)
        if checkpoints is None:
            targets.append(Target(folder, name, index, 0))
            continue
        found = [path for path in Path(model).glob(checkpoints) if path.is_dir() and _step_of(path) is not None]
        if not found:
            raise ValueError(f"no folder {checkpoints!r} with a step number in {model!r}")
        targets += [Target(str(path), name, index, _step_of(path)) for path in sorted(found, key=_step_of)]
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
