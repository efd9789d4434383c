"""Findings about who loses: chosen (displacement, fall from a peak), other answers, or rejected alone."""

from trl_dynamics.findings.effects import COUNTS, MIN_EFFECT, MIN_PROBES, Effect
from trl_dynamics.findings.finding import ALERT, INFO, WARNING, Finding
from trl_dynamics.findings.rules import Run, rule
from trl_dynamics.paths.changes import (
    ALERT_EFFECT,
    FLUENT,
    MIN_BYSTANDER_FALL,
    Changes,
    bystander_types,
    paraphrases_of_chosen,
)
from trl_dynamics.paths.metrics import PER_SEQUENCE
from trl_dynamics.paths.rules.degeneration import are_loops, got_worse
from trl_dynamics.paths.rules.finiteness import over_finite_probes
from trl_dynamics.paths.rules.remedies import remedy_of
from trl_dynamics.paths.summary import Summary

# A peak is the best of many steps: noise alone puts it about two standard errors above the rest.
PEAK_STANDARD_ERRORS = 4.0


@rule(displacement_harmful=(ALERT, WARNING), displacement=WARNING, displacement_benign=INFO)
@over_finite_probes
def displacement(summary: Summary, run: Run) -> Finding | None:
    """Chosen ends below its start; what other answers do over the same steps decides whether that harms."""
    changes, method = summary.changes(), run.method
    if not changes.chosen.down():
        return None
    others = _others(changes)
    name, severity, title, meaning, remedy = _verdict(summary, changes, others, method)
    peak = _peak_step(summary)
    best = f"Chosen was highest at step {peak}. " if severity != INFO and peak > changes.start else ""
    return Finding(
        name,
        severity,
        title,
        f"{meaning} From step {changes.start} to {changes.end} chosen moved {changes.chosen} nats per token from its "
        f"start{_moved_too(changes, others)}",
        {
            "chosen_change": changes.chosen.mean,
            "from_step": float(changes.start),
        }
        | _evidence(changes, others),
        f"chosen ends at least {MIN_EFFECT} nats per token below its start. Benign if over the same steps neither "
        f"{FLUENT}, nor paraphrases of chosen, nor one type of these fall by {MIN_EFFECT}, and there is neither "
        "squeezing nor greedy answers that degenerate. Else harmful, an alert from "
        f"{ALERT_EFFECT} nats per token of chosen or other fluent answers; but without degeneration it cannot be "
        "told for SFT, which pushes nothing down, and where there is entropy_collapse in a run with probe_samples; "
        f"{COUNTS}.",
        best + remedy,
    )


@rule(fall_from_peak=(WARNING, INFO))
@over_finite_probes
def fall_from_peak(summary: Summary, run: Run) -> Finding | None:
    """Chosen fell from a peak inside the run, and not below its start: a better checkpoint lies behind, no more.

    Never an alert: what training was to do is still there, and the best of many steps is a peak by chance, too.
    """
    changes, method = summary.changes(), run.method
    peak = _peak_step(summary)
    if changes.chosen.down() or peak in (changes.start, changes.end):
        return None
    window = summary.changes(start=peak)
    if not window.chosen.down(standard_errors=PEAK_STANDARD_ERRORS):
        return None
    others = _others(window)
    pays = _fell(window, others) or got_worse(summary, method)
    pays = pays or (method != "sft" and summary.squeezed_since() is not None)
    place = "still above its start" if changes.chosen.mean > 0 else "no longer above its start"
    return Finding(
        "fall_from_peak",
        WARNING if pays else INFO,
        f"chosen fell from its peak, and is {place}",
        f"Chosen was highest at step {peak}. Since then, to step {window.end}, it moved {window.chosen} nats per "
        f"token{_moved_too(window, others)} Against step {changes.start}, its start, it is at {changes.chosen}.",
        {
            "chosen_change": window.chosen.mean,
            "from_step": float(peak),
            "chosen_change_since_start": changes.chosen.mean,
        }
        | _evidence(window, others),
        f"chosen does not end {MIN_EFFECT} nats per token below its start, but as much, and {PEAK_STANDARD_ERRORS:g} "
        "standard errors, below its highest step, inside the run. A warning if over the same steps "
        f"{FLUENT}, or paraphrases of chosen, or one type of these fall by {MIN_EFFECT}, or there is squeezing, or "
        f"greedy answers got worse; else info; {COUNTS}.",
        f"Use the checkpoint near step {peak}, or train less.",
    )


