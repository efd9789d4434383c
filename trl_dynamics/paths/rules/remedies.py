"""What to do about a run, where several findings share it."""

# What holds chosen up and keeps probability from being squeezed, per training method. For DPO: first what needs no
# option, then options by what they kept in recipes/dpo_squeezing/RESULTS.md.
_BY_METHOD = {
    "dpo": 'Stop earlier or lower the learning rate; hold chosen up (dpop_lambda, or loss_type=["sigmoid", "sft"]); '
    "damp the push on rejected tokens that are unlikely already (gate_dpo); use rejected answers that the model gives "
    'itself; or first run SFT on chosen and rejected together (sft_on="both", extended SFT).',
    "sft": "Stop earlier or lower the learning rate, and check that chosen is the kind of answer you train on.",
    "grpo": "Stop earlier, lower the learning rate or raise beta, and check what the reward pays for.",
    "track": "Use an earlier checkpoint, or train less, or at a lower learning rate.",
}


def remedy_of(method: str) -> str:
    """What to do in a training of this method."""
    return _BY_METHOD.get(method, _BY_METHOD["track"])
