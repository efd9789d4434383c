"""Findings about DPO's own objective: what the trainer logged over the last quarter, by the kind of its loss."""

import dataclasses
import json
import math

import pytest

from synthetic_runs import records, write_run
from trl_dynamics.paths import rules
from trl_dynamics.paths.summary import summarise, summarise_store
from trl_dynamics.paths.training import Training
from trl_dynamics.store.store import DynamicsStore

CALM = summarise(records())
OTHER = {"loss_type": ["ipo"]}


def lines(values, key="loss", early=0.3, **more):
    """A log of 4 times as many lines, whose last quarter has these values."""
    whole = [early] * (3 * len(values)) + list(values)
    return [{"step": step, key: value, "rewards/margins": 0.1} | more for step, value in enumerate(whole, start=1)]


def found(log, config=None, method="dpo", summary=CALM):
    run = dataclasses.replace(summary, training=Training(log, config or {}))
    return {one.name: one for one in rules.find(run, {"method": method})}


def test_a_loss_above_ln_2_is_told_and_one_below_is_not():
    told = found(lines([0.75, 0.74, 0.76, 0.75]))["loss_above_reference"]
    assert told.severity == "warning" and told.evidence == {"loss": pytest.approx(0.75), "lines": 4}
    assert found(lines([5.0, 3.0, 4.0, 6.0]))["loss_above_reference"].severity == "alert"
    for quiet in ([0.6] * 4, [math.log(2) + 1e-6] * 4, [0.2, 2.0, 0.1, 0.9], [0.5, 1.0, 0.5, 0.9]):
        assert not found(lines(quiet)), quiet
    noisy = found(lines([0.6, 1.4, 0.7, 1.2]))["loss_above_reference"]
    assert noisy.evidence["loss"] == pytest.approx(0.975), "well above, by 1.5 standard errors"
    assert not found(lines([0.2] * 4, early=9.0)), "only the last quarter counts"
    assert set(found(lines([5.0]))) == {"loss_above_reference"}, "of one line the noise is not known"
    assert not found([])


@pytest.mark.parametrize("method", ["sft", "grpo", "track"])
def test_only_dpo_is_judged_by_it(method):
    assert not found(lines([5.0] * 4), method=method)
    assert not found(lines([0.1] * 4, "rewards/accuracies"), OTHER, method)


@pytest.mark.parametrize(
    "config",
    [
        OTHER,
        {"loss_type": ["sigmoid", "sft"]},
        {"loss_weights": [0.5]},
        {"use_weighting": True},
        {"label_smoothing": 0.1},
        {"dpop_lambda": 50.0},
        {"dpo_shift": 0.0},
        {"cal_dpo": 1.0},
    ],
    ids=str,
)
def test_another_loss_is_judged_by_its_accuracy(config):
    assert not found(lines([5.0] * 4), config)
    told = found(lines([0.35, 0.4, 0.3, 0.35], "rewards/accuracies"), config)
    assert set(told) == {"accuracy_below_half"}
    assert told["accuracy_below_half"].evidence == {"reward_accuracy": pytest.approx(0.35), "ties": 0, "lines": 4}
    for quiet in ([0.5, 0.55, 0.6, 0.5], [0.3, 0.6, 0.2, 0.6]):
        assert not found(lines(quiet, "rewards/accuracies"), config)


@pytest.mark.parametrize("loss", ["sigmoid", ["sigmoid"], None])
def test_the_sigmoid_loss_is_not_judged_by_accuracy(loss):
    config = {} if loss is None else {"loss_type": loss, "loss_weights": [1.0]}
    assert not found(lines([0.1] * 4, "rewards/accuracies"), config)
    assert set(found(lines([0.9] * 4), config)) == {"loss_above_reference"}
    assert not found(lines([0.9] * 4, aux_loss=0.3), config), "a router's loss is on top"


def test_ties_count_half():
    """TRL counts them as misses: with a learning rate of 0 its accuracy is 0, and nothing was lost."""
    still = summarise(records(noise=0.0))
    assert not found(lines([0.0] * 4, "rewards/accuracies"), OTHER, summary=still)
    half = records(noise=0.0)
    moved = (half["probe_id"] < "p012") & (half["response_type"] == "rejected") & (half["step"] > 0)
    half.loc[moved, "logp_sum"] += 1.0
    assert not found(lines([0.3] * 4, "rewards/accuracies"), OTHER, summary=summarise(half))
    told = found(lines([0.1] * 4, "rewards/accuracies"), OTHER, summary=summarise(half))["accuracy_below_half"]
    assert told.evidence["ties"] == 0.5 and told.evidence["reward_accuracy"] == pytest.approx(0.35)


def test_few_lines_of_few_pairs_are_a_coin():
    """Three steps with batches of 4, of which 5 pairs of 12 are right: as likely as not, where nothing was learnt."""
    small = OTHER | {"per_device_train_batch_size": 4}
    few = lines([0.5, 0.25, 0.5], "rewards/accuracies", 0.5)
    assert not found(few, small)
    assert found(few, small | {"gradient_accumulation_steps": 16})["accuracy_below_half"].evidence["lines"] == 3
    assert found([line | {"step": 100 * line["step"]} for line in few], small), "so many steps in a line"
    assert found(lines([0.125], "rewards/accuracies"), OTHER), "one of eight, of one line"
    assert not found(lines([0.25], "rewards/accuracies"), OTHER)


def test_lines_whose_rewards_are_nan_do_not_count():
    """The trainer logs a NaN loss as 0, and compares NaN rewards to an accuracy of 0."""
    log = lines([5.0] * 4)
    lost = [line | {"loss": 0.0, "rewards/margins": math.nan} for line in log[-3:]]
    assert found(log[:-3] + lost)["loss_above_reference"].evidence == {"loss": 5.0, "lines": 1}
    assert "loss_above_reference" in found([line | {"loss": None} for line in log[-1:]] + log)
    assert not found([line | {"rewards/margins": None} for line in log])
    assert not found([line | {"rewards/margins": math.nan} for line in lines([0.0] * 4, "rewards/accuracies")], OTHER)


def test_good_news_does_not_stand_beside_it():
    better = summarise(records({"chosen": 0.4}))
    assert set(found([], summary=better)) == {"improvement"}
    assert set(found(lines([0.9] * 4), summary=better)) == {"loss_above_reference"}


def test_log_and_options_of_a_store_are_read_and_damage_is_one_line(tmp_path):
    store = DynamicsStore(write_run(tmp_path / "run", records()))
    store.write_trainer_log([*lines([2.0] * 4), {"step": 16, "train_loss": 0.1, "train_runtime": 1.0}])
    summary = summarise_store(store)["policy"]
    assert summary.training.config["beta"] == 0.1
    assert {one.name for one in rules.find(summary, store.read_meta())} == {"loss_above_reference"}
    (store.root / "trainer_log.json").write_text(json.dumps([{"loss": 1}])[:-4])
    with pytest.raises(ValueError, match="is damaged"):
        summarise_store(store)
