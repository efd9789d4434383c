"""What the study can be run on: the embedded world, or the small real model with real text.

A world gives the base model, the settings, and per seed the training pairs, held-out pairs and probes: the probes are
the first training pairs, and every answer of an `other_train` is one that is trained on.
"""

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, DatasetDict

from trl_dynamics import ProbeSet, embedded

HERE = Path(__file__).parent
DATA_VARIABLE = "TRL_DYNAMICS_DATA"
MODEL, PAIRS = "stories260k", "probing_helpful_base/formal_prob_{}.jsonl"
# Real pairs with a longer answer are left out, in characters: a model of 512 tokens, half an hour on two cores.
MAX_CHARACTERS = 250


@dataclass(frozen=True)
class World:
    """Base model and data.

    Args:
        base (`str`): The model that everything starts from.
        configs (`dict[str, str]`): YAML file of each method, beside this one.
        num_pairs, num_probes, num_held_out (`int`): Sizes, of a seed.
        draw (`Callable`): `draw(seed, num_pairs, num_probes, num_held_out)` gives training pairs, held-out pairs and
            probes.
        max_answer (`int`): Tokens of a drawn answer.
        max_prompt (`int`, *optional*): Last tokens of a prompt that are kept, as in training.
        judged (`bool`): Whether a checker can tell good answers from bad ones here.
    """

    base: str
    configs: dict[str, str]
    num_pairs: int
    num_probes: int
    num_held_out: int
    draw: Callable[[int, int, int, int], tuple[list[dict], list[dict], ProbeSet]]
    max_answer: int
    max_prompt: int | None
    judged: bool

    def write(self, folder: Path, seed: int, num_pairs: int, num_probes: int) -> None:
        """Write the pairs, probes and held-out prompts of a seed, unless they are there."""
        if (folder / "held_out.jsonl").is_file():
            return
        train, held_out, probes = self.draw(seed, num_pairs, num_probes, self.num_held_out)
        splits = {"train": Dataset.from_list(train), "test": Dataset.from_list(held_out)}
        DatasetDict(splits).save_to_disk(folder / "pairs")
        probes.save(folder / "probes")
        lines = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in held_out]
        (folder / "held_out.part").write_text("".join(lines), encoding="utf-8")
        (folder / "held_out.part").rename(folder / "held_out.jsonl")


def draw_embedded(
    seed: int, num_pairs: int, num_probes: int, num_held_out: int
) -> tuple[list[dict], list[dict], ProbeSet]:
    """Pairs and probes of the embedded world; held-out pairs differ in style alone and are about other people."""
    held_out = embedded.style_rows(num_held_out, seed, "test")
    return embedded.preference_rows(num_pairs, seed), held_out, embedded.probe_set(num_probes, seed)


def draw_helpful_base(
    seed: int, num_pairs: int, num_probes: int, num_held_out: int
) -> tuple[list[dict], list[dict], ProbeSet]:
    """Pairs of helpful-base with their published probes, in an order of the seed's.

    `other_train` of a probe becomes the chosen answer of the training pair after it: the published one may not be
    trained on.

    Raises:
        ValueError: If there are fewer such pairs.
    """
    train, held_out = (_short_pairs(split, seed) for split in ("train", "test"))
    if min(len(train) - num_pairs, len(held_out) - num_held_out) < 0:
        raise ValueError(
            f"{num_pairs} pairs and {num_held_out} held-out ones wanted, and {len(train)} and {len(held_out)} are "
            f"there with answers of at most {MAX_CHARACTERS} characters"
        )
    published = {probe.prompt: probe for probe in ProbeSet.from_jsonl(data_folder() / PAIRS.format("train"))}
    probes = []
    for index, row in enumerate(train[:num_probes]):
        probe = published[row["prompt"]]
        other = train[(index + 1) % num_pairs]["chosen"]
        probes.append(replace(probe, responses=probe.responses | {"other_train": other}))
    return train[:num_pairs], held_out[:num_held_out], ProbeSet(tuple(probes), name="helpful_base")


def data_folder() -> Path:
    """Where the public files lie; the main README says where they come from.

    Raises:
        ValueError: If the environment does not say.
    """
    if DATA_VARIABLE not in os.environ:
        raise ValueError(f"set {DATA_VARIABLE} to the folder that has {MODEL} and {PAIRS.format('train')}")
    return Path(os.environ[DATA_VARIABLE])


def _short_pairs(split: str, seed: int) -> list[dict]:
    rows = [json.loads(line) for line in open(data_folder() / PAIRS.format(split), encoding="utf-8")]
    kept = [
        {"prompt": row["prompt"]} | {name: f" {row[name].strip()}" for name in ("chosen", "rejected")}
        for row in rows
        if row["rejected"].strip() and max(len(row["chosen"]), len(row["rejected"])) <= MAX_CHARACTERS
    ]
    random.Random(f"{split}/{seed}").shuffle(kept)
    return kept


def world_of(name: str) -> World:
    """One of `WORLDS`.

    Raises:
        ValueError: If the real model is asked for and the environment does not say where it is.
    """
    if name == "embedded":
        configs = {"sft": "sft_cpu.yaml", "dpo": "dpo_cpu.yaml"}
        return World("embedded", configs, 200, 24, 64, draw_embedded, 40, None, judged=True)
    configs = {"sft": "sft_real_cpu.yaml", "dpo": "dpo_real_cpu.yaml"}
    return World(str(data_folder() / MODEL), configs, 200, 16, 32, draw_helpful_base, 128, 96, judged=False)


WORLDS = ("embedded", "helpful_base")
