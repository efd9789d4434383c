"""Models, or the checkpoints of runs, scored one after the other into one store, which a later call continues."""

import functools
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from transformers.utils import logging as transformers_logging

from trl_dynamics import loading, stats_head
from trl_dynamics.paths.kinds import RECORDS, SAMPLES
from trl_dynamics.paths.records import has_baseline, probe_set_files, read_baseline, write_baseline
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.progress import with_bar
from trl_dynamics.scoring.arguments import ScoringArguments
from trl_dynamics.scoring.head_check import settle_head
from trl_dynamics.scoring.identity import model_identity
from trl_dynamics.scoring.layout_check import settle_layout
from trl_dynamics.scoring.processes import on_main
from trl_dynamics.scoring.setup import LIMITS, build_engine, build_sampler, changed_fields, describe_run
from trl_dynamics.store.aside import is_tracked
from trl_dynamics.store.store import DynamicsStore

logger = logging.getLogger(__name__)

# What a run wrote into its meta.json: option of this command -> path there.
REPLAYED = {
    "dtype": ("model", "dtype"),
    "attn_implementation": ("model", "attn_implementation"),
    "mixed_precision": ("mixed_precision",),
    "probe_dtype": ("probe_dtype",),
    "probe_layout": ("batch_plan", "layout"),
    "probe_tokens_per_batch": ("batch_plan", "tokens_per_batch"),
    "probe_top_k": ("top_k",),
    "probe_samples": ("samples", "num_probes"),
    "probe_sample_tokens": ("samples", "max_new_tokens"),
    **{name: ("limits", name) for name in LIMITS},
    **{name: ("probe_set", "metadata", "selection", name) for name in ("probe_max_probes", "probe_subset")},
}


@dataclass(frozen=True)
class Target:
    """One set of weights to score: a path, and the model and step its records go under."""

    path: str
    model: str
    model_index: int
    step: int


@dataclass
class LoadingArguments(ScoringArguments):
    """How models are loaded and scored one after the other; see [`score_checkpoints`].

    Args:
        dtype (`str`, *optional*): Weights' dtype.
        mixed_precision (`str`, *optional*): Autocast.
        attn_implementation (`str`, *optional*): As in `from_pretrained`.
        model_revision (`str`): Branch, tag or commit on the hub.
        trust_remote_code (`bool`): Whether model code that comes from the hub may run.
    """

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
class RecordedRun:
    """What a run left behind: its meta.json and the y* it froze."""

    output_dir: str
    meta: dict
    star_ids: list[list[int]] | None


def score_checkpoints(
    targets: list[Target],
    probe_set: ProbeSet,
    output_dir: str,
    args: LoadingArguments,
    accelerator: Accelerator,
    *,
    run: RecordedRun | None = None,
    same_reading: bool = False,
    layout_required: bool = False,
    facts: Mapping[str, object] | None = None,
) -> DynamicsStore:
    """Score what has no records yet, and write those; all processes call this together.

    y* is that of `run`, or frozen at the first target; a target that tokenises the probes differently starts a
    baseline of its own. An interrupted call goes on where it stopped when it is given again.

    Args:
        targets (`list[Target]`): What to score, in order.
        probe_set ([`ProbeSet`]): The probes.
        output_dir (`str`): Where the records go.
        args ([`LoadingArguments`]): How; `dtype` must be given. Of [`replay`], it scores as `run` did.
        accelerator (`Accelerator`): The processes and their devices.
        run ([`RecordedRun`], *optional*): A run whose batches and y* are taken.
        same_reading (`bool`): Whether all targets of a model must read the probes alike, or it is an error.
        layout_required (`bool`): Whether a layout that fails its check is an error, not replaced.
        facts (`Mapping`, *optional*): More for meta.json, such as `trained_with`.

    Raises:
        ValueError: If the store holds a training run, a model cannot be loaded, or targets read the probes apart.
    """
    store = DynamicsStore(output_dir)
    settings = {name: getattr(args, name) for name in (*REPLAYED, "model_revision")}
    session = _Session(store, run, accelerator, targets, settings)
    session.facts |= facts or {}
    try:
        session.begin(probe_set)
        for target in targets:
            if (target.model_index, target.step) not in session.done:
                session.score(target, args, probe_set, same_reading=same_reading, required=layout_required)
        session.finish()
    finally:
        store.close()
    accelerator.wait_for_everyone()
    return store


