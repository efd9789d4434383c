"""Adapters that PEFT saved: what they were trained on, putting them on it, and merging them into it."""

import json
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from trl_dynamics import places
from trl_dynamics.loading.files import (
    ADAPTER_CONFIG,
    CONFIG,
    MERGED_FROM,
    NotLoadable,
    and_more,
    find_adapter_config,
    find_file,
)

logger = logging.getLogger(__name__)

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# A checkpoint of FSDP has a pytorch_model_fsdp.bin as well, which is no model of its own.
_WHOLE_WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
# Adapters of these tasks were trained on other outputs than a causal language model's.
_OTHER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
# Second copies of matrices over the vocabulary, which PEFT writes where these were resized and trained as well.
_COPIES = re.compile(r"\.(modules_to_save|original_module|base_layer|token_adapter)\.")
_REMEDY = "save or copy the adapter again, or correct base_model_name_or_path"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder or hub name, PEFT's name for its kind, such as LORA, and the model it was trained on."""

    path: str
    kind: str
    base: str
    base_revision: str | None


def find_adapter(path: str, revision: str | None = None) -> Adapter | None:
    """What the adapter at a folder or hub name says of itself; None where there is a whole model.

    Raises:
        NotLoadable: If its config is damaged, its base cannot be found, it is for another task, or a whole model
            is in the same folder.
    """
    file = find_adapter_config(path, revision)
    if file is None:
        return None
    folder = Path(path)
    if folder.is_dir() and (whole := [found.name for glob in _WHOLE_WEIGHTS for found in folder.glob(glob)]):
        raise NotLoadable(
            f"{path!r} holds a whole model ({whole[0]}) and an adapter ({ADAPTER_CONFIG}), either of which may be "
            "meant; move one of them elsewhere"
        )
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        base, kind = config["base_model_name_or_path"], config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotLoadable(f"{file} is no adapter's config ({error}); save or copy the adapter again") from error
    if config.get("task_type") in _OTHER_TASKS:
        raise NotLoadable(
            f"{path!r} is an adapter for {config['task_type']}; expected one of a causal language model (CAUSAL_LM)"
        )
    if not base:
        raise NotLoadable(f"{file} names no base model; write its folder or hub name into base_model_name_or_path")
    return Adapter(path, kind, _find_base(base, path), config.get("revision"))


def weights_file(path: str, revision: str | None = None) -> str:
    """Where the weights of the adapter at a folder or hub name are on this machine.

    Raises:
        NotLoadable: If it has none.
    """
    files = (find_file(path, name, revision) for name in WEIGHTS)
    if found := next((file for file in files if file is not None), None):
        return found
    raise NotLoadable(f"adapter {path!r} has no weights; expected {' or '.join(WEIGHTS)} there; {_REMEDY}")


def _find_base(base: str, path: str) -> str:
    """The base as named; a relative path may also be meant from a folder above the adapter's, and a model that was
    merged for a run moves with that run's folder."""
    if Path(base).is_dir():
        return base
    if Path(path).is_dir():
        folder = Path(path).resolve()
        named = [] if Path(base).is_absolute() else [above / base for above in folder.parents]
        found = [place for place in named if any((place / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))]
        merged_near = [above / Path(base).name for above in (folder, *folder.parents)]
        found += [place for place in merged_near if (place / MERGED_FROM).is_file()]
        if found:
            logger.info(f"{path}: its base {base!r} is taken from {found[0]}")
            return str(found[0])
    try:
        places.refuse_missing(base, "its base model", "a folder with a model, or a hub name")
    except ValueError as error:
        remedy = f"correct base_model_name_or_path in {Path(path) / ADAPTER_CONFIG}"
        raise NotLoadable(f"adapter {path!r} cannot be loaded: {error}; {remedy}") from error
    return base


