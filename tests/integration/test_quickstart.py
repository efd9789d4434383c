"""The quickstart, on a handful of pairs: four runs, one page, findings in words; and its recipes say the same."""

import logging
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from transformers.utils import logging as transformers_logging

import trl_dynamics
from trl_dynamics.cli.main import main
from trl_dynamics.cli.quickstart import DPO, SFT

ROOT = Path(__file__).parents[2]
SMALL = ["--num_pairs", "8", "--num_probes", "4"]


def test_four_runs_and_one_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainers = logging.getLogger("trl_dynamics.trainers")
    before = trainers.level, datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    assert main(["quickstart", "--output_dir", "out", *SMALL]) == 0
    after = trainers.level, datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    assert after == before
    printed = capsys.readouterr().out
    names = ["sft", "dpo", "sft_both", "dpo_after_sft_both"]
    frame = trl_dynamics.load_records(*(tmp_path / "out" / name for name in names))
    assert set(frame["run"]) == set(names) and frame.groupby("run")["probe_id"].nunique().eq(4).all()
    assert all(f"\n{name}: " in printed for name in names)
    assert str(tmp_path / "out" / "report.html") in printed and "\nProbing took " in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(name in page for name in names)


def test_without_the_report_extra_it_trains_and_says_how_to_get_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert main(["quickstart", "--output_dir", str(tmp_path), *SMALL]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert "pip install 'trl-dynamics[report]'" in printed[-1]
    # And before the minutes of training.
    assert "pip install 'trl-dynamics[report]'" in printed[0]
    assert len(trl_dynamics.load_records(tmp_path / "dpo"))


@pytest.mark.parametrize(("name", "settings"), [("sft", SFT), ("dpo", DPO)])
def test_the_recipe_is_what_the_quickstart_does(name, settings):
    recipe = yaml.safe_load((ROOT / f"recipes/quickstart/{name}.yaml").read_text())
    extra = {"dataset_num_rows": 200, "probe_max_probes": 40}
    assert recipe == settings | extra | ({"model_name_or_path": "embedded"} if name == "sft" else {})
