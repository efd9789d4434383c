"""What is scored and how: the options that training and `trl-dynamics track` share, and what they may be."""

import dataclasses
from dataclasses import dataclass, field

from trl_dynamics.probing.encode import LengthLimits
from trl_dynamics.probing.schema import RESERVED_FIELDS, check_amount

_LEAST = {
    "probe_max_probes": 1,
    "probe_tokens_per_batch": 1,
    "probe_top_k": 1,
    "probe_samples": 0,
    "probe_sample_tokens": 1,
}


@dataclass
class ScoringArguments:
    """What is scored and how; shared by the trainers and `trl-dynamics track`."""

    probe_set: str | None = field(
        default=None,
        metadata={
            "help": "Probe set to track: a folder or .jsonl/.parquet file, or a dataset on the hub. None: no probing, "
            "the trainer is TRL's own."
        },
    )
    probe_types: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Columns of the probe set that hold answers besides those named like a response type (chosen, "
            "rejected, other_test, ...); other columns are left out. Sets made by `probes build` and `probes import` "
            "name their own."
        },
    )
    probe_layout: str = field(
        default="auto",
        metadata={
            "help": "How responses are batched: 'shared_prefix' runs each prompt once for all its responses, 'padded' "
            "one row per response. 'auto' takes the first where the model allows it and a check at the start agrees.",
            "choices": ["auto", "shared_prefix", "padded"],
        },
    )
    probe_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens, padding included, in one forward while probing. Frozen for the run. None: 512 on a "
            "CPU, 16384 on an accelerator."
        },
    )
    probe_dtype: str | None = field(
        default=None,
        metadata={
            "help": "'float32' scores in float32 whatever dtype training computes in. None: as training computes.",
            "choices": ["float32"],
        },
    )
    probe_max_probes: int | None = field(
        default=None, metadata={"help": "Use only the first so many probes of the set. None: all."}
    )
    probe_subset: float | None = field(
        default=None,
        metadata={
            "help": "Score only this share (below 1) or number of probes, the same ones at every step, chosen by a "
            "hash of their ids. None: all."
        },
    )
    probe_max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest probe prompt in tokens; a longer one keeps its last tokens. None: no limit."},
    )
    probe_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest probe prompt + response in tokens; a longer one loses the response's end. None: a row "
            "longer than the model's context is an error."
        },
    )
    probe_top_k: int = field(default=10, metadata={"help": "How many labels the top-k probability mass covers."})
    probe_samples: int | None = field(
        default=None,
        metadata={
            "help": "Let the model answer the prompts of so many probes greedily at every probing step, the same ones "
            "each time, chosen by a hash of their ids. None: no answers."
        },
    )
    probe_sample_tokens: int = field(
        default=64, metadata={"help": "Most new tokens of an answer that `probe_samples` asks for."}
    )

    def __post_init__(self):
        check_probe_options(self)
        if hasattr(super(), "__post_init__"):
            super().__post_init__()


def check_probe_options(options: "ScoringArguments") -> None:
    """Refuse values that no run can have.

    Args:
        options: A dataclass with the fields of [`ScoringArguments`]; the choices of every `probe_` field are checked.

    Raises:
        ValueError: If a value is out of its range or not among its choices.
    """
    declared = dataclasses.fields(options)
    for option in declared:
        if option.name.startswith("probe_") and "choices" in option.metadata:
            _check_choice(option, getattr(options, option.name))
    defaults = {option.name: option.default for option in declared}
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is None and defaults[name] is None:
            continue
        if value is None or value < least or value != int(value):
            raise ValueError(f"{name} is {value}, expected at least {least}, as a whole number")
    if options.probe_subset is not None:
        check_amount(options.probe_subset)
    if isinstance(options.probe_types, str) or set(options.probe_types) & set(RESERVED_FIELDS):
        raise ValueError(f"probe_types is {options.probe_types!r}, expected a list of columns that hold answers")
    LengthLimits(options.probe_max_prompt_length, options.probe_max_length)


def _check_choice(option: dataclasses.Field, value: object) -> None:
    choices = option.metadata["choices"]
    if value not in choices and value != option.default:
        expected = ", ".join(map(str, choices)) + (", or none" if option.default is None else "")
        raise ValueError(f"{option.name} is {value!r}, expected {'one of ' if len(choices) > 1 else ''}{expected}")
