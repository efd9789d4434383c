"""trl-dynamics sft: supervised fine-tuning with a tracked probe set."""

from datasets import Dataset
from transformers import Trainer, TrainingArguments

from trl_dynamics.cli.training import DynamicsScriptArguments, TrainingCommand
from trl_dynamics.trainers.data import check_answers


class SFTCommand(TrainingCommand):
    """SFT on the command line: only the columns that are trained on must not be blank."""

    def train(
        self, script_args: DynamicsScriptArguments, training_args: TrainingArguments, *configs, **options
    ) -> Trainer:
        """Load data and model, train, save; see [`TrainingCommand.train`]."""
        self._sft_on, self._text_field = training_args.sft_on, training_args.dataset_text_field
        return super().train(script_args, training_args, *configs, **options)

    def check_rows(self, dataset: Dataset, script_args: DynamicsScriptArguments) -> Dataset:
        """The rows to train on, refused or dropped where their completion, or an answer of their pair, is blank.

        Raises:
            ValueError: If neither TRL nor `sft_on` finds anything to train on in these columns, or a row is blank.
        """
        from trl_dynamics.trainers.sft_columns import first_row, has_answers, own_columns

        row = first_row(dataset)
        own = () if row is None else own_columns(row, self._text_field)
        if row is not None and not own and not has_answers(row):
            raise ValueError(
                f"training data has nothing to train on: in its first row, {_shown(row)}. sft needs text, messages, "
                "prompt+completion, prompt+chosen or chosen+rejected, as text or messages; a prompt without a "
                "completion or chosen is an error in TRL, whatever else there is"
            )
        columns = ("completion",) if own and self._sft_on is None else ("chosen", "rejected")
        return check_answers(dataset, columns=columns, drop_invalid_rows=script_args.drop_invalid_rows)


def _shown(row: dict) -> str:
    return ", ".join(f"{name} is {value!r:.40}" for name, value in sorted(row.items()))


def command() -> SFTCommand:
    """The command with its trainer and config."""
    from trl_dynamics.trainers.config import SFTConfig
    from trl_dynamics.trainers.sft import SFTTrainer

    return SFTCommand("sft", SFTTrainer, SFTConfig)


def run(argv: list[str]) -> int:
    """Train in this process, or through `accelerate launch` when launch options are given."""
    return command().run(argv)
