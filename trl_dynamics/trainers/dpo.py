"""DPOTrainer: TRL's, with probe tracking."""

import trl

from trl_dynamics.trainers.config import DPOConfig
from trl_dynamics.trainers.mixin import DynamicsMixin


class DPOTrainer(DynamicsMixin, trl.DPOTrainer):
    """Drop-in replacement for [`trl.DPOTrainer`]; without a probe set it does what that does.

    Args:
        model, ref_model, args, train_dataset, ...: As in [`trl.DPOTrainer`].
        probe_set ([`ProbeSet`], `str`, `datasets.Dataset` or `list[dict]`, *optional*): What to track; takes
            precedence over `args.probe_set`.
    """

    _tag_names = [*trl.DPOTrainer._tag_names, "trl-dynamics"]

    def __init__(self, model, ref_model=None, args=None, *more, probe_set=None, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = DPOConfig(f"{name.split('/')[-1]}-DPO")
        super().__init__(model, ref_model, args, *more, **kwargs)
        self._start_tracking(probe_set, "dpo")
