"""Training that starts from an adapter: merged into its base once, as a whole model inside the run's folder."""

import hashlib
import json
import logging
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainingArguments

from trl_dynamics import loading
from trl_dynamics.compat import without_zero3
from trl_dynamics.errors import first_line
from trl_dynamics.probing.io import complete_folder
from trl_dynamics.scoring.processes import on_main

logger = logging.getLogger(__name__)


def whole_model(path: str, args: TrainingArguments, *, dtype: object, revision: str | None) -> str:
    """The folder or hub name of a whole model to train from: `path` itself, or what its adapter makes of its base.

    The merged model stays in the run's folder: the reference of DPO and the base of a new adapter are loaded from it.
    Its folder is named after what it was made of, so that a call that resumes takes it, and another adapter never
    takes its place.

    Args:
        path (`str`): Folder or hub name of a model or an adapter.
        args (`TrainingArguments`): Gives the run's folder, and whether code that comes with the model may run.
        dtype (`str` or `torch.dtype`, *optional*): What training loads the weights in; the merged ones are computed
            and saved in it.
        revision (`str`, *optional*): Of `path` on the hub.

    Raises:
        NotLoadable: If it is no causal language model, weights are missing, or the adapter cannot be merged.
        ValueError: If the merged model cannot be written, or another machine does not see it.
    """
    hub = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    adapter = on_main(lambda: loading.find_adapter(path, revision))
    if adapter is None:
        loading.require_whole(path, **hub)
        return path
    folder = on_main(lambda: _merge(adapter, Path(args.output_dir), dtype, hub))
    PartialState().wait_for_everyone()
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not seen by every machine; choose an output_dir that all of them share")
    return str(folder)


def _merge(adapter: loading.Adapter, output_dir: Path, dtype: object, hub: dict) -> Path:
    source = {
        "adapter_sha256": _sha256(loading.weights_file(adapter.path, hub["revision"])),
        "adapter_config_sha256": _sha256(loading.find_adapter_config(adapter.path, hub["revision"])),
        "base": adapter.base,
        "base_revision": adapter.base_revision,
        "dtype": str(dtype).removeprefix("torch."),
    }
    folder = output_dir / f"_merged_{hashlib.sha256(json.dumps(source).encode()).hexdigest()[:8]}"
    said = f"{adapter.path} is an adapter ({adapter.kind}), merged into its base {adapter.base}"
    if not (folder / loading.MERGED_FROM).is_file():
        tokenizer = loading.load_tokenizer(adapter.path, **hub)
        with without_zero3():
            model = loading.load_causal_lm(adapter.path, dtype=dtype, **hub)
            model = loading.merged(model, adapter.path)
        try:
            with complete_folder(folder) as part:
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
                text = json.dumps({"adapter": adapter.path} | source, indent=2)
                (part / loading.MERGED_FROM).write_text(f"{text}\n", encoding="utf-8")
        except SafetensorError as error:  # such as of a full disk, which names a temporary file or none
            raise ValueError(f"the merged model cannot be written to {str(folder)!r}: {first_line(error)}") from error
    logger.info(f"{said}: training starts from {folder}")
    return folder


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