class _Session:
    """One call of `track`: what it scores goes into one store, which an earlier call may have begun."""

    def __init__(
        self, store: DynamicsStore, run: RecordedRun | None, accelerator, targets: list[Target], settings: dict
    ):
        self.store, self.run, self.accelerator, self.targets = store, run, accelerator, targets
        self.meta: dict = {}
        self.facts = {
            "status": "running",
            "num_processes": accelerator.num_processes,
            "targets": [vars(target) for target in targets],
            "settings": settings,
        }
        self.done: set[tuple[int, int]] = set()
        self.news: list[str] = []
        self.baselines: dict[str, list[list[int]]] = {}
        if run is not None and run.star_ids is not None:
            self.baselines[run.meta["batch_plan"]["fingerprint"]] = run.star_ids

    def begin(self, probe_set) -> None:
        """Keep other writers out, and take over what an earlier call has done in the same way."""
        self.meta, self.done, earlier = on_main(lambda: self._continued(probe_set))
        self.baselines |= earlier

    def score(self, target: Target, args: LoadingArguments, probe_set, *, same_reading: bool, required: bool) -> None:
        """Load the weights, score them, write their records."""
        began = time.perf_counter()
        model, tokenizer = _load(target.path, args, self.accelerator.device)
        engine, fallback = build_engine(model, tokenizer, probe_set, args, self.accelerator)
        shown = self.accelerator.is_main_process and transformers_logging.is_progress_bar_enabled()
        engine.watch = functools.partial(with_bar, shown=shown)
        sampler = build_sampler(model, tokenizer, probe_set, args, engine)
        stats_head.install(model)
        settle_head(engine, model, fallback, required=required)
        settle_layout(engine, model, fallback, required=required)
        plan = engine.batch_plan["fingerprint"]
        if same_reading and self.meta.get("plans", {}).get(str(target.model_index), plan) != plan:
            raise ValueError(
                f"{target.path} does not read the probes as {self.targets[0].path} does (tokenizer, chat template or "
                "batches), so that their numbers cannot be compared; give --base the model that training began with"
            )
        replayed = self.run.meta["batch_plan"]["fingerprint"] if self.run is not None else plan
        if plan != replayed and self.accelerator.is_main_process:
            same_probes = self.run.meta["probe_set"]["fingerprint"] == probe_set.fingerprint
            logger.warning(
                f"{target.path} is not scored in the batches of the run in {self.run.output_dir}"
                f"{'' if same_probes else ', whose probes were others'}: token by token the numbers differ by "
                "rounding, and y* is frozen anew"
            )
        scores = engine.score(model, self.baselines.get(plan))
        num_rows = len(scores.columns["probe_id"])
        table = RECORDS.table({"model": [target.model] * num_rows, "step": [target.step] * num_rows} | scores.columns)
        tables = {RECORDS: table, SAMPLES: None}
        if sampler is not None:
            answers = sampler.sample(model)
            num_rows = len(answers["probe_id"])
            keys = {"model": [target.model] * num_rows, "step": [target.step] * num_rows}
            tables[SAMPLES] = SAMPLES.table(keys | answers)
        # Which y* goes on after an interruption: that of each model's first target.
        plans = self.meta.setdefault("plans", {})
        is_first, is_begun = "batch_plan" not in self.meta, str(target.model_index) in plans
        plans.setdefault(str(target.model_index), plan)
        if is_first:
            self.meta |= describe_run(model, probe_set, engine, "track", args, sampler) | self.meta
        size = model_identity(model)["vocab_size"]
        # Metrics that need it are left out where models have vocabularies of different sizes.
        self.meta["model"]["vocab_size"] = size if is_first or size == self.meta["model"].get("vocab_size") else None

        def write() -> None:
            if is_first:
                why = "; ".join(self.news) or "track begins there"
                self.store.create(self.meta, changed_fields(args), probe_set_files(probe_set), why)
            if not has_baseline(self.store, target.model_index):
                write_baseline(self.store, scores.star_ids, model_index=target.model_index)
            if not is_begun:
                self.store.write_meta(self.meta)
            self.store.write(target.step, tables, target.model_index)
            logger.info(f"scored {target.model} at step {target.step}")

        on_main(write)
        self.baselines.setdefault(plan, scores.star_ids)
        self.meta["probe_seconds"] += time.perf_counter() - began

    def finish(self) -> None:
        """Say in meta.json that all is done."""
        self.meta["status"] = "finished"
        on_main(lambda: self.store.write_meta(self.meta))

    def _continued(self, probe_set) -> tuple[dict, set[tuple[int, int]], dict[str, list[list[int]]]]:
        """What the store of an interrupted or smaller call says: meta, the done, the y* of each plan."""
        self.store.open()
        earlier = self.store.read_meta() if self.store.exists else {}
        if earlier and not is_tracked(earlier):
            raise ValueError(
                f"{self.store.root} holds the records of a training run ({earlier.get('method')}), whose place those "
                "of track would take; choose another --output_dir, e.g. "
                f"{self.store.output_dir.with_name(self.store.output_dir.name + '-track')}"
            )
        self.news = what_differs(earlier, self.facts, probe_set) if earlier else []
        indices = {target.model_index for target in self.targets}
        done = set() if self.news else {(i, step) for i in indices for step in self.store.steps(RECORDS, i)}
        if self.facts["settings"]["probe_samples"]:
            done &= {(i, step) for i in indices for step in self.store.steps(SAMPLES, i)}
        if not done:
            return self.facts, set(), {}
        logger.info(f"{self.store.root} has records of {len(done)} of {len(self.targets)} targets already")
        begun = sorted({index for index, _ in done})
        plans = {str(begun[0]): earlier["batch_plan"]["fingerprint"]} | earlier.get("plans", {})
        star_ids = {plans[str(i)]: read_baseline(self.store, model_index=i) for i in begun if str(i) in plans}
        return earlier | self.facts | {"plans": plans}, done, star_ids


