"""What a finding is: its severity, its parts, and the remedies that several share."""

from dataclasses import dataclass, field

INFO, WARNING, ALERT = "info", "warning", "alert"
SEVERITIES = (ALERT, WARNING, INFO)

# What holds chosen up and keeps probability from being squeezed, per training method. For DPO: first what needs no
# option, then options by what they kept in recipes/dpo_squeezing/RESULTS.md.
REMEDIES = {
    "dpo": 'Stop earlier or lower the learning rate; hold chosen up (dpop_lambda, or loss_type=["sigmoid", "sft"]); '
    "damp the push on rejected tokens that are unlikely already (gate_dpo); use rejected answers that the model gives "
    'itself; or first run SFT on chosen and rejected together (sft_on="both", extended SFT).',
    "sft": "Stop earlier or lower the learning rate, and check that chosen is the kind of answer you train on.",
    "grpo": "Stop earlier, lower the learning rate or raise beta, and check what the reward pays for.",
    "track": "Use an earlier checkpoint, or train less, or at a lower learning rate.",
}


@dataclass(frozen=True)
class Finding:
    """One thing that the records of a run say.

    Args:
        name (`str`): Stable identifier, e.g. `squeezing`.
        severity (`str`): `info`, `warning` or `alert`.
        title (`str`): The finding in a few words.
        text (`str`): What happened, with numbers, in plain language.
        evidence (`dict[str, float]`): The numbers the rule looked at.
        rule (`str`): The exact rule with its thresholds.
        remedy (`str`): What to do.
    """

    name: str
    severity: str
    title: str
    text: str
    evidence: dict[str, float] = field(default_factory=dict)
    rule: str = ""
    remedy: str = ""
