"""||K_ou||_F of every pair of rows: how strongly an update's logits are tied to an observer's, whatever the force.

O observers   U rows of the update   N, M their labelled positions   V labels   P parameters
"""

from typing import Any

import torch

from trl_dynamics.akg.gram.record import num_rows, rows_of
from trl_dynamics.akg.kernel import Kernel
from trl_dynamics.akg.task import Task


def block_norms(
    task: Task, update: Any, observe: Any, *, num_products: int | None = None, seed: int = 0
) -> torch.Tensor:
    """The Frobenius norm of K's block between each observer and each row of the update, (O, U) float64.

    Args:
        task ([`Task`]): What K is of.
        update, observe: Batches of the task.
        num_products (`int`, *optional*): Products with K per row of the side that has fewer rows; the relative
            standard deviation of a norm is at most about 1 / sqrt(2 `num_products`), as for a kernel of rank one.
            Default: exact, by all Jacobians, which hold (N + M) V P numbers: for few labels and small models.
        seed (`int`): Of the random vectors, which are the same for the same batches: norms at two checkpoints differ
            by what K does, hardly by the draw.

    Raises:
        ValueError: If there are no products to make.
    """
    if num_products is None:
        return _exact(task, update, observe)
    if num_products < 1:
        raise ValueError(f"num_products is {num_products}, expected at least 1")
    if num_rows(observe) < num_rows(update):
        return block_norms(task, observe, update, num_products=num_products, seed=seed).T
    rng = torch.Generator().manual_seed(seed)
    rows = [rows_of(update, slice(row, row + 1)) for row in range(num_rows(update))]
    return torch.stack([_sketched(Kernel(task, row, observe), num_products, rng) for row in rows], dim=1).sqrt()


def _sketched(kernel: Kernel, num_products: int, rng: torch.Generator) -> torch.Tensor:
    """(O,) means of ||K_o v||^2 over Gaussian v of the update's logits, each an unbiased estimate of ||K_o||_F^2."""
    square_N = torch.zeros(kernel.shape_o[0], dtype=torch.float64)
    for _ in range(num_products):
        vector_MV = torch.randn(kernel.shape_u, generator=rng, dtype=torch.float64).to(kernel.device, kernel.dtype)
        square_N += kernel.apply(vector_MV).double().square().sum(dim=1).cpu() / num_products
    return _by_row(square_N, kernel.task, kernel.observe)


def _exact(task: Task, update: Any, observe: Any) -> torch.Tensor:
    square_NM = Kernel(task, update, observe).exact().double().square().sum(dim=(1, 3)).cpu()
    return _by_row(_by_row(square_NM, task, observe).T, task, update).T.sqrt()


def _by_row(values_NX: torch.Tensor, task: Task, batch: Any) -> torch.Tensor:
    """Sums over the positions of each row of a batch."""
    zeros = values_NX.new_zeros(num_rows(batch), *values_NX.shape[1:])
    return zeros.index_add(0, task.items(batch).cpu(), values_NX)
