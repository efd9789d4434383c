"""squeeze_guard: the gradient of a rejected token is held back where the step would squeeze everybody else.

B = 2P rows: P chosen answers, then the P rejected ones   T tokens   N rejected tokens of a micro-batch
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_dynamics import stats_head
from trl_dynamics.compat import log_metric
from trl_dynamics.ops import squeeze
from trl_dynamics.ops.tiled_head import Head, squeeze_rows
from trl_dynamics.scoring.engine import evaluating
from trl_dynamics.trainers.squeeze.recording import TokenForward, widest_float

logger = get_logger(__name__)

# Share of an earlier kappa in the average after a calibration.
KAPPA_DECAY = 0.7
# Under this name a checkpoint's trainer_state.json keeps kappa.
CHECKPOINT_KEY = "squeeze_guard"


def as_guarded(weight_N: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each token its own weight: the guard."""
    return weight_N


def uniform(weight_N: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A control: the mean weight of the micro-batch for all of its tokens."""
    return weight_N.mean().expand_as(weight_N) if len(weight_N) else weight_N


def shuffled(weight_N: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A control: the same weights, dealt out at random among the tokens of the micro-batch."""
    return weight_N[torch.randperm(len(weight_N), generator=generator).to(weight_N.device)]


MODES: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "guard": as_guarded,
    "uniform": uniform,
    "shuffled": shuffled,
}


@dataclass(frozen=True)
class _Pushed:
    """What the last micro-batch pushed down, for the calibration: `unit_N` is the push per unit of kappa."""

    rows: squeeze.Rows
    unit_N: torch.Tensor
    forward: TokenForward


