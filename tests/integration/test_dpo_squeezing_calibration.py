"""The calibration of the findings, on a handful of steps: trained once, answered once, and a page of all of it."""

import json
import sys
from pathlib import Path

import pytest
from datasets import load_from_disk

RECIPE = Path(__file__).parents[2] / "recipes" / "dpo_squeezing"
SMALL = ["--num_pairs", "16", "--num_probes", "4", "--max_steps", "5", "--workers", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the driver on development runs of the study's; returns its folder."""
    sys.path.insert(0, str(RECIPE))
    import calibration
    import study

    root = tmp_path_factory.mktemp("calibration")
    study.main(["--output_dir", str(root / "study"), "--seeds", "0", "--arms", "dpo", *SMALL])

    def start(*more: str) -> Path:
        seeds = ["--development_seeds", "0", "1", "--seeds", "5", "--num_prompts", "6"]
        seeds += ["--arms", "dpo_4e-4", "sft_templated", "sft_own_answers"]
        places = ["--development", str(root / "study"), "--output_dir", str(root / "out")]
        calibration.main([*places, *seeds, *SMALL, *more])
        return root / "out"

    yield start
    sys.path.remove(str(RECIPE))


def times_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.json")) if "answers" in path.parts}


def test_runs_are_trained_answered_and_scored_once(run):
    folder = run()
    page = (folder / "calibration.md").read_text()
    # Development has no model that its sft_own_answers could start from.
    assert "development 3 runs of seeds 0, test 5 runs of seeds 5" in page
    assert "| squeezing | squeezes | test |" in page and "| dpo_4e-4 | 1 |" in page
    assert "Thresholds on development" in page and "## Test, arm by arm" in page
    answers = {
        path.stem: json.loads(path.read_text())["rows"] for path in (folder / "answers" / "test").rglob("*.json")
    }
    assert set(answers) == {"base", "sft", "dpo_4e-4", "sft_templated", "sft_low_rate", "sft_own_answers"}
    assert {len(rows) for rows in answers.values()} == {6 + 6 + 2 * 6}
    own, pairs = (load_from_disk(str(folder / "seed5" / data))["train"] for data in ("own_answers", "pairs"))
    said = {prompt: text for kind, prompt, text in answers["sft_low_rate"] if kind == "training"}
    for row, pair in zip(own, pairs, strict=True):
        assert row["prompt"] == pair["prompt"] and row["rejected"] == pair["rejected"]
        prompt, chosen = row["prompt"][0]["content"], row["chosen"][0]["content"]
        assert said.get(prompt, chosen).strip() == chosen, "what the model it starts from says to that"
    prompts = [[(kind, prompt) for kind, prompt, _ in rows] for rows in answers.values()]
    assert prompts[0] == prompts[1] == prompts[2]

    before = times_of(folder)
    assert (folder / "calibration.md").read_text() == (run() / "calibration.md").read_text()
    assert times_of(folder) == before, "nothing is answered again"
    weights = folder / "seed5" / "dpo_4e-4" / "model.safetensors"
    weights.write_bytes((folder / "seed5" / "sft" / "model.safetensors").read_bytes())
    run()
    changed = {Path(path).stem for path, time in times_of(folder).items() if before[path] != time}
    assert changed == {"dpo_4e-4"}, "other weights, other answers"


def test_runs_without_a_checker_are_scored_by_what_was_done(run):
    folder = run("--real", str(run().parent / "study"))
    page = (folder / "calibration.md").read_text()
    assert "| squeezing | squeezes | real model |" in page and "| harmed | real model |" not in page