def settled(summary: Summary, window: Changes) -> bool:
    """Whether entropy collapsed, along chosen or in the model's own answers: it has settled on few of them."""
    return window.entropy_collapsed or (summary.samples is not None and summary.samples.grew_sure)


def settled_unbroken(summary: Summary, window: Changes, broken: bool) -> bool:
    """Whether entropy collapsed while own answers, which were taken, do not degenerate: they may be good ones.

    Without own answers it is not known, and a collapse is no reason to withdraw an alert; nor is it where own answers
    are loops, whatever they were at the start.
    """
    asked = summary.samples is not None and len(summary.samples.steps) > 1
    return asked and not broken and not are_loops(summary.samples) and settled(summary, window)


def _others(window: Changes) -> dict[str, Effect]:
    """What else may lose with chosen, of enough probes to judge."""
    paraphrases = window.of_types(paraphrases_of_chosen(window.types))
    found = {"other fluent answers": window.bystanders, "paraphrases of chosen": paraphrases}
    return {label: effect for label, effect in found.items() if effect.num_probes >= MIN_PROBES}


def _fell(window: Changes, others: dict[str, Effect]) -> list[str]:
    """Those of `others` that fell, else kinds of paraphrases that did."""
    fell = [label for label, effect in others.items() if effect.down()]
    # A mean over paraphrases may hold because one kind gains what another loses.
    return fell or window.falling(paraphrases_of_chosen(window.types))


def _evidence(window: Changes, others: dict[str, Effect]) -> dict[str, float]:
    shown = {"rejected": window.rejected} | others if window.rejected.known else others
    return {f"{label.replace(' ', '_')}_change": effect.mean for label, effect in shown.items()}


def _moved_too(window: Changes, others: dict[str, Effect]) -> str:
    """How others moved over the same steps, as the end of a sentence, and which types fell by themselves."""
    shown = {"rejected": window.rejected} | others if window.rejected.known else others
    falling = window.falling(bystander_types(window.types))
    alone = f" Types that fell by themselves: {', '.join(falling)}." if falling else ""
    return "".join(f", {label} {effect}" for label, effect in shown.items()) + "." + alone


def _verdict(
    summary: Summary, window: Changes, others: dict[str, Effect], method: str
) -> tuple[str, str, str, str, str]:
    """Whether a fall of chosen harms, as (name, severity, title, why, remedy of the finding)."""
    who = "chosen and rejected both fell" if window.rejected.down() else "chosen fell"
    fell, broken = _fell(window, others), got_worse(summary, method)
    squeezed = method != "sft" and summary.squeezed_since() is not None
    unclear = not broken if method == "sft" else settled_unbroken(summary, window, broken)
    if (fell or squeezed) and unclear:
        return _unclear(who, fell, method)
    if fell or squeezed or broken:
        severe = -window.chosen.mean >= ALERT_EFFECT or -window.bystanders.mean >= ALERT_EFFECT
        severity, remedy = ALERT if severe else WARNING, remedy_of(method)
        held = "other fluent answers hold" if others else "there are no other fluent answers to look at"
        if fell:
            title = f"harmful displacement: {who} and took similar answers along"
            why = f"{' and '.join(fell)} fell, too, so what you prefer is losing, not only its wording"
        elif squeezed:
            title = f"harmful displacement: {who}, and likely tokens gained"
            why = f"{held}, but what was lost went to tokens that were likely already"
        else:
            title = f"harmful displacement: {who}, and own answers degenerate"
            why = f"{held}, but what the model itself says degenerates"
        return "displacement_harmful", severity, title, f"{_capital(who)}, and that mostly does harm: {why}.", remedy
    if not others:
        return (
            "displacement",
            WARNING,
            f"{who}: benign or harmful cannot be told",
            f"Fewer than {MIN_PROBES} probes have other fluent answers, so the records cannot tell whether this is "
            "harmful.",
            "Add paraphrases and unrelated answers to the probe set to tell the two apart.",
        )
    asked = ": DPO's loss asks for a margin only" if method == "dpo" else ""
    return (
        "displacement_benign",
        INFO,
        f"benign displacement: {who}, other fluent answers hold on average",
        f"{_capital(who)}, and by itself that is no fault{asked}. On average {' and '.join(others)} hold, so what is "
        "lost is this wording.",
        "This alone asks for nothing; look at samples. Add an SFT term on chosen if its exact wording matters.",
    )


