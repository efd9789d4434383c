"""A tracked run in which the operating system refuses files above 4 kB at steps 2 and 3.

usage: limited_worker.py OUTPUT_DIR ON_ERROR
"""

import json
import logging
import resource
import sys

import torch
from transformers import TrainerCallback

from tiny_runs import PROBES, make_trainer

SIZE = 4096


class Limit(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        limited = state.global_step + 1 in (2, 3)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (SIZE if limited else resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )


output_dir, on_error = sys.argv[1:]
torch.set_num_threads(1)
logging.basicConfig(level=logging.WARNING)
trainer = make_trainer("sft", output_dir, probes=PROBES, max_steps=4, probe_every=1, probe_on_error=on_error)
trainer.add_callback(Limit())
trainer.train()
print(json.dumps({"steps": trainer.state.global_step}))
