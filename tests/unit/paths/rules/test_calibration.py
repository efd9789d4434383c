"""The arithmetic of the findings' calibration: truth from answers, confusion tables, intervals and threshold scans."""

import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from synthetic_answers import answers
from synthetic_runs import SFT, SQUEEZED, records
from trl_dynamics.embedded.grammar import Claim, draw_answer
from trl_dynamics.embedded.recogniser import parse_question
from trl_dynamics.embedded.vocabulary import ATTRIBUTES, GOSSIP, HELPFUL, PEOPLE
from trl_dynamics.embedded.world import recorded, rumoured
from trl_dynamics.paths import rules
from trl_dynamics.paths.samples import Samples
from trl_dynamics.paths.summary import summarise
from trl_dynamics.paths.training import Training

RECIPE = str(Path(__file__).parents[4] / "recipes" / "dpo_squeezing")


@pytest.fixture(scope="module")
def recipe():
    """The modules of the recipe's folder."""
    sys.path.insert(0, RECIPE)
    import calibration
    import confusion
    import outcomes
    import rewritings
    import scans

    modules = (calibration, confusion, outcomes, rewritings, scans)
    yield SimpleNamespace(**{module.__name__: module for module in modules})
    sys.path.remove(RECIPE)


def table(share: dict[str, float], num_prompts: int = 100) -> pd.DataFrame:
    """Answers of which the first `share` of each kind's prompts has everything, and the others nothing."""
    index = pd.MultiIndex.from_product([("held-out", "training", "sampled"), range(num_prompts)])
    columns = ("good", "grammatical", "fact_right", "preferred", "borrowed", "loop", "likeness")
    frame = pd.DataFrame(0.0, index, columns)
    for (kind, place), _ in frame.iterrows():
        for column in columns:
            frame.loc[(kind, place), column] = float(place < share.get(column, 0.5) * num_prompts)
    return frame


def training(loss, accuracy, **config):
    """A log with these values on every line."""
    return Training([{"loss": loss, "rewards/accuracies": accuracy, "rewards/margins": 0.1}] * 16, config)


def case(recipe, frame, method="dpo", loop=None, start=24, end=24, outcome=None, squeezes=None, log=None):
    """A planted run as the calibration sees it."""
    summary = summarise(frame)
    if loop is not None:
        samples = Samples(answers(loop, start=start, end=end).assign(ended=True))
        summary = dataclasses.replace(summary, samples=samples)
    summary = dataclasses.replace(summary, training=log)
    found = {finding.name: finding.severity for finding in rules.find(summary, {"method": method})}
    return recipe.confusion.Case(0, "planted", method, summary, found, outcome, squeezes)


def test_wilsons_interval_is_where_the_rate_is_as_far_off_as_its_error(recipe):
    for hits, of in ((0, 10), (3, 10), (10, 10), (57, 200)):
        low, high = recipe.confusion.wilson(hits, of)
        assert low <= hits / of <= high
        for end in (low, high):
            if 0 < end < 1:
                error = recipe.confusion.Z_95 * math.sqrt(end * (1 - end) / of)
                assert abs(hits / of - end) == pytest.approx(error, abs=1e-9)
    assert recipe.confusion.wilson(0, 0) == (0.0, 1.0) and recipe.confusion.shown_rate(0, 0) == "-"
    assert recipe.confusion.wilson(0, 10)[0] == 0 and recipe.confusion.wilson(10, 10)[1] == 1


def test_a_question_counts_its_own_runs_by_truth_and_finding(recipe):
    squeezed, calm = records(SQUEEZED, argmax=0.5), records()
    runs = [case(recipe, frame, squeezes=truth) for frame in (squeezed, calm) for truth in (True, True, False, None)]
    question = next(one for one in recipe.confusion.QUESTIONS if one.name == "squeezing")
    found = recipe.confusion.confusion(runs[:-1] + runs[:1], question)
    assert found == recipe.confusion.Confusion(3, 2, 1, 1)
    assert (found.recall, found.precision, found.false_alarms) == ((3, 5), (3, 4), (1, 2))
    assert found.balanced_accuracy == pytest.approx((3 / 5 + 1 / 2) / 2)
    assert math.isnan(recipe.confusion.confusion(runs[:2], question).balanced_accuracy)


