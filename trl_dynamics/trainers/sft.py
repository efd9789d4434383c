"""SFTTrainer: TRL's, with probe tracking, and preference data turned into SFT rows."""

import trl
from accelerate.logging import get_logger

from trl_dynamics.trainers.config import SFTConfig
from trl_dynamics.trainers.data import is_preference, preference_to_completion
from trl_dynamics.trainers.mixin import DynamicsMixin

logger = get_logger(__name__)


class SFTTrainer(DynamicsMixin, trl.SFTTrainer):
    """Drop-in replacement for [`trl.SFTTrainer`]; without a probe set and preference data it does what that does.

    Args:
        model, args, train_dataset, ...: As in [`trl.SFTTrainer`]. Rows with chosen and rejected answers are trained
            on as `args.sft_on` says.
        probe_set ([`ProbeSet`], `str`, `datasets.Dataset` or `list[dict]`, *optional*): What to track; takes
            precedence over `args.probe_set`.
    """

    _tag_names = [*trl.SFTTrainer._tag_names, "trl-dynamics"]

    def __init__(self, model, args=None, data_collator=None, train_dataset=None, *more, probe_set=None, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = SFTConfig(f"{name.split('/')[-1]}-SFT")
        self._sft_on = getattr(args, "sft_on", "chosen")
        if train_dataset is not None:
            train_dataset = self._as_completions(train_dataset, "train")
        super().__init__(model, args, data_collator, train_dataset, *more, **kwargs)
        self._start_tracking(probe_set, "sft")

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        dataset = self._as_completions(dataset, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _as_completions(self, dataset, dataset_name: str):
        if not is_preference(dataset):
            return dataset
        logger.info(f"{dataset_name} data holds preference pairs: training on sft_on={self._sft_on!r}")
        return preference_to_completion(dataset, self._sft_on)
