"""One step's influence by central differences: for models whose weights lie in pieces on several processes.

    N observed positions of this process

Forward mode cannot run there. Instead each process moves its own pieces along the step, in place, all of them run the
observers forward together, and every bit is put back. With f(e) = ln pi of a label at e times the step, and
D(e) = (f(e) - f(-e)) / 2e, the derivative is (4 D(e) - D(2e)) / 3 up to order e^4 (Richardson's extrapolation).

How large e is decides between two errors: terms of higher order, which grow with what the outputs move by, and
rounding, which shrinks with it. Both are least where the outputs move by about u^(1/5) nats, u being the dtype's
resolution, so e is chosen by that and not by the size of the weights: rates, optimisers and parts of a step differ by
orders of magnitude, and what a weight does to the output differs with the model.

In float32 this is off by about 1e-4 of the change and states 5e-4 to 1e-2, which covers 99 of 100 labels or more; it
takes as long as forward mode, or half as long again (measured on tiny models in eight set-ups of model and optimiser).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from trl_dynamics.akg.influence import CENTRAL_DIFFERENCES, Change, Influence
from trl_dynamics.akg.steps import Step, Tensors
from trl_dynamics.akg.task import refuse_split

PRECISE = (torch.float32, torch.float64)
# The largest movement of an output, over u^(1/5), that is aimed at, the range around it that is taken as it is, and
# its lower end for a distance that served before, which a bent line may have halved.
AIM, RANGE, LEAST_KNOWN, TRIALS = 2.0, (0.5, 3.0), 0.1, 5
# Where the extrapolation corrects an output by more than this times u^(1/5), the line is too bent, and is halved.
BEND, HALVINGS = 5e-3, 6
# Weights never move by more than this share of their norm, whatever their change does.
FARTHEST = 0.1
# Standard errors of rounding that are stated. It is told from what five equidistant values of a cubic polynomial obey;
# the two factors are the norms of the coefficients of the fourth difference, and of the derivative.
ROUNDING_ERRORS, OF_FOURTH, OF_SLOPE = 4.0, 70**0.5, 130**0.5 / 12

# Up and down a line: by what multiple the weights moved, and (N,) ln pi there.
Pair = tuple[tuple[float, torch.Tensor], tuple[float, torch.Tensor]]


@dataclass(frozen=True)
class Shards:
    """The trainable weights as this process holds them.

    Args:
        values (`dict[str, torch.Tensor]`): By name, the piece of each parameter; it can be written to, and the next
            forward after `settle` sees it.
        settle (`Callable`): Called by all processes after a change: drops what was gathered of the old weights.
        device (`torch.device`): Where processes exchange numbers.
        distributed (`bool`): Whether other processes hold other pieces.
    """

    values: dict[str, torch.Tensor]
    settle: Callable[[], None]
    device: torch.device
    distributed: bool

    def total(self, number: float) -> float:
        """The sum over all processes."""
        return self._reduced(number, dist.ReduceOp.SUM)

    def largest(self, number: float) -> float:
        """The largest of all processes."""
        return self._reduced(number, dist.ReduceOp.MAX)

    def _reduced(self, number: float, operation: dist.ReduceOp) -> float:
        if not self.distributed:
            return number
        value = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(value, operation)
        return float(value)


def whole(model: nn.Module) -> Shards:
    """The weights of a model that lies on one process as it is.

    Raises:
        ValueError: If it lies in pieces, or as [`refuse_rounded_weights`].
    """
    refuse_split(model)
    refuse_rounded_weights(model)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return Shards(values, lambda: None, next(model.parameters()).device, distributed=False)


def refuse_rounded_weights(model: nn.Module) -> None:
    """Refuse weights that cannot take a small change.

    Raises:
        ValueError: If any is quantised or of half precision.
    """
    dtypes = {p.dtype for p in model.parameters()}
    coarse = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - set(PRECISE))
    if getattr(model, "is_quantized", False) or coarse:
        what = "quantised" if getattr(model, "is_quantized", False) else " and ".join(coarse)
        raise ValueError(
            f"the model has {what} weights, but central differences need float32: small changes would be rounded "
            "away. Load it with dtype=torch.float32 and train with bf16=False and fp16=False, or train data parallel "
            "(DDP), where influence is exact in half precision as well"
        )


@dataclass
class CentralDifferences:
    """Predicts what one step does to one batch of observers after the other, all processes together.

    Args:
        shards ([`Shards`]): The weights. They are moved while a batch is observed, and put back bit for bit, also when
            a forward fails.
        step ([`Step`]): The change of each piece, from [`akg.steps`], whose formulas are elementwise.
        distances (`dict[str, float]`, *optional*): Per part, the last multiple of it that the weights were moved by;
            the next batch begins there.
    """

    shards: Shards
    step: Step
    distances: dict[str, float] = field(default_factory=dict)

    def predict(
        self, label_logp: Callable[[], torch.Tensor], label_N: torch.Tensor, item_N: torch.Tensor
    ) -> Influence:
        """The step's influence, part by part; all processes call this together, each with observers of its own.

        A part takes four forwards, and two more each time that its distance did not suit, mostly for the first batch.

        Args:
            label_logp (`Callable`): Runs the observers forward; (N,) ln pi of their labels, nats.
            label_N, item_N (`torch.Tensor`): As in [`Influence`].
        """
        logp_N = label_logp()
        parts = {name: self._change(name, changes, label_logp, logp_N) for name, changes in self.step.parts.items()}
        total = Change(
            sum(part.target_N for part in parts.values()), error_N=sum(part.error_N for part in parts.values())
        )
        return Influence(
            total, parts, label_N, item_N, logp_N, None, None, None, self.step, method=CENTRAL_DIFFERENCES
        )

    def _change(
        self, name: str, changes: Tensors, label_logp: Callable[[], torch.Tensor], logp_N: torch.Tensor
    ) -> Change:
        unit = torch.finfo(logp_N.dtype).eps ** 0.2
        with moving(self.shards, changes) as line:

            def at(multiple: float) -> tuple[float, torch.Tensor]:
                return line.move(multiple), label_logp().double()

            near, distance = self._suiting(at, name, line.reach, logp_N, unit)
            far = at(2 * distance), at(-2 * distance)
            for _ in range(HALVINGS):
                bend_N = distance * (_slope(near) - _slope(far)) / 3
                if self._largest(bend_N, logp_N) <= BEND * unit:
                    break
                distance, far = distance / 2, near
                near = at(distance), at(-distance)
        self.distances[name] = distance
        value_N, error_N = derivative(near, far, logp_N.double(), distance)
        return Change(value_N.to(logp_N.dtype), error_N=error_N.to(logp_N.dtype))

    def _suiting(self, at: Callable, name: str, reach: float, logp_N: torch.Tensor, unit: float) -> tuple[Pair, float]:
        """Values at plus and minus a distance at which the outputs move by about what suits, and the distance."""
        distance = min(self.distances.get(name, 1.0), reach)
        least = LEAST_KNOWN if name in self.distances else RANGE[0]
        for trial in range(TRIALS):
            near = at(distance), at(-distance)
            movement = self._largest((near[0][1] - near[1][1]) / 2, logp_N) / unit
            factor = min(max(AIM / movement if movement else math.inf, 1e-3), 1e3, reach / distance)
            if least <= movement <= RANGE[1] or factor == 1.0 or trial == TRIALS - 1:
                return near, distance
            distance *= factor

    def _largest(self, change_N: torch.Tensor, logp_N: torch.Tensor) -> float:
        """The largest change of any label on any process; infinite where one overflowed."""
        change_N = change_N[logp_N.isfinite()].abs().nan_to_num(nan=math.inf)
        return self.shards.largest(float(change_N.max()) if len(change_N) else 0.0)


def derivative(near: Pair, far: Pair, logp_N: torch.Tensor, distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The derivative at 0 and how far off it may be: the extrapolation's own size, and rounding.

    Args:
        near, far: (distance, values) up and down the line, at once and twice the distance; what the weights really
            moved by once they were rounded, which for steps of one size everywhere, as Adam's, is not what was asked.
        logp_N: The values at 0.
        distance (`float`): What was asked for.
    """
    slope_N, correction_N = _slope(near), (_slope(near) - _slope(far)) / 3
    fourth_N = far[0][1] + far[1][1] - 4 * (near[0][1] + near[1][1]) + 6 * logp_N
    # What is typical, and what this label shows, since rounding differs from label to label.
    noise_N = (fourth_N.square().mean() + fourth_N.square()).sqrt() / OF_FOURTH
    return slope_N + correction_N, correction_N.abs() + ROUNDING_ERRORS * OF_SLOPE * noise_N / distance