def _unclear(who: str, fell: list[str], method: str) -> tuple[str, str, str, str, str]:
    """The verdict where what is lost went to answers that the probe set does not have."""
    sure = "The model has become sure of what it says (entropy collapse), and that is not these answers"
    other = "SFT pushes nothing down by name, so training teaches other answers than these, or breaks the model"
    why, too = other if method == "sft" else sure, " and took similar answers along" if fell else ""
    return (
        "displacement",
        WARNING,
        f"{who}{too}: benign or harmful cannot be told",
        f"{why}: others may be as good or worse, which records cannot tell apart.",
        "Read what it answers now (probe_samples keeps it, and degeneration is then seen), or compare it with the "
        "model before (`trl-dynamics judge`). Have probes whose chosen is worded as in training, or, if it is, train "
        "less.",
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@rule(bystander_loss=INFO)
@over_finite_probes
def bystander_loss(summary: Summary, run: Run) -> Finding | None:
    """Other fluent answers fall hard since the start, and chosen does not."""
    changes = summary.changes()
    moved = {name: changes.of_types([name]) for name in bystander_types(summary.types)}
    fallen = {name: effect for name, effect in moved.items() if effect.down(MIN_BYSTANDER_FALL)}
    holds = changes.chosen.num_probes >= MIN_PROBES and changes.chosen.mean > -MIN_EFFECT
    if not holds or not fallen:
        return None
    numbers = ", ".join(f"{name} {effect}" for name, effect in fallen.items())
    return Finding(
        "bystander_loss",
        INFO,
        f"some other fluent answers fell hard since the start ({', '.join(fallen)}), and chosen did not",
        f"Chosen moved {changes.chosen} nats per token, while other fluent answers, which nothing pushes down by "
        f"name, fell: {numbers}. What keeps chosen from falling protects what is like it, not everything else.",
        {"chosen_change": changes.chosen.mean, **{f"{name}_change": effect.mean for name, effect in fallen.items()}},
        f"chosen does not fall by {MIN_EFFECT} nats per token, and a type of {FLUENT} falls by at least "
        f"{MIN_BYSTANDER_FALL}; {COUNTS}.",
        "Test the model on prompts that ask for such text. If it must go on writing it, mix some of it into training, "
        "stop earlier or lower the learning rate.",
    )


@rule(margin_by_rejection=INFO)
@over_finite_probes
def margin_by_rejection(summary: Summary, run: Run) -> Finding | None:
    """The preference margin grows although chosen does not rise."""
    changes, method = summary.changes(), run.method
    per_token, per_sequence = (
        changes.difference("chosen", "rejected"),
        changes.difference("chosen", "rejected", PER_SEQUENCE),
    )
    pushed = per_token.up() and per_sequence.up() and changes.rejected.down() and not changes.chosen.up()
    if method == "sft" or not pushed:
        return None
    clearly = changes.chosen.up(0.0) or changes.chosen.down(0.0)
    gained = f"gained less than {MIN_EFFECT} nats per token" if changes.chosen.mean > 0 else "fell"
    chosen = f"chosen {gained if clearly else 'did not clearly move'}"
    return Finding(
        "margin_by_rejection",
        INFO,
        f"the margin grew because rejected fell; {chosen}",
        f"The margin moved {per_sequence} nats per sequence, with rejected {changes.rejected} and chosen "
        f"{changes.chosen} nats per token: reward accuracy may improve although {chosen}.",
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
    """The step where chosen is highest above its start, paired by probe."""
    moved = summary.levels("chosen", since_start=True)
    return max(moved, key=moved.__getitem__, default=summary.steps[0])