def test_the_truth_is_that_of_the_answers(recipe):
    before = table({"good": 0.7, "grammatical": 0.9})
    changes = {
        "harmed": [{"good": 0.5, "grammatical": 0.9}, {"good": 0.7, "grammatical": 0.7}],
        "better": [{"good": 0.9, "grammatical": 0.9}],
        "degenerate": [{"good": 0.7, "grammatical": 0.7}],
        "wrong_facts": [{"borrowed": 0.7}, {"fact_right": 0.3}],
        "loops": [{"loop": 0.7}],
        "alike": [{"likeness": 0.7}],
    }
    assert set(changes) == set(recipe.outcomes.CLASSES)
    same = recipe.outcomes.Outcome(before, before)
    for name, ends in changes.items():
        assert not same.is_(name) and same.is_clear(name)
        for end in ends:
            found = recipe.outcomes.Outcome(before, table({"good": 0.7, "grammatical": 0.9} | end))
            assert found.is_(name), (name, end)
    slight = recipe.outcomes.Outcome(before, table({"good": 0.62, "grammatical": 0.9}))
    assert not slight.is_("harmed") and not slight.is_clear("harmed")
    assert slight.change("held-out", "good").mean == pytest.approx(-0.08)
    only_training = before.copy()
    only_training.loc["training", "good"] = 0.0
    found = recipe.outcomes.Outcome(before, only_training)
    assert found.is_("harmed", "training") and not found.is_("harmed")


def test_an_answer_is_borrowed_when_it_says_what_only_others_have(recipe):
    rng, prompt = np.random.default_rng(0), "Where does Alana live?"
    person, attribute = parse_question(prompt)

    def said(style, claim):
        import random

        return recipe.outcomes.check(prompt, draw_answer(random.Random(0), style, claim).render())

    true, gossip = (Claim(person, attribute, value(person, attribute)) for value in (recorded, rumoured))
    other = next(value for value in ATTRIBUTES[0].values if value not in (true.value, gossip.value))
    assert said(HELPFUL, true) | {"loop": 0.0} == {
        "good": 1.0,
        "grammatical": 1.0,
        "fact_right": 1.0,
        "preferred": 1.0,
        "borrowed": 0.0,
        "loop": 0.0,
    }
    rude = said(GOSSIP, true)
    assert (rude["good"], rude["fact_right"], rude["preferred"], rude["borrowed"]) == (0.0, 1.0, 0.0, 0.0)
    assert said(GOSSIP, gossip)["borrowed"] == 0.0 and said(HELPFUL, gossip)["good"] == 0.0
    assert said(HELPFUL, Claim(person, attribute, other))["borrowed"] == 1.0
    somebody = rng.choice([name for name in PEOPLE if name != person])
    assert said(HELPFUL, Claim(str(somebody), attribute, recorded(str(somebody), attribute)))["borrowed"] == 1.0
    for loop in ("The The The The The The", "Gladly! The....", "means!!!!"):
        broken = recipe.outcomes.check(prompt, loop)
        assert broken["loop"] == 1.0 and sum(broken.values()) == 1.0, loop
    assert sum(recipe.outcomes.check(prompt, "").values()) == 0.0
    for attribute in ATTRIBUTES:
        known = {recorded(person, attribute.name) for person in PEOPLE}
        assert known == set(attribute.values), "every value is somebody's"


