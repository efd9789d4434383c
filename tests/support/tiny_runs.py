"""Training runs of seconds: the same data, model and arguments wherever a test needs a trainer."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed

import trl_dynamics
from tiny import tiny_model, tiny_tokenizer

PAIRS = [
    {"prompt": f"What is {a} plus {b}?", "chosen": f" It is {a + b}.", "rejected": f" Maybe {a * b}, who knows?"}
    for a in range(5)
    for b in range(4)
]
PROBES = [row | {"other_test": " Paris."} for row in PAIRS[:3]]

_OPTIONS = {
    "max_steps": 20,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 3,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}
_GRPO_OPTIONS = {"num_generations": 2, "max_completion_length": 6, "per_device_eval_batch_size": 2}


def completions() -> Dataset:
    """The chosen answers as prompt/completion rows."""
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])


def letter_share(completions: list[str], **columns) -> list[float]:
    """A reward that costs nothing: the share of letters among a completion's characters."""
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in completions]


def make_trainer(
    method: str,
    output_dir,
    *,
    package=trl_dynamics,
    lora=False,
    probes=None,
    data=None,
    dropout=0.2,
    dtype=torch.float32,
    make_model=tiny_model,
    **options,
):
    """A trainer on the tiny model; `probes` is a probe set or None, `options` go to the config.

    `dtype` is that of the weights, `make_model` has the signature of `tiny_model`. In GRPO, groups of two complete a
    prompt with six tokens and are rewarded for letters; with `beta` the reference model is loaded from a folder below
    `output_dir`, as TRL wants it. With probes, `probe_every` has a value: the default depends on the clock.
    """
    set_seed(options.setdefault("seed", 7))
    config_class, trainer_class = (getattr(package, f"{method.upper()}{kind}") for kind in ("Config", "Trainer"))
    defaults = _OPTIONS | (_GRPO_OPTIONS if method == "grpo" else {})
    if package is trl_dynamics and (probes is not None or "probe_set" in options):
        options.setdefault("probe_every", 0.05)
    args = config_class(output_dir=str(output_dir), **(defaults | options))
    model = make_model("llama", attention_dropout=dropout).to(dtype)
    extra = {}
    if method == "dpo" and not lora:
        extra["ref_model"] = make_model("llama").to(dtype)
    if method == "grpo":
        extra["reward_funcs"] = letter_share
    if method == "grpo" and args.beta and not lora:
        model.save_pretrained(Path(output_dir) / "reference")
        model.config.name_or_path = str(Path(output_dir) / "reference")
    if lora:
        extra["peft_config"] = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear")
    if probes is not None:
        extra["probe_set"] = probes
    data = data or (completions() if method == "sft" else Dataset.from_list(PAIRS))
    return trainer_class(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(4)) if "eval_strategy" in options else None,
        processing_class=tiny_tokenizer(),
        **extra,
    )
