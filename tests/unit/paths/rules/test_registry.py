"""Findings fire on planted signatures with the right numbers, and stay silent on noise."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

from synthetic_answers import answers
from synthetic_runs import ALL_TYPES, SFT, SQUEEZED, STEPS, records
from trl_dynamics import DPOConfig, GRPOConfig, SFTConfig
from trl_dynamics.findings import effects
from trl_dynamics.findings.finding import SEVERITIES
from trl_dynamics.findings.verdicts import summary_text
from trl_dynamics.paths import changes, rules
from trl_dynamics.paths.comparison import compare
from trl_dynamics.paths.samples import Samples
from trl_dynamics.paths.summary import summarise

DPO, SFT_META = {"method": "dpo"}, {"method": "sft"}


def names(frame, meta=DPO):
    return {finding.name for finding in rules.find(frame, meta)}


def only(frame, name, meta=DPO):
    return next(finding for finding in rules.find(frame, meta) if finding.name == name)


def with_answers(frame, loop=0.0):
    """The records of a run that also kept greedy answers."""
    return dataclasses.replace(summarise(frame), samples=Samples(answers(loop)))


def test_squeezing_has_its_numbers_and_its_onset():
    found = only(records(SQUEEZED, argmax=0.5), "squeezing")
    assert found.severity == "alert"
    assert found.evidence["argmax_change"] == pytest.approx(0.5, abs=0.02)
    assert found.evidence["gap_change"] == pytest.approx(0.65, abs=0.02)
    assert found.evidence["other_fluent_answers_change"] == pytest.approx(-0.8, abs=0.02)
    # Bystanders lose 0.05 at 1/16 of the run, the gap gains it at 1/13, argmax 0.02 at 1/25: step 40 of 320 is first.
    assert found.evidence["since_step"] == 40
    assert (
        "drained_mass" not in only(records(SQUEEZED, argmax=0.5, types=("chosen", "other_test")), "squeezing").evidence
    )
    drained = only(records(SQUEEZED, argmax=0.5, drained=0.1), "squeezing").evidence["drained_mass"]
    assert drained == pytest.approx(0.1, abs=0.01)
    assert "moved +0.503 ± 0.004 nats per token" in found.text and "step 40" in found.text


@pytest.mark.parametrize(
    "drift, argmax",
    [
        (SQUEEZED, 0.0),
        ({"rejected": -1.0, "rejected_rephrase_semantic": -1.0, "chosen_permuted": -1.0}, 0.5),
        (SQUEEZED | {"chosen": 0.5}, 0.5),
        (SQUEEZED | {"chosen": 0.1}, 0.5),
    ],
    ids=["argmax holds", "bystanders and chosen hold", "chosen keeps up", "chosen gains, but less"],
)
def test_squeezing_needs_all_its_parts(drift, argmax):
    assert "squeezing" not in names(records(drift, argmax=argmax))


def test_where_chosen_is_sharp_a_small_gain_of_the_likeliest_token_is_enough():
    squeezed = {"chosen": -0.04, "other_test": -0.3, "human_unrelated": -0.4}
    assert "squeezing" in names(records(squeezed, argmax=0.03, num_probes=60))
    assert "squeezing" not in names(records(squeezed, argmax=0.01, num_probes=60))


def test_a_mild_squeeze_is_a_warning():
    mild = {name: -0.4 for name in ALL_TYPES} | {"chosen": -0.02}
    found = only(records(mild, argmax=0.1), "squeezing")
    assert found.severity == "warning" and "judge" in found.text and "Expect" not in found.text
    for worse in (records(mild | {"chosen": -0.08}, argmax=0.1), records(mild, argmax=0.3)):
        assert only(worse, "squeezing").severity == "alert"


def test_a_harmful_displacement_is_an_alert_by_what_chosen_or_bystanders_lose():
    for chosen, others, severity in ((-0.07, -0.07, "warning"), (-0.13, -0.07, "alert"), (-0.07, -0.13, "alert")):
        types = ["chosen", "rejected", "other_test", "human_unrelated"]
        frame = records({"chosen": chosen, "other_test": others, "human_unrelated": others}, types=types)
        assert only(frame, "displacement_harmful").severity == severity


def test_displacement_is_benign_while_other_answers_hold():
    frame = records({"chosen": -0.3, "rejected": -0.9, "chosen_permuted": -0.9, "other_test_permuted": -0.9})
    assert "displacement_benign" in names(frame) and "displacement_harmful" not in names(frame)
    assert "fell by themselves" not in only(frame, "displacement_benign").text
    one_falls = records({"chosen": -0.3, "human_unrelated": -0.1})
    assert "fell by themselves: human_unrelated." in only(one_falls, "displacement_benign").text


@pytest.mark.parametrize(
    "victims", [("chosen_rephrase_semantic", "chosen_self_rephrase"), ("other_test", "other_train")]
)
def test_displacement_is_harmful_when_others_fall_too(victims):
    frame = records({"chosen": -0.3, "rejected": -0.9} | dict.fromkeys(victims, -0.6))
    assert "displacement_harmful" in names(frame)


def test_a_mean_over_paraphrases_hides_no_fall_of_one_kind():
    frame = records({"chosen": -0.3, "chosen_rephrase_semantic": -0.2, "chosen_rephrase_format": 0.3})
    assert not summarise(frame).changes().of_types(changes.paraphrases_of_chosen(ALL_TYPES)).down()
    found = only(frame, "displacement_harmful")
    assert "chosen_rephrase_semantic fell, too" in found.text


def test_what_sft_takes_from_chosen_may_have_gone_to_answers_as_good():
    """SFT pushes nothing down: chosen falls where other answers are taught, and those may be right ones."""
    fallen = dict.fromkeys(("chosen", "rejected", "other_test", "chosen_rephrase_semantic"), -0.9)
    frame = records(fallen, argmax=0.6)
    assert names(frame, SFT_META) == {"displacement"}
    found = only(frame, "displacement", SFT_META)
    assert found.severity == "warning" and "cannot be told" in found.title and "teaches other answers" in found.text
    assert {"squeezing", "displacement_harmful"} <= names(frame)
    assert "displacement_benign" in names(records({"chosen": -0.3}), SFT_META)


@pytest.mark.parametrize("method", ["dpo", "track"])
def test_a_model_that_settles_on_few_answers_may_have_settled_on_good_ones(method):
    fallen = dict.fromkeys(("chosen", "other_test", "other_train", "chosen_rephrase_semantic"), -0.9)
    meta = {"method": method}
    settled = only(with_answers(records(fallen, entropy=-1.2)), "displacement", meta)
    assert "has become sure of what it says" in settled.text and "judge" in settled.remedy
    assert "displacement_harmful" in names(with_answers(records(fallen, entropy=-0.6)), meta)
    assert "displacement_harmful" in names(with_answers(records(fallen, entropy=-1.2), loop=0.9), meta)


def test_where_nobody_asked_the_model_a_collapse_withdraws_no_alert():
    """Without own answers degeneration is not seen, so that its absence says nothing."""
    collapsed = records(SQUEEZED | {"other_test": -0.9, "chosen_rephrase_semantic": -0.9}, argmax=0.5, entropy=-1.2)
    asked, unasked = (
        {finding.name: finding.severity for finding in rules.find(frame, DPO)}
        for frame in (with_answers(collapsed), collapsed)
    )
    assert unasked["squeezing"] == unasked["displacement_harmful"] == "alert"
    assert asked["squeezing"] == asked["displacement"] == "warning" and "displacement_harmful" not in asked


def test_both_falling_is_answered_directly():
    """The question of users: chosen and rejected both fall, is it broken?"""
    benign = only(records({"chosen": -0.3, "rejected": -0.9}), "displacement_benign")
    assert "chosen and rejected both fell" in benign.title and "no fault: DPO's loss asks for a margin" in benign.text
    assert "paraphrases of chosen hold" in benign.text
    harmful = only(records({"chosen": -0.3, "rejected": -0.9, "other_test": -1.5}), "displacement_harmful")
    assert "chosen and rejected both fell" in harmful.title
    assert "that mostly does harm: other fluent answers fell, too" in harmful.text
    assert harmful.evidence["rejected_change"] == pytest.approx(-0.9, abs=0.02)
    assert "rejected" not in only(records({"chosen": -0.3, "other_test": -1.5}), "displacement_harmful").title


def test_a_fall_that_feeds_likely_tokens_is_not_called_benign():
    """Only shuffled words fall with chosen, but likely tokens collect what they lose: that is squeezing."""
    frame = records({"chosen": -0.3, "chosen_permuted": -1.5, "other_test_permuted": -1.5}, argmax=0.4)
    assert {"squeezing", "displacement_harmful"} <= names(frame) and "displacement_benign" not in names(frame)
    assert "likely already" in only(frame, "displacement_harmful").text


def test_remedies_fit_the_method():
    frame = records(SQUEEZED, argmax=0.5)
    for name in ("squeezing", "displacement_harmful"):
        remedy = only(frame, name).remedy
        options = [remedy.index(option) for option in ("lower", "dpop_lambda", "gate_dpo", 'sft_on="both"')]
        assert options == sorted(options) and "squeeze_guard" not in remedy
        for method in ("grpo", "track", "unheard_of"):
            assert "dpop" not in only(frame, name, {"method": method}).remedy


def test_remedies_name_options_that_exist():
    types = {*ALL_TYPES, "other_train", "other_test"}
    configs = {"dpo": (DPOConfig, SFTConfig), "sft": (SFTConfig,), "grpo": (GRPOConfig,), "track": ()}
    frames = [records(SQUEEZED, argmax=0.5, entropy=-1.5, eos=-0.9), records(SFT), records({"rejected": -0.9})]
    named = set()
    for method, known in configs.items():
        fields = {field.name for config in known for field in dataclasses.fields(config)}
        remedies = " ".join(f.remedy for frame in frames for f in rules.find(frame, {"method": method}))
        options = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", remedies)) - types
        assert options <= fields | {"max_length"}
        named |= options
    assert {"gate_dpo", "dpop_lambda", "sft_on", "loss_type", "entropy_coef"} <= named


def test_displacement_from_a_peak_inside_the_run():
    frame = records(lambda name, t: 2.0 * t * (1 - t) + 0.2 * t if name == "chosen" else 0.0)
    found = only(frame, "fall_from_peak")
    assert found.severity == "info" and found.title.endswith("still above its start")
    assert found.evidence["from_step"] == 160
    assert found.evidence["chosen_change"] == pytest.approx(0.2 - 0.6, abs=0.02)
    assert found.evidence["chosen_change_since_start"] == pytest.approx(0.2, abs=0.02)
    assert names(frame) == {"fall_from_peak"}


def test_a_fall_from_a_peak_is_no_alert_whoever_falls_along():
    """Chosen and rejected rose since the start, both fell from their peak: that is a warning about checkpoints."""
    along = ("chosen", "rejected", "other_test", "human_unrelated", "chosen_rephrase_semantic")
    for rest, title in ((0.2, "still above its start"), (-0.02, "no longer above its start")):
        frame = records(lambda name, t, rest=rest: 2.0 * t * (1 - t) + rest * t if name in along else 0.0)
        found = only(frame, "fall_from_peak")
        assert found.severity == "warning" and found.title.endswith(title)
        assert not [one for one in rules.find(frame, DPO) if one.severity == "alert"]
    below = records(lambda name, t: 2.0 * t * (1 - t) - 0.2 * t if name in along else 0.0)
    assert "displacement_harmful" in names(below) and "fall_from_peak" not in names(below)


def test_displacement_without_other_answers_says_that_it_cannot_tell():
    found = only(records({"chosen": -0.3}, types=["chosen", "rejected"]), "displacement")
    assert "cannot tell" in found.text and found.severity == "warning"


def test_what_says_the_same_as_rejected_is_meant_to_fall():
    by_design = {"rejected": -0.9, "rejected_rephrase_semantic": -0.9, "rejected_rephrase_format": -0.9}
    assert names(records(by_design)) == {"margin_by_rejection"}
    assert "displacement_benign" in names(records(by_design | {"chosen": -0.3}))


def test_bystanders_that_fall_hard_while_chosen_holds_are_told_of():
    found = only(records({"rejected": -0.9, "human_unrelated": -0.6, "other_test": -0.1}), "bystander_loss")
    assert found.severity == "info" and "human_unrelated -0.59" in found.text and "other_test" not in found.text
    assert found.evidence["human_unrelated_change"] == pytest.approx(-0.6, abs=0.02)
    assert set(found.evidence) == {"chosen_change", "human_unrelated_change"}
    rises = names(records({"chosen": 0.4, "human_unrelated": -0.6}))
    assert "bystander_loss" in rises and "improvement" not in rises
    for drift in (
        {"chosen": -0.3, "human_unrelated": -0.6},
        {"human_unrelated": -0.2, "other_test": -0.2},
        {"rejected_rephrase_format": -0.6, "chosen_permuted": -0.6},
    ):
        assert "bystander_loss" not in names(records(drift)), drift
    assert "bystander_loss" not in names(records({"other_test": -0.6}, types=["rejected", "other_test"]))


def test_margin_by_rejection_only_counts_outside_sft():
    frame = records({"rejected": -0.8})
    assert names(frame) == {"margin_by_rejection"}
    assert only(frame, "margin_by_rejection").severity == "info"
    assert only(frame, "margin_by_rejection").evidence["rejected_change"] == pytest.approx(-0.8, abs=0.02)
    assert names(frame, SFT_META) == set()
    assert "margin_by_rejection" not in names(records({"rejected": -0.8, "chosen": 0.3}))


def test_unrelated_pull_up_is_compared_with_held_out_answers():
    found = only(records(SFT), "unrelated_pull_up", SFT_META)
    assert found.severity == "warning"
    assert found.evidence["other_train_minus_other_test"] == pytest.approx(0.35, abs=0.02)
    style = only(records(SFT | {"other_test": 0.4}), "unrelated_pull_up", SFT_META)
    assert style.severity == "info" and "style" in style.text
    alone = records(SFT, types=["chosen", "rejected", "other_train"])
    assert "other_test" in only(alone, "unrelated_pull_up", SFT_META).remedy
    assert "unrelated_pull_up" not in names(records(SFT), DPO)


def test_unrelated_pull_up_says_whether_it_goes_on():
    early = records(lambda name, t: {"chosen": t, "other_train": min(t, 0.125)}.get(name, 0.0) * 4)
    goes_on = records(lambda name, t: {"chosen": t, "other_train": t}.get(name, 0.0))
    found = [only(frame, "unrelated_pull_up", SFT_META) for frame in (early, goes_on)]
    assert ["keeps rising" in one.text for one in found] == [False, True]
    # The middle of the seven steps is step 40, an eighth of the run.
    assert found[1].evidence["other_train_change_late"] == pytest.approx(7 / 8, abs=0.02)


def test_entropy_collapse_and_end_of_turn_loss():
    assert names(records(entropy=-1.0)) == {"entropy_collapse"}
    assert names(records(entropy=-0.6)) == set()
    assert names(records(eos=-0.8)) == {"end_of_turn_loss"}


def test_improvement_is_good_news_only_without_side_effects():
    good = {"chosen": 0.4, "chosen_rephrase_semantic": 0.1}
    assert names(records(good, argmax=0.2)) == {"improvement"}
    assert only(records(good), "improvement").severity == "info"
    assert "improvement" not in names(records(good | {"other_test": -0.9, "human_unrelated": -0.9}))
    # SFT makes the model surer of what is likely already, and its answers better.
    assert "improvement" in names(records(good, argmax=0.9))
    by_design = {"rejected_rephrase_semantic": -0.9, "rejected_rephrase_format": -0.9, "chosen_permuted": -0.9}
    assert "improvement" in names(records(good | by_design))
    hidden = records(good | {"other_train": 0.9, "other_test": -0.2})
    assert summarise(hidden).changes().bystanders.up() and "improvement" not in names(hidden)


def test_the_most_severe_finding_comes_first():
    found = rules.find(records(SQUEEZED, argmax=0.5, entropy=-1.2), DPO)
    ranks = [SEVERITIES.index(finding.severity) for finding in found]
    assert ranks == sorted(ranks) and len(set(ranks)) > 1


@pytest.mark.parametrize("method", ["dpo", "sft", "track"])
@pytest.mark.parametrize("seed", range(6))
def test_noise_gives_no_finding(seed, method):
    assert rules.find(records(seed=seed, noise=0.1, num_probes=30), {"method": method}) == []


def test_strong_noise_rarely_gives_a_finding():
    """With noise far above the minimum effect only the standard errors protect: few false alarms, none severe."""
    types = ["chosen", "rejected", "chosen_rephrase_semantic", "other_train", "other_test"]
    runs = [rules.find(records(seed=s, noise=0.5, num_probes=12, types=types), DPO) for s in range(60)]
    assert sum(bool(run) for run in runs) <= 9
    assert not any(finding.severity == "alert" for run in runs for finding in run)


def test_few_probes_need_larger_effects():
    assert names(records(SQUEEZED, argmax=0.5, num_probes=3)) == set()
    noisy = effects.Effect(0.25, 0.1, 4)
    assert not noisy.up() and effects.Effect(0.25, 0.1, 100).up()
    assert effects.Effect(-0.25, 0.1, 100).down() and not effects.Effect(0.25, 0.1, 100).down()


def test_standard_error_is_that_of_the_mean_and_knows_clusters():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(40)
    single = effects.clustered_effect(pd.DataFrame({"a": values}))
    assert single.se == pytest.approx(values.std(ddof=1) / np.sqrt(40))
    twice = effects.clustered_effect(pd.DataFrame({"a": values, "b": values}))
    assert twice.se == pytest.approx(single.se) and twice.mean == pytest.approx(values.mean())
    holed = pd.DataFrame({"a": values, "b": np.where(np.arange(40) % 2, values, np.nan)})
    found = effects.clustered_effect(holed)
    assert found.mean == pytest.approx((values.mean() + values[1::2].mean()) / 2) and found.num_probes == 40


def test_standard_error_matches_the_spread_of_repeated_draws():
    """Over many draws with missing types, the reported error is the true one."""
    rng = np.random.default_rng(1)
    present = rng.random((50, 3)) < [1.0, 0.7, 0.4]
    drawn = []
    for _ in range(400):
        values = rng.standard_normal((50, 1)) + 0.5 * rng.standard_normal((50, 3))
        drawn.append(effects.clustered_effect(pd.DataFrame(np.where(present, values, np.nan))))
    spread = np.std([effect.mean for effect in drawn])
    assert np.mean([effect.se for effect in drawn]) == pytest.approx(spread, rel=0.1)


def test_row_order_does_not_matter():
    frame = records(SQUEEZED, argmax=0.5, missing=("other_test", "rejected"))
    shuffled = frame.sample(frac=1.0, random_state=1)
    assert [f.name for f in rules.find(frame, DPO)] == [f.name for f in rules.find(shuffled, DPO)]
    assert summary_text(rules.find(frame, DPO), "r", "") == summary_text(rules.find(shuffled, DPO), "r", "")


def test_custom_types_and_single_steps_are_quiet():
    assert names(records(types=["good", "bad"])) == set()
    assert names(records(SQUEEZED, steps=[5])) == set()


def test_summary_is_one_line_per_finding():
    found = rules.find(records(SQUEEZED, argmax=0.5), DPO)
    lines = summary_text(found, "my-run", "").splitlines()
    assert len(lines) == len(found) and lines[0].startswith("my-run: alert: squeezing")
    calm = summary_text([], "my-run", rules.calm_text(summarise(records())))
    assert calm == "my-run: no finding: what moved is too little to count, or is as it should be."


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"types": ["good", "bad"]}, "no chosen answer was scored at both ends"),
        ({"num_probes": 3}, "3 of the 4 probes with chosen answers"),
        ({"steps": [5]}, "one step was scored"),
    ],
)
def test_what_could_not_be_judged_is_not_called_as_it_should_be(options, said):
    assert said in rules.calm_text(summarise(records(**options)))


def test_comparison_is_paired_at_the_last_common_step():
    strong = records(SQUEEZED, argmax=0.5, noise=0.05)
    half = records({name: value / 2 for name, value in SQUEEZED.items()}, argmax=0.5, noise=0.05, seed=1)
    half = half[half["step"] <= 160]
    found = {f.name: f for f in compare({"base": strong, "mild": half})}
    others = found["compare_other_fluent_answers"]
    # At step 160, half of the run: -0.4 against -0.2.
    assert others.evidence["other_fluent_answers_difference"] == pytest.approx(0.2, abs=0.02)
    assert "mild" in others.title and "higher than in base" in others.title and "step 160" in others.text
    assert compare({"base": strong, "again": records(SQUEEZED, argmax=0.5, noise=0.05, seed=2)}) == []
    assert compare({"base": strong, "other": half[half["step"] == STEPS[0]]}) == []
