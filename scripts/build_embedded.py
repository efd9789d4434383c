"""Build the embedded default from nothing: tokenizer, base model, its build.json, and optionally the world probe set.

The tokenizer is made from word lists and has the same hash everywhere. The model is trained on text that the world
emits, on one CPU thread, so that the number of cores changes neither the result nor, at this size, the speed much.

    python scripts/build_embedded.py                                  # into trl_dynamics/embedded/model
    python scripts/build_embedded.py --check                          # rebuild elsewhere, compare with what is shipped
    python scripts/build_embedded.py --probes_dir probes/world --skip_model
"""

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from trl_dynamics.embedded import model_path, probe_set
from trl_dynamics.embedded.base_model import BUILD_FILE, build_card, held_out_loss
from trl_dynamics.embedded.tokenizer import build_tokenizer, tokenizer_hash
from trl_dynamics.embedded.training import TrainingPlan, new_model, train

# How far the held-out loss of a rebuilt model may be from the shipped one's, as a share of it.
LOSS_TOLERANCE = 0.02
LOG_EVERY = 250


def build(folder: Path, plan: TrainingPlan) -> dict:
    """Train and write model, tokenizer and build.json into `folder`; returns what build.json says."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    tokenizer = build_tokenizer()
    model = new_model(tokenizer, plan.seed)

    def log(step: int, loss: float) -> None:
        if step % LOG_EVERY == 0:
            print(f"step {step:5d}  loss {loss:.4f}  {time.perf_counter() - start:5.0f} s", flush=True)

    train(model, tokenizer, plan, log)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = {
        "seed": plan.seed,
        "num_steps": plan.num_steps,
        "num_parameters": model.num_parameters(),
        "held_out_loss": round(held_out_loss(model, tokenizer), 6),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    (folder / BUILD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print_summary(folder, card, time.perf_counter() - start)
    return card


def print_summary(folder: Path, card: dict, seconds: float) -> None:
    """What was built, with the size of every file."""
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.3f} MB  {path.name}")
    print(f"parameters {card['num_parameters']}, held-out loss {card['held_out_loss']:.4f} nats per token")
    print(f"tokenizer {card['tokenizer_sha256']}, built in {seconds:.0f} s")


def differences(shipped: dict, rebuilt: dict) -> list[str]:
    """What makes a rebuilt model not equivalent to the shipped one; empty if it is."""
    found = []
    if shipped["tokenizer_sha256"] != rebuilt["tokenizer_sha256"]:
        found.append(f"tokenizer hash {rebuilt['tokenizer_sha256']}, shipped {shipped['tokenizer_sha256']}")
    change = rebuilt["held_out_loss"] / shipped["held_out_loss"] - 1
    if abs(change) > LOSS_TOLERANCE:
        found.append(f"held-out loss differs by {change:+.1%}, more than {LOSS_TOLERANCE:.0%}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Build or check; returns the exit status: 1 if the check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(model_path()), help="folder of model and tokenizer")
    parser.add_argument("--check", action="store_true", help="rebuild in a temporary folder and compare")
    parser.add_argument("--probes_dir", type=Path, help="also write the world probe set into this folder")
    parser.add_argument("--skip_model", action="store_true", help="build no model, for --probes_dir alone")
    args = parser.parse_args(argv)
    if args.probes_dir:
        probe_set().save(args.probes_dir)
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            found = differences(build_card(), build(Path(folder), TrainingPlan()))
        print("\n".join(found) or "equivalent to the shipped model")
        return 1 if found else 0
    if not args.skip_model:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        build(args.output_dir, TrainingPlan())
    return 0


if __name__ == "__main__":
    sys.exit(main())
