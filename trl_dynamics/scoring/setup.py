"""One tracked run: the engine that fits a model, and the description that goes with its records."""

import dataclasses
import datetime

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments

from trl_dynamics import compat, stats_head
from trl_dynamics.probing.encode import LengthLimits, encode, encode_prompts
from trl_dynamics.probing.labelled import pad_id_of
from trl_dynamics.probing.layouts import Layout, PaddedLayout, SharedPrefixLayout
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.scoring.arguments import ScoringArguments
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.scoring.sampling import GreedySampler, Reading
from trl_dynamics.versions import VERSIONED, installed_versions

# Ours, or a TRL config with our fields.
Options = ScoringArguments | TrainingArguments
Processor = PreTrainedTokenizerBase | ProcessorMixin
LIMITS = ("probe_max_prompt_length", "probe_max_length")
# Never written to a folder that may be shared.
SECRETS = ("hub_token", "push_to_hub_token")
CPU_TOKENS, ACCELERATOR_TOKENS = 512, 16384


def build_engine(
    model: nn.Module,
    processing_class: Processor,
    probe_set: ProbeSet,
    args: Options,
    accelerator: Accelerator | None = None,
) -> tuple[ProbeEngine, PaddedLayout]:
    """The engine for `model`: probes encoded with its tokenizer, within its context; and a layout for every model.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Read for its context length and end-of-turn tokens.
        processing_class: Its tokenizer, or a processor that holds one, with the chat template that TRL uses.
        probe_set ([`ProbeSet`]): What to score.
        args: Anything with the fields of [`ProbeArguments`].
        accelerator ([`~accelerate.Accelerator`], *optional*): Processes that share the work.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    encoded = encode(probe_set, processing_class, limits_of(model, args), end_ids_of(model))
    pad_id = pad_id_of(tokenizer, model)
    if args.probe_dtype not in (None, "float32"):
        raise ValueError(f"probe_dtype is {args.probe_dtype!r}, expected 'float32' or none")
    tokens = tokens_per_batch_of(args, accelerator)
    engine = ProbeEngine(
        encoded,
        choose_layout(model, args.probe_layout, tokens, pad_id),
        top_k=args.probe_top_k,
        accelerator=accelerator,
        float32=args.probe_dtype == "float32",
    )
    boundaries = stats_head.length_boundaries(model)
    return engine, PaddedLayout(pad_id=pad_id, tokens_per_batch=tokens, boundaries=boundaries)


def build_sampler(
    model: nn.Module, processing_class: Processor, probe_set: ProbeSet, args: Options, engine: ProbeEngine
) -> GreedySampler | None:
    """What lets `model` answer some of the probes' prompts greedily; None where `probe_samples` asks for none.

    The prompts are those of `probe_samples` probes, the same ones at every step, chosen by a hash of their ids.
    Answers end at the tokenizer's EOS, at the model's own, and at whatever ends a scored response.

    Args:
        model, processing_class, probe_set, args: As for [`build_engine`].
        engine ([`ProbeEngine`]): That of the same run.
    """
    if args.probe_samples is None or args.probe_samples == 0:
        return None
    if args.probe_samples < 0 or args.probe_samples != int(args.probe_samples):
        raise ValueError(f"probe_samples is {args.probe_samples}, expected a number of probes, or none")
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    limits = limits_of(model, args)
    ends = {tokenizer.eos_token_id, *end_ids_of(model), *(item.eos_id for item in engine.encoded.items)} - {None}
    return GreedySampler(
        encode_prompts(probe_set.sample(args.probe_samples), processing_class, limits),
        Reading(tokenizer, frozenset(ends), pad_id_of(tokenizer, model), limits.context_length),
        args.probe_sample_tokens,
        engine,
        tokens_per_batch_of(args, engine.accelerator),
    )


def limits_of(model: nn.Module, args: Options) -> LengthLimits:
    """What the arguments cut, and what the model can take."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return LengthLimits(args.probe_max_prompt_length, args.probe_max_length, context)


