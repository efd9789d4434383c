"""Causal language models with their tokenizers and configs; an adapter's come from its base where it has none."""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_dynamics.compat import without_zero3
from trl_dynamics.loading.adapters import Adapter, find_adapter, merged, put_on
from trl_dynamics.loading.files import NotLoadable, and_more, find_file, naming, require_model

_OTHER_HEADS = re.compile(r"For(Sequence|Token|Audio|Image)Classification$|ForQuestionAnswering$|ForMultipleChoice$")
_TOKENIZER_REMEDY = "save one there with tokenizer.save_pretrained, or copy the files of the base model's"

T = TypeVar("T")


def load_causal_lm(
    path: str,
    *,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    trainable: bool = False,
) -> PreTrainedModel:
    """The causal language model at a folder or hub name, in eval mode on the CPU.

    An adapter is put on its base unmerged, as a `PeftModel`: the forward is that of training.

    Args:
        path (`str`): Folder or hub name of a model or an adapter.
        dtype (`str` or `torch.dtype`, *optional*): Of the model's weights; `"auto"` takes that of the file.
        attn_implementation (`str`, *optional*): As in `from_pretrained`.
        revision (`str`, *optional*): Branch, tag or commit of `path` on the hub.
        trust_remote_code (`bool`, *optional*): Run code that comes with the model.
        trainable (`bool`, *optional*): Let an adapter's own weights require gradients, and no others. A whole model's
            weights always do.

    Raises:
        NotLoadable: If it is no causal language model, or a file or a weight of it is missing or damaged.
    """
    with naming(path):
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise NotLoadable(
                f"model {path!r} cannot be loaded: dtype is {dtype!r}, expected auto, float32, bfloat16 or float16"
            )
        adapter = find_adapter(path, revision)
        options = {"trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation, "dtype": dtype}
        if adapter is None:
            return _load_whole(path, revision, options).eval()
        base = _of_base(adapter, lambda name, commit: load_causal_lm(name, revision=commit, **options))
        if hasattr(base, "peft_config"):
            base = merged(base, adapter.base)
        return put_on(base, adapter, revision, trainable).eval()


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; an adapter without one has its base's.

    Raises:
        NotLoadable: If there is none, or its files are damaged.
    """
    options = {"trust_remote_code": trust_remote_code}
    with naming(path):
        adapter = find_adapter(path, revision)
        if adapter is not None and find_file(path, "tokenizer_config.json", revision) is None:
            return _of_base(adapter, lambda name, commit: load_tokenizer(name, revision=commit, **options))
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", **options)
        except json.JSONDecodeError as error:
            raise NotLoadable(f"the tokenizer of {path!r} is damaged ({error}); {_TOKENIZER_REMEDY}") from error
        except ValueError as error:
            if "instantiate the backend tokenizer" not in str(error):
                raise
            raise NotLoadable(f"{path!r} holds no tokenizer; {_TOKENIZER_REMEDY}") from error
        # Without files, some classes make a tokenizer that knows its special tokens only and reads no text at all.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise NotLoadable(f"{path!r} holds no tokenizer; {_TOKENIZER_REMEDY}")
        return tokenizer


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model, or of an adapter's base.

    Raises:
        NotLoadable: If there is none, or it is damaged.
    """
    options = {"trust_remote_code": trust_remote_code}
    with naming(path):
        adapter = find_adapter(path, revision)
        if adapter is not None:
            return _of_base(adapter, lambda name, commit: load_config(name, revision=commit, **options))
        require_model(path)
        return AutoConfig.from_pretrained(path, revision=revision or "main", **options)


def context_length(path: str, *, trust_remote_code: bool = False) -> int | None:
    """How many tokens the model can take, by its config; None if it does not say."""
    config = load_config(path, trust_remote_code=trust_remote_code).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def end_ids(path: str) -> list[int]:
    """Token ids that end a turn by the generation config of the model, or of an adapter's base.

    Raises:
        NotLoadable: If that file is damaged.
    """
    with naming(path):
        adapter = find_adapter(path)
        if find_file(path, "generation_config.json") is None:
            return [] if adapter is None else _of_base(adapter, lambda name, commit: end_ids(name))
        ends = GenerationConfig.from_pretrained(path).eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]


def require_causal_lm(path: str, *, trust_remote_code: bool = False) -> None:
    """Refuse what is no causal language model by its config, without a look at its weights.

    Raises:
        NotLoadable: Says what it is.
    """
    with naming(path):
        _require_causal_lm(load_config(path, trust_remote_code=trust_remote_code), path)


def require_whole(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Refuse a whole model that TRL would load with weights made up; reads their names and shapes alone.

    Raises:
        NotLoadable: If it is no causal language model, or a weight is missing or of another shape.
    """
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with naming(path), without_zero3(), _quiet_report():
        config = load_config(path, **options)
        _require_causal_lm(config, path)
        # The class that TRL takes.
        kind = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
        model, found = kind.from_pretrained(
            path, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        _refuse_gaps(found, path)
        if model.get_output_embeddings() is None:
            raise NotLoadable(
                f"{path!r} is a {type(model).__name__}, which has no language model's head; expected a causal "
                "language model"
            )


def _of_base(adapter: Adapter, load: Callable[[str, str | None], T]) -> T:
    """What `load` returns for an adapter's base; its errors say whose base it is."""
    try:
        return load(adapter.base, adapter.base_revision)
    except NotLoadable as error:
        raise NotLoadable(f"the base of adapter {adapter.path!r}: {error}") from error


def _load_whole(path: str, revision: str | None, options: dict) -> PreTrainedModel:
    """A whole model, no weight of which is left to chance."""
    _require_causal_lm(load_config(path, revision=revision, trust_remote_code=options["trust_remote_code"]), path)
    given = {name: value for name, value in options.items() if value is not None}
    with _quiet_report():
        model, found = AutoModelForCausalLM.from_pretrained(
            path, revision=revision or "main", output_loading_info=True, ignore_mismatched_sizes=True, **given
        )
    _refuse_gaps(found, path)
    return model


def _require_causal_lm(config: PreTrainedConfig, path: str) -> None:
    kind = (getattr(config, "architectures", None) or [f"model of type {config.model_type}"])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise NotLoadable(
            f"{path!r} is an encoder-decoder ({kind}), of which the decoder alone would be scored; expected a causal "
            "language model"
        )
    if _OTHER_HEADS.search(kind):
        raise NotLoadable(
            f"{path!r} is a {kind}, which has no language model's head; expected a causal language model"
        )


def _refuse_gaps(found: dict, path: str) -> None:
    """Refuse a model of which `from_pretrained` had to make up weights."""
    missing, misfits = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    remedy = "save the whole model again, or correct its config.json"
    if missing:
        raise NotLoadable(
            f"{path!r} has no weights for {missing[0]!r}{and_more(missing)}, which would be random; {remedy}"
        )
    if misfits:
        name, file, model = misfits[0]
        raise NotLoadable(
            f"{path!r}: the weights {name!r}{and_more(misfits)} have the shape {tuple(file)}, expected {tuple(model)} "
            f"by the config; {remedy}"
        )


@contextlib.contextmanager
def _quiet_report() -> Iterator[None]:
    """Leave out the table of missing weights that transformers logs: they are refused, in one line."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or not ("MISSING" in text or "MISMATCH" in text)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
