"""Findings about who loses: chosen (displacement), others while chosen holds, or rejected alone."""

from trl_dynamics.tracking.aggregate import Summary
from trl_dynamics.tracking.degeneration import degeneration
from trl_dynamics.tracking.effects import (
    ALERT_EFFECT,
    COUNTS,
    MIN_BYSTANDER_FALL,
    MIN_EFFECT,
    MIN_PROBES,
    Changes,
    Effect,
    bystander_types,
    paraphrases_of_chosen,
)
from trl_dynamics.tracking.finding import ALERT, INFO, REMEDIES, WARNING, Finding
from trl_dynamics.tracking.metrics import PER_SEQUENCE

# A peak is the best of many steps: noise alone puts it about two standard errors above the rest.
PEAK_STANDARD_ERRORS = 4.0


def displacement(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """Chosen loses probability: below its start, or below a peak inside the run; others decide whether that harms."""
    peak = _peak_step(summary)
    if changes.chosen.down():
        window, since = changes, "its start"
    else:
        window, since = summary.changes(start=peak), f"its peak (against the start it stands at {changes.chosen})"
        if peak in (changes.start, changes.end) or not window.chosen.down(standard_errors=PEAK_STANDARD_ERRORS):
            return None
    paraphrases = paraphrases_of_chosen(summary.types)
    others = {"other fluent answers": window.bystanders, "paraphrases of chosen": window.of_types(paraphrases)}
    others = {label: effect for label, effect in others.items() if effect.known}
    broken = degeneration(summary, changes, method) is not None
    name, severity, title, meaning, remedy = _verdict(summary, window, others, broken, method)
    shown = {"rejected": window.rejected} | others if window.rejected.known else others
    numbers = "".join(f", {label} {effect}" for label, effect in shown.items())
    falling = window.falling(bystander_types(summary.types))
    alone = f" Types that fell by themselves: {', '.join(falling)}." if falling else ""
    best = f"Chosen was highest at step {peak}. " if severity != INFO and peak > changes.start else ""
    return Finding(
        name,
        severity,
        title,
        f"{meaning} From step {window.start} to {window.end} chosen moved {window.chosen} nats per token from "
        f"{since}{numbers}.{alone}",
        {
            "chosen_change": window.chosen.mean,
            "from_step": float(window.start),
            **{f"{label.replace(' ', '_')}_change": effect.mean for label, effect in shown.items()},
        },
        f"chosen ends at least {MIN_EFFECT} nats per token below its start, or below a peak strictly inside the run "
        f"by as much and by {PEAK_STANDARD_ERRORS:g} standard errors. Benign if over the same steps neither "
        "bystanders (third parties except shuffled words and paraphrases of rejected), nor paraphrases of chosen, nor "
        f"one type of these fall by {MIN_EFFECT}, and there is neither squeezing nor degeneration. Else harmful, an "
        f"alert from {ALERT_EFFECT} nats per token of chosen or bystanders; but without degeneration it cannot be "
        "told for SFT, which pushes nothing down, and where there is entropy_collapse in a run with probe_samples; "
        f"{COUNTS}.",
        best + remedy,
    )


def settled(summary: Summary, window: Changes) -> bool:
    """Whether entropy collapsed, along chosen or in the model's own answers: it has settled on few of them."""
    return window.entropy_collapsed or (summary.samples is not None and summary.samples.grew_sure)


def settled_unbroken(summary: Summary, window: Changes, broken: bool) -> bool:
    """Whether entropy collapsed while own answers, which were taken, do not degenerate: they may be good ones.

    Without own answers nobody knows, and a collapse is no reason to withdraw an alert.
    """
    asked = summary.samples is not None and len(summary.samples.steps) > 1
    return asked and not broken and settled(summary, window)


def _verdict(
    summary: Summary, window: Changes, others: dict[str, Effect], broken: bool, method: str
) -> tuple[str, str, str, str, str]:
    """Whether a fall of chosen harms, as (name, severity, title, why, remedy of the finding)."""
    who = "chosen and rejected both fell" if window.rejected.down() else "chosen fell"
    fell = [label for label, effect in others.items() if effect.down()]
    # A mean over paraphrases may hold because one kind gains what another loses.
    fell = fell or window.falling(paraphrases_of_chosen(window.types))
    squeezed = method != "sft" and summary.squeezed_since() is not None
    unclear = not broken if method == "sft" else settled_unbroken(summary, window, broken)
    if (fell or squeezed) and unclear:
        return _unclear(who, method)
    if fell or squeezed or broken:
        severe = -window.chosen.mean >= ALERT_EFFECT or -window.bystanders.mean >= ALERT_EFFECT
        severity, remedy = ALERT if severe else WARNING, REMEDIES.get(method, REMEDIES["track"])
        if fell:
            title = f"harmful displacement: {who} and took similar answers along"
            why = f"{' and '.join(fell)} fell, too, so what you prefer is losing, not only its wording"
        elif squeezed:
            title = f"harmful displacement: {who}, and likely tokens gained"
            why = "other fluent answers hold, but what was lost went to tokens that were likely already"
        else:
            title = f"harmful displacement: {who}, and own answers degenerate"
            why = "other fluent answers hold, but what the model itself says degenerates"
        return "displacement_harmful", severity, title, f"{_capital(who)}, and that mostly does harm: {why}.", remedy
    if not others:
        return (
            "displacement",
            WARNING,
            f"{who}: benign or harmful cannot be told",
            "The probe set has no other fluent answers, so the records cannot tell whether this is harmful.",
            "Add paraphrases and unrelated answers to the probe set to tell the two apart.",
        )
    asked = ": DPO's loss asks for a margin only" if method == "dpo" else ""
    return (
        "displacement_benign",
        INFO,
        f"benign displacement: {who}, other answers hold",
        f"{_capital(who)}, and by itself that is no fault{asked}. On average {' and '.join(others)} hold, so what is "
        "lost is this wording.",
        "Nothing urgent; look at samples. Add an SFT term on chosen if its exact wording matters.",
    )


def _unclear(who: str, method: str) -> tuple[str, str, str, str, str]:
    """The verdict where what is lost went to answers that the probe set does not have."""
    sure = "The model has become sure of what it says (entropy collapse), and that is not these answers"
    other = "SFT pushes nothing down by name, so training teaches other answers than these, or breaks the model"
    why = other if method == "sft" else sure
    return (
        "displacement",
        WARNING,
        f"{who} and took similar answers along: benign or harmful cannot be told",
        f"{why}: others may be as good or worse, which records cannot tell apart.",
        "Read what it answers now (probe_samples keeps it, and degeneration is then seen), or compare it with the "
        "model before (`trl-dynamics judge`). Have probes whose chosen is worded as in training, or, if it is, train "
        "less.",
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def bystander_loss(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """Chosen holds or rises, but other fluent answers fall hard."""
    moved = {name: changes.of_types([name]) for name in bystander_types(summary.types)}
    fallen = {name: effect for name, effect in moved.items() if effect.down(MIN_BYSTANDER_FALL)}
    holds = changes.chosen.num_probes >= MIN_PROBES and changes.chosen.mean > -MIN_EFFECT
    if not holds or not fallen:
        return None
    numbers = ", ".join(f"{name} {effect}" for name, effect in fallen.items())
    return Finding(
        "bystander_loss",
        INFO,
        "chosen holds, but other fluent answers lose",
        f"Chosen moved {changes.chosen} nats per token, while others that nothing pushes down by name fell: "
        f"{numbers}. What holds chosen up protects chosen and what is like it, not everything else.",
        {"chosen_change": changes.chosen.mean, **{f"{name}_change": effect.mean for name, effect in fallen.items()}},
        f"chosen does not fall by {MIN_EFFECT} nats per token, and a type of bystanders (third parties except "
        f"shuffled words and paraphrases of rejected) falls by at least {MIN_BYSTANDER_FALL}; {COUNTS}.",
        "Nothing urgent where only prompts like those of training count. If the model must go on writing such text, "
        "mix some of it into training, stop earlier or lower the learning rate, and test it on such prompts.",
    )


def margin_by_rejection(summary: Summary, changes: Changes, method: str) -> Finding | None:
    """The preference margin grows although chosen does not rise."""
    per_token, per_sequence = (
        changes.difference("chosen", "rejected"),
        changes.difference("chosen", "rejected", PER_SEQUENCE),
    )
    pushed = per_token.up() and per_sequence.up() and changes.rejected.down() and not changes.chosen.up()
    if method == "sft" or not pushed:
        return None
    return Finding(
        "margin_by_rejection",
        INFO,
        "the margin grows only by pushing rejected down",
        f"The margin moved {per_sequence} nats per sequence, with rejected {changes.rejected} and chosen "
        f"{changes.chosen} nats per token: reward accuracy improves while nothing preferred became likelier.",
        {
            "margin_change": per_sequence.mean,
            "chosen_change": changes.chosen.mean,
            "rejected_change": changes.rejected.mean,
        },
        f"the margin rises, per token by at least {MIN_EFFECT} nats, rejected falls by at least {MIN_EFFECT} and "
        f"chosen does not rise by {MIN_EFFECT}; not for SFT; {COUNTS}.",
        "Do not select checkpoints by reward margin or accuracy alone; watch chosen and other fluent answers."
        + (' A term holds chosen up: dpop_lambda, or loss_type=["sigmoid", "sft"].' if method == "dpo" else ""),
    )


def _peak_step(summary: Summary) -> int:
    levels = summary.levels("chosen")
    return max(levels, key=levels.__getitem__, default=summary.steps[0])
