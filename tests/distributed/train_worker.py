"""One tracked run of the tiny model, started on every process by `accelerate launch`.

usage: train_worker.py METHOD OUTPUT_DIR NUM_PROCESSES PER_DEVICE_BATCH_SIZE [lora]
"""

import json
import os
import sys

import torch

from tiny_runs import PROBES, make_trainer

method, output_dir, num_processes, batch_size, *flags = sys.argv[1:]
torch.set_num_threads(1)
trainer = make_trainer(
    method,
    output_dir,
    lora="lora" in flags,
    probes=PROBES[: 1 if "one_probe" in flags else None],
    max_steps=4,
    probe_every=2,
    per_device_train_batch_size=int(batch_size),
    dropout=0.0,
)
# Most ways to start several CPU processes wrongly run one process, or several that know nothing of each other.
assert trainer.accelerator.num_processes == int(num_processes), trainer.accelerator.distributed_type
trainer.train()
if trainer.accelerator.is_main_process:
    kind = type(trainer.model_wrapped).__name__
    print(json.dumps({"wrapper": kind, "log": trainer.state.log_history}))
trainer.accelerator.wait_for_everyone()
trainer.end()
# Gloo's threads may still hold Python objects; an interpreter that takes itself down beside them aborts now and then.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
