"""Training runs of seconds: the same data, model and arguments wherever a test needs a trainer."""

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


def completions() -> Dataset:
    """The chosen answers as prompt/completion rows."""
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])


def make_trainer(
    method: str, output_dir, *, package=trl_dynamics, lora=False, probes=None, data=None, dropout=0.2, **options
):
    """A trainer on the tiny model; `probes` is a probe set or None, `options` go to the config."""
    set_seed(options.setdefault("seed", 7))
    defaults = {
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
    config_class = {"sft": package.SFTConfig, "dpo": package.DPOConfig}[method]
    trainer_class = {"sft": package.SFTTrainer, "dpo": package.DPOTrainer}[method]
    args = config_class(output_dir=str(output_dir), **(defaults | options))
    extra = {}
    if method == "dpo" and not lora:
        extra["ref_model"] = tiny_model("llama")
    if lora:
        extra["peft_config"] = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear")
    if probes is not None:
        extra["probe_set"] = probes
    data = data or (completions() if method == "sft" else Dataset.from_list(PAIRS))
    return trainer_class(
        model=tiny_model("llama", attention_dropout=dropout),
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(4)) if "eval_strategy" in options else None,
        processing_class=tiny_tokenizer(),
        **extra,
    )
