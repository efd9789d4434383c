"""What tells one scored series from another: the model, the precision, the probes and their batches."""

import hashlib
import json

from torch import nn

from trl_dynamics.compat import whole_shape
from trl_dynamics.store.identity import Same

_MODEL = "Keep the model and adapter options of the run"
# Entries of meta.json that must be the same after a resume.
SAME = (
    Same("model.architecture", "the model's architecture", "Keep the model of the run"),
    Same("model.num_parameters", "the number of parameters", _MODEL),
    Same("model.vocab_size", "the vocabulary's size", "Keep the model and tokenizer of the run"),
    Same("model.structure", "the shapes or dtypes of the parameters", _MODEL, shown=False),
    Same("model.dtype", "the weights' dtype", "Keep the dtype of the run"),
    Same("mixed_precision", "mixed precision", "Keep bf16/fp16 as in the run"),
    Same("probe_dtype", "probe_dtype", "Keep probe_dtype as in the run"),
)
SAME_PROBES = (
    Same(
        "probe_set.fingerprint",
        "the probe set",
        "Keep probe_max_probes and probe_subset as in the run, and pass the set in the store's probe_set/ folder",
        shown=False,
        causes=(
            "probe_set.metadata.selection.probe_max_probes",
            "probe_set.metadata.selection.probe_subset",
        ),
    ),
    Same("top_k", "probe_top_k", "Keep probe_top_k as in the run"),
    Same("samples.num_probes", "the number of prompts to answer", "Keep probe_samples as in the run, or leave it out"),
    Same("samples.max_new_tokens", "probe_sample_tokens", "Keep probe_sample_tokens as in the run"),
    Same(
        "samples.fingerprint", "the prompts to answer or what ends an answer", "Keep the tokenizer of the run", False
    ),
    Same(
        "batch_plan.fingerprint",
        "the probe batches",
        "Keep the tokenizer, probe_layout, probe_tokens_per_batch and the length limits of the run",
        shown=False,
    ),
)


def model_identity(model: nn.Module) -> dict:
    """What tells one model from another without looking at a weight, for meta.json.

    After a checkpoint the weights are the checkpoint's, whatever the model was started from. So another model is one
    of another architecture, vocabulary, dtype or shape; its name, which may be a path that moved, says nothing.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Not wrapped yet; parameters that ZeRO-3 shards count as whole.

    Returns:
        `dict`: architecture, dtype, vocab_size, num_parameters, and structure, a hash over the shapes and dtypes of
        all parameters in no order, since names change between versions of transformers.
    """
    parameters = list(model.parameters())
    shapes = [tuple(whole_shape(parameter)) for parameter in parameters]
    dtypes = [str(parameter.dtype).removeprefix("torch.") for parameter in parameters]
    rows = sorted([dtype, *shape] for dtype, shape in zip(dtypes, shapes, strict=True))
    config = model.config.get_text_config()
    return {
        "architecture": model.config.model_type,
        "dtype": dtypes[0],
        "vocab_size": getattr(config, "vocab_size", None),
        "num_parameters": sum(_product(shape) for shape in shapes),
        "structure": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