def put_on(base: PreTrainedModel, adapter: Adapter, revision: str | None, trainable: bool) -> PreTrainedModel:
    """The base with the adapter on it, every weight of which has its place there.

    Args:
        base (`PreTrainedModel`): Grows to the adapter's vocabulary.
        adapter ([`Adapter`]): What to put on it.
        revision (`str`, *optional*): Of the adapter on the hub.
        trainable (`bool`): Whether the adapter's weights require gradients.

    Raises:
        NotLoadable: If weights are missing, do not fit, or cannot be trained.
    """
    from peft import PeftConfig, PeftModel

    shapes = _shapes(adapter.path, revision)
    config = PeftConfig.from_pretrained(adapter.path, revision=revision)
    if config.is_prompt_learning and trainable:
        raise NotLoadable(
            f"{adapter.path!r} is a learned prompt ({adapter.kind}), which PEFT does not train on once it is loaded; "
            "expected a model, or an adapter of its weights such as LoRA"
        )
    config.inference_mode = not trainable
    options = {"is_trainable": trainable, "revision": revision}
    # New rows and weights are drawn before the saved ones take their place.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        _grow(base, adapter, shapes)
        model = PeftModel.from_pretrained(base, adapter.path, config=config, **options)
        if "forward" in vars(model.base_model):
            # Adaption prompts keep the base's forward as it was, and so would pass by one that replaces it later.
            model.base_model.forward = lambda *args, **kwargs: base(*args, **kwargs)
        found = model.load_adapter(adapter.path, model.active_adapter, **options)
    spare = [] if config.is_prompt_learning else [name for name in found.unexpected_keys if not _COPIES.search(name)]
    if found.missing_keys:
        raise NotLoadable(
            f"adapter {adapter.path!r} has no weights for {found.missing_keys[0]!r}{and_more(found.missing_keys)}, "
            f"which would be random; {_REMEDY}"
        )
    if spare:
        raise NotLoadable(
            f"adapter {adapter.path!r} does not fit its base {adapter.base!r}, which has no place for {spare[0]!r}"
            f"{and_more(spare)}; {_REMEDY}"
        )
    return model


def _grow(base: PreTrainedModel, adapter: Adapter, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the base as many tokens as the adapter was trained with."""
    matrices = {base.get_input_embeddings(), base.get_output_embeddings()}
    names = [name for name, module in base.named_modules() if module in matrices]
    saved = re.compile(rf"(^|\.)({'|'.join(map(re.escape, names))})\.({_COPIES.pattern[2:-2]}\.)*weight$")
    rows = {shape[0] for name, shape in shapes.items() if len(shape) == 2 and saved.search(name)}
    if len(rows) > 1:
        raise NotLoadable(
            f"adapter {adapter.path!r} has vocabularies of {sorted(rows)} tokens for embeddings and head; expected one"
        )
    if rows and rows != {base.get_input_embeddings().weight.shape[0]}:
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _shapes(path: str, revision: str | None) -> dict[str, tuple[int, ...]]:
    """Shape of each weight in the adapter's file."""
    file = weights_file(path, revision)
    if file.endswith(".bin"):
        weights = torch.load(file, map_location="meta", weights_only=True)
        return {name: tuple(weight.shape) for name, weight in weights.items()}
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}


def merged(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The base of an adapted model with the adapter in its weights: a whole model, to be saved and loaded as such.

    Embeddings and head stay tied unless the adapter moved them apart.

    Args:
        model (`PeftModel`): As `load_causal_lm` returns it; its weights change.
        path (`str`): The adapter, for errors.

    Raises:
        NotLoadable: If the adapter is none that weights can take in, such as a learned prompt.
    """
    kind = next(iter(model.peft_config.values())).peft_type
    kind = getattr(kind, "value", kind)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise NotLoadable(
            f"{path!r} is an adapter ({kind}) that cannot be merged into its base; expected a model, or an adapter "
            "of its weights such as LoRA"
        )
    tied = model.get_base_model().config.get_text_config().tie_word_embeddings
    _untie(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        try:
            whole = model.merge_and_unload(safe_merge=True)
        except NotImplementedError as error:
            raise NotLoadable(f"{path!r} is an adapter ({kind}) that PEFT cannot merge into its base") from error
    inside, head = whole.get_input_embeddings().weight, whole.get_output_embeddings().weight
    tied = tied and inside.shape == head.shape and torch.equal(inside, head)
    whole.config.tie_word_embeddings = whole.config.get_text_config().tie_word_embeddings = tied
    if tied:
        whole.tie_weights()
    return whole


def _untie(model: PreTrainedModel) -> None:
    """Give every module weights of its own: what is merged into a tied head must not reach the embeddings."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                own = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                module.register_parameter(name, own)
            seen.add(id(parameter))
