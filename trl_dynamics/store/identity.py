"""What makes two parts of a run one series: the same probes, scored in the same way, by the same model."""

import hashlib
import json
from pathlib import Path

from trl_dynamics.probing.schema import ProbeSet

# Entries of meta.json that must be the same after a resume: path, what it is, what to keep.
_SAME = (
    (("model", "architecture"), "the model's architecture", "Keep the model of the run"),
    (("model", "num_parameters"), "the number of parameters", "Keep the model and adapter options of the run"),
    (("model", "vocab_size"), "the vocabulary's size", "Keep the model and tokenizer of the run"),
    (
        ("model", "structure"),
        "the shapes or dtypes of the parameters",
        "Keep the model and adapter options of the run",
    ),
    (("model", "dtype"), "the weights' dtype", "Keep the dtype of the run"),
    (("mixed_precision",), "mixed precision", "Keep bf16/fp16 as in the run"),
    (("probe_dtype",), "probe_dtype", "Keep probe_dtype as in the run"),
    (("top_k",), "probe_top_k", "Keep probe_top_k as in the run"),
    (
        ("samples", "num_probes"),
        "the number of prompts to answer",
        "Keep probe_samples as in the run, or leave it out",
    ),
    (("samples", "max_new_tokens"), "probe_sample_tokens", "Keep probe_sample_tokens as in the run"),
    (("akg", "observe", "fingerprint"), "what akg observes", "Keep akg_observe, akg_max_probes and the tokenizer"),
    (("samples", "fingerprint"), "the prompts to answer or what ends an answer", "Keep the tokenizer of the run"),
)


def model_identity(model) -> dict:
    """What tells one model from another without looking at a weight, for meta.json.

    After a checkpoint the weights are the checkpoint's, whatever the model was started from. So another model is one
    of another architecture, vocabulary, dtype or shape; its name, which may be a path that moved, says nothing.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Not wrapped yet; parameters that ZeRO-3 shards count as whole.

    Returns:
        `dict`: architecture, dtype, vocab_size, num_parameters, and structure, a hash over the shapes and dtypes of
        all parameters in no order, since names change between versions of transformers.
    """
    parameters = list(model.parameters())
    shapes = [tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in parameters]
    dtypes = [str(parameter.dtype).removeprefix("torch.") for parameter in parameters]
    rows = sorted([dtype, *shape] for dtype, shape in zip(dtypes, shapes, strict=True))
    config = model.config.get_text_config()
    return {
        "architecture": model.config.model_type,
        "dtype": dtypes[0],
        "vocab_size": getattr(config, "vocab_size", None),
        "num_parameters": sum(_product(shape) for shape in shapes),
        "structure": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def refuse_other_probes(earlier: dict, config: dict, probe_set: ProbeSet, root: Path) -> None:
    """Refuse to continue records of other probes.

    Args:
        earlier, config (`dict`): meta.json and config.yaml as recorded.
        probe_set ([`ProbeSet`]): What is to be scored now.
        root (`Path`): The store, for the message.

    Raises:
        ValueError: If anything differs, with the options that made it so as far as they are known.
    """
    was, now = earlier["probe_set"]["fingerprint"], probe_set.fingerprint
    if was == now:
        return
    before, after = earlier["probe_set"].get("metadata", {}).get("selection", config), probe_set.selection
    changed = [name for name in ("probe_max_probes", "probe_subset") if before.get(name) != after.get(name)]
    values = "".join(f"; {name} was {before.get(name)}, is {after.get(name)}" for name in changed)
    kept = f"Keep {' and '.join(changed)} as in the run, and pass" if changed else "Pass"
    raise ValueError(
        f"cannot resume probing with another probe set: {root} was recorded with fingerprint {was[:12]}, the probe "
        f"set {probe_set.name!r} has {now[:12]}{values}. {kept} the set in {root / 'probe_set'}, or use another "
        "output_dir."
    )


def refuse_other_series(earlier: dict, now: dict, root: Path) -> None:
    """Refuse to continue records that something else made.

    Args:
        earlier, now (`dict`): meta.json as recorded, and as this run would write it; what one of them does not say
            is not compared. The number of processes is not either: it may change.
        root (`Path`): The store, for the message.

    Raises:
        ValueError: If anything differs, with both values and what to do.
    """
    for path, what, remedy in _SAME:
        was, is_now = _entry(earlier, path), _entry(now, path)
        if None not in (was, is_now) and was != is_now:
            values = "" if path[-1] in ("structure", "fingerprint") else f" was {was!r}, is {is_now!r};"
            raise ValueError(
                f"cannot resume probing: {what}{values or ' differ;'} the records in {root} would not be one series. "
                f"{remedy}, or use another output_dir"
            )
    was, is_now = earlier.get("run_id"), now.get("run_id")
    if None not in (was, is_now) and was != is_now:
        raise ValueError(
            f"cannot resume probing: the checkpoint is of another run than the records in {root}. Resume from a "
            "checkpoint of the run that wrote them, or, if that run's records were moved aside, move its "
            f"{root.name}-old-* folder back to {root.name}"
        )


def _entry(meta: dict, path: tuple[str, ...]) -> object:
    for name in path:
        meta = meta.get(name) if isinstance(meta, dict) else None
    return meta


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