def _slope(ends: Pair) -> torch.Tensor:
    """From one end to the other; 0 where the weights did not move."""
    (up, up_N), (down, down_N) = ends
    return (up_N - down_N) / (up - down) if up != down else torch.zeros_like(up_N)


@contextlib.contextmanager
def moving(shards: Shards, changes: Mapping[str, torch.Tensor]) -> Iterator["Line"]:
    """The weights along a line of changes; at the end they are back where they were, bit for bit."""
    line = Line(shards, changes)
    try:
        with torch.no_grad():
            yield line
    finally:
        line.put_back()


class Line:
    """Weights that stand at a multiple of some changes from where they were.

    Attributes:
        reach (`float`): The multiple at which they would move by `FARTHEST` of their norm.
    """

    def __init__(self, shards: Shards, changes: Mapping[str, torch.Tensor]):
        self.shards, self.changes = shards, changes
        self.kept = {name: shards.values[name].clone() for name in changes}
        self.length_sq = shards.total(sum(_dot(change, change) for change in changes.values()))
        weight_sq = shards.total(sum(_dot(kept, kept) for kept in self.kept.values()))
        self.reach = FARTHEST * (weight_sq / self.length_sq) ** 0.5 if weight_sq and self.length_sq else math.inf

    def move(self, multiple: float) -> float:
        """Put the weights there; by what multiple they really moved, since a weight plus its change is rounded."""
        along = 0.0
        for name, change in self.changes.items():
            value, kept = self.shards.values[name], self.kept[name]
            value.copy_(kept).add_(change, alpha=multiple)
            along += _dot(value - kept, change)
        self.shards.settle()
        along = self.shards.total(along)
        return along / self.length_sq if self.length_sq else 0.0

    def put_back(self) -> None:
        """Put the weights where they were."""
        with torch.no_grad():
            for name, value in self.kept.items():
                self.shards.values[name].copy_(value)
        self.shards.settle()


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() * other.double()).sum())
