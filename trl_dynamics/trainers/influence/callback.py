"""Influence in training: predicted right before an optimiser step, measured right after it, recorded.

Between the last backward and the step, `.grad` is what the optimiser will get, whatever the loss was: accumulated,
averaged over processes and clipped. So no loss is computed again, and SFT, DPO and GRPO are all the same here.
DeepSpeed steps before transformers' callbacks come, and calls from in between.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_dynamics.akg.steps import plain
from trl_dynamics.influence.kind import BATCH, INFLUENCE
from trl_dynamics.store.identity import Same
from trl_dynamics.tracking.series import Series
from trl_dynamics.trainers.influence.choice import choose_backend
from trl_dynamics.trainers.influence.observed import Observed
from trl_dynamics.trainers.influence.rows import ERROR, LOGP, NAN, PREDICTED, TRUE, Prediction, rows_of, table_of

logger = logging.getLogger(__name__)

HALF = ("float16", "bfloat16")
SAME = Same(
    "akg.observe.fingerprint", "what akg observes", "Keep akg_observe, akg_max_probes and the tokenizer", shown=False
)


class InfluenceCallback(TrainerCallback):
    """Predicts, measures and records what single steps do to observed answers; training does not notice.

    Args:
        trainer ([`~transformers.Trainer`]): Whose steps.
        observed ([`Observed`]): The answers.
        series ([`Series`]): Of the run; the rows go to its store.

    Attributes:
        grad_norm (`float` or `torch.Tensor`): Norm before clipping of the gradient that `.grad` holds; the trainer
            notes it here.

    Raises:
        ValueError: If steps of this trainer cannot be predicted.
    """

    def __init__(self, trainer: Trainer, observed: Observed, series: Series):
        self.trainer, self.observed, self.series = trainer, observed, series
        self.backend = choose_backend(trainer)
        self.updates = list(dict.fromkeys(trainer.args.akg_updates))
        self.grad_norm: float | torch.Tensor = NAN
        accelerator = trainer.accelerator
        self._share = observed.share(accelerator.process_index, accelerator.num_processes, accelerator.device)
        self._before: list[torch.Tensor] = []
        self._predictions: list[Prediction] = []
        self._waiting = contextlib.ExitStack()
        dtype = compute_dtype(trainer.model)
        if dtype in HALF and trainer.is_world_process_zero():
            logger.warning(
                f"akg_every on {dtype} weights: predictions hold, but what is measured of a single step is mostly "
                "rounding there; to compare the two, load the model with dtype=torch.float32 (bf16=True may stay)"
            )
        series.same.append(SAME)
        series.meta["akg"] = {
            "every": trainer.args.akg_every,
            "updates": self.updates,
            "method": self.backend.method,
            "dtype": dtype,
            "observe": observed.description,
        }

    def noting(self, grad_norm: Callable) -> Callable:
        """The trainer's method that gives the gradient's norm before clipping, which is noted on its way."""

        @functools.wraps(grad_norm)
        def noted(*args, **kwargs):
            self.grad_norm = grad_norm(*args, **kwargs)
            return self.grad_norm

        return noted

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Refuse optimisers whose steps are not known."""
        self._predictions = []
        self._waiting.close()
        try:
            plain(self.trainer.optimizer)
        except ValueError as error:
            kind = type(getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)).__name__
            raise ValueError(
                f"akg_every predicts the steps of torch's SGD, Adam and AdamW, but training steps with {kind}: set "
                "optim='adamw_torch' or optim='sgd', or leave akg_every out"
            ) from error

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Wait for the step inside of the backward, if it is one of those to look at."""
        if self.backend.steps_in_backward and state.global_step % args.akg_every == 0:
            self._waiting.enter_context(self.backend.before_step(self._look_ahead))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        """Predict the step that is about to be taken, if it is one of those to look at."""
        if not self.backend.steps_in_backward and state.global_step % args.akg_every == 0:
            self._look_ahead()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        """Measure what a predicted step did, and write both."""
        self._waiting.close()
        predictions, self._predictions = self._predictions, []
        # fp16 leaves out steps whose gradient overflowed.
        if not predictions or self.trainer.accelerator.optimizer_step_was_skipped:
            return
        with self._apart():
            after = [self.backend.logp(batch) for batch in self._share.batches] if BATCH in self.updates else []
            self._write(predictions, after)

    def _look_ahead(self) -> None:
        step = self.trainer.state.global_step
        with self._apart():
            self._before = [self.backend.logp(batch) for batch in self._share.batches]
            self._predictions = [self._predict(step, update) for update in self.updates]

    def _predict(self, step: int, update: str) -> Prediction:
        facts = {"force_norm": NAN, "grad_norm": NAN}
        facts["lr"] = float(plain(self.trainer.optimizer).param_groups[0]["lr"])
        if update == BATCH:
            taken = self.backend.step()
        else:
            answers = self.observed.answers(update, self.trainer.accelerator.device)
            taken, facts["force_norm"], facts["grad_norm"] = self.backend.step_on(answers)
        found = []
        for batch in self._share.batches:
            influence = self.backend.predict(taken, batch)
            changes = {PREDICTED: influence.total} | influence.parts
            found.append({name: change.target_N for name, change in changes.items()})
            if influence.total.error_N is not None:
                found[-1][ERROR] = influence.total.error_N
        return Prediction(step, update, facts, found)

    def _write(self, predictions: list[Prediction], after: list[torch.Tensor]) -> None:
        before = [{LOGP: before_N} for before_N in self._before]
        true = [{LOGP: b_N, TRUE: a_N - b_N} for b_N, a_N in zip(self._before, after, strict=False)]
        rows = []
        for order, prediction in enumerate(predictions):
            if prediction.update == BATCH:  # inside of a backward it was not known yet
                prediction.facts["grad_norm"] = float(self.grad_norm)
            measured = true if prediction.update == BATCH else before
            found = rows_of(prediction, self.observed, self._share.items, measured)
            rows += [((order, item), row) for item, row in found]
        table = table_of([row for _, row in sorted(gather_object(rows), key=lambda placed: placed[0])])
        store, step = self.series.store, predictions[0].step
        self.series.write(lambda: store.write(step, {INFLUENCE: table}), f"the influence of step {step}")

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """What happens in here counts as time of its own, neither of training nor of probing."""
        began = time.perf_counter()
        yield
        seconds, part = time.perf_counter() - began, self.series.meta["parts"][-1]
        part["akg_seconds"] = part.get("akg_seconds", 0.0) + seconds
        self.series.cost.leave_out(seconds)


def compute_dtype(model: nn.Module) -> str:
    """The dtype that observers are computed in: the coarsest of the weights."""
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return next((dtype for dtype in (*HALF, "float32") if dtype in dtypes), "float64")
