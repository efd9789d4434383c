"""What `trl-dynamics sft|dpo|grpo` and scripts/train_*.py share: arguments, then data, model, training, saving."""

from dataclasses import dataclass

import trl
from datasets import Dataset, DatasetDict
from transformers import Trainer, TrainingArguments

from trl_dynamics import loading
from trl_dynamics.cli import inputs, launching, merging, options, outputs, sources
from trl_dynamics.cli.options import option
from trl_dynamics.scoring.setup import changed_fields
from trl_dynamics.trainers.data import check_answers, limit_prompts


@dataclass
class DynamicsScriptArguments(trl.ScriptArguments):
    """TRL's script arguments; `dataset_name` also takes a local .jsonl or .parquet file, a folder, or `embedded`."""

    dataset_num_rows: int | None = option(None, "Train on the first so many rows only. None: all.")
    max_prompt_length: int | None = option(
        None, "Longest training prompt in tokens; a longer one keeps its last tokens. Plain text only."
    )
    drop_invalid_rows: bool = option(
        False, "Drop training rows with a blank answer (grpo: prompt) instead of stopping."
    )


class TrainingCommand:
    """One trainer on the command line.

    Args:
        name (`str`): Command and module name.
        trainer_class, config_class: The trainer and its arguments.

    A trainer with further needs has a subclass: `script_class` for more options, and the methods below.
    """

    script_class: type[DynamicsScriptArguments] = DynamicsScriptArguments

    def __init__(self, name: str, trainer_class: type, config_class: type):
        self.name, self.trainer_class, self.config_class = name, trainer_class, config_class

    def run(self, argv: list[str]) -> int:
        """Parse, then train here or hand over to `accelerate launch`.

        Raises:
            ValueError: If an argument or a key of the YAML file is unknown, or the data or model does not exist.
        """
        configs, launch_args = self.parse(argv)
        if launching.needs_launcher(launch_args):
            return launching.launch(self.name, launch_args, argv)
        with inputs.streaming(configs[0]):
            self.train(*configs)
        return 0

    def parse(self, argv: list[str]) -> tuple[list, list[str]]:
        """Arguments of script, trainer, model and data mixture, and what is meant for `accelerate launch`.

        Raises:
            ValueError: If an option is unknown, or options contradict each other or this machine.
        """
        types = (self.script_class, self.config_class, trl.ModelConfig, trl.DatasetMixtureConfig)
        parser = options.parser_of(types, self.name)
        try:
            *configs, from_yaml, from_line = options.parse(parser, argv, separate_remaining_strings=True)
        except ValueError as error:
            if "support bf16" not in str(error):
                raise
            message = "no GPU here computes in bf16, which is TRL's default: add --use_cpu True --bf16 False"
            raise ValueError(message) from error
        launch_args = from_yaml + from_line
        launching.refuse_unknown(launch_args, options.names_of(parser), self.name)
        return configs, launch_args

    def trainer_arguments(self, script_args: DynamicsScriptArguments) -> dict:
        """What the trainer takes beyond model, data and configs."""
        return {}

    def check_rows(self, dataset: Dataset, script_args: DynamicsScriptArguments) -> Dataset:
        """The rows to train on, refused or dropped where they are no use."""
        columns = ("chosen", "rejected")
        return check_answers(dataset, columns=columns, drop_invalid_rows=script_args.drop_invalid_rows)

    def train(
        self,
        script_args: DynamicsScriptArguments,
        training_args: TrainingArguments,
        model_args: trl.ModelConfig,
        dataset_args: trl.DatasetMixtureConfig,
        *,
        drop_callbacks: tuple[type, ...] = (),
    ) -> Trainer:
        """Load data and model, train, save; the same steps on every process. Returns the trainer."""
        given = changed_fields(script_args, model_args, dataset_args)
        model = sources.find_model(model_args.model_name_or_path)
        outputs.require_writable(training_args.output_dir)
        sources.require_template(getattr(training_args, "chat_template_path", None))
        outputs.require_reporters(training_args.report_to)
        resume_from = sources.find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
        more = self.trainer_arguments(script_args)
        _ = training_args.device  # sets up the processes, which logging needs, on the devices asked for
        training_args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "trust_remote_code": training_args.trust_remote_code,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(training_args.model_init_kwargs or {}),
        }
        types = training_args.probe_types
        probe_set = sources.find_probe_set(training_args.probe_set, training_args.probe_max_probes, types)
        observed = sources.find_probe_set(training_args.akg_observe, training_args.akg_max_probes, types)
        splits = inputs.load_splits(script_args, dataset_args)
        revision = model_args.model_revision
        tokenizer = loading.load_tokenizer(model, revision=revision, trust_remote_code=training_args.trust_remote_code)
        data = self._data(splits, script_args, training_args, tokenizer)
        dtype = training_args.model_init_kwargs["dtype"]
        model = merging.whole_model(model, training_args, dtype=dtype, revision=revision)
        trainer = self.trainer_class(
            model=model,
            args=training_args,
            quantization_config=trl.get_quantization_config(model_args),
            peft_config=trl.get_peft_config(model_args),
            probe_set=probe_set,
            akg_observe=observed,
            **data,
            **more,
        )
        for callback in drop_callbacks:
            trainer.remove_callback(callback)
        if trainer.store_keeper:
            trainer.store_keeper.config |= given
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_model(training_args.output_dir)
        if training_args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
        # A process that leaves while another still talks to it takes the whole launch down.
        trainer.accelerator.wait_for_everyone()
        trainer.end()
        return trainer

    def _data(self, splits: DatasetDict, script_args, training_args, tokenizer) -> dict[str, Dataset]:
        """The trainer's data sets: one to train on and, where training evaluates, one for that."""
        names = {"train_dataset": script_args.dataset_train_split}
        if training_args.eval_strategy != "no":
            names["eval_dataset"] = script_args.dataset_test_split
        return {
            given: self._prepare(inputs.take_split(splits, name), script_args, tokenizer)
            for given, name in names.items()
        }

    def _prepare(self, dataset, script_args, tokenizer):
        if script_args.dataset_num_rows is not None:
            dataset = dataset.take(script_args.dataset_num_rows)
        if isinstance(dataset, Dataset):
            inputs.require_columns(dataset, self.name)
            dataset = self.check_rows(dataset, script_args)
        if script_args.max_prompt_length is not None:
            dataset = limit_prompts(dataset, tokenizer, script_args.max_prompt_length)
        return dataset
