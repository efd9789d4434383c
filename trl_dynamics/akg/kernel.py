"""The empirical neural tangent kernel K = J_o J_u^T between observers and updates, as an operator and by its size.

    N observed positions   U positions of the update   V outputs at each (labels, or features)   m products

K has (N V)^2-like many entries and is never formed but on small models; one product with it costs one backward through
the update and one forward-mode pass over the observers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_dynamics.akg.jvp import push_forward, refuse, reverse_jacobian
from trl_dynamics.akg.modes import evaluated
from trl_dynamics.akg.task import Task
from trl_dynamics.statistics import student_t


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, and how many products with K it took."""

    value: float
    low: float
    high: float
    num_products: int


class Kernel:
    """K between two batches of a task.

    Args:
        task ([`Task`]): Its `logits` are what K is of; a task whose `logits` yield features gives the kernel of
            features, which predicts how these move.
        update, observe: Batches of the task.
        moves (`Callable`, *optional*): `moves(name)` says which parameters count; default: all that can be trained.

    Raises:
        ValueError: If no parameter is left, or weights are quantised or split over processes.
    """

    def __init__(self, task: Task, update: Any, observe: Any, moves: Callable[[str], bool] = lambda name: True):
        refuse(task.model)
        self.task, self.update, self.observe = task, update, observe
        self.parameters = {name: p for name, p in task.trainable().items() if moves(name)}
        if not self.parameters:
            raise ValueError(f"no parameter of {len(task.trainable())} that can be trained counts: K would be zero")
        task.labels_of(update, "the update"), task.labels_of(observe, "what is observed")
        self.shape_u, self.shape_o = self._shape(update), self._shape(observe)
        self.num_products = 0

    def apply(self, vector_UV: torch.Tensor) -> torch.Tensor:
        """K v: what the observers' outputs do when the update's are pulled along v, (N, V)."""
        return self._product(self.update, vector_UV, self.observe)

    def apply_transposed(self, vector_NV: torch.Tensor) -> torch.Tensor:
        """K^T w, (U, V)."""
        return self._product(self.observe, vector_NV, self.update)

    def exact(self) -> torch.Tensor:
        """K itself, (N, V, U, V), by all Jacobians: for small models."""
        rows, columns = (self._jacobian(batch) for batch in (self.observe, self.update))
        return torch.einsum("nvp,ukp->nvuk", rows, columns)

    def frobenius(self, num_products: int = 48, seed: int = 0) -> Estimate:
        """||K||_F by a low-rank range and what is left beside it, with a 95 % interval.

        A third of the products finds the range Q of K from random vectors, a third gives ||Q^T K||_F^2 exactly, and
        the rest estimates ||(1 - Q Q^T) K||_F^2 from Gaussian vectors, the only part that is uncertain (the splitting
        of Hutch++, arXiv 2010.09649). Trained models' kernels are nearly of low rank, so little is left.

        The interval is too narrow for few products, since the spread of what is left is itself estimated from a third
        of them. In 400 draws of each of two matrices of size 60 (Wishart, and of eigenvalues 1 / k) it held the norm
        in 70 and 64 % at 6 products, 79 and 78 % at 9, 85 and 84 % at 12, 91 % at 18 and 94 % at 48.

        Args:
            num_products (`int`): At least 6.

        Raises:
            ValueError: If there are fewer.
        """
        if num_products < 6:
            raise ValueError(f"num_products is {num_products}, expected at least 6: two for each of three parts")
        rng, third = self._generator(seed), num_products // 3
        sketch = torch.stack([self.apply(self._gaussian(self.shape_u, rng)).flatten() for _ in range(third)], dim=-1)
        range_Q, _ = torch.linalg.qr(sketch)
        kept = sum(float(self.apply_transposed(q.view(self.shape_o)).square().sum()) for q in range_Q.T)
        left = []
        for _ in range(num_products - 2 * third):
            image = self.apply(self._gaussian(self.shape_u, rng)).flatten()
            left.append(float((image - range_Q @ (range_Q.T @ image)).square().sum()))
        return _root(kept, left, third + range_Q.shape[1] + len(left))

    def frobenius_plain(self, num_products: int = 48, seed: int = 0) -> Estimate:
        """||K||_F by Gaussian vectors alone: what [`frobenius`] is better than."""
        rng = self._generator(seed)
        left = [float(self.apply(self._gaussian(self.shape_u, rng)).square().sum()) for _ in range(num_products)]
        return _root(0.0, left, num_products)

    def trace(self, num_products: int = 48, seed: int = 0) -> Estimate:
        """tr K with a 95 % interval, by the same splitting; observers and updates must be equally many.

        Raises:
            ValueError: If they are not, or there are fewer than 6 products.
        """
        if self.shape_u != self.shape_o:
            raise ValueError(f"the trace needs equally many positions, got {self.shape_o[0]} and {self.shape_u[0]}")
        if num_products < 6:
            raise ValueError(f"num_products is {num_products}, expected at least 6: two for each of three parts")
        rng, third = self._generator(seed), num_products // 3
        sketch = torch.stack([self.apply(self._gaussian(self.shape_u, rng)).flatten() for _ in range(third)], dim=-1)
        range_Q, _ = torch.linalg.qr(sketch)
        kept = sum(float(q @ self.apply(q.view(self.shape_u)).flatten()) for q in range_Q.T)
        left = []
        for _ in range(num_products - 2 * third):
            probe = self._gaussian(self.shape_u, rng).flatten()
            probe = probe - range_Q @ (range_Q.T @ probe)
            left.append(float(probe @ self.apply(probe.view(self.shape_u)).flatten()))
        mean, error = _mean(left), _standard_error(left)
        width = student_t(len(left) - 1) * error
        made = third + range_Q.shape[1] + len(left)
        return Estimate(kept + mean, kept + mean - width, kept + mean + width, made)

    def _product(self, source: Any, vector: torch.Tensor, target: Any) -> torch.Tensor:
        self.num_products += 1
        pulled = reverse_jacobian(self.task, self.parameters, source, vector)
        tiles: list[torch.Tensor] = []
        push_forward(self.task, pulled, target, lambda logits, first, second: tiles.append(first))
        return torch.cat(tiles)

    def _jacobian(self, batch: Any) -> torch.Tensor:
        """(positions, V, P), one backward per output."""
        with evaluated(self.task.model), torch.enable_grad():
            outputs = torch.cat(list(self.task.logits(self.task.model, batch)))
            rows = []
            for output in outputs.flatten():
                found = torch.autograd.grad(
                    output, list(self.parameters.values()), retain_graph=True, materialize_grads=True
                )
                rows.append(torch.cat([gradient.flatten() for gradient in found]))
        return torch.stack(rows).view(*outputs.shape, -1)

    def _shape(self, batch: Any) -> tuple[int, int]:
        with torch.no_grad(), evaluated(self.task.model):
            tiles = list(self.task.logits(self.task.model, batch))
        self.dtype, self.device = tiles[0].dtype, tiles[0].device
        return sum(map(len, tiles)), tiles[0].shape[-1]

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(seed)

    def _gaussian(self, shape: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=self.dtype, device=self.device)


def _root(kept: float, left: list[float], num_products: int) -> Estimate:
    """The root of `kept` plus the mean of `left`, whose law is taken for a multiple of chi squared.

    A sum of squares of Gaussians is close to one (Satterthwaite), and lopsided where few of them count.
    """
    mean, error = _mean(left), _standard_error(left)
    if not error:
        value = (kept + mean) ** 0.5
        return Estimate(value, value, value, num_products)
    freedom = 2 * (mean / error) ** 2
    low, high = (mean * freedom / chi_squared(level, freedom) for level in (0.975, 0.025))
    return Estimate((kept + mean) ** 0.5, (kept + low) ** 0.5, (kept + high) ** 0.5, num_products)


def chi_squared(level: float, freedom: float) -> float:
    """The quantile of chi squared at `level`, by bisection of the incomplete gamma function."""
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    low, high = 0.0, freedom + 40 * (freedom + 1) ** 0.5 + 40
    for _ in range(80):
        middle = (low + high) / 2
        below = torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64)) < level
        low, high = (middle, high) if below else (low, middle)
    return high


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std()) / len(values) ** 0.5
