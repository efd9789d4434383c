"""The sum of predicted changes along a short run, step by step, beside what was learnt."""

from pathlib import Path

import language
import pandas as pd
from datasets import Dataset

from trl_dynamics import DPOConfig, DPOTrainer, ProbeSet, SFTConfig, SFTTrainer
from trl_dynamics.influence.kind import INFLUENCE
from trl_dynamics.influence.series import accumulated_influence, influence_stability
from trl_dynamics.store.store import DynamicsStore

RUNS = ("embedded sft", "embedded dpo")
NUM_STEPS, NUM_PROBES = 20, 3
FIXED = ("chosen", "rejected")
# Steps between recorded ones: all of them, and a sample.
ALL, SAMPLE = 1, 5


def measure(name: str, folder: Path, seed: int) -> None:
    """One of `RUNS` with every step predicted, unless it is there; DPO starts from the SFT model of the study."""
    world_name, method = name.split()
    world, output = language.world_of(world_name, seed), folder / f"running-{name}"
    if (output / "training_args.bin").is_file():
        return
    start = world.base if method == "sft" else str(folder / f"{world_name}-sft")
    options = language.COMMON | world.options | {"max_steps": NUM_STEPS, "seed": seed, "akg_every": ALL}
    options |= {"akg_updates": ["batch", *FIXED], "lr_scheduler_type": "constant"}
    if method == "sft":
        trainer, args = SFTTrainer, SFTConfig(str(output), learning_rate=1e-3, **options)
    else:
        trainer, args = DPOTrainer, DPOConfig(str(output), learning_rate=2e-4, beta=0.1, **options)
    observed = ProbeSet(tuple(world.probes)[:NUM_PROBES], name=world.probes.name)
    run = trainer(start, args=args, train_dataset=Dataset.from_list(world.pairs), akg_observe=observed)
    run.train()
    run.save_model()


def sums(output: Path, every: int) -> pd.DataFrame:
    """Accumulated influence of a run at its last recorded step, had only each `every`-th step been recorded."""
    frame = DynamicsStore(output).read(INFLUENCE, set(range(0, NUM_STEPS, every)))
    found = accumulated_influence(frame)
    return found[found["step"] == found["step"].max()].set_index("response_type")


def neighbours(output: Path) -> pd.DataFrame:
    """How the ranking of fixed updates' influence agrees between every two neighbouring steps."""
    frame = DynamicsStore(output).read(INFLUENCE, columns=["num_tokens", "predicted_sum"])
    return influence_stability(frame).consecutive()
