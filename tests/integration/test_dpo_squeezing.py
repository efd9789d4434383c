"""The study of the squeezing effect: its arms, its arithmetic, and a run of a few steps; its YAML files are read."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from datasets import load_from_disk

import trl_dynamics
from trl_dynamics.cli import dpo, sft
from trl_dynamics.findings.effects import Effect

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
YAMLS = [path for study in ("dpo_squeezing", "sft_probing") for path in sorted((RECIPES / study).glob("*.yaml"))]
ON_CPU = ["--use_cpu", "True", "--bf16", "False"]
COMMANDS = {"sft": sft, "dpo": dpo}


@pytest.fixture(scope="module")
def recipe():
    """The modules of the recipe's folder."""
    sys.path.insert(0, str(RECIPES / "dpo_squeezing"))
    import claims
    import measures
    import study
    import worlds

    yield SimpleNamespace(study=study, measures=measures, claims=claims, worlds=worlds)
    sys.path.remove(str(RECIPES / "dpo_squeezing"))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """Runs the driver on a handful of pairs; returns its folder."""
    folder = tmp_path_factory.mktemp("study")

    def start(*more: str) -> Path:
        small = ["--num_pairs", "16", "--num_probes", "4", "--max_steps", "5", "--workers", "1"]
        recipe.study.main(
            ["--output_dir", str(folder), "--seeds", "3", "--arms", "dpo", "dpo_on_policy", *small, *more]
        )
        return folder

    return start


def lines_of(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(path.glob("*.log"))}


def test_arms_are_trained_once_judged_and_summarised(run, capsys):
    folder = run()
    seed = folder / "seed3"
    frame = trl_dynamics.load_records(*(seed / name for name in ("sft", "dpo", "dpo_on_policy")))
    assert frame.groupby("run")["step"].max().eq(5).all() and frame["probe_id"].nunique() == 4
    drawn, pairs = (load_from_disk(str(seed / name))["train"] for name in ("on_policy", "pairs"))
    assert 0 < len(drawn) <= len(pairs) == 16
    assert not {str(row["rejected"]) for row in drawn} & {str(row["rejected"]) for row in pairs}
    assert all(row["rejected"] != row["chosen"] for row in drawn)
    text = (folder / "summary.md").read_text()
    assert "Seeds 3; at least 5 are needed before a verdict." in text
    assert "| sft |" in text and "## Difference to plain DPO at equal margin" in text and "does not hold" not in text
    assert all(name in (folder / "report.html").read_text() for name in ("dpo_on_policy", "sft"))

    before = lines_of(seed)
    run()
    assert lines_of(seed) == before
    (seed / "dpo" / "training_args.bin").unlink()  # as if it had been stopped before its model was saved
    run()
    changed = {name for name, text in lines_of(seed).items() if text != before[name]}
    assert changed == {"dpo.log"}


def test_a_folder_of_other_settings_is_refused(run):
    with pytest.raises(ValueError, match="choose another folder"):
        run("--guard_budget", "0.5")


def test_more_probes_than_pairs_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--num_probes", "17")
    assert "17 probes and 16 pairs: probes are the first training pairs" in capsys.readouterr().err


def test_the_real_world_needs_its_files_named(recipe, monkeypatch):
    monkeypatch.delenv("TRL_DYNAMICS_DATA", raising=False)
    with pytest.raises(ValueError, match="set TRL_DYNAMICS_DATA to the folder"):
        recipe.worlds.world_of("helpful_base")


def test_the_real_world_probes_what_it_trains_on(recipe, data_dir):
    world = recipe.worlds.world_of("helpful_base")
    train, held_out, probes = world.draw(3, 20, 8, 6)
    trained_on = [row["chosen"] for row in train]
    assert (len(train), len(held_out), len(probes)) == (20, 6, 8)
    assert [(probe.prompt, probe.responses["chosen"]) for probe in probes] == [
        (row["prompt"], row["chosen"]) for row in train[:8]
    ]
    assert [probe.responses["other_train"] for probe in probes] == trained_on[1:9]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert all(len(row[name]) <= 250 and row[name].strip() for row in train for name in ("chosen", "rejected"))
    assert world.draw(4, 20, 8, 6)[0] != train == world.draw(3, 20, 8, 6)[0]
    with pytest.raises(ValueError, match="300 pairs and 6 held-out ones wanted, and 249 and"):
        world.draw(3, 300, 8, 6)


def test_every_arm_is_a_valid_command_and_comes_after_what_it_starts_from(recipe, tmp_path):
    study = recipe.study
    args = study.argparse.Namespace(world="embedded", num_pairs=200, num_probes=32, guard_budget=1e-3, max_steps=None)
    for name, arm in study.ARMS.items():
        method, *words = study.words_of(name, tmp_path, 7, args)
        (_, config, model, _), launch = COMMANDS[method].command().parse(words)
        assert launch == [] and config.seed == 7 and config.probe_max_probes == 32
        assert model.model_name_or_path == ("embedded" if arm.start == study.BASE else str(tmp_path / arm.start))
        assert config.max_steps == arm.options.get("max_steps", 150 if method == "sft" else 100)
    assert study.with_starts(["dpo_after_both"]) == ["sft_both", "dpo_after_both"]
    assert study.with_starts(list(reversed(study.ARMS))) == list(study.ARMS)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_yaml_is_read_and_says_what_it_trains_on(path, tmp_path):
    method = "dpo" if path.name.startswith("dpo") else "sft"
    words = ["--config", str(path), "--output_dir", str(tmp_path), *ON_CPU]
    (script, config, model, data), launch = COMMANDS[method].command().parse(words)
    assert launch == [] and config.probe_every > 0
    if not path.stem.endswith("_cpu"):
        assert [(one.path, one.data_dir, one.split) for one in data.datasets] == [
            ("Anthropic/hh-rlhf", "helpful-base", "train[:5000]")
        ]
        assert model.use_peft == path.stem.endswith("_lora") and "not run here" in path.read_text().split("\n")[0]


