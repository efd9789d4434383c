"""Two small language models in SFT and in DPO, saved along the way, and the answers whose pairs are ranked."""

import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_dynamics import DPOConfig, DPOTrainer, ProbeSet, SFTConfig, SFTTrainer, embedded, loading
from trl_dynamics.akg.task import Task, causal_lm
from trl_dynamics.probing.encode import LengthLimits, encode
from trl_dynamics.probing.labelled import collate, pad_id_of

STEPS = (0, 2, 10, 30, 60)
NUM_PAIRS = 128
# Real prompts and answers longer than this, in characters, are left out: the model reads 512 tokens.
MAX_PROMPT, MAX_ANSWER = 300, 250
# All of these answers to the first prompts are updates, or are observed.
UPDATE_TYPES, NUM_UPDATED = ("chosen", "rejected"), 3
OBSERVED_TYPES, NUM_OBSERVED = ("chosen", "rejected", "chosen_rephrase_semantic", "other_test"), 3
COMMON = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "save_only_model": True,
    "logging_steps": 25,
}


@dataclass(frozen=True)
class World:
    """A base model with its pairs and probes: the probes are the first training pairs.

    Args:
        base (`str`): The model that SFT starts from.
        options (`dict`): Of the trainers.
        limits ([`LengthLimits`]): Of the rows that are ranked.
        num_products (`int`): With K for each update: of long answers K is of higher rank.
    """

    base: str
    options: dict
    limits: LengthLimits
    num_products: int
    pairs: list[dict]
    probes: ProbeSet


def world_of(name: str, seed: int) -> World:
    """`embedded`, or `stories260k` with published probes of helpful-base."""
    if name == "embedded":
        pairs, probes = embedded.preference_rows(NUM_PAIRS, seed), embedded.probe_set(12, seed)
        return World(embedded.model_path(), {"per_device_train_batch_size": 8}, LengthLimits(), 12, pairs, probes)
    folder = Path(os.environ["TRL_DYNAMICS_DATA"])
    path = folder / "probing_helpful_base" / "formal_prob_train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row["prompt"]) <= MAX_PROMPT]
    rows = [row for row in rows if all(0 < len(row[side].strip()) <= MAX_ANSWER for side in UPDATE_TYPES)]
    random.Random(seed).shuffle(rows)
    pairs = [
        {"prompt": row["prompt"]} | {side: f" {row[side].strip()}" for side in UPDATE_TYPES}
        for row in rows[:NUM_PAIRS]
    ]
    published = {probe.prompt: probe for probe in ProbeSet.from_jsonl(path)}
    probes = ProbeSet(tuple(published[pair["prompt"]] for pair in pairs[:12]), name="helpful_base")
    options = {"per_device_train_batch_size": 4, "max_length": 256}
    return World(str(folder / "stories260k"), options, LengthLimits(24, 40, 512), 30, pairs, probes)


class SaveAt(TrainerCallback):
    """Asks for a checkpoint after each of some steps."""

    def __init__(self, steps: tuple[int, ...]):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps
        return control


def train(method: str, world: World, start: str, output: Path, seed: int, steps: tuple[int, ...]) -> None:
    """SFT on chosen, or DPO, with a checkpoint after each of `steps` but 0; the last model is saved in `output`."""
    options = COMMON | world.options | {"output_dir": str(output), "seed": seed, "max_steps": max(steps)}
    if method == "sft":
        trainer, args = SFTTrainer, SFTConfig(learning_rate=1e-3, **options)
    else:
        trainer, args = DPOTrainer, DPOConfig(learning_rate=2e-4, beta=0.1, **options)
    run = trainer(start, args=args, train_dataset=Dataset.from_list(world.pairs), callbacks=[SaveAt(steps)])
    run.train()
    run.save_model()


def ranked(world: World) -> tuple[dict, dict, list[list[bool]]]:
    """The batches of updates and observers, and whether an observer and an update have the same prompt."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    items = encode(world.probes, tokenizer, world.limits, loading.end_ids(world.base)).items
    prompts = [probe.probe_id for probe in world.probes]
    sides = []
    for types, num in ((UPDATE_TYPES, NUM_UPDATED), (OBSERVED_TYPES, NUM_OBSERVED)):
        sides.append([item for item in items if item.response_type in types and item.probe_id in prompts[:num]])
    same = [[one.probe_id == other.probe_id for other in sides[0]] for one in sides[1]]
    update, observe = (collate(side, pad_id_of(tokenizer)) for side in sides)
    return update, observe, same


def checkpoints(start: str, output: Path) -> Iterator[tuple[int, Task]]:
    """Every step that was saved, from 0, and the model there."""
    saved = {int(re.sub(r"\D", "", path.name)): path for path in output.glob("checkpoint-*")}
    for step, path in [(0, start), *sorted(saved.items())]:
        yield step, causal_lm(AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval())