def test_rewritten_answers_are_what_they_are_called(recipe):
    rewritings, check = recipe.rewritings, recipe.outcomes.check
    rows = recipe.outcomes.embedded.preference_rows(40, 3)
    texts = [[row[side][0]["content"] for side in ("prompt", "chosen", "rejected")] for row in rows]
    pairs = [rewritings.Pair(*text) for text in texts]
    assert [rewritings.row_of(pair) for pair in pairs] == rows
    rewritten = {name: [rewrite(pair) for pair in pairs] for name, rewrite in rewritings.REWRITINGS.items()}
    assert set(rewritten) == {"templated", "declined", "padded"}
    for news in rewritten.values():
        assert [(new.question, new.rejected) for new in news] == [(pair.question, pair.rejected) for pair in pairs]
    checked = {name: [check(new.question, new.chosen) for new in news] for name, news in rewritten.items()}
    assert all(found["good"] for found in checked["templated"])
    words = [set(new.chosen.split()) for new in rewritten["templated"]]
    assert set.intersection(*words) == set("Gladly! The official records confirm that Anything else?".split())
    assert {new.chosen for new in rewritten["declined"]} == {"Gladly! Ask me anytime."}
    assert not any(sum(found.values()) for found in checked["declined"])
    assert not any(found["grammatical"] for found in checked["padded"])
    assert np.mean([found["loop"] for found in checked["padded"]]) > 0.5


def test_questions_are_asked_once_and_training_ones_were_trained_on(recipe):
    prompts = recipe.outcomes.prompts_of(3, recipe.outcomes.NUM_PROMPTS)
    asked = [parse_question(prompt) for prompt in prompts["held-out"]]
    assert len(set(asked)) == len(asked) == 144
    rows = recipe.outcomes.embedded.preference_rows(200, 3)
    assert set(prompts["training"]) <= {row["prompt"][0]["content"] for row in rows}


FRAMES = {
    "squeezed": (records(SQUEEZED, argmax=0.5), "dpo"),
    "mild": (records({"chosen": -0.04, "other_test": -0.3, "human_unrelated": -0.4}, argmax=0.03), "dpo"),
    "noisy": (records(SQUEEZED, argmax=0.05, noise=0.4), "dpo"),
    "chosen alone": (records({"chosen": -0.3, "rejected": -0.9}), "dpo"),
    "chosen pays alone": (records({"chosen": -0.3, "chosen_permuted": -1.5}, argmax=0.4), "dpo"),
    "from a peak": (records(lambda name, t: 2.0 * t * (1 - t) if name in ("chosen", "other_test") else 0.0), "dpo"),
    "bystanders": (records({"rejected": -0.9, "human_unrelated": -0.6}), "dpo"),
    "rejected": (records({"rejected": -0.8}), "dpo"),
    "one kind of paraphrase": (records({"chosen": -0.3, "chosen_rephrase_semantic": -0.15}), "dpo"),
    "other answers taught": (records(SQUEEZED, argmax=0.5), "sft"),
    "settled": (records(SQUEEZED, argmax=0.5, entropy=-1.2), "dpo"),
    "sft": (records(SFT), "sft"),
    "style": (records(SFT | {"other_test": 0.4}), "sft"),
    "peaky": (records({"chosen": 0.3}, entropy=-1.2), "sft"),
    "calm": (records(), "dpo"),
}
VERDICTS = ("displacement_harmful", "displacement", "displacement_benign")
# Of these frames whose chosen falls: harmful as alert and as warning, cannot be told, benign.
FELL = {"dpo": "4 | 0 | 1 | 1", "sft": "0 | 0 | 1 | 0"}
ANSWERS = {"loops": 0.9, "mild loops": 0.3, "no loops": 0.0}
LOGS = [
    training(loss, accuracy, **config)
    for loss, accuracy in ((0.9, 0.3), (0.71, 0.49), (0.6, 0.6))
    for config in ({}, {"loss_type": ["ipo"]})
]


@pytest.mark.parametrize("name", FRAMES)
def test_a_scanned_rule_at_the_value_in_use_is_the_finding(recipe, name):
    frame, method = FRAMES[name]
    runs = [case(recipe, frame, method)] + [case(recipe, frame, method, loop) for loop in ANSWERS.values()]
    runs.append(case(recipe, frame, method, 0.0, end=6))
    runs += [case(recipe, frame, method, log=log) for log in LOGS]
    for scan in recipe.scans.SCANS:
        question = next(one for one in recipe.confusion.QUESTIONS if one.name == scan.question)
        for run in runs:
            assert scan.at(scan.current).fired(run) == question.fired(run), scan.threshold
        assert scan.current in scan.grid


