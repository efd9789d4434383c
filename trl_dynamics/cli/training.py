"""What `trl-dynamics sft|dpo` and scripts/train_*.py share: arguments, data, the run, the launch on many processes."""

import difflib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import trl
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoTokenizer

from trl_dynamics import embedded
from trl_dynamics.tracking.run import changed_fields
from trl_dynamics.trainers.data import check_answers, limit_prompts

# As model, dataset or probe set: what this package ships, so that a run needs neither files nor a hub.
EMBEDDED = "embedded"
EMBEDDED_ROWS, EMBEDDED_PROBES = 200, 40

_LOCAL_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class DynamicsScriptArguments(trl.ScriptArguments):
    """TRL's script arguments; `dataset_name` also takes a local .jsonl or .parquet file, a folder, or `embedded`."""

    dataset_num_rows: int | None = field(
        default=None, metadata={"help": "Train on the first so many rows only. None: all."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest training prompt in tokens; a longer one keeps its last tokens. Plain text only."},
    )
    drop_invalid_rows: bool = field(
        default=False, metadata={"help": "Drop training rows with a blank answer instead of stopping."}
    )


class TrainingCommand:
    """One trainer on the command line.

    Args:
        name (`str`): Command and module name.
        trainer_class, config_class: The trainer and its arguments.
    """

    def __init__(self, name: str, trainer_class: type, config_class: type):
        self.name, self.trainer_class, self.config_class = name, trainer_class, config_class

    def run(self, argv: list[str]) -> int:
        """Parse, then train here or hand over to `accelerate launch`.

        Raises:
            ValueError: If an argument or a key of the YAML file is unknown, or the data or model does not exist.
        """
        configs, launch_args = self.parse(argv)
        launched = "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
        if not launched and (launch_args or torch.cuda.device_count() > 1):
            return launch(self.name, launch_args, _without(argv, launch_args))
        self.train(*configs)
        return 0

    def parse(self, argv: list[str]) -> tuple[list, list[str]]:
        """Arguments of script, trainer, model and data mixture, and what is meant for `accelerate launch`."""
        types = (DynamicsScriptArguments, self.config_class, trl.ModelConfig, trl.DatasetMixtureConfig)
        parser = trl.TrlParser(types, prog=f"trl-dynamics {self.name}")
        *configs, from_yaml, from_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        known = {option for action in parser._actions for option in action.option_strings}
        launch_args = from_yaml + from_line
        _refuse_unknown(launch_args, known, self.name)
        return configs, launch_args

    def train(self, script_args, training_args, model_args, dataset_args, *, drop_callbacks: tuple[type, ...] = ()):
        """Load data and model, train, save; the same steps on every process. Returns the trainer."""
        probe_set = _resolve_embedded(script_args, training_args, model_args)
        _require_model(model_args.model_name_or_path)
        _require_writable(training_args.output_dir)
        _ = training_args.device  # sets up the processes, which logging needs, on the devices asked for
        training_args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "trust_remote_code": getattr(model_args, "trust_remote_code", False),
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(training_args.model_init_kwargs or {}),
        }
        splits = load_splits(script_args, dataset_args)
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
        train_dataset = self._prepare(splits[_split(splits, script_args.dataset_train_split)], script_args, tokenizer)
        eval_dataset = None
        if training_args.eval_strategy != "no":
            eval_split = _split(splits, script_args.dataset_test_split)
            eval_dataset = self._prepare(splits[eval_split], script_args, tokenizer)
        trainer = self.trainer_class(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=trl.get_quantization_config(model_args),
            peft_config=trl.get_peft_config(model_args),
            probe_set=probe_set,
        )
        for callback in drop_callbacks:
            trainer.remove_callback(callback)
        if trainer.probe_callback:
            trainer.probe_callback.config |= changed_fields(script_args, model_args, dataset_args)
        trainer.train(resume_from_checkpoint=_resume_from(training_args))
        trainer.save_model(training_args.output_dir)
        if training_args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
        if trainer.probe_callback and trainer.is_world_process_zero():
            print(f"records: {trainer.probe_callback.store.root}")
            print(f"page:    trl-dynamics report {training_args.output_dir} -o report.html")
        trainer.end()
        return trainer

    def _prepare(self, dataset, script_args, tokenizer):
        if script_args.dataset_num_rows is not None:
            dataset = dataset.take(script_args.dataset_num_rows)
        if isinstance(dataset, Dataset):
            _require_columns(dataset, self.name)
            dataset = check_answers(dataset, drop_invalid_rows=script_args.drop_invalid_rows)
        if script_args.max_prompt_length is not None:
            dataset = limit_prompts(dataset, tokenizer, script_args.max_prompt_length)
        return dataset


