"""One step's influence by central differences: for models whose weights lie in pieces on several processes.

    N observed positions of this process

Forward mode cannot run there. Instead each process moves its own pieces along the step, in place, all of them run the
observers forward together, and every bit is put back. With f(e) = ln pi of a label at e times the step, and
D(e) = (f(e) - f(-e)) / 2e, the derivative is (4 D(e) - D(2e)) / 3 up to order e^4 (Richardson's extrapolation).

How large e is decides between two errors: terms of higher order, which grow with what the outputs move by, and
rounding, which shrinks with it. Both are least where the outputs move by about u^(1/5) nats, u being the dtype's
resolution, so e is chosen by that and not by the size of the weights: rates, optimisers and parts of a step differ by
orders of magnitude, and what a weight does to the output differs with the model.

The stated error of a value holds at a confidence of 99.9 %: of 1000 values, over draws of model, batch and step, 999
are off by no more. It is no bound. It adds what Richardson's extrapolation corrected to 99.9 % of Student's t for
rounding. Rounding errors of forwards are Gaussian and independent, but differ between labels by a factor of up to 4
(float32 against float64). Five equidistant values show one standard error of each label; what is stated mixes it with
the mean over all labels and processes. The fewer the labels, the larger the factor.

In float32 this is off by about 1e-4 of the change and states 5e-4 to 2e-2; it takes as long as forward mode, or half
as long again (measured on tiny models in eight set-ups of model and optimiser).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from trl_dynamics.akg.one_step import CENTRAL_DIFFERENCES, Change, Influence
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
# What is stated of each value: the share of values that are off by no more.
CONFIDENCE = 0.999
# Student's t at this confidence, by degrees of freedom. The mean over labels counts as up to three: that is how
# unequal the labels' own variances are, as scaled inverse chi-squares, in the most unequal models that were measured.
STUDENT_T = {1: 636.62, 2: 31.599, 3: 12.924, 4: 8.610}
# Norms of the coefficients of the fourth difference, which shows a label's rounding, and of the derivative.
OF_FOURTH, OF_SLOPE = 70**0.5, 130**0.5 / 12

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
        value_N, error_N = derivative(near, far, logp_N.double(), distance, self.shards.total, logp_N.dtype)
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


def derivative(
    near: Pair,
    far: Pair,
    logp_N: torch.Tensor,
    distance: float,
    total: Callable[[float], float] = float,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The derivative at 0, and by how much it is off at most in 999 of 1000 values.

    Args:
        near, far: (distance, values) up and down the line, at once and twice the distance; what the weights really
            moved by once they were rounded, which for steps of one size everywhere, as Adam's, is not what was asked.
        logp_N: The values at 0.
        distance (`float`): What was asked for.
        total (`Callable`, *optional*): The sum of a number over all processes.
        dtype (`torch.dtype`, *optional*): What the values were computed in.
    """
    slope_N, correction_N = _slope(near), (_slope(near) - _slope(far)) / 3
    fourth_N = far[0][1] + far[1][1] - 4 * (near[0][1] + near[1][1]) + 6 * logp_N
    own_N = fourth_N.square() / OF_FOURTH**2
    moved_N = sum((values_N - logp_N).abs() for _, values_N in (*near, *far))
    if total(float(moved_N.sum())):  # Values of few digits can agree by chance.
        own_N = own_N + (torch.finfo(dtype).eps * logp_N).square() / 12
    known_N = own_N.isfinite()
    count = int(total(float(known_N.sum())))
    mean = total(float(own_N[known_N].sum())) / max(count, 1)
    rounding_N = STUDENT_T[min(1 + count // 4, len(STUDENT_T))] * ((mean + own_N) / 2).sqrt()
    return slope_N + correction_N, correction_N.abs() + OF_SLOPE * rounding_N / distance


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
