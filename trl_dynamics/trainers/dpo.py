"""DPOTrainer: TRL's, with probe tracking, the gauge of the squeezing risk and interventions against it."""

import trl

from trl_dynamics.scoring.probes import find_probes
from trl_dynamics.trainers.config import DPOConfig
from trl_dynamics.trainers.influence.arguments import find_observed
from trl_dynamics.trainers.mixin import DynamicsMixin
from trl_dynamics.trainers.squeeze.interventions import SqueezeLoss, build_loss, squeeze_options


class DPOTrainer(DynamicsMixin, trl.DPOTrainer):
    """Drop-in replacement for [`trl.DPOTrainer`]; without a probe set and options of ours it does what that does.

    Args:
        model, ref_model, args, train_dataset, ...: As in [`trl.DPOTrainer`].
        probe_set ([`ProbeSet`], `str`, `datasets.Dataset` or `list[dict]`, *optional*): What to track; takes
            precedence over `args.probe_set`.
        akg_observe (as `probe_set`, *optional*): What `akg_every` observes; takes precedence over `args.akg_observe`.

    Raises:
        ValueError: If options of [`SqueezeArguments`] contradict each other or `loss_type`, before anything is loaded.
    """

    _tag_names = [*trl.DPOTrainer._tag_names, "trl-dynamics"]
    _squeeze_loss: SqueezeLoss | None = None

    def __init__(self, model, ref_model=None, args=None, *more, probe_set=None, akg_observe=None, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = DPOConfig(f"{name.split('/')[-1]}-DPO")
        options = squeeze_options(args)
        probe_set = find_probes(probe_set, args)
        observed = find_observed(akg_observe, probe_set, args)
        super().__init__(model, ref_model, args, *more, **kwargs)
        # Before the stats head, which passes other calls on to the forward that it finds.
        self._squeeze_loss = build_loss(self, options, tracked=probe_set is not None)
        self._start_tracking(probe_set, observed, "dpo")

    def _compute_loss(self, model, inputs, return_outputs):
        if self._squeeze_loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        return self._squeeze_loss(super()._compute_loss, model, inputs, return_outputs)