def load_splits(script_args, dataset_args):
    """The training data by split: a local file or folder, a hub dataset, or a mixture.

    Raises:
        ValueError: If neither or both of `dataset_name` and `datasets` are given, or a local path does not exist.
    """
    if bool(script_args.dataset_name) == bool(dataset_args.datasets):
        raise ValueError(
            "give exactly one of --dataset_name (a file, folder or hub dataset) and `datasets:` in the YAML"
        )
    if dataset_args.datasets:
        return trl.get_dataset(dataset_args)
    if script_args.dataset_name == EMBEDDED:
        rows = embedded.preference_rows(script_args.dataset_num_rows or EMBEDDED_ROWS)
        return DatasetDict({"train": Dataset.from_list(rows)})
    name, path = script_args.dataset_name, Path(script_args.dataset_name)
    streaming = script_args.dataset_streaming
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        loaded = load_from_disk(name)
        return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    if path.is_file():
        if path.suffix not in _LOCAL_KINDS:
            raise ValueError(f"dataset file {name!r} is of kind {path.suffix!r}; expected one of {list(_LOCAL_KINDS)}")
        return load_dataset(_LOCAL_KINDS[path.suffix], data_files=name, streaming=streaming)
    if not path.exists() and _looks_local(name):
        raise ValueError(
            f"dataset {name!r} does not exist; expected a .jsonl or .parquet file, a folder or a hub name"
        )
    return load_dataset(name, name=script_args.dataset_config, streaming=streaming)


def launch(name: str, launch_args: list[str], own_args: list[str]) -> int:
    """Start the command again on many processes; returns the exit status of `accelerate launch`."""
    arguments = ["--config_file" if arg == "--accelerate_config" else arg for arg in launch_args]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, "-m", f"trl_dynamics.cli.{name}"]
    return subprocess.run([*command, *own_args], check=False).returncode


def _refuse_unknown(launch_args: list[str], own_options: set[str], name: str) -> None:
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    known.add("--accelerate_config")
    for arg in launch_args:
        option = arg.split("=")[0]
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, sorted(own_options | known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"unknown option or YAML key {option.removeprefix('--')!r}{hint} (trl-dynamics {name} --help)"
            )


def _without(argv: list[str], taken: list[str]) -> list[str]:
    """`argv` without the subsequence `taken` of it; entries of `taken` that came from elsewhere are passed over."""
    left, rest = list(taken), []
    for arg in argv:
        if arg in left:
            left = left[left.index(arg) + 1 :]
        else:
            rest.append(arg)
    return rest


def _resolve_embedded(script_args, training_args, model_args):
    """Put the embedded model's folder in place of its name; returns the embedded probe set where it is asked for."""
    if model_args.model_name_or_path == EMBEDDED:
        model_args.model_name_or_path = embedded.model_path()
    if training_args.probe_set != EMBEDDED:
        return None
    return embedded.probe_set(training_args.probe_max_probes or EMBEDDED_PROBES)


def _require_model(name_or_path: str | None) -> None:
    if not name_or_path:
        raise ValueError("no model given: pass --model_name_or_path (a folder or a hub name)")
    if _looks_local(name_or_path) and not Path(name_or_path).is_dir():
        raise ValueError(f"model {name_or_path!r} does not exist; expected a folder with a model, or a hub name")


def _require_writable(output_dir: str) -> None:
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {output_dir!r}: {error.strerror}; choose another one") from error


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in _LOCAL_KINDS


def _require_columns(dataset: Dataset, name: str) -> None:
    columns = set(dataset.column_names)
    accepted = {
        "dpo": [{"chosen", "rejected"}],
        "sft": [
            {"messages"},
            {"text"},
            {"prompt", "completion"},
            {"chosen", "rejected"},
            {"conversations"},
            {"input_ids"},
        ],
    }[name]
    if not any(wanted <= columns for wanted in accepted):
        listed = " or ".join("+".join(sorted(wanted)) for wanted in accepted)
        raise ValueError(f"training data has the columns {sorted(columns)}; {name} needs {listed}")


def _split(splits, name: str) -> str:
    if name not in splits:
        raise ValueError(f"the data has no split {name!r}; found {list(splits)}")
    return name


def _resume_from(training_args) -> str | bool | None:
    value = training_args.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(value).lower(), value)
