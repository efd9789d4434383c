"""How well cheap stand-ins rank what they stand for: forms from one forward, and bounds from records of short runs."""

from pathlib import Path

import language
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dynamics import SFTConfig, SFTTrainer, load_records, loading
from trl_dynamics.akg.proxies import FORMS
from trl_dynamics.akg.stability import influence_measure, kernel_measure, label_pairs
from trl_dynamics.akg.task import Task, causal_lm
from trl_dynamics.paths.lbk import lower_bounds
from trl_dynamics.probing.encode import encode
from trl_dynamics.probing.labelled import collate, pad_id_of

# One short run on all probes' answers of each type, per optimiser and its rate.
TRAINED_TYPES = ("chosen", "rejected", "chosen_rephrase_semantic", "other_test", "chosen_permuted")
OPTIMIZERS = {"adamw_torch": 1e-4}
NUM_STEPS, NUM_PROBES = 8, 2


def forms_of(task: Task, update, observe, measured: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Every cheap form that the task has, per pair of labels, with the two exact measures."""
    found, pairs_OU = {name: value.numpy() for name, value in measured.items()}, label_pairs(task, update, observe)
    for name, form in FORMS.items():
        try:
            form_OU = form(task, update, observe)
        except ValueError:
            continue  # blocks are those of transformers
        found[name] = (form_OU if name == "mean features" else form_OU / pairs_OU).numpy()
    return found


def measure(world_name: str, folder: Path, seed: int) -> None:
    """The bounds of a world's base model, unless they are there."""
    if not (path := folder / f"bounds-{world_name}.npz").is_file():
        keep(path, bounds(language.world_of(world_name, seed), folder / f"{world_name}-bounds", seed))


def bounds(world: language.World, folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Type by type, observed x trained on: LBK and SignDelta of short runs, and what the exact kernel says."""
    types = sorted(set.intersection(*(set(probe.responses) for probe in world.probes)))
    found = {"types": np.array(types), "trained": np.array(TRAINED_TYPES)}
    for optimizer, rate in OPTIMIZERS.items():
        tables = []
        for trained in TRAINED_TYPES:
            output = folder / f"{optimizer}-{trained}"
            vocab_size = short_run(world, trained, output, optimizer, rate, seed)
            frame = load_records(output)
            frame = frame[frame["step"].isin([0, NUM_STEPS])]
            tables.append(lower_bounds(frame, trained, vocab_size).set_index("response_type").loc[types])
        for name in ("lbk", "sign_delta"):
            found[f"{optimizer}/{name}"] = np.stack([table[name].to_numpy() for table in tables], axis=1)
    return found | exact_cells(world, types)


def short_run(world: language.World, trained: str, output: Path, optimizer: str, rate: float, seed: int) -> int:
    """Train on all probes' answers of a type, a few steps of all of them at once; returns V."""
    rows = []
    for probe in world.probes:
        answer = probe.responses[trained]
        chat = not isinstance(probe.prompt, str) and isinstance(answer, str)
        rows.append(
            {"prompt": probe.prompt, "completion": [{"role": "assistant", "content": answer}] if chat else answer}
        )
    limits = {"probe_max_prompt_length": world.limits.max_prompt_length, "probe_max_length": world.limits.max_length}
    options = language.COMMON | world.options | {"per_device_train_batch_size": len(rows), "optim": optimizer}
    options |= {"max_steps": NUM_STEPS, "learning_rate": rate, "lr_scheduler_type": "constant", "probe_every": 0}
    args = SFTConfig(str(output), seed=seed, probe_log_spaced=False, **limits, **options)
    run = SFTTrainer(world.base, args, train_dataset=Dataset.from_list(rows), probe_set=world.probes)
    run.train()
    return run.model.config.vocab_size


def exact_cells(world: language.World, types: list[str]) -> dict[str, np.ndarray]:
    """Observed x trained on: the mean of -S and the root mean square of ||K||_F over the first probes' answers."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    chosen = {probe.probe_id for probe in list(world.probes)[:NUM_PROBES]}
    items = [item for item in encode(world.probes, tokenizer, world.limits, loading.end_ids(world.base)).items]
    sides = [
        [item for item in items if item.response_type in wanted and item.probe_id in chosen]
        for wanted in (types, TRAINED_TYPES)
    ]
    observe, update = (collate(side, pad_id_of(tokenizer)) for side in sides)
    task = causal_lm(AutoModelForCausalLM.from_pretrained(world.base, dtype="float32").eval())
    members = [
        torch.tensor([[item.response_type == name for item in side] for name in names], dtype=torch.float64)
        for side, names in zip(sides, (types, TRAINED_TYPES), strict=True)
    ]
    of_type_TO, of_type_RU = (rows / rows.sum(dim=1, keepdim=True) for rows in members)
    influence_OU = influence_measure(task, update, observe)
    kernel_OU = kernel_measure(6)(task, update, observe)
    cells = {"-influence": -influence_OU, "kernel": kernel_OU.square()}
    cells = {name: of_type_TO @ value_OU @ of_type_RU.T for name, value_OU in cells.items()}
    return {"-influence": cells["-influence"].numpy(), "kernel": cells["kernel"].sqrt().numpy()}


def keep(path: Path, arrays: dict) -> None:
    """Write a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.rename(path)