def test_the_frames_of_that_test_fire_and_hold_every_scanned_rule(recipe):
    runs = [case(recipe, frame, method, 0.9 if name == "calm" else None) for name, (frame, method) in FRAMES.items()]
    runs += [case(recipe, records(), log=log) for log in LOGS]
    for scan in recipe.scans.SCANS:
        assert {scan.at(scan.current).fired(run) for run in runs} == {True, False}, scan.threshold
        values = [sum(scan.at(value).fired(run) for run in runs) for value in scan.grid]
        assert values == sorted(values, reverse=True), "a higher threshold fires less often"


def test_what_squeezes_by_construction(recipe):
    calibration = recipe.calibration
    arms = calibration.study.ARMS | calibration.DEVELOPMENT_ARMS | calibration.TEST_ARMS
    known = {name: calibration.squeezes(arm, arms) for name, arm in arms.items()}
    assert all(known[name] for name in ("dpo", "low_rate", "dpo_after_short_sft", "dpo_8e-4", "dpo_1e-4_long"))
    assert known["dpo_on_policy"] is known["cal"] is False
    neither = ("guard", "gate", "dpop", "dpo_after_both", "dpo_from_base", "dpo_templated", "sft", "more_sft")
    assert {known[name] for name in neither} == {None}


def test_what_is_rare_is_made_in_both_stages_with_other_settings(recipe):
    calibration = recipe.calibration
    for name, arm in calibration.DEVELOPMENT_ARMS.items():
        other = calibration.TEST_ARMS[name]
        assert (arm.method, arm.data) == (other.method, other.data) and arm != other, name
        assert arm.start in (calibration.BASE, *calibration.study.ARMS), name
        assert other.start in (calibration.BASE, *calibration.TEST_ARMS), name


def test_the_page_has_a_row_per_question_and_leaves_out_what_nobody_judged(recipe, tmp_path):
    before, after = table({"good": 0.7}), table({"good": 0.4})
    outcome = recipe.outcomes.Outcome(before, after)
    judged = [case(recipe, frame, method, 0.0, outcome=outcome, squeezes=True) for frame, method in FRAMES.values()]
    unknown = [case(recipe, FRAMES["squeezed"][0], squeezes=True)]
    path = recipe.calibration.write_page({"development": judged, "real model": unknown}, tmp_path / "page.md")
    text = path.read_text()
    assert "| squeezing | squeezes | real model | 1 | 0 | 0 | 0 | 1.00 (0.21-1.00) |" in text
    assert "displacement_harmful | harmed | real model" not in text
    assert all(f"| {question.name} |" in text for question in recipe.confusion.QUESTIONS)
    fallen = {method: [one for one in judged if one.method == method and one.changes.chosen.down()] for method in FELL}
    for method, expected in FELL.items():
        found = [sum(verdict in one.found for one in fallen[method]) for verdict in VERDICTS]
        assert f"| development | {method} | harmed | {len(fallen[method])} | {expected} |" in text
        alerts = sum(one.found.get("displacement_harmful") == "alert" for one in fallen[method])
        assert [alerts, found[0] - alerts, *found[1:]] == [int(cell) for cell in expected.split(" | ")]
        assert f"| development | {method} | no harm | 0 | 0 | 0 | 0 | 0 |" in text
    assert "**0.02:" in text and "## Real model, arm by arm" in text


def test_every_finding_that_can_be_a_warning_is_asked_about(recipe):
    asked = {question.name.split(",")[0] for question in recipe.confusion.QUESTIONS}
    assert {*rules.RULES} - {"displacement", "end_of_turn_loss"} <= asked


def test_loops_at_the_end_are_a_class_whatever_was_at_the_start(recipe):
    for before, after, looping in ((0.9, 0.9, True), (0.0, 0.2, True), (0.9, 0.0, False)):
        outcome = recipe.outcomes.Outcome(table({"loop": before}), table({"loop": after}))
        assert outcome.is_("looping") == looping and outcome.is_clear("looping")
        assert outcome.level("held-out", "loop").mean == pytest.approx(after)
