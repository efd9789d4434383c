"""SFTTrainer: TRL's, with probe tracking, and preference data turned into SFT rows whose sides are told apart."""

import copy
import inspect

import torch
import trl
from accelerate.logging import get_logger
from torch import nn
from transformers.utils import ModelOutput

from trl_dynamics import compat
from trl_dynamics.scoring.probes import find_probes
from trl_dynamics.trainers.config import SFTConfig
from trl_dynamics.trainers.data import column_names, preference_to_completion, sides_of
from trl_dynamics.trainers.influence.arguments import find_observed
from trl_dynamics.trainers.mixin import DynamicsMixin
from trl_dynamics.trainers.recorder import Recorder
from trl_dynamics.trainers.sft_columns import first_row, has_answers, left_over_columns, own_columns
from trl_dynamics.trainers.sides import LABEL_ROW, LABEL_SIDE, SIDE_COLUMN, SideCollator, mark_labels, side_sums

logger = get_logger(__name__)


class SFTTrainer(DynamicsMixin, trl.SFTTrainer):
    """Drop-in replacement for [`trl.SFTTrainer`]; it trains on what that trains on.

    Data that TRL cannot train on but that has chosen answers is trained on these, with a warning; a value of
    `args.sft_on` says what to train on wherever rows have chosen answers. With two sides (`"both"`,
    `"chosen_and_other"`) the log has, for training and evaluation, `nll/chosen` and `nll/rejected` (or `nll/other`):
    the mean of -log p over the side's labels, in nats per token, whatever the loss; and `mean_token_accuracy/...`.
    Means are over all tokens since the last log line, or of the whole evaluation, and of all processes. With
    `completion_only_loss=False` the prompt's tokens are labels of both sides. Packing and padding-free batches keep
    the sides apart; context and sequence parallelism train, but log no sides.

    Args:
        model, args, train_dataset, ...: As in [`trl.SFTTrainer`]. With a `formatting_func` or
            `dataset_kwargs={"skip_prepare_dataset": True}`, rows are left to it.
        probe_set ([`ProbeSet`], `str`, `datasets.Dataset` or `list[dict]`, *optional*): What to track; takes
            precedence over `args.probe_set`.
        akg_observe (as `probe_set`, *optional*): What `akg_every` observes; takes precedence over `args.akg_observe`.

    Raises:
        ValueError: If `sft_on` cannot be had with `formatting_func` or with the data, or chosen answers are no text.
    """

    _tag_names = [*trl.SFTTrainer._tag_names, "trl-dynamics"]

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        *more,
        probe_set=None,
        akg_observe=None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = SFTConfig(f"{name.split('/')[-1]}-SFT")
        probe_set = find_probes(probe_set, args)
        observed = find_observed(akg_observe, probe_set, args)
        self._sft_on = getattr(args, "sft_on", None)
        self._sides = sides_of(self._sft_on or "chosen")
        self._side_sums: dict[str, torch.Tensor] = {}
        self._text_field = getattr(args, "dataset_text_field", "text")
        self._told_chosen = False
        given = inspect.signature(super().__init__).bind_partial(
            model, args, data_collator, train_dataset, *more, **kwargs
        )
        skips = bool((getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"))
        self._keeps_pairs = skips or given.arguments.get("formatting_func") is not None
        if self._keeps_pairs and self._sft_on is not None:
            raise ValueError(
                f"sft_on={self._sft_on!r} makes rows of preference pairs, but formatting_func or skip_prepare_dataset "
                "leaves no pairs to it; leave one of the two out"
            )
        self._made_rows = None
        if train_dataset is not None:
            train_dataset = self._made_rows = self._as_completions(train_dataset, "train")
        super().__init__(model, args, data_collator, train_dataset, *more, **kwargs)
        self._made_rows = None
        if self._sides:
            self.data_collator = SideCollator(self.data_collator)
        self._start_tracking(probe_set, observed, "sft")

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if dataset is not self._made_rows:
            dataset = self._as_completions(dataset, dataset_name)
        if self._sides and SIDE_COLUMN in column_names(dataset):
            # First to labels of whole rows; what cuts, packs and shuffles them comes after the sides are in them.
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            dataset = super()._prepare_dataset(dataset, processing_class, whole, False, None, dataset_name)
            dataset = mark_labels(dataset)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _as_completions(self, dataset, dataset_name: str):
        """The data with the columns that TRL is to train on; left to TRL where it refuses or has prepared it."""
        row = None if self._keeps_pairs else first_row(dataset)
        if row is None or SIDE_COLUMN in row:
            return dataset
        own = own_columns(row, self._text_field)
        if own and (self._sft_on is None or own == ("input_ids",)):
            if has_answers(row) and own != ("input_ids",):
                logger.info(f"{dataset_name} data: training on {'+'.join(own)}, as TRL does; sft_on trains on chosen")
            foreign = left_over_columns(row, own)
            return dataset.remove_columns(foreign) if foreign else dataset
        if has_answers(row):
            self._tell_chosen(dataset_name, row)
            return preference_to_completion(dataset, self._sft_on or "chosen")
        if "chosen" in row:
            raise ValueError(
                f"{dataset_name} data has nothing to train on: 'chosen' is {row['chosen']!r:.60} in the first row, "
                f"expected text or messages, and a prompt; found the columns {sorted(row)}"
            )
        if self._sft_on is not None:
            logger.warning(f"{dataset_name} data has no chosen answers: sft_on={self._sft_on!r} is idle")
        return dataset

    def _tell_chosen(self, dataset_name: str, row) -> None:
        if self._sft_on is not None:
            logger.info(f"{dataset_name} data holds chosen answers: rows are made as sft_on={self._sft_on!r} says")
        elif not self._told_chosen:
            self._told_chosen = True
            own = {self._text_field, "messages"} & set(row)
            why = f" Without the column prompt it would train on {', '.join(sorted(own))}." if own else ""
            logger.warning(
                f"{dataset_name} data has columns that TRL's SFTTrainer cannot train on ({', '.join(sorted(row))}): "
                f"training on the chosen answers.{why if 'prompt' in row else ''} sft_on='chosen' (--sft_on chosen) "
                "says so without this warning"
            )

    def compute_loss(
        self, model: nn.Module, inputs: dict, *args, **kwargs
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """TRL's loss; where labels have sides, their means go to the metrics."""
        side_BT, row_BT = inputs.pop(LABEL_SIDE, None), inputs.pop(LABEL_ROW, None)
        # Context and sequence parallelism hand out parts of sequences, with labels that are shifted already.
        if side_BT is None or "shift_labels" in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        recorder = Recorder(model)
        loss = super().compute_loss(recorder, inputs, *args, **kwargs)
        self._add_sides(recorder.output, side_BT[:, 1:], row_BT if row_BT is None else row_BT[:, 1:])
        return loss

    @torch.no_grad()
    def _add_sides(self, output: ModelOutput, side_BT: torch.Tensor, row_BT: torch.Tensor | None) -> None:
        # Learned prompts come before the row's own tokens.
        parts = (part.detach()[:, -side_BT.shape[1] :] for part in (output.log_probs, output.is_top1))
        sums_RS3 = side_sums(*parts, side_BT, row_BT, len(self._sides))
        mode = "train" if self.model.training else "eval"
        if mode == "eval" and self.accelerator.even_batches:
            # Rows that fill up the last batch of an evaluation are dropped; each process has as many of them.
            sums_S3 = self.accelerator.gather_for_metrics(sums_RS3).sum(0)
        else:
            sums_S3 = self.accelerator.reduce(sums_RS3.sum(0))
        sums_S3 = sums_S3.double().cpu()
        # TRL averages the values of a metric and forgets them at each log line; this one value is the average.
        if any(compat.waits_for_log(self, mode, f"nll/{side}") for side in self._sides):
            sums_S3 = sums_S3 + self._side_sums[mode]
        self._side_sums[mode] = sums_S3
        for side, (nll, num_top1, count) in zip(self._sides, sums_S3.tolist(), strict=True):
            if count:
                compat.log_metric(self, mode, f"nll/{side}", nll / count, replace=True)
                compat.log_metric(self, mode, f"mean_token_accuracy/{side}", num_top1 / count, replace=True)