def end_ids_of(model: nn.Module) -> list[int]:
    """Token ids that end a turn by the model's generation config."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def tokens_per_batch_of(args: Options, accelerator: Accelerator | None) -> int:
    """Most tokens of one forward: as asked for, else what suits the device."""
    on_cpu = accelerator is None or accelerator.device.type == "cpu"
    default = CPU_TOKENS if on_cpu else ACCELERATOR_TOKENS
    return default if args.probe_tokens_per_batch is None else args.probe_tokens_per_batch


def recorded_layout(plan: dict, args: Options, fallback: PaddedLayout) -> Layout:
    """The layout that a run's meta.json recorded, where the arguments leave it open.

    Args:
        plan (`dict`): `batch_plan` of the run; the first schema version gave rows per batch instead of tokens.
        args: Anything with `probe_layout` and `probe_tokens_per_batch`.
        fallback ([`PaddedLayout`]): Knows the padding token.

    Raises:
        ValueError: If the run recorded influence alone, and so scored no batches.
    """
    if "layout" not in plan:
        raise ValueError(
            "cannot resume probing: the part of the run before the checkpoint recorded influence alone (akg_observe) "
            "and tracked no probe_set. Resume without probe_set, or start anew in another output_dir"
        )
    name = plan["layout"] if args.probe_layout == "auto" else args.probe_layout
    tokens = args.probe_tokens_per_batch
    tokens = plan.get("tokens_per_batch") if tokens is None else tokens
    if name == "padded":
        rows = plan.get("batch_size") if tokens is None else None
        return PaddedLayout(rows, fallback.pad_id, tokens_per_batch=tokens, boundaries=fallback.boundaries)
    return SharedPrefixLayout(tokens or fallback.tokens_per_batch, fallback.pad_id, fallback.boundaries)


def choose_layout(model: nn.Module, wanted: str, tokens_per_batch: int, pad_id: int) -> Layout:
    """The layout of that name; `"auto"` shares prompts where the model's attention allows it.

    Raises:
        ValueError: If the name is unknown, or prompts cannot be shared but were asked to be.
    """
    if wanted not in ("auto", "shared_prefix", "padded"):
        raise ValueError(f"probe_layout is {wanted!r}, expected 'auto', 'shared_prefix' or 'padded'")
    boundaries = stats_head.length_boundaries(model)
    if wanted != "padded" and compat.can_share_prompts(model):
        return SharedPrefixLayout(tokens_per_batch, pad_id, boundaries)
    if wanted == "shared_prefix":
        raise ValueError(
            f"probe_layout='shared_prefix' does not fit {model.config.model_type}: it needs plain or sliding-window "
            "attention in every layer and no prompt-learning adapter; use 'auto' or 'padded'"
        )
    return PaddedLayout(pad_id=pad_id, tokens_per_batch=tokens_per_batch, boundaries=boundaries)


def describe_run(
    model: nn.Module,
    probe_set: ProbeSet,
    engine: ProbeEngine,
    method: str,
    args: Options,
    sampler: GreedySampler | None = None,
) -> dict:
    """What produced the numbers, for meta.json."""
    return describe_origin(model, probe_set, method) | {
        "batch_plan": engine.batch_plan,
        "cuts": engine.encoded.cuts,
        "top_k": engine.top_k,
        "samples": None if sampler is None else sampler.description,
        "probe_dtype": "float32" if engine.float32 else None,
        "mixed_precision": engine.accelerator.mixed_precision if engine.accelerator else "no",
        "limits": {name: getattr(args, name) for name in LIMITS},
        "probe_seconds": 0.0,
        "train_seconds": 0.0,
    }


def describe_origin(model: nn.Module, probe_set: ProbeSet, method: str) -> dict:
    """Which package versions, model and probe set, for meta.json."""
    parameters = list(model.parameters())
    return {
        "kind": method if method in ("track", "akg") else "train",
        "method": method,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: found for name, found in installed_versions(VERSIONED).items() if found},
        "model": {
            "name_or_path": model.config.name_or_path,
            "architecture": model.config.model_type,
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "attn_implementation": compat.attention_of(model),
            "num_parameters": sum(map(compat.whole_numel, parameters)),
            "num_trainable": sum(compat.whole_numel(p) for p in parameters if p.requires_grad),
        },
        "probe_set": {
            "name": probe_set.name,
            "fingerprint": probe_set.fingerprint,
            "num_probes": len(probe_set),
            "counts": probe_set.counts,
            "metadata": probe_set.metadata,
        },
    }


def changed_fields(*configs: object) -> dict:
    """Fields of dataclass configs that differ from their defaults, flat: what replays the run, once it is plain.

    Values are as they are; [`DynamicsStore.create`] writes them plain. Left out are the hub's access tokens, and what
    a config made of no value at all, such as accelerate's own defaults.
    """
    changed = {}
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if field.init and field.name not in SECRETS and not _same(value, default) and not _is_filled_in(value):
                changed[field.name] = value
    return changed


def _same(value: object, default: object) -> bool:
    try:
        return bool(value == default)
    except (TypeError, ValueError):  # arrays compare element by element
        return False


def _is_filled_in(value: object) -> bool:
    """Whether this is a dataclass that says nothing, which a config's `__post_init__` puts in the place of None."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return False
    required = [f for f in dataclasses.fields(value) if f.default is f.default_factory is dataclasses.MISSING]
    return not required and _same(value, type(value)())
