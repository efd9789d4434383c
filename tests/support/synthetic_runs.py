"""Records as a run would write them, from a few numbers per response type: for tests of everything that reads them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from small_stores import write_records
from trl_dynamics.paths.kinds import RECORDS, SAMPLES
from trl_dynamics.paths.records import probe_set_files
from trl_dynamics.probing.schema import RESPONSE_TYPES, Probe, ProbeSet
from trl_dynamics.store.store import DynamicsStore

ALL_TYPES = tuple(RESPONSE_TYPES)
STEPS = (0, 10, 20, 40, 80, 160, 320)
VOCAB_SIZE = 50

# Nats per token that a type has gained at the end of the run; a type that is not named does not move.
Drift = dict[str, float] | Callable[[str, float], float]

SQUEEZED = {name: -0.8 for name in ALL_TYPES} | {"chosen": -0.15, "rejected": -1.6, "chosen_initial": -0.1}
SFT = {
    "chosen": 0.8,
    "rejected": 0.1,
    "other_train": 0.4,
    "other_test": 0.05,
    "chosen_permuted": -0.2,
    "other_test_permuted": -0.2,
}


def records(
    drift: Drift | None = None,
    *,
    argmax: float = 0.0,
    entropy: float = 0.0,
    eos: float = 0.0,
    drained: float = 0.0,
    types: Sequence[str] = ALL_TYPES,
    steps: Sequence[int] = STEPS,
    num_probes: int = 24,
    noise: float = 0.02,
    missing: Sequence[str] = (),
    model: str = "policy",
    seed: int = 0,
) -> pd.DataFrame:
    """Records of one model.

    Args:
        drift: Change of logp_mean at the end of the run per type, or a function of (type, fraction of the run).
        argmax, entropy, eos, drained: Change at the end of argmax (nats per token), entropy (nats), end-of-turn
            log-probability (nats) and the mass of all other labels (probability).
        noise: Standard deviation over probes of every change, nats per token.
        missing: Types that only every other probe has.
        seed: Of the noise; what is there at the start (levels, lengths) is the same for every seed.
    """
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    drift = drift or {}
    curve = drift if callable(drift) else lambda name, t: drift.get(name, 0.0) * t
    rows = []
    for index in range(num_probes):
        for name in types:
            if name in missing and index % 2:
                continue
            start, tokens, rest = -1.5 - 0.6 * fixed.random(), int(fixed.integers(8, 40)), 0.3 + 0.1 * fixed.random()
            for step in steps:
                t = (step - steps[0]) / (steps[-1] - steps[0]) if len(steps) > 1 else 0.0
                wobble = noise * rng.standard_normal(5) * (step != steps[0])
                logp = start + curve(name, t) + wobble[0]
                top = max(start + 1.2 + argmax * t + wobble[1], logp)
                rest_now = rest - drained * t + 0.1 * wobble[2]
                rows.append(
                    {
                        "model": model,
                        "step": step,
                        "probe_id": f"p{index:03d}",
                        "response_type": name,
                        "num_tokens": tokens,
                        "truncated": index == 3,
                        "logp_sum": logp * tokens,
                        "logp_mean": logp,
                        "prob_mean": float(np.exp(logp)),
                        "argmax_logp_sum": top * tokens,
                        "argmax_match_mean": 0.4,
                        "entropy_mean": 1.8 + entropy * t + wobble[3],
                        "sum_sq_mean": 0.2 + 0.5 * float(np.exp(logp)),
                        "topk_mass_mean": 0.8,
                        "star_logp_sum": -1.0 * tokens,
                        "rest_mass_mean": rest_now,
                        "eos_logp": np.nan if index == 3 else -0.5 + eos * t + wobble[4],
                    }
                )
    return pd.DataFrame(rows)[RECORDS.schema.names]


def probe_set(frame: pd.DataFrame, *, prompt: str = "What did question {i} ask?", name: str = "synthetic") -> ProbeSet:
    """The probe set that `frame` would have been scored on; prompts of odd probes are chat messages."""
    probes = []
    for i, (probe_id, rows) in enumerate(frame.groupby("probe_id")):
        text = prompt.format(i=i)
        messages = [{"role": "user", "content": text}]
        responses = {kind: f"{kind} answer to {probe_id}" for kind in rows["response_type"].unique()}
        probes.append(Probe(str(probe_id), messages if i % 2 else text, responses))
    return ProbeSet(tuple(probes), name=name, required_types=())


def meta(frame: pd.DataFrame, probes: ProbeSet, *, method: str = "dpo", **entries) -> dict:
    """What a finished run writes about itself."""
    counts = probes.counts
    steps = sorted(int(step) for step in frame["step"].unique())
    return {
        "kind": "track" if method == "track" else "train",
        "method": method,
        "status": "finished",
        "created": "2026-03-01T12:30:00+00:00",
        "versions": {"trl_dynamics": "0.1.0", "trl": "1.16.0", "torch": "2.13.0"},
        "seed": 42,
        "model": {
            "name_or_path": "tiny",
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "num_parameters": 1234567,
            "vocab_size": VOCAB_SIZE,
        },
        "layout": "shared_prefix",
        "batch_plan": {"num_items": 300, "num_batches": 12, "batch_size": 8, "fingerprint": "ab" * 32},
        "probe_set": {
            "name": probes.name,
            "fingerprint": probes.fingerprint,
            "num_probes": len(probes),
            "counts": counts,
            "metadata": {"dropped": {"chosen_self_rephrase": 3}},
        },
        "cuts": {name: {"prompt": 0, "response": 1, "of": n} for name, n in counts.items()},
        "schedule": {"steps": steps},
        "num_processes": 1,
        "probe_seconds": 12.5,
        "train_seconds": 300.0,
        "top_k": 10,
        "baseline_step": steps[0],
        **entries,
    }


def trainer_log(steps: Sequence[int], method: str) -> list[dict]:
    """Log lines as the trainer keeps them, the summary line of the end included; a tracked run has none."""
    if method == "track":
        return []
    lines = [
        {"step": int(step), "epoch": 0.1, "loss": 0.7 - 0.0005 * step, "learning_rate": 1e-6}
        | ({"rewards/margins": 0.01 * step, "rewards/accuracies": 0.5} if method == "dpo" else {})
        for step in steps
    ]
    return [*lines, {"step": int(steps[-1]), "train_loss": 0.6, "train_runtime": 300.0}]


def write_run(
    folder: Path,
    frame: pd.DataFrame,
    *,
    method: str = "dpo",
    prompt: str | None = None,
    answers: pd.DataFrame | None = None,
    **entries,
) -> Path:
    """Write `frame`, and greedy `answers` of its steps, as a run's store in `folder`, one shard per model and step."""
    probes = probe_set(frame, prompt=prompt) if prompt else probe_set(frame)
    store = DynamicsStore(folder)
    config = {"learning_rate": 1e-6, "beta": 0.1}
    store.create(meta(frame, probes, method=method, **entries), config, probe_set_files(probes))
    store.write_trainer_log(trainer_log(sorted(frame["step"].unique()), method))
    for index, (model, rows) in enumerate(frame.groupby("model", sort=False)):
        for step, shard in rows.groupby("step"):
            columns = {name: shard[name].tolist() for name in RECORDS.schema.names}
            samples = None
            if answers is not None:
                own = answers[(answers["model"] == model) & (answers["step"] == step)]
                samples = SAMPLES.table({name: own[name].tolist() for name in SAMPLES.schema.names})
            write_records(store, RECORDS.table(columns), step=int(step), model_index=index, samples=samples)
    return folder