def what_differs(earlier: dict, facts: dict, probe_set: ProbeSet) -> list[str]:
    """Why records of an earlier call are not those that this call would take, one phrase per difference.

    Args:
        earlier (`dict`): meta.json as that call left it.
        facts (`dict`): `settings` and `targets` of this call.
        probe_set ([`ProbeSet`]): What this call scores.
    """
    news, before = [], earlier["probe_set"]
    if before["fingerprint"] != probe_set.fingerprint:
        news.append(
            f"the probe set {probe_set.name!r} now asked for is another ({len(probe_set)} probes, fingerprint "
            f"{probe_set.fingerprint[:12]})"
        )
    # A setting that the earlier call did not know yet had what is its default now.
    defaults = {one.name: one.default for one in fields(LoadingArguments)}
    was = {name: defaults.get(name) for name in facts["settings"]} | earlier.get("settings", {})
    now = facts["settings"]
    names = was.keys() | now.keys()
    if not was["probe_samples"] and not now["probe_samples"]:
        names -= {"probe_samples", "probe_sample_tokens"}
    for name in sorted(names):
        if was.get(name) != now.get(name):
            news.append(f"{name} was {was.get(name)}, is {now.get(name)}")
    gone = [target["path"] for target in earlier["targets"] if target not in facts["targets"]]
    return news + ([f"these models are not among those asked for now: {', '.join(gone)}"] if gone else [])


def recorded_run(model: str) -> RecordedRun | None:
    """The run that a model is the output of; None if it has no records."""
    source = DynamicsStore(model)
    if not source.exists:
        return None
    # A run that went on from before its first records leaves a y* that its next records replace.
    star_ids = read_baseline(source) if source.steps(RECORDS) and has_baseline(source) else None
    return RecordedRun(str(source.output_dir), source.read_meta(), star_ids)


def replay(args: LoadingArguments, meta: dict, given: Collection[str]) -> dict:
    """How to score, by option: what was given, else as the run of `meta` did, else the defaults."""
    settings = {}
    for name, path in REPLAYED.items():
        value = meta
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        settings[name] = getattr(args, name) if name in given or value is None else value
    settings["dtype"] = settings["dtype"] or "float32"
    if meta and PartialState().is_main_process:
        shown = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
        logger.info(f"scoring as the run did ({shown}); --replay False scores by the options alone")
    return settings


def not_finite(store: DynamicsStore) -> tuple[int, int]:
    """How many of all recorded answers have a log-probability that is not finite, and how many there are."""
    indices = {target["model_index"] for target in store.read_meta()["targets"]}
    steps = sorted({step for index in indices for step in store.steps(RECORDS, index)})
    columns = [store.read(RECORDS, {step}, ["logp_sum"])["logp_sum"] for step in steps]
    return sum(int((~np.isfinite(column)).sum()) for column in columns), sum(map(len, columns))


def _load(path: str, args: LoadingArguments, device: torch.device):
    options = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = loading.load_tokenizer(path, **options)
    model = loading.load_causal_lm(path, dtype=args.dtype, attn_implementation=args.attn_implementation, **options)
    return model.to(device), tokenizer
