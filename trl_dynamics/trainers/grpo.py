"""GRPOTrainer: TRL's, with probe tracking."""

import trl

from trl_dynamics.scoring.probes import find_probes
from trl_dynamics.trainers.config import GRPOConfig
from trl_dynamics.trainers.influence.arguments import find_observed
from trl_dynamics.trainers.mixin import DynamicsMixin


class GRPOTrainer(DynamicsMixin, trl.GRPOTrainer):
    """Drop-in replacement for [`trl.GRPOTrainer`]; without a probe set it does what that does.

    Probes are scored at temperature 1 whatever the temperature of sampling, so that their numbers compare with those
    of SFT and DPO runs; no probe is generated from and none is rewarded.

    Args:
        model, reward_funcs, args, train_dataset, ...: As in [`trl.GRPOTrainer`].
        probe_set ([`ProbeSet`], `str`, `datasets.Dataset` or `list[dict]`, *optional*): What to track; takes
            precedence over `args.probe_set`.
        akg_observe (as `probe_set`, *optional*): What `akg_every` observes; takes precedence over `args.akg_observe`.
    """

    _tag_names = [*trl.GRPOTrainer._tag_names, "trl-dynamics"]

    def __init__(self, model, reward_funcs=None, args=None, *more, probe_set=None, akg_observe=None, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = GRPOConfig(f"{name.split('/')[-1]}-GRPO")
        probe_set = find_probes(probe_set, args)
        observed = find_observed(akg_observe, probe_set, args)
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self._start_tracking(probe_set, observed, "grpo")
        if self.store_keeper is not None:
            # TRL fills in both sizes of a generation and refuses a config that names both.
            self.store_keeper.config.pop("generation_batch_size", None)
