"""What the squeezing-risk gauge costs: CPU seconds of a DPO step that it measures over those of TRL's own step.

    python scripts/bench/dpo.py [--quick]

Two models, with vocabularies of 512 and 32,000. Every batch is stepped on twice, with the gauge and without, each
first in every second pair, in one process on one thread. A step is the loss with its reference, the backward, AdamW,
and what the gauge does at the end of the step. Needs the public data files: TRL_DYNAMICS_DATA names their folder (see
README.md).
"""

import argparse
import contextlib
import copy
import io
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import measure
import torch
from datasets import Dataset
from tracking import built_model, real_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from trl_dynamics import DPOConfig, DPOTrainer, ProbeSet

LARGEST = 1.02
GOALS = {"gauge": f"<= {LARGEST} at every step, or gauge_every where it is more"}
# Characters of a prompt's end and of an answer; the real model's context is short.
PROMPT, ANSWER = 300, 400


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pairs of steps; under 50 s on two cores")
    args = parser.parse_args(argv)
    folder = os.environ.get("TRL_DYNAMICS_DATA")
    if not folder:
        parser.error("TRL_DYNAMICS_DATA does not name the folder with the public data files (see README.md)")
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    published = ProbeSet.from_jsonl(Path(folder) / "probing_helpful_base/formal_prob_train.jsonl")
    ratios = {}
    print(f"{'':<28} {'tokens':>7} {'CPU s a step':>13} {'gauge / TRL, median with its interval at 95 %':>48}")
    for name, num_pairs, batch_size, make_model in (
        ("stories", 8 if args.quick else 80, 4, lambda: real_model(Path(folder))),
        ("large", 2 if args.quick else 32, 1, lambda: built_model("llama", 32_000, published)),
    ):
        model, tokenizer = make_model()
        found = paired_steps(model, tokenizer, published, num_pairs, batch_size)
        interval = measure.bootstrap_median([on / off for off, on, _ in found])
        label = f"{name}, vocabulary {model.config.vocab_size}"
        seconds, tokens = (sum(column) / len(found) for column in (list(zip(*found, strict=True))[i] for i in (0, 2)))
        print(f"{label:<28} {tokens:7.0f} {seconds:13.3f} {str(interval):>48}")
        ratios |= {f"{name}/gauge": interval.median, f"{name}/gauge_high": interval.high}
    met = all(value <= LARGEST for key, value in ratios.items() if key.endswith("/gauge"))
    shown = {key: round(value, 4) for key, value in ratios.items()}
    print(json.dumps({"name": "dpo", "ratios": shown, "goals": GOALS, "met": met}))
    return 0


def paired_steps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: ProbeSet, num_pairs: int, batch_size: int
) -> list[tuple[float, float, int]]:
    """CPU seconds of a step as TRL's, of one with the gauge on the same batch, and the batch's tokens, padded."""
    with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(model, tokenizer, rows, output_dir, batch_size)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        batches = [batch for _, batch in zip(range(num_pairs + 1), trainer.get_train_dataloader(), strict=False)]
        squeeze_loss, found = trainer._squeeze_loss, []

        def step(batch: dict, gauged: bool) -> float:
            trainer._squeeze_loss = squeeze_loss if gauged else None
            start = time.process_time()
            trainer.training_step(trainer.model, dict(batch))
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            trainer.state.global_step += 1
            if gauged:
                squeeze_loss.gauge.on_step_end(trainer.args, trainer.state, trainer.control)
            return time.process_time() - start

        for index, batch in enumerate(batches):
            order = (True, False) if index % 2 else (False, True)
            seconds = {gauged: step(batch, gauged) for gauged in order}
            found.append((seconds[False], seconds[True], batch["input_ids"].numel()))
        assert len(trainer._metrics["train"]["squeeze_risk/rejected/energy"]) == len(batches)
    return found[1:]  # the first pair warms up


def make_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: ProbeSet, output_dir: str, batch_size: int
) -> DPOTrainer:
    """A DPO trainer with the gauge at every step, on helpful-base pairs."""
    pairs = [
        {"prompt": p.prompt[-PROMPT:], "chosen": p.responses["chosen"][:ANSWER], "rejected": rejected[:ANSWER]}
        for p in rows
        if (rejected := p.responses.get("rejected"))
    ]
    args = DPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=batch_size,
        gradient_checkpointing=False,
        gauge_every=1,
        max_length=512,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    reference = copy.deepcopy(model)
    return DPOTrainer(model, reference, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)


if __name__ == "__main__":
    sys.exit(main())
