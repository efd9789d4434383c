"""What the worker can run, by name: runs of seconds whose records are compared between set-ups."""

import json
import types
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from tiny import tiny_model
from tiny_runs import PAIRS, make_trainer

# Rows that one optimiser step takes, over all processes.
ROWS_PER_STEP = 2


@dataclass(frozen=True)
class Scenario:
    """A tracked run of four steps.

    Args:
        method (`str`): `"sft"`, `"dpo"` or `"grpo"`.
        num_probes (`int`, *optional*): Probes, of three responses each.
        lora (`bool`, *optional*): Train an adapter.
        accumulation (`int`, *optional*): Forwards of one process that an optimiser step of two processes takes.
        tied (`bool`, *optional*): The LM head shares the embeddings' weights.
        scaled (`bool`, *optional*): The model's own logits are more than its head makes of its last hidden states.
        undivided (`bool`, *optional*): One process takes the rows of a step in one forward.
        resume_from (`str`, *optional*): Continue a copy of this scenario's run, from its checkpoint after step 2;
            relative to the launch's folder.
        parallelism (`dict`, *optional*): Sizes as `accelerate launch --parallelism_config_...` would set them; the
            trainer must refuse them.
        mixed_precision (`str`, *optional*): As `accelerate launch --mixed_precision` would set it; the config's own
            `bf16` wants to see a GPU.
        clocks_differ (`bool`, *optional*): By the main process' clock no scoring between the first and the last is
            affordable, by those of the others all are.
        full_disk_at (`int`, *optional*): The step at which the main process, and only that one, cannot write records.
        options (`dict`, *optional*): For the config.
    """

    method: str
    num_probes: int = 3
    lora: bool = False
    accumulation: int = 1
    tied: bool = False
    scaled: bool = False
    undivided: bool = False
    resume_from: str | None = None
    parallelism: dict = field(default_factory=dict)
    mixed_precision: str = "no"
    clocks_differ: bool = False
    full_disk_at: int | None = None
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Tracking:
    """`trl-dynamics track` on the checkpoints of a run: the first one, then all, then all once more.

    Args:
        run (`str`): The run; relative to the launch's folder.
        options (`tuple[str, ...]`, *optional*): Further flags.
    """

    run: str
    options: tuple[str, ...] = ()
    calls: tuple[str, ...] = ("checkpoint-2", "checkpoint-*", "checkpoint-*")