class SqueezeGuard(TrainerCallback):
    """Weighs the gradient of each rejected token by w_t, the largest w in [0, 1] that keeps a budget of drained mass.

    The drained mass D_t is the probability that one step takes from all labels but the rejected token y- and its rival
    y* (see [`squeeze.drained_mass`]); the budget is a bound on D_t(w_t s_t), per token and optimiser step. The loss'
    value and all that chosen tokens receive stay: ln p- becomes sum_t [w_t ln p_t + (1 - w_t) ln p_t.detach()].
    Tokens that the loss does not push down keep w = 1.

    The push s_t = lr c_t kappa moves the logits by -s_t (e_y - p): lr is the optimiser's, c_t the coefficient of
    ln p_t in the gradient of the whole optimiser step, in 1 / nat: the gradient that arrives in the backward, after
    weights applied before the guard's, over accumulated micro-batches and processes. Gradient clipping is not in it.

    kappa, the logits' change per unit of lr times residual on the token itself, is measured. In softmax regression
    under SGD it is ||x||^2. In a network under AdamW it also holds the step's preconditioner and momentum, whatever
    tokens that share parameters add, and clipping: one number that says how far the logits of pushed tokens really
    moved. For that the last micro-batch of the step, on each process, is run once more after the step (evaluation
    mode, no gradient, no random number), and the fall of the log-odds of y- against y*, which a push lowers by
    s (1 - p_y + p*) exactly, is fitted by least squares over all tokens and processes ([`squeeze.response_sums`]).
    This is done after each of the first `squeeze_guard_every` steps and then every so many; values are averaged with
    the newest at 1 - 0.7. A mean below 0, where rejected tokens rise against their rivals, counts as 0. The first
    step that has a learning rate runs unguarded. Dropout that stays on in training spoils the measurement: a warning
    says so.

    What it does not know: tokens of a batch move each other's logits as well, so that within one batch the predicted
    and the actual drained mass agree in scale better than in rank.

    In the log, over the pushed tokens of all processes: `squeeze_guard/weight` mean w; `held_back` share with w < 1;
    `drained_mass`, `drained_mass_unguarded` mean predicted D_t(w_t s_t) and D_t(s_t); `kappa`; `kappa_fit` the cosine
    of measured and fitted changes of log-odds (1: kappa explains them all).

    Args:
        trainer ([`~trl.DPOTrainer`]): Its `args` have `squeeze_guard` (the budget), `squeeze_guard_mode` and
            `squeeze_guard_every`, checked by [`check_guard`]; the guard adds itself to its callbacks.
    """

    observes_tokens = True

    def __init__(self, trainer):
        args = trainer.args
        self.trainer, self.budget, self.every = trainer, float(args.squeeze_guard), args.squeeze_guard_every
        self.mode = MODES[args.squeeze_guard_mode]
        self.kappa: float | None = None
        self._rows: squeeze.Rows | None = None
        self._pushed: _Pushed | None = None
        self._sums: torch.Tensor | None = None
        self._num_micro = 0
        stats_head.install(trainer.model)
        trainer.add_callback(self)

    def observe(self, hidden_ND: torch.Tensor, head: Head, target_N: torch.Tensor) -> None:
        """Keep what is needed of the rejected tokens' rows; runs inside the loss' forward, without gradient."""
        self._rows = squeeze_rows(hidden_ND, head, target_N)

    def weights(self, gradient_BT: torch.Tensor, forward: TokenForward) -> torch.Tensor:
        """(B, T): w_t on rejected tokens that are pushed down, 1 elsewhere; runs in the backward."""
        mask_BT = forward.rejected_mask_BT
        rows, self._rows = self._rows, None
        accelerator = self.trainer.accelerator
        rate = max(group["lr"] for group in self.trainer.optimizer.param_groups)
        unit_N = gradient_BT[mask_BT].clamp(min=0).to(rows.top_NK.dtype)
        unit_N = unit_N * (rate / (forward.num_accumulated * accelerator.num_processes))
        weight_N = self._shares(rows, unit_N)
        self._pushed = _Pushed(rows, weight_N * unit_N, forward)
        self._num_micro += 1
        weight_BT = torch.ones_like(gradient_BT)
        weight_BT[mask_BT] = weight_N.to(gradient_BT.dtype)
        return weight_BT

    def _shares(self, rows: squeeze.Rows, unit_N: torch.Tensor) -> torch.Tensor:
        weight_N = torch.ones_like(unit_N)
        if self.kappa is None:
            return weight_N
        pushed_N = unit_N > 0
        rows, push_N = rows[pushed_N], max(self.kappa, 0.0) * unit_N[pushed_N]
        weight_N[pushed_N] = self.mode(squeeze.largest_share(rows, push_N, self.budget), self._generator())
        kept_N = weight_N[pushed_N]
        drained = [squeeze.drained_by_push(rows, s.clamp(max=squeeze.LARGEST_PUSH)) for s in (kept_N * push_N, push_N)]
        columns = (torch.ones_like(kept_N), kept_N, (kept_N < 1).to(kept_N), *drained)
        sums = torch.stack([column.sum() for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums
        return weight_N

    def _generator(self) -> torch.Generator:
        """Random numbers of its own, the same for a step however often the run was resumed."""
        place = (self.trainer.state.global_step, self._num_micro, self.trainer.accelerator.process_index)
        seed = self.trainer.args.seed
        for part in place:
            seed = (seed * 1_000_003 + part) % 2**63
        return torch.Generator().manual_seed(seed)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Go on with the kappa of the checkpoint."""
        kept = state.stateful_callbacks.get(CHECKPOINT_KEY, {}) if state.global_step else {}
        self.kappa = kept.get("kappa")
        self._rows, self._pushed, self._sums, self._num_micro = None, None, None, 0
        if drops_out(self.trainer.model):
            logger.warning(
                "squeeze_guard compares log-probabilities before a step, with dropout, to those after it, without: "
                "set disable_dropout, and the model config's dropout (attention_dropout, ...) to 0"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Log the step and calibrate; every process comes here at the same steps, and before the step's line."""
        pushed, self._pushed, self._num_micro = self._pushed, None, 0
        self._log_weights()
        step = state.global_step
        skipped = getattr(self.trainer.accelerator, "optimizer_step_was_skipped", False)
        if (step <= self.every or step % self.every == 0) and not skipped:
            self._calibrate(pushed)
        state.stateful_callbacks[CHECKPOINT_KEY] = {"kappa": self.kappa}

    def _log_weights(self) -> None:
        if self.kappa is None:
            return
        sums = torch.zeros(5) if self._sums is None else self._sums
        self._sums = None
        count, *totals = self.trainer.accelerator.reduce(sums.to(self.trainer.accelerator.device), "sum").tolist()
        names = ("weight", "held_back", "drained_mass", "drained_mass_unguarded")
        if count:
            self._log({name: total / count for name, total in zip(names, totals, strict=True)})

    def _calibrate(self, pushed: _Pushed) -> None:
        sums = self._response(pushed)
        product, square, change = self.trainer.accelerator.reduce(sums, "sum").tolist()
        # Without a push, as in the first step of a warm-up, there is nothing to measure.
        if square == 0 or not math.isfinite(product / square):
            return
        measured, share = product / square, 0.0 if self.kappa is None else KAPPA_DECAY
        self.kappa = share * (self.kappa or 0.0) + (1 - share) * measured
        fit = product / math.sqrt(square * change) if change else 0.0
        self._log({"kappa": self.kappa, "kappa_fit": fit})

    def _response(self, pushed: _Pushed) -> torch.Tensor:
        """This process' [`squeeze.response_sums`] of the step that was just taken."""
        trainer, rows, inputs = self.trainer, pushed.rows, pushed.forward.model_inputs
        rows_N, cols_N = pushed.forward.rejected_mask_BT.nonzero(as_tuple=True)
        ids = inputs["input_ids"]
        request = stats_head.StatsRequest(
            rows_N, cols_N, ids[rows_N, cols_N + 1], ids.shape[1], rows.rival_id_N[:, None], top_k=1
        )
        with evaluating(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
            after = trainer.model(**inputs, stats_request=request)
        sums = squeeze.response_sums(rows, after["target_logp"], after["extra_logp"][:, 0], pushed.unit_N)
        device = trainer.accelerator.device
        return sums.to(device, widest_float(device))

    def _log(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            log_metric(self.trainer, "train", f"squeeze_guard/{name}", value)


def drops_out(model: nn.Module) -> bool:
    """Whether the model has dropout, as modules or as numbers that its attention passes on."""
    # Where an attention keeps a module under this name, such as Bloom's, that is among the modules.
    passed_on = (getattr(module, "attention_dropout", None) for module in model.modules())
    return any(isinstance(rate, float | int) and rate > 0 for rate in passed_on) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    )


def check_guard(budget: float, mode: str, every: int) -> None:
    """Refuse options that are out of range.

    Raises:
        ValueError: With what was given and what is expected.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"squeeze_guard is {budget!r}, expected a probability: the drained mass that a step may cost")
    if mode not in MODES:
        raise ValueError(f"squeeze_guard_mode is {mode!r}, expected one of {', '.join(MODES)}")
    if every < 1:
        raise ValueError(f"squeeze_guard_every is {every!r}, expected a number of steps from 1 on")
