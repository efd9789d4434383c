"""No two findings of a run contradict each other, nor their own numbers: many random runs."""

import dataclasses
import itertools

import numpy as np
import pytest

from synthetic_answers import answers
from synthetic_runs import ALL_TYPES, records
from trl_dynamics.findings.finding import SEVERITIES
from trl_dynamics.paths import rules
from trl_dynamics.paths.samples import Samples
from trl_dynamics.paths.summary import summarise
from trl_dynamics.paths.training import Training

NUM_RUNS = 160
STEPS = (0, 40, 160, 320)
GROUPS = (["other_train", "other_test", "human_unrelated"], ["chosen_rephrase_semantic", "chosen_self_rephrase"])
CLAIMS = {
    # What a title or text says, and what must hold of the change since the start wherever it is said.
    "and chosen did not": lambda c: c.chosen.mean > -0.05,
    "still above its start": lambda c: c.chosen.mean > 0,
    "no longer above its start": lambda c: c.chosen.mean <= 0,
    "chosen fell, ": lambda c: c.chosen.mean < 0,
    "chosen and rejected both fell": lambda c: c.chosen.mean < 0 and c.rejected.mean < 0,
    "chosen rose": lambda c: c.chosen.mean > 0,
    "chosen gained less than 0.05": lambda c: 0 < c.chosen.mean < 0.05,
    "; chosen fell": lambda c: c.chosen.mean < 0,
    "chosen did not clearly move": lambda c: abs(c.chosen.mean) < 3 * c.chosen.se,
    "because rejected fell": lambda c: c.rejected.mean < -0.04,
}
FALLEN = {"displacement", "displacement_harmful", "displacement_benign"}
# What must not be told beside a finding.
DENIES = {
    "improvement": FALLEN
    | {"fall_from_peak", "squeezing", "bystander_loss", "margin_by_rejection", "degeneration", "entropy_collapse"}
    | {"loss_above_reference", "accuracy_below_half", "not_finite"},
    "bystander_loss": FALLEN,
    "fall_from_peak": FALLEN,
    "displacement_benign": {"squeezing", "displacement", "displacement_harmful"},
    "displacement": {"displacement_harmful"},
}
REASSURING = ("Carry on", "Nothing urgent", "as it should be", "may not matter")


def draw(rng):
    """A run whose types move by a handful of amounts, straight or over a peak, with or without answers and a log."""
    amounts = (-0.9, -0.3, -0.07, -0.041, 0.0, 0.041, 0.07, 0.3)
    ends = {name: rng.choice(amounts) for name in ALL_TYPES}
    for group in (
        ["other_train", "other_test", "human_unrelated"],
        ["chosen_rephrase_semantic", "chosen_self_rephrase"],
    ):
        if rng.random() < 0.6:
            ends |= dict.fromkeys(group, rng.choice(amounts))
    peaks = {name: rng.choice((0.0, 0.0, 2.0)) for name in ALL_TYPES}
    types = [name for name in ALL_TYPES if name == "chosen" or rng.random() < 0.8]
    frame = records(
        lambda name, t: ends[name] * t + peaks[name] * t * (1 - t),
        argmax=rng.choice((0.0, 0.03, 0.5)),
        entropy=rng.choice((0.0, -1.2)),
        eos=rng.choice((0.0, -0.8)),
        types=types,
        steps=STEPS,
        num_probes=int(rng.choice((3, 5, 8))),
        noise=rng.choice((0.005, 0.02, 0.3)),
        seed=int(rng.integers(1 << 30)),
    )
    if rng.random() < 0.15:
        frame.loc[(frame["step"] >= 40) & (frame["probe_id"] < rng.choice(("p001", "p999"))), "logp_mean"] = np.nan
    summary = summarise(frame)
    if rng.random() < 0.6:
        rows = answers(rng.choice((0.0, 0.0, 0.4, 0.9)), steps=STEPS, num_probes=6, end=int(rng.choice((24, 6))))
        if rng.random() < 0.2:
            rows["repeat_share"] = 0.99
        summary = dataclasses.replace(summary, samples=Samples(rows))
    known = {"rewards/accuracies": 0.3, "rewards/margins": 0.1}
    log = [{"step": 10 * number, "loss": rng.choice((0.3, 0.9, 3.0))} | known for number in range(1, 5)]
    config = {} if rng.random() < 0.5 else {"loss_type": ["ipo"]}
    training = Training(log if rng.random() < 0.3 else [], config)
    return dataclasses.replace(summary, training=training), str(rng.choice(("dpo", "sft", "track", "grpo")))


@pytest.fixture(scope="module")
def runs():
    rng = np.random.default_rng(0)
    drawn = [draw(rng) for _ in range(NUM_RUNS)]
    return [(summary, rules.find(summary, {"method": method})) for summary, method in drawn]


def test_every_rule_and_every_claim_is_met(runs):
    """Else the tests below could not fail."""
    told = {finding.name for _, found in runs for finding in found}
    assert told >= {*rules.RULES, *FALLEN}
    texts = " ".join(f"{finding.title} {finding.text}" for _, found in runs for finding in found)
    assert not [claim for claim in CLAIMS if claim not in texts]


def test_words_hold_of_the_numbers(runs):
    for summary, found in runs:
        changes = summary.changes()
        for finding, (claim, holds) in itertools.product(found, CLAIMS.items()):
            if claim in f"{finding.title} {finding.text}":
                assert holds(changes), (finding.title, str(changes.chosen), str(changes.rejected))


def test_no_finding_denies_another(runs):
    for _, found in runs:
        names = {finding.name for finding in found}
        assert len(names) == len(found)
        for name, denied in DENIES.items():
            assert name not in names or not names & denied, names
        assert "degeneration" not in names or not [f for f in found if "Answers may be fine" in f.text]
        severities = {finding.severity for finding in found}
        if "alert" in severities:
            assert not [f for f in found for word in REASSURING if word in f.title + f.text + f.remedy]


def test_no_alert_says_that_chosen_fell_while_it_is_above_its_start(runs):
    for summary, found in runs:
        rose = summary.changes().chosen.mean > 0
        alerts = {finding.name for finding in found if finding.severity == "alert"}
        assert not rose or not alerts & (FALLEN | {"fall_from_peak"})


def test_no_number_is_missing_in_a_sentence(runs):
    for _, found in runs:
        for finding in found:
            assert " nan" not in f"{finding.title} {finding.text}" and "+nan" not in finding.text, finding.text


def test_findings_are_most_severe_first_and_the_finite_part_is_named(runs):
    for summary, found in runs:
        order = [SEVERITIES.index(finding.severity) for finding in found]
        assert order == sorted(order)
        if any(part.not_finite[0] for part in summary.parts):
            assert found and found[0].severity == "alert" and "not_finite" in {one.name for one in found}
