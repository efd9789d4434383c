"""Does the ranking of pairs by influence, or by the size of K, hold over training? The thesis rests on that it does.

    O observers   U rows of the update   N, M their labelled positions

AKG explains a run by the kernel of one moment as long as K keeps its order of pairs, whatever its size
(2509.19554; the "relative stability" assumed in arXiv 2407.10490).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from trl_dynamics.akg.block_norms import block_norms
from trl_dynamics.akg.gram.products import gram
from trl_dynamics.akg.task import Task, causal_lm, num_rows
from trl_dynamics.statistics import Stability, pair_sides, rank_stability

Measure = Callable[[Task, Any, Any], torch.Tensor]


def influence_measure(task: Task, update: Any, observe: Any) -> torch.Tensor:
    """(O, U) S of [`akg.gram.gram`] per pair of labels: A, K and G together, with its sign."""
    pairs_OU = label_pairs(task, update, observe)
    return gram(task, update, observe, check=False).total_OU / pairs_OU


def kernel_measure(num_products: int | None = None, seed: int = 0, **more: Any) -> Measure:
    """(O, U) root mean square, over pairs of labels, of the size ||K||_F of K between them: K alone.

    Args: as [`akg.block_norms.block_norms`].
    """

    def measure(task: Task, update: Any, observe: Any) -> torch.Tensor:
        pairs_OU = label_pairs(task, update, observe)
        return block_norms(task, update, observe, num_products=num_products, seed=seed, **more) / pairs_OU.sqrt()

    return measure


def label_pairs(task: Task, update: Any, observe: Any) -> torch.Tensor:
    """(O, U) how many pairs of labels two rows have; without it, a ranking is first of all one of lengths.

    Raises:
        ValueError: If a row has no label.
    """
    return torch.outer(_label_counts(task, observe, "observe"), _label_counts(task, update, "update"))


def _label_counts(task: Task, batch: Any, what: str) -> torch.Tensor:
    count_B = torch.bincount(task.items(batch).cpu(), minlength=num_rows(batch))
    if empty := (count_B == 0).nonzero()[:, 0].tolist():
        raise ValueError(
            f"row {empty[0]} of {what} has no labelled position, so no mean over its labels; leave it out"
        )
    return count_B.double()


def stability(
    checkpoints: Iterable[tuple[object, Task | nn.Module]],
    update: Any,
    observe: Any,
    measure: Measure = influence_measure,
    *,
    seed: int = 0,
) -> Stability:
    """Spearman's correlation, between every two checkpoints, of a fixed set of pairs ranked by a measure.

    Args:
        checkpoints (`Iterable`): Names, or steps, in order, and the task or causal LM at each; from a generator, one
            model is held at a time, and the same one may come again with other weights.
        update, observe: Batches of the task; all pairs of their rows count.
        measure (`Callable`): [`influence_measure`], a [`kernel_measure`], or your own, from a task and the two batches
            to (O, U) numbers.
        seed (`int`): Of the bootstrap, which draws observers and updates again.

    Raises:
        ValueError: If there are fewer than 2 checkpoints, or 3 pairs, or a row has no label.
    """
    found = {}
    for name, task in checkpoints:
        if name in found:
            raise ValueError(f"the checkpoint {name!r} comes twice; give each a name of its own")
        found[name] = measure(task if isinstance(task, Task) else causal_lm(task), update, observe)
    if not found:
        raise ValueError("there is no checkpoint, expected at least 2")
    return stability_of(found, seed=seed)


def stability_of(measured_OU: dict[object, torch.Tensor], *, seed: int = 0) -> Stability:
    """[`stability`] of what was measured already, by checkpoint; see there."""
    sides = pair_sides(next(iter(measured_OU.values())).shape)
    return rank_stability({name: one.flatten().numpy() for name, one in measured_OU.items()}, sides, seed=seed)
