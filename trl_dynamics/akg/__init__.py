"""akg: what one training step on some examples does to the model's predictions of others (-eta * A * K * G).

Everything here works on a [`Task`] (task.py): a causal language model, a classifier, or two functions of your own.
task.py also has the words for batches: positions that predict a label, rows, sums by row, label log-probabilities.
Predictions are in one_step.py, batched.py (several updates in one pass) and features.py (hidden states); real_step.py
takes the real step that they are checked against. They are made of losses.py, steps.py (the optimiser's own step),
jvp.py (forward mode), modes.py (evaluation mode) and checks.py (what is refused). K itself: kernel.py, block_norms.py,
stability.py, gram/ (all inner products of gradients) and proxies.py (cheap stand-ins). Split weights (FSDP2, ZeRO):
split/. This room may import statistics, stats_head, ops and compat.
"""

from typing import TYPE_CHECKING

from trl_dynamics import lazy

if TYPE_CHECKING:
    from trl_dynamics.akg.batched import influences
    from trl_dynamics.akg.kernel import Kernel
    from trl_dynamics.akg.one_step import Influence, influence
    from trl_dynamics.akg.real_step import verify
    from trl_dynamics.akg.task import Task, causal_lm, classifier

__getattr__, __dir__, __all__ = lazy.exports(
    __name__,
    {
        "Influence": "one_step",
        "Kernel": "kernel",
        "Task": "task",
        "causal_lm": "task",
        "classifier": "task",
        "influence": "one_step",
        "influences": "batched",
        "verify": "real_step",
    },
)
