"""What akg refuses, before anything is computed: weights in pieces, other heads, batches that a model misreads.

B rows   T tokens   N labelled positions   V labels
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from trl_dynamics.compat import base_causal_lm, is_in_pieces
from trl_dynamics.stats_head.check import Precision, same_log_probs
from trl_dynamics.stats_head.forward import own_logits
from trl_dynamics.stats_head.ways import num_labels_of

# Tokens of the row on which a model's own log-probabilities are compared with those of its head.
_NUM_CHECKED = 32


def refuse_split(model: nn.Module) -> None:
    """Refuse weights that lie in pieces on several processes.

    Raises:
        ValueError: If there are any.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "the weights are split over processes by FSDP1 (FullyShardedDataParallel), which computes with flat "
            "copies that forward mode and the hooks of gram do not see; load the whole model on each process, "
            "before it is wrapped, or shard it with FSDP2 (fsdp_version: 2) and use akg.split.differences"
        )
    if any(isinstance(parameter, DTensor) or is_in_pieces(parameter) for parameter in model.parameters()):
        raise ValueError(
            "the weights are split over processes (tensor parallelism, FSDP2 or ZeRO-3), where forward mode and the "
            "hooks of gram cannot run; load the whole model on each, without tp_plan and before it is sharded, or use "
            "akg.split.differences with the pieces of akg.split.fsdp or akg.split.zero"
        )


def check_batch(batch: Any) -> None:
    """Refuse what is no batch of a causal LM.

    Raises:
        ValueError: If it is no mapping, lacks `input_ids` or `labels`, or they differ in shape.
    """
    names = ("input_ids", "labels")
    if not isinstance(batch, Mapping) or not all(isinstance(batch.get(name), torch.Tensor) for name in names):
        what = sorted(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ValueError(f"the batch has {what}, expected a mapping with input_ids and labels, tensors (B, T)")
    shapes = [tuple(batch[name].shape) for name in names]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        raise ValueError(f"input_ids has shape {shapes[0]} and labels {shapes[1]}, expected the same (B, T)")


def refuse_outside(ids: torch.Tensor, size: int, what: str, remedy: str) -> None:
    """Refuse ids that are not from 0 to `size` - 1.

    Raises:
        ValueError: If there are any; `what` names the ids and `remedy` says what to do.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"{what} are from {int(ids.min())} to {int(ids.max())}, expected 0 to {size - 1}, {remedy}")


def refuse_padding(base: nn.Module, batch: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse rows that begin with padding, where no `attention_mask` says so: it would be read as text.

    Raises:
        ValueError: If there are any; `what` names the batch.
    """
    ids_BT, (pad, ends) = batch["input_ids"], padding_of(base)
    if pad is None or "attention_mask" in batch:
        return
    # A text may begin with one token of those that begin or end texts, but not with two.
    padded_B = (ids_BT[:, : 2 if pad in ends else 1] == pad).all(dim=1)
    if bool(padded_B.any()):
        raise ValueError(
            f"{what}: {int(padded_B.sum())} of {len(ids_BT)} rows begin with padding (token {pad}) and there is no "
            "attention_mask, so that it would be read as text; add the attention_mask, or pad at the right"
        )


def padding_of(base: nn.Module) -> tuple[int | None, set[int]]:
    """The token that a model's configuration says is padding, and those that begin and end texts."""
    config = base.config.get_text_config()
    values = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos")]
    ends = {token for value in values for token in (value if isinstance(value, list) else [value])}
    return getattr(config, "pad_token_id", None), ends - {None}


def check_head(model: nn.Module, logits: Callable[[nn.Module, Any], Iterable[torch.Tensor]]) -> None:
    """Refuse models whose log-probabilities are not what their output embeddings make of their last hidden states.

    Args:
        model (`nn.Module`): A causal LM.
        logits (`Callable`): Gives tiles (n, V) of what the embeddings make of them, from the model and a batch.

    Raises:
        ValueError: If it is one.
    """
    head = base_causal_lm(model).get_output_embeddings()
    ids_BT = torch.arange(1, 1 + _NUM_CHECKED)[None] * 7919 % num_labels_of(base_causal_lm(model), head)
    ids_BT = ids_BT.to(next(model.parameters()).device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            own = own_logits(base_causal_lm(model), model, input_ids=ids_BT)[0, :-1]
            ours = torch.cat(list(logits(model, {"input_ids": ids_BT, "labels": ids_BT})))
        same = same_log_probs(own, ours, half=Precision.of_weights(model).half)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError):  # no last hidden states, or none of the size that the embeddings take
        same = False
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not same:
        raise ValueError(
            f"{type(base_causal_lm(model)).__name__} does more than its output embeddings to its last hidden states, "
            "so that akg.task.causal_lm would observe another model; make a Task with functions of your own"
        )