def test_a_curve_is_read_where_another_first_reaches_a_level(recipe):
    measures = recipe.measures
    margin = pd.Series({0: 0.0, 10: 4.0, 20: 3.0, 30: 8.0})
    curve = pd.Series({0: 0.0, 5: -1.0, 10: -2.0, 30: -6.0})
    assert measures.value_at_level(curve, margin, 2.0) == pytest.approx(-1.0)  # at step 5
    assert measures.value_at_level(curve, margin, 4.0) == pytest.approx(-2.0)
    assert measures.value_at_level(curve, margin, 5.5) == pytest.approx(-5.0)  # at step 25
    assert np.isnan(measures.value_at_level(curve, margin, 8.1))
    assert np.isnan(measures.value_at_level(curve, pd.Series(dtype=float), 1.0))


def test_arms_of_unequal_length_are_compared_at_the_end_of_the_shorter_one(recipe):
    short, long = pd.Series({0: 0.0, 10: 1.0}), pd.Series({0: 0.0, 8: 0.4, 12: 0.8, 30: 9.0})
    assert recipe.measures.end_difference(short, long) == pytest.approx(1.0 - 0.6)
    assert recipe.measures.end_difference(long, short) == pytest.approx(0.6 - 1.0)
    assert np.isnan(recipe.measures.end_difference(short, pd.Series(dtype=float)))


def test_a_peak_is_picked_on_other_seeds_than_it_is_tested_on(recipe):
    ends = [(1.0, 0.4), (0.2, 0.9), (0.3, 0.1)]
    curves = [pd.Series({0: 0.0, 10: middle, 20: end}) for middle, end in ends]
    # The means of the others are 0.25 and 0.5, 0.65 and 0.25, 0.6 and 0.65 at steps 10 and 20.
    assert recipe.claims.falls_from_others_peak(curves) == pytest.approx([0.0, -0.7, 0.0])
    noise = np.random.default_rng(0).normal(size=(400, 5, 11))
    falls = [recipe.claims.falls_from_others_peak([*map(pd.Series, draw)]) for draw in noise]
    said = [recipe.measures.verdict(recipe.measures.over_seeds(fall), up=True) for fall in falls]
    assert said.count("holds") < 400 * 0.08  # 0.1 and more where the peak is that of the same seeds


def test_verdicts_know_their_direction_and_need_five_seeds(recipe):
    measures = recipe.measures
    rise = Effect(0.3, 0.05, 5)
    assert (measures.verdict(rise, up=True), measures.verdict(rise, up=False)) == ("holds", "the reverse holds")
    assert measures.verdict(Effect(0.3, 0.2, 5), up=True) == "undecided"
    assert measures.verdict(Effect(0.3, 0.05, 4), up=True).startswith("no verdict")
    assert measures.count_verdict([True] * 4 + [False]) == "holds, 4 of 5 seeds"
    assert measures.count_verdict([True] * 3 + [False] * 2).startswith("does not hold")
    assert recipe.claims.whole("x", [("a", "holds"), ("b", "undecided")])[1] == "**not established**"
    assert recipe.claims.whole("x", [("a", "holds"), ("b", "the reverse holds")])[1] == "**does not hold**"
    assert recipe.claims.whole("x", [("a", "holds")])[1] == "**holds**"


def planted(measures, margin_at_end: float, drained_per_margin: float):
    """A run whose margin grows evenly over 10 steps, and drained mass with it."""
    margin = pd.Series(np.linspace(0.0, margin_at_end, 11))
    run = measures.Run.__new__(measures.Run)
    run.curves = {"margin": margin, "drained mass": margin * drained_per_margin}
    return run


def test_arms_are_compared_seed_by_seed_at_the_margin_that_both_reach(recipe):
    measures = recipe.measures
    study = measures.Study({}, [])
    rates = (0.01, 0.02, 0.03, 0.02, 0.01)
    study.runs = {
        "slow": [planted(measures, 5.0, rate + 0.004 + seed * 1e-5) for seed, rate in enumerate(rates)],
        "fast": [planted(measures, 10.0, rate) for rate in rates],
    }
    at_end = study.difference("slow", "fast", "drained mass")
    at_margin = study.difference("slow", "fast", "drained mass", measures.EQUAL_MARGIN)
    assert at_margin.mean == pytest.approx(5 * (0.004 + 2e-5)) and at_margin.num_probes == 5
    assert at_end.mean < 0 < at_margin.mean
    assert measures.verdict(at_margin, up=False) == "the reverse holds"