PADDED = {"probe_layout": "padded"}
SHARED = {"probe_layout": "shared_prefix"}
# Eight rows in evaluation batches of three: two processes fill the last ones up with rows that must not count. Before
# training and not after: FSDP2 keeps what an evaluation's forward gathered until the next backward.
SIDES = {"sft_on": "both", "logging_steps": 1, "eval_strategy": "no", "eval_on_start": True}
SIDES |= {"per_device_eval_batch_size": 3}
SAVING = {"save_strategy": "steps", "save_steps": 2}
GUARDED = {"squeeze_guard": 1e-3, "logging_steps": 1, "learning_rate": 1e-2, "optim": "sgd"}
ANSWERS = {"probe_samples": 5, "probe_sample_tokens": 12, "probe_tokens_per_batch": 40}
# Four batches of observed answers for two processes, or an odd number where there is one probe less.
INFLUENCE = {"akg_every": 2, "akg_updates": ["batch", "chosen"], "probe_tokens_per_batch": 200, "optim": "sgd"}
INFLUENCE |= {"learning_rate": 1e-2}
SCENARIOS = {
    "sft": Scenario("sft", options=SHARED),
    "sft_padded": Scenario("sft", options=PADDED),
    # Log lines of every step, for the gauge's sake, which a probe set turns on.
    "dpo": Scenario("dpo", options=SHARED | {"logging_steps": 1}),
    "dpo_padded": Scenario("dpo", options=PADDED | {"dpop_lambda": 5.0, "dpo_shift": 0.7, "gate_dpo": "q10"}),
    "grpo": Scenario("grpo"),
    "sft_lora": Scenario("sft", lora=True),
    "dpo_lora": Scenario("dpo", lora=True, options={"cal_dpo": 0.5, "gate_dpo": "token"}),
    "influence": Scenario("dpo", num_probes=5, options=INFLUENCE),
    "influence_lora": Scenario("sft", num_probes=4, lora=True, options=INFLUENCE | {"optim": "adamw_torch"}),
    "influence_accumulation": Scenario("sft", num_probes=1, accumulation=2, options=INFLUENCE),
    "dpo_guard": Scenario("dpo", undivided=True, options=GUARDED),
    "dpo_guard_lora": Scenario("dpo", undivided=True, lora=True, options=GUARDED),
    "accumulation": Scenario("sft", accumulation=2, options=SIDES),
    # So few tokens that each prompt, or each response, is a group of its own.
    "uneven_shared": Scenario("sft", num_probes=5, options=SHARED | {"probe_tokens_per_batch": 40}),
    "uneven_padded": Scenario("sft", num_probes=3, options=PADDED | {"probe_tokens_per_batch": 40}),
    # Three batches of prompts for two processes, or five where a batch holds the new tokens as well.
    "answers_shared": Scenario("sft", num_probes=5, options=SHARED | ANSWERS),
    "answers_padded": Scenario("sft", num_probes=5, options=PADDED | ANSWERS),
    "one_probe_shared": Scenario("sft", num_probes=1, options=SHARED | {"probe_tokens_per_batch": 512}),
    "one_probe_padded": Scenario("sft", num_probes=1, options=PADDED | {"probe_tokens_per_batch": 512}),
    "bf16": Scenario("sft", mixed_precision="bf16"),
    "context_parallel": Scenario("sft", parallelism={"CP_SIZE": "2"}),
    "sequence_parallel": Scenario("sft", parallelism={"SP_SIZE": "2"}),
    "tensor_parallel": Scenario("sft", parallelism={"TP_SIZE": "2"}),
    "tied": Scenario("sft", tied=True),
    "own_forward": Scenario("sft", scaled=True),
    "saved": Scenario("sft", options=SAVING),
    "resumed": Scenario("sft", options=SAVING, resume_from="saved"),
    "thinned": Scenario("sft", clocks_differ=True, options={"probe_every": None}),
    "full_disk": Scenario("sft", options=SHARED, full_disk_at=2),
    "full_disk_stop": Scenario("sft", options=SHARED | {"probe_on_error": "stop"}, full_disk_at=2),
    "resumed_from_one": Scenario("sft", options=SAVING, resume_from="../one/saved"),
    "resumed_from_two": Scenario("sft", options=SAVING, resume_from="../ddp/saved"),
}

TRACKINGS = {
    "tracked": Tracking("../one/saved"),
    "tracked_uneven": Tracking("../one/saved", ("--probe_layout", "padded", "--probe_tokens_per_batch", "40")),
}


def probes_of(scenario: Scenario) -> list[dict]:
    """Probes whose prompts and answers differ in length."""
    return [
        row | {"prompt": row["prompt"] + "?" * (index % 3), "other_test": " Paris" + "!" * index}
        for index, row in enumerate(PAIRS[: scenario.num_probes])
    ]


def save_inputs(folder: Path) -> None:
    """What the scenarios load: a model that DeepSpeed splits while it is created draws other weights."""
    rows = probes_of(SCENARIOS["saved"])
    (folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, tied in (("model", False), ("model_tied", True)):
        tiny_model("llama", tie_word_embeddings=tied).save_pretrained(folder / name)


def scale_logits(model: PreTrainedModel) -> PreTrainedModel:
    """The model with logits of 1.5 times the size, by no name that its config has."""
    forward = model.forward

    def scaled(self, *args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output

    model.forward = types.MethodType(scaled, model)
    return model


def make(scenario: Scenario, folder: Path, name: str, num_processes: int, **device_options):
    """The trainer of a scenario; the rows of an optimiser step do not depend on the number of processes."""
    rows = ROWS_PER_STEP * scenario.accumulation

    def load(family: str, **overrides) -> PreTrainedModel:
        source = folder / ("model_tied" if scenario.tied else "model")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **overrides)
        return scale_logits(model) if scenario.scaled else model

    return make_trainer(
        scenario.method,
        folder / name,
        lora=scenario.lora,
        probes=probes_of(scenario),
        dropout=0.0,
        make_model=load,
        data=Dataset.from_list(PAIRS) if "sft_on" in scenario.options else None,
        **{
            "max_steps": 4,
            "probe_every": 2,
            "probe_tokens_per_batch": 96,
            "per_device_train_batch_size": rows // num_processes if scenario.undivided else 1,
            "gradient_accumulation_steps": 1 if scenario.undivided else rows // num_processes,
        }
        | scenario.options
        | device_options,
    )
