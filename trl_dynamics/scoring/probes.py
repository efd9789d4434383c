"""Which probes a run scores: found, checked and narrowed before a model is loaded or a folder is made."""

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainingArguments

from trl_dynamics.findings.effects import MIN_PROBES
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.schema import WITHOUT_REJECTED, ProbeSet

logger = logging.getLogger(__name__)


def find_probes(probe_set: object, args: TrainingArguments) -> ProbeSet | None:
    """What a run is to track; None where it is nothing.

    Args:
        probe_set: As the trainers take it; None for the one that `args` names.
        args: Ours, or a plain TRL config.

    Raises:
        ValueError: If `output_dir` cannot be a folder, or the probe set does not exist or is not valid.
    """
    place = Path(args.output_dir)
    there = next((path for path in (place, *place.parents) if path.exists()), place)
    if there.exists() and not there.is_dir():
        raise ValueError(f"output_dir is {args.output_dir!r}, but {str(there)!r} is a file; choose another folder")
    source = probe_set if probe_set is not None else getattr(args, "probe_set", None)
    if source is None:
        return None
    options = (getattr(args, name, None) for name in ("probe_max_probes", "probe_subset"))
    types = getattr(args, "probe_types", [])
    probe_set = probe_io.load(source, types=types)
    require_types(probe_set, types)
    return narrow(probe_set, *options, tells=args.process_index == 0)


def require_types(probe_set: ProbeSet, types: Sequence[str]) -> None:
    """Refuse types that were asked for by name and that no probe has.

    Raises:
        ValueError: If there is one, with the types that there are.
    """
    if missing := [name for name in types if name not in probe_set.response_types]:
        raise ValueError(
            f"probe_types has {missing[0]!r}, which no probe of {probe_set.name!r} has; found "
            f"{', '.join(probe_set.response_types)}"
        )


def narrow(probe_set: ProbeSet, max_probes: int | None, subset: float | None, *, tells: bool) -> ProbeSet:
    """[`ProbeSet.narrow`]; the process that `tells` warns of a subset larger than the set, of too few probes, and of
    missing rejected answers."""
    kept = probe_set.narrow(max_probes, subset)
    if tells and subset is not None and subset > len(kept):
        logger.warning(
            f"probe_subset is {subset:g}, but the probe set {kept.name!r} has {len(kept)} probes: all are scored"
        )
    if tells and "rejected" not in kept.response_types:
        logger.warning(f"probe set {kept.name!r} has no rejected answers: {WITHOUT_REJECTED}")
    if tells and len(kept) < MIN_PROBES:
        number = "1 probe is" if len(kept) == 1 else f"{len(kept)} probes are"
        logger.warning(
            f"{number} scored and recorded, but no change is judged, which takes at least {MIN_PROBES} probes"
        )
    return kept
